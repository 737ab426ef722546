"""Everything before the first step: settings and images in, a `Session` out."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from trainer.config import RunConfig
from trainer.data import latent_cache
from trainer.data.augment import without_trigger
from trainer.data.examples import encode_texts, hold_out, make_examples, throttled
from trainer.data.scan import DatasetItem, override_repeats, scan_dataset
from trainer.errors import ConfigError
from trainer.families import LoadedBase, load_base
from trainer.families.base import PLAIN_READING, Conditioning, size_multiple
from trainer.inference import class_images
from trainer.inference.samples import sampler_name
from trainer.lora import inject, textual_inversion
from trainer.lora.warm_start import check_covered
from trainer.models import quantization
from trainer.models.cpu_threads import use_threads_for
from trainer.models.device import DTYPES, choose_device, choose_precision
from trainer.models.model_files import locate
from trainer.runs.atomic_files import check_room
from trainer.runs.events import Event, EventLog, Progress, Started, Warned, read_events
from trainer.training import estimate
from trainer.training.distributed import World
from trainer.training.oom_fallbacks import Fallbacks, set_tiling
from trainer.training.optimizers import try_optimizer
from trainer.training.session import Session, TrainingData, build_session, plan_adapter
from trainer.training.training_samples import sample_prompts

Report = Callable[[Event], object]


def prepare(
    run: RunConfig,
    folder: Path,
    log: EventLog,
    fallbacks: Fallbacks | None = None,
    world: World | None = None,
) -> Session:
    """Checks the settings, loads the base, encodes the dataset and builds the session.

    Raises TrainerError for anything that cannot work, as early as possible.
    """
    fallbacks = fallbacks or Fallbacks(run, log)
    world = world or World()
    world.check(run.training.batch_size, run.training.gradient_accumulation_steps)
    log.append(Progress("loading"))
    report = throttled(log.append)

    # Dataset: only the files are read here, so a mistake in them is reported within seconds.
    with world.main_first():
        items = _scan(run, log, report)
    check_room(folder, estimate.disk_bytes(run), "the run")
    items = override_repeats(items, Path(run.dataset.folder), run.dataset.repeats)

    # Base model.
    device = choose_device()
    precision = choose_precision(run.base.precision, device)
    if run.base.quantization != "none":
        # Fails at once if bitsandbytes is missing, not after the base is loaded.
        quantization.load_bitsandbytes(run.base.quantization, DTYPES[precision], device)
    base = _load_base(run, precision, log, report, fallbacks, world)
    # A resumed run keeps the number of its first start: another one may change the last bits.
    earlier = threads_of(read_events(folder / "events.jsonl"))
    threads = use_threads_for(base.denoiser, device, run.dataset.resolution // 8, earlier)
    _check_settings_fit(run, base)
    _check_before_encoding(run, base, device)

    # Latents and conditioning.
    fallbacks.catch_up("cache", 0)
    with world.main_first():
        data = fallbacks.attempt(
            "cache",
            0,
            lambda: _encode_dataset(run, base, items, device, log, "cache" in fallbacks.tiled),
        )
    names = {example.name for example in data.examples}
    if run.training.early_stop and any(example.name in names for example in data.validation):
        log.append(
            Warned(
                "training.early_stop has no effect: the dataset has too few images for a "
                "validation set, so the run takes all its steps."
            )
        )
    return build_session(run, folder, log, fallbacks, world, device, precision, base, data, threads)


def threads_of(events: Iterable[Event]) -> int:
    """Returns how many CPU threads the first start of a run used, or 0 before its first start."""
    for event in events:
        if isinstance(event, Started) and event.threads:
            return event.threads
    return 0


def _scan(run: RunConfig, log: EventLog, report: Report) -> list[DatasetItem]:
    """Returns the usable images of the dataset, and warns of each file that is left out."""

    def report_progress(done: int, total: int) -> None:
        report(Progress("loading", done, total))

    items, issues = scan_dataset(Path(run.dataset.folder), run.dataset, progress=report_progress)
    for issue in issues:
        if issue.level == "error":
            log.append(Warned(f"{issue.file} is left out: {issue.message}"))
    return items


def _load_base(
    run: RunConfig,
    precision: str,
    log: EventLog,
    report: Report,
    fallbacks: Fallbacks,
    world: World,
) -> LoadedBase:
    """Loads the base model. If it is not on this machine, rank 0 downloads it first."""
    must_download = world.agree(locate(run.base) is None)
    with world.main_first() if must_download else nullcontext():
        base = fallbacks.attempt(
            "load",
            0,
            lambda: load_base(run.base, DTYPES[precision], run.dataset.caption_tokens, report),
        )
    for note in base.files.notes:
        log.append(Warned(note))
    return base


def _check_settings_fit(run: RunConfig, base: LoadedBase) -> None:
    """Raises ConfigError if a setting does not apply to this family."""
    weightings = base.family.objective(base.pipe).weightings
    if run.objective.weighting not in weightings:
        raise ConfigError(
            f"objective.weighting: {run.objective.weighting} does not suit {base.family.name}; "
            f"choose {' or '.join(weightings)}."
        )
    multiple = size_multiple(base.pipe)
    if run.dataset.bucket_step % multiple:
        raise ConfigError(
            f"dataset.bucket_step ({run.dataset.bucket_step}) must be a multiple of {multiple} "
            f"for {base.family.name}."
        )


def _check_before_encoding(run: RunConfig, base: LoadedBase, device: torch.device) -> None:
    """Raises TrainerError for what would otherwise fail only after all images are encoded."""
    components, adapter, start_from = plan_adapter(run, base)
    targets = {
        name: {target.name for target in inject.targets_of(module, name, adapter)}
        for name, module in components.items()
    }
    if start_from:
        check_covered(start_from, targets)
    sampler_name(base.pipe, run.sampling.sampler)
    if run.adapter.trigger_vectors:
        textual_inversion.new_trigger_embedding(run, base)
    if run.training.optimizer != "adamw8bit":  # AdamW replaces it if it does not work
        try_optimizer(run, device)


def _encode_dataset(
    run: RunConfig,
    base: LoadedBase,
    items: Sequence[DatasetItem],
    device: torch.device,
    log: EventLog,
    tiled: bool,
) -> TrainingData:
    """Encodes all images, then all texts unless captions or text encoders change during the run."""
    vae_hash, encoder_hash = base_hashes(base)
    _warn_of_long_captions(base, items, log)

    # Images. Tiled latents differ slightly from whole ones, so they are cached under another key.
    vae = base.pipe.vae
    vae.to(device)
    set_tiling(vae, tiled)
    if tiled:
        vae_hash += " tiled"
    class_items = class_images.collect(run, base, device, log)
    root = Path(run.dataset.folder)
    examples, validation = hold_out(run, make_examples(run, base, items, root, vae_hash, log))
    class_examples = []
    if class_items:
        settings = class_images.plain_settings(run)
        class_root = Path(run.dataset.regularisation_folder)
        class_examples = make_examples(settings, base, class_items, class_root, vae_hash, log)

    # Texts. The VAE makes room for the text encoders: together they need more than either alone.
    vae.to("cpu")
    encoders = base.family.text_encoders(base.pipe).values()
    _move(encoders, device)
    if _encoders_are_trained(run, base) or run.dataset.captions_vary:
        return TrainingData(examples, validation, class_examples, None)
    captions = [example.caption for example in [*examples, *validation, *class_examples]]
    texts = _encode_all_texts(run, base, captions, sample_prompts(run, examples), encoder_hash)
    _move(encoders, torch.device("cpu"))
    return TrainingData(examples, validation, class_examples, texts)


def _encoders_are_trained(run: RunConfig, base: LoadedBase) -> bool:
    trainable = base.family.trainable_text_encoders(base.pipe)
    return bool(run.adapter.trigger_vectors) or any(map(run.training.rate_of, trainable))


def _move(modules: Iterable[nn.Module], device: torch.device) -> None:
    for module in modules:
        module.to(device)


def _encode_all_texts(
    run: RunConfig,
    base: LoadedBase,
    captions: Sequence[str],
    prompts: Sequence[str],
    encoder_hash: str,
) -> dict[str, Conditioning]:
    """Encodes every text that the run may need: captions, the empty one, and sample prompts."""
    texts = ["", *captions]  # dropped captions become empty
    if run.objective.prior_preservation:
        texts += [without_trigger(text, run.dataset) for text in texts]
    texts += [*prompts, run.sampling.negative_prompt]
    texts += [without_trigger(prompt, run.dataset) for prompt in prompts]
    return encode_texts(base, texts, encoder_hash)


def base_hashes(base: LoadedBase) -> tuple[str, str]:
    """Returns hashes of what latents and what conditioning depend on, for the cache's keys.

    Latents depend on the VAE's file. Conditioning depends on the text encoders' files, their number
    format and how captions are read, and on model_index.json, which may define what an empty
    caption becomes.
    """
    files = base.files
    paths = {path for part in ("vae", *files.text_encoders) for path in files.weights[part]}
    hashes = {path: latent_cache.file_hash(path) for path in paths}

    parts = []
    if not files.path.is_file():
        parts.append(latent_cache.file_hash(files.path / "model_index.json"))
    for encoder in files.text_encoders:
        parts += [hashes[path] for path in files.weights[encoder]]
    if base.reading != PLAIN_READING:
        parts.append(repr(base.reading))
    encoders = base.family.text_encoders(base.pipe).values()
    parts += sorted({str(encoder.dtype) for encoder in encoders} - {"torch.float32"})
    return " ".join(hashes[path] for path in files.weights["vae"]), " ".join(parts)


def _warn_of_long_captions(base: LoadedBase, items: Sequence[DatasetItem], log: EventLog) -> None:
    counts, limit = base.family.token_counts(base.pipe, [item.caption for item in items])
    limit *= base.reading.chunks
    too_long = [item.path.name for item, count in zip(items, counts, strict=True) if count > limit]
    if too_long:
        log.append(
            Warned(
                f"{len(too_long)} captions are longer than {limit} tokens (such as {too_long[0]}), "
                "so the model does not see their ends. Raise dataset.caption_tokens."
            )
        )
