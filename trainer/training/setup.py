"""Everything before the first step: settings and pictures in, a `Session` out."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from trainer import config
from trainer.config import RunConfig
from trainer.data import latent_cache
from trainer.data.augment import without_trigger
from trainer.data.examples import Example, encode_texts, hold_out, make_examples, throttled
from trainer.data.scan import DatasetItem, override_repeats, scan_dataset
from trainer.errors import ConfigError
from trainer.families import LoadedBase, load_base
from trainer.families.base import PLAIN_READING, Batch, Conditioning, pixel_step
from trainer.families.objective import Noised, Objective
from trainer.inference import class_images
from trainer.inference.samples import sampler_name
from trainer.lora import inject, textual_inversion
from trainer.lora.formats.reader import AdapterFile, read_adapter
from trainer.lora.targets import check_names
from trainer.lora.textual_inversion import Embedding
from trainer.lora.warm_start import check_covered, settings_from, start
from trainer.models import quantization
from trainer.models.attention import choose_attention, use_attention
from trainer.models.cpu_conv import use_matrix_products
from trainer.models.device import DTYPES, choose_device, choose_precision
from trainer.models.model_files import DENOISERS, locate
from trainer.runs.atomic_files import check_room
from trainer.runs.events import EventLog, Progress, Warned
from trainer.training import estimate
from trainer.training.cuda_graphs import GraphedPredict
from trainer.training.distributed import World
from trainer.training.oom_fallbacks import Fallbacks, set_tiling
from trainer.training.optimizers import build_optimizer, try_optimizer, warmup_steps


@dataclass
class Session:
    """A training in memory."""

    run: RunConfig
    folder: Path
    log: EventLog
    device: torch.device
    precision: str
    attention: str
    base: LoadedBase
    objective: Objective
    components: dict[str, nn.Module]
    """The adapted parts of the base by their names in the pipeline: {"unet": ..., "text_encoder": ...}."""
    trigger: Embedding | None
    """The trigger word's vectors, where they are learned too."""
    groups: dict[str, dict[str, nn.Parameter]]
    """`parameter_groups`, looked up once: each step asks, and walking through a large denoiser takes many milliseconds."""
    optimizer: torch.optim.Optimizer
    average: EMAModel | None
    """Of the parameters, in their order."""
    examples: list[Example]
    held_out: list[Example]
    class_examples: list[Example]
    """Others of the subject's kind, one beside each picture; empty where there are none."""
    texts: dict[str, Conditioning] | None
    """Of every caption that may occur, without a batch; None where the text encoders run in every step."""
    total_steps: int
    fallbacks: Fallbacks
    predict: Callable[[Noised, Batch], Tensor]
    """The family's, of the denoiser; made faster where that is possible."""
    world: World
    eight_bit: bool = False
    """Whether want of memory took the optimiser to 8 bits."""

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; in the order of the optimiser's groups."""
        return {name: p for group in self.groups.values() for name, p in group.items()}

    @property
    def kept(self) -> dict[str, Tensor]:
        """What a state holds of the adapter: what is trained, and what it started from where that is not zero."""
        starts = {
            f"{part}.{name}": b
            for part, module in self.components.items()
            for name, b in inject.starts(module).items()
        }
        return self.parameters | starts

    @property
    def buckets(self) -> list[list[int]]:
        return shape_buckets(self.examples)

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """With gradients where the caller has them on."""
        return to_device(self.base.encode(captions), self.device)

    def learns(self, component: str, step: int) -> bool:
        """Whether a component is trained in this step: the text encoders may stop before the denoiser."""
        return component in DENOISERS or step <= math.ceil(
            self.run.training.text_encoder_until * self.total_steps
        )

    def dataset_fingerprints(self) -> dict[str, str]:
        own = {
            f"{e.name} at {e.resolution}": e.fingerprint for e in [*self.examples, *self.held_out]
        }
        return own | {
            f"class picture {e.name} at {e.resolution}": e.fingerprint for e in self.class_examples
        }


