"""Pictures of the subject's kind, made by the base alone, so that the adapter does not forget what else there is of it.

Prior preservation with class pictures: Ruiz et al. 2022, "DreamBooth", arXiv:2208.12242, section 3.2.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer import config
from trainer.config import RunConfig
from trainer.data.images import IMAGE_SUFFIXES
from trainer.data.scan import DatasetItem, scan_dataset
from trainer.errors import DatasetError
from trainer.families import LoadedBase
from trainer.inference.samples import generate, sampler_name, save_sample
from trainer.runs.atomic_files import atomic_write
from trainer.runs.events import EventLog, Progress, Warned


def collect(
    run: RunConfig, base: LoadedBase, device: torch.device, log: EventLog
) -> list[DatasetItem]:
    """The class pictures of a run, made first where too few are there; none without a folder for them."""
    if not run.dataset.regularisation_folder:
        return []
    fill(run, base, device, log.append)
    try:
        items, findings = scan_dataset(
            Path(run.dataset.regularisation_folder), resolution=run.dataset.resolution
        )
    except DatasetError as error:
        raise DatasetError(
            f"The class pictures cannot be used. {error} Or set dataset.class_pictures to have some made."
        ) from None
    for finding in findings:
        if finding.level == "error":
            log.append(Warned(f"The class picture {finding.file} is left out: {finding.message}"))
    return items


def settings(run: RunConfig) -> RunConfig:
    """How class pictures are read: as they are, with no trigger, no mask and no variants."""
    plain = {name: config.get(config.RunConfig(), f"dataset.{name}") for name in PLAIN}
    return run.model_copy(update={"dataset": run.dataset.model_copy(update=plain)})


PLAIN = (
    "trigger",
    "flip",
    "random_crop",
    "colour_jitter",
    "shuffle_tags",
    "tag_dropout",
    "caption_wildcards",
    "masked_loss",
)


def fill(
    run: RunConfig, base: LoadedBase, device: torch.device, report: Callable[[Progress], Any]
) -> int:
    """Makes class pictures until the folder holds `dataset.class_pictures`; returns how many were made. The base must have no adapter.

    The number of a picture is its seed: the same settings make the same pictures, whenever they were interrupted.
    """
    folder, wanted = Path(run.dataset.regularisation_folder), run.dataset.class_pictures
    present = (
        sum(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*"))
        if folder.is_dir()
        else 0
    )
    missing = range(max(0, wanted - present))
    if not missing:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    numbers = (
        number
        for number in range(1, 2 * wanted + 1)
        if not (folder / f"class-{number:05d}.png").exists()
    )
    base.pipe.to(device)
    for done, number in zip(missing, numbers, strict=False):
        report(Progress("sampling", done, len(missing)))
        asked: dict[str, Any] = {
            "prompt": run.dataset.class_words,
            "negative_prompt": "",
            "seed": number,
            "inference_steps": run.sampling.inference_steps,
            "guidance_scale": run.sampling.guidance_scale,
        }
        side, path = run.dataset.resolution, folder / f"class-{number:05d}.png"
        atomic_write(path.with_suffix(".txt"), run.dataset.class_words.encode())
        save_sample(
            path,
            generate(base, **asked, width=side, height=side),
            **asked,
            sampler=sampler_name(base.pipe),
            note="Class picture",
        )
    base.denoiser.to("cpu")
    return len(missing)
