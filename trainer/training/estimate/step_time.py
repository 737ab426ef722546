"""Seconds per step."""

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


def measured_seconds_per_step(run: RunConfig, runs: Iterable[Path]) -> float | None:
    """Seconds per step of the latest run with the same base, size and batch on this machine; None without one."""
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


OPERATIONS_PER_SECOND = {
    "cuda": 25e12,
    "cpu": 5e10,
}  # what a step reaches on a middling card, and on one core; only until a step was measured

STEP_OVERHEAD = {"cuda": 0.12, "cpu": 0.12}  # seconds


def expected_seconds_per_step(run: RunConfig, device: str, cores: int = 1) -> float:
    """A first guess from counted operations, good to a factor of two or three; only until a step was measured."""
    size, training = size_of(run), run.training
    each = (
        size.costs.operations_checkpointed
        if training.gradient_checkpointing
        else size.costs.operations
    )
    positions = fmean(side**2 for side in resolutions(run)) / size.latent_step**2
    passes, images = (
        training.gradient_accumulation_steps * passes_per_image(run),
        training.batch_size,
    )
    operations = each * positions * size.denoiser * images * passes
    speed = OPERATIONS_PER_SECOND[device] * (max(1, cores) ** 0.8 if device == "cpu" else 1)
    return (operations / speed + STEP_OVERHEAD[device] * passes) / training.devices
