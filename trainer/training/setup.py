"""Everything before the first step: settings and pictures in, a `Session` out."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from trainer.config import RunConfig
from trainer.data import latent_cache
from trainer.data.augment import without_trigger
from trainer.data.examples import Example, encode_texts, hold_out, make_examples, throttled
from trainer.data.scan import DatasetItem, override_repeats, scan_dataset
from trainer.errors import ConfigError
from trainer.families import LoadedBase, load_base
from trainer.families.base import PLAIN_READING, Conditioning, pixel_step
from trainer.inference import class_images
from trainer.inference.samples import sampler_name
from trainer.lora import inject, textual_inversion
from trainer.lora.warm_start import check_covered
from trainer.models import quantization
from trainer.models.device import DTYPES, choose_device, choose_precision
from trainer.models.model_files import locate
from trainer.runs.atomic_files import check_room
from trainer.runs.events import EventLog, Progress, Warned
from trainer.training import estimate
from trainer.training.distributed import World
from trainer.training.oom_fallbacks import Fallbacks, set_tiling
from trainer.training.optimizers import try_optimizer
from trainer.training.session import Session, _chosen, assemble
from trainer.training.training_samples import sample_prompts


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
        quantization.load_bitsandbytes(run.base.quantization, DTYPES[precision], device)
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
        textual_inversion.new_trigger_embedding(run, base)
    if run.training.optimizer != "adamw8bit":  # which has a stand-in
        try_optimizer(run, device)


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
            class_images.plain_settings(run),
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
