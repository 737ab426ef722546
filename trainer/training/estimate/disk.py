"""Disk space of a run."""

from pathlib import Path

from trainer.config import RunConfig
from trainer.data.augment import variants_per_image
from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.scan import resolutions
from trainer.errors import ModelError
from trainer.training.estimate.parameters import FILE_BYTES, trainable_parameters

CHECKPOINTS = 3  # two stay, and a third is written before the oldest is deleted
CHECKPOINT_TENSORS = 3  # per parameter: the weight and the two moments of AdamW
FLOAT_BYTES = 4
SAMPLE_BYTES_PER_PIXEL = 3  # an uncompressed PNG
MAX_LATENT_CHANNELS = 16
MAX_TEXT_WIDTH = 4096
CAPTION_TOKENS = 77
LOGS_BYTES = 2**22


def disk_bytes(run: RunConfig) -> float:
    """Returns the bytes that a run writes: checkpoints, adapters, samples and cached tensors.

    Rather too many than too few. The adapter counts as empty if the base is not on this machine.
    """
    try:
        parameters = trainable_parameters(run) or 0
    except ModelError:  # reported when the base is loaded
        parameters = 0
    saves = run.saving.saves + 1  # the chosen save is copied to the plain name
    tensors = CHECKPOINT_TENSORS + bool(run.training.ema_decay)
    checkpoints = CHECKPOINTS * parameters * tensors * FLOAT_BYTES
    adapters = saves * parameters * FILE_BYTES[run.saving.precision]
    return checkpoints + adapters + saves * _sample_bytes(run) + _cache_bytes(run) + LOGS_BYTES


def _sample_bytes(run: RunConfig) -> int:
    """Returns the bytes of the samples of one save."""
    samples = max(2, len(run.sampling.prompts))
    return samples * run.dataset.resolution**2 * SAMPLE_BYTES_PER_PIXEL


def _cache_bytes(run: RunConfig) -> float:
    """Returns the bytes of cached latents (mean and deviation) and conditioning (two encoders)."""
    files = Path(run.dataset.folder).rglob("*")
    images = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in files)
    pixels = variants_per_image(run) * sum(side**2 for side in resolutions(run))
    latents = pixels / 64 * MAX_LATENT_CHANNELS * 2 * FLOAT_BYTES
    conditioning = 2 * CAPTION_TOKENS * MAX_TEXT_WIDTH * FLOAT_BYTES
    return images * (latents + conditioning)