def shape_buckets(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of the examples of each shape, each as often as it is repeated."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(examples):
        shapes.setdefault(tuple(example.mean.shape), []).extend([index] * example.repeats)
    return [shapes[shape] for shape in sorted(shapes)]


def to_device(conditioning: Conditioning, device: torch.device) -> Conditioning:
    return {name: tensor.to(device) for name, tensor in conditioning.items()}


def prepare(
    run: RunConfig,
    folder: Path,
    log: EventLog,
    fallbacks: Fallbacks | None = None,
    world: World | None = None,
) -> Session:
    """Loads, checks, caches and injects. Raises TrainerError in a sentence for whatever cannot work."""
    fallbacks, world = fallbacks or Fallbacks(run, log), world or World()
    world.check(run.training.batch_size, run.training.gradient_accumulation_steps)
    log.append(Progress("loading"))
    report, root = throttled(log.append), Path(run.dataset.folder)
    with world.main_first():
        items, findings = scan_dataset(
            root,
            resolution=run.dataset.resolution,
            trigger=run.dataset.trigger,
            caption_tokens=run.dataset.caption_tokens,
            separate_lines=run.dataset.caption_wildcards,
            progress=lambda done, total: report(Progress("loading", done, total)),
        )
    for finding in findings:
        if finding.level == "error":
            log.append(Warned(f"{finding.file} is left out: {finding.message}"))
    check_room(folder, estimate.disk_bytes(run), "the run")
    items = override_repeats(items, root, run.dataset.repeats)
    device = choose_device()
    precision = choose_precision(run.base.precision, device)
    if run.base.quantization != "none":  # before the long work
        quantization.working(run.base.quantization, DTYPES[precision], device)
    with (
        world.main_first() if world.agree(locate(run.base) is None) else nullcontext()
    ):  # one downloads it, all read it
        base = fallbacks.attempt(
            "load",
            0,
            lambda: load_base(run.base, DTYPES[precision], run.dataset.caption_tokens, report),
        )
    for note in base.files.notes:
        log.append(Warned(note))
    objective = base.family.objective(base.pipe)
    if run.objective.weighting not in objective.weightings:
        raise ConfigError(
            f"objective.weighting: {run.objective.weighting} does not suit {base.family.name}; choose {' or '.join(objective.weightings)}."
        )
    if run.dataset.bucket_step % pixel_step(base.pipe):
        raise ConfigError(
            f"dataset.bucket_step ({run.dataset.bucket_step}) must be a multiple of {pixel_step(base.pipe)} for {base.family.name}."
        )
    _check_before_the_long_work(run, base, device)
    fallbacks.catch_up("cache", 0)
    with world.main_first():
        examples, held_out, class_examples, texts = fallbacks.attempt(
            "cache",
            0,
            lambda: _encode_all(run, base, items, device, log, "cache" in fallbacks.tiled),
        )
    if run.training.early_stop and {e.name for e in held_out} & {e.name for e in examples}:
        log.append(
            Warned(
                "training.early_stop does nothing here: too few pictures to hold some out, so the run goes to its end."
            )
        )
    return assemble(
        run,
        folder,
        log,
        fallbacks,
        device,
        precision,
        base,
        examples,
        held_out,
        class_examples,
        texts,
        world,
    )


def _check_before_the_long_work(run: RunConfig, base: LoadedBase, device: torch.device) -> None:
    """What would only be told when all pictures are encoded. Raises TrainerError."""
    components, adapter, file = _chosen(run, base)
    targets = {
        name: {target.name for target in inject.targets_of(module, name, adapter)}
        for name, module in components.items()
    }
    if file:
        check_covered(file, targets)
    sampler_name(base.pipe, run.sampling.sampler)
    if run.adapter.trigger_vectors:
        textual_inversion.fresh(run, base)
    if run.training.optimizer != "adamw8bit":  # which has a stand-in
        try_optimizer(run, device)


def assemble(
    run: RunConfig,
    folder: Path,
    log: EventLog,
    fallbacks: Fallbacks,
    device: torch.device,
    precision: str,
    base: LoadedBase,
    examples: list[Example],
    held_out: list[Example],
    class_examples: list[Example],
    texts: dict[str, Conditioning] | None,
    world: World | None = None,
) -> Session:
    """The second half, where all that is trained on is there: the adapter, the optimiser, and the fastest way through the denoiser."""
    attention, why = choose_attention(base.denoiser, device, DTYPES[precision])
    use_attention(base.denoiser, attention)
    components, adapter, file = _chosen(
        run, base
    )  # told by the weights as they are stored, so before they are quantised
    if run.base.quantization != "none":
        quantization.quantize(base.denoiser, run.base.quantization, DTYPES[precision], device)
        fallbacks.attempt(
            "load", 0, lambda: base.denoiser.to(device)
        )  # there the weights are rounded, before an adapter is put on them
    for name, module in components.items():
        inject.inject(module, name, adapter, run.training.seed)
    if file:
        start(file, components)
    if run.training.gradient_checkpointing:
        base.denoiser.enable_gradient_checkpointing()
    trigger = textual_inversion.fresh(run, base) if run.adapter.trigger_vectors else None
    base = textual_inversion.put_on(base, [trigger]) if trigger else base
    if device.type == "cpu":
        use_matrix_products(base.denoiser)
    layout = (
        torch.channels_last if device.type == "cuda" else torch.preserve_format
    )  # what its convolutions are fastest in
    fallbacks.attempt("load", 0, lambda: base.denoiser.to(device, memory_format=layout))
    views = sum(example.repeats for example in examples)
    total_steps = estimate.total_steps(run, views)
    warmup_steps(run, total_steps)
    graphed = device.type == "cuda" and run.training.cuda_graphs and _can_be_recorded(run)
    groups = parameter_groups(components, trigger)
    parameters = [p for group in groups.values() for p in group.values()]
    return Session(
        run=run,
        folder=folder,
        log=log,
        device=device,
        precision=precision,
        attention=why,
        base=base,
        objective=base.family.objective(base.pipe).to(device),
        components=components,
        trigger=trigger,
        groups=groups,
        optimizer=optimizer_for(run, groups, device, log),
        average=EMAModel(parameters, decay=run.training.ema_decay)
        if run.training.ema_decay
        else None,
        examples=examples,
        held_out=held_out,
        class_examples=class_examples,
        texts=texts,
        total_steps=total_steps,
        fallbacks=fallbacks,
        predict=GraphedPredict(base.family, base.denoiser)
        if graphed
        else partial(base.family.predict, base.denoiser),
        world=world or World(),
    )


def _can_be_recorded(run: RunConfig) -> bool:
    """Draws and copies on the CPU's side would happen once, while a graph is recorded, and never again."""
    adapter = run.adapter
    draws = adapter.dropout or adapter.rank_dropout or adapter.module_dropout
    return not (draws or run.training.activation_offload or run.base.quantization != "none")


def _encode_all(
    run: RunConfig,
    base: LoadedBase,
    items: Sequence[DatasetItem],
    device: torch.device,
    log: EventLog,
    tiled: bool,
) -> tuple[list[Example], list[Example], list[Example], dict[str, Conditioning] | None]:
    """The pictures, those held out, the class pictures, and the conditioning of all texts where it does not change."""
    pipe, (vae_hash, encoder_hash) = base.pipe, base_hashes(base)
    _warn_of_long_captions(base, items, log)
    text_encoders = base.family.text_encoders(pipe).values()
    pipe.vae.to(device)
    set_tiling(pipe.vae, tiled)
    vae_hash += (
        " tiled" if tiled else ""
    )  # other latents than those of the whole picture, if only a little
    class_items = class_images.collect(run, base, device, log)
    examples, held_out = hold_out(
        run, make_examples(run, base, items, Path(run.dataset.folder), vae_hash, log)
    )
    class_examples = []
    if class_items:
        class_examples = make_examples(
            class_images.settings(run),
            base,
            class_items,
            Path(run.dataset.regularisation_folder),
            vae_hash,
            log,
        )
    pipe.vae.to(
        "cpu"
    )  # the text encoders follow it: together they would take more than either needs
    for part in text_encoders:
        part.to(device)
    learned = run.adapter.trigger_vectors or any(
        map(run.training.rate_of, base.family.trainable_text_encoders(pipe))
    )
    if learned or run.dataset.captions_vary:
        return examples, held_out, class_examples, None
    captions = ["", *(e.caption for e in [*examples, *held_out, *class_examples])]
    if run.objective.prior_preservation:
        captions += [without_trigger(caption, run.dataset) for caption in captions]
    prompts = sample_prompts(run, examples)
    prompts += [
        run.sampling.negative_prompt,
        *(without_trigger(prompt, run.dataset) for prompt in prompts),
    ]
    texts = encode_texts(base, [*captions, *prompts], encoder_hash)
    for part in text_encoders:
        part.to("cpu")
    return examples, held_out, class_examples, texts


def sample_prompts(run: RunConfig, examples: Sequence[Example]) -> list[str]:
    """The chosen prompts, else the captions of two pictures."""
    return (
        list(run.sampling.prompts)
        or [e.caption for e in examples if e.resolution == run.dataset.resolution][:2]
    )


def base_hashes(base: LoadedBase) -> tuple[str, str]:
    """What latents and conditioning depend on: the file of the VAE; those of the text encoders, their number format, and how they are read.

    In a folder model_index.json may say what an empty caption becomes.
    """
    files = base.files
    read = {path for part in ("vae", *files.text_encoders) for path in files.weights[part]}
    hashes = {
        path: latent_cache.file_hash(path) for path in read
    }  # all one and the same, where the base is a single file
    index = (
        [] if files.path.is_file() else [latent_cache.file_hash(files.path / "model_index.json")]
    )
    encoders = [hashes[path] for part in files.text_encoders for path in files.weights[part]]
    reading = [] if base.reading == PLAIN_READING else [repr(base.reading)]
    dtypes = {str(encoder.dtype) for encoder in base.family.text_encoders(base.pipe).values()} - {
        "torch.float32"
    }
    return " ".join(hashes[path] for path in files.weights["vae"]), " ".join(
        [*index, *encoders, *reading, *sorted(dtypes)]
    )


def _warn_of_long_captions(base: LoadedBase, items: Sequence[DatasetItem], log: EventLog) -> None:
    counts, limit = base.family.token_counts(base.pipe, [item.caption for item in items])
    limit *= base.reading.chunks
    too_long = [item.path.name for item, count in zip(items, counts, strict=True) if count > limit]
    if too_long:
        log.append(
            Warned(
                f"Captions longer than the {limit} tokens that are read: {len(too_long)}, such as that of {too_long[0]}; "
                "their ends are not seen. dataset.caption_tokens sets how many are."
            )
        )


def _chosen(
    run: RunConfig, base: LoadedBase
) -> tuple[dict[str, nn.Module], config.Adapter, AdapterFile | None]:
    """What gets an adapter, with which settings, and the file that it goes on from. Raises TrainerError."""
    family, training = base.family, run.training
    parts = {family.denoiser_name: base.denoiser, **family.trainable_text_encoders(base.pipe)}
    components = {name: module for name, module in parts.items() if training.rate_of(name) > 0}
    if not components:
        raise ConfigError(
            f"Nothing would be trained: {base.files.path.name} has only {', '.join(parts)}, and their learning rates are 0."
        )
    if family.dialect == "diffusers" and run.adapter.kind not in ("lora", "rslora"):
        raise ConfigError(
            f"adapter.kind = {run.adapter.kind} has no file format that programs read for {family.name}; use lora or rslora there."
        )
    check_names(
        run.adapter, {name: inject.weight_shapes(module) for name, module in components.items()}
    )
    file = (
        read_adapter(Path(run.adapter.start_from).expanduser()) if run.adapter.start_from else None
    )
    return components, settings_from(run.adapter, file, base) if file else run.adapter, file


def parameter_groups(
    components: Mapping[str, nn.Module], trigger: Embedding | None
) -> dict[str, dict[str, nn.Parameter]]:
    """What is trained, by what has a learning rate of its own, and by name."""
    groups = {
        part: {f"{part}.{name}": p for name, p in inject.trainable(module).items()}
        for part, module in components.items()
    }
    return groups | (
        {"trigger": {f"trigger.{part}": rows for part, rows in trigger.rows.items()}}
        if trigger
        else {}
    )


def optimizer_for(
    run: RunConfig,
    groups: Mapping[str, Mapping[str, nn.Parameter]],
    device: torch.device,
    log: EventLog,
) -> torch.optim.Optimizer:
    """The chosen one, tried out first, for the `parameter_groups`. AdamW in 8 bits alone has a stand-in, since it takes the same steps."""
    try:
        try_optimizer(run, device)
    except (ImportError, OSError, RuntimeError, ConfigError) as error:
        if run.training.optimizer != "adamw8bit":
            raise
        log.append(
            Warned(
                f"adamw8bit cannot be used here ({str(error)[:200]}); adamw is used, with the same steps and more memory."
            )
        )
        run = config.replace(run, {"training.optimizer": "adamw"})
    return build_optimizer(
        [(list(group.values()), run.training.rate_of(name)) for name, group in groups.items()], run
    )
