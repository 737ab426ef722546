"""Bytes that a run writes."""

from pathlib import Path

from trainer.config import RunConfig
from trainer.data.augment import variants_per_image
from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.scan import resolutions
from trainer.errors import ModelError
from trainer.training.estimate.parameters import FILE_BYTES, trainable_parameters


def disk_bytes(run: RunConfig) -> float:
    """What a run will write: its states (three at a time), adapters, samples and cache. A little too much rather than too little."""
    try:
        parameters = trainable_parameters(run) or 0
    except ModelError:  # told where the base is loaded
        parameters = 0
    pictures = sum(
        path.suffix.lower() in IMAGE_SUFFIXES for path in Path(run.dataset.folder).rglob("*")
    )
    area, saves = run.dataset.resolution**2, run.saving.saves + 1
    seen = variants_per_image(run) * sum(side**2 for side in resolutions(run))
    states = (
        3 * 4 * parameters * (3 + (1 if run.training.ema_decay else 0))
    )  # weights and two moments in float32
    adapters = saves * parameters * FILE_BYTES[run.saving.precision]
    cached = pictures * (
        seen / 64 * 16 * 2 * 4 + 2 * 77 * 4096 * 4
    )  # latents of up to 16 channels, embeddings of up to 4096 numbers
    return states + adapters + saves * max(2, len(run.sampling.prompts)) * area * 3 + cached + 2**22
