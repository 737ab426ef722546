"""Seconds per step: measured on this machine, or a first guess."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from trainer import config
from trainer.config import RunConfig
from trainer.data.scan import resolutions
from trainer.errors import ConfigError
from trainer.runs import run_status
from trainer.training.estimate.costs import size_of
from trainer.training.estimate.steps import passes_per_image

OPERATIONS_PER_SECOND = {"cuda": 25e12, "cpu": 5e10}
"""What a step reaches on a medium GPU, and on one CPU core."""
CORES_EXPONENT = 0.8
"""The speed of a CPU grows with this power of its cores."""
STEP_OVERHEAD = {"cuda": 0.12, "cpu": 0.12}
"""Seconds of a pass that do not depend on the model."""


def measured_seconds_per_step(run: RunConfig, runs: Iterable[Path]) -> float | None:
    """Returns the seconds per step of the first comparable run in a list of run folders.

    Comparable runs have the same base, image size and batch. Returns None without one.
    """
    for folder in runs:
        try:
            other = config.load(folder / "run.toml")
        except ConfigError:
            continue
        if _speed_key(other) == _speed_key(run):
            speed = run_status.read_status(folder).seconds_per_step
            if speed is not None:
                return speed
    return None


def _speed_key(run: RunConfig) -> Sequence[object]:
    """Returns everything that the time of a step depends on."""
    training = run.training
    return (
        run.base,
        resolutions(run),
        passes_per_image(run),
        training.batch_size,
        training.gradient_accumulation_steps,
        training.gradient_checkpointing,
        training.activation_offload,
        training.rate_of("text_encoder") > 0,
        training.rate_of("text_encoder_2") > 0,
        run.adapter.trigger_vectors > 0,
        training.learning_rate > 0,
        training.devices,
    )


def expected_seconds_per_step(run: RunConfig, device: str, cores: int = 1) -> float:
    """Returns a guess from counted operations, right to a factor of two or three.

    Use it only until a step has been measured. `device` is "cuda" or "cpu".
    """
    size, training = size_of(run), run.training
    operations_per_position = size.costs.operations
    if training.gradient_checkpointing:
        operations_per_position = size.costs.operations_checkpointed
    positions = fmean(side**2 for side in resolutions(run)) / size.latent_step**2
    passes = training.gradient_accumulation_steps * passes_per_image(run)
    operations = operations_per_position * positions * size.denoiser * training.batch_size * passes
    speed = OPERATIONS_PER_SECOND[device]
    if device == "cpu":
        speed *= max(1, cores) ** CORES_EXPONENT
    return (operations / speed + STEP_OVERHEAD[device] * passes) / training.devices
