"""What a run will take: steps, parameters, bytes and time, worked out before it starts and without torch.

The trainer uses the very same functions, so that what the page says is what happens.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainer import config, run_folder
from trainer.base_model import inspect, locate
from trainer.config import RunConfig
from trainer.safetensors_header import TensorInfo

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FILE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
SMALLEST_SET_TO_HOLD_OUT = 10


def held_out_count(run: RunConfig, pictures: int) -> int:
    """How many pictures are kept out of training for measuring."""
    return round(pictures * run.dataset.hold_out) if pictures >= SMALLEST_SET_TO_HOLD_OUT else 0


def total_steps(run: RunConfig, views: int) -> int:
    """Optimiser steps of a run whose training pictures count `views` per pass (repeats included)."""
    training = run.training
    if training.steps:
        return training.steps
    return max(1, math.ceil(views * training.views_per_picture / (training.batch_size * training.gradient_accumulation_steps)))


def steps_for(run: RunConfig, pictures: int) -> int:
    """Optimiser steps for a dataset of so many pictures, those held out not counted."""
    return total_steps(run, pictures - held_out_count(run, pictures))


def save_steps(total: int, saves: int) -> list[int]:
    """The steps after which the adapter is saved: `saves` equal parts, the last one at the end."""
    return sorted({max(1, round(total * part / saves)) for part in range(1, saves + 1)})


def trainable_parameters(run: RunConfig) -> int | None:
    """Weights of the adapter; None where the base is not on this machine yet."""
    folder = locate(run.base)
    if folder is None:
        return None
    base, training = inspect(folder), run.training
    parts = [*(["unet"] if training.learning_rate else []), *(base.text_encoders if training.text_encoder_learning_rate else [])]
    return sum(lora_parameters(base.tensors[part], run.adapter.rank) for part in parts)


def lora_parameters(tensors: dict[str, TensorInfo], rank: int) -> int:
    """rank x (inputs + outputs) for each adapted projection (Hu et al. 2021, section 4.1)."""
    adapted = (info.shape for name, info in tensors.items() if name.removesuffix(".weight").endswith(ATTENTION))
    return sum(rank * (shape[0] + shape[1]) for shape in adapted if len(shape) == 2)


def file_bytes(run: RunConfig) -> int | None:
    """Size of the finished file, its header of some kilobytes not counted."""
    parameters = trainable_parameters(run)
    return None if parameters is None else parameters * FILE_BYTES[run.saving.precision]


def measured_seconds_per_step(run: RunConfig, runs: Iterable[Path]) -> float | None:
    """Seconds per step of the latest run with the same base, size and batch on this machine; None without one."""
    for folder in runs:
        try:
            other = config.load(folder / "run.toml")
        except config.ConfigError:
            continue
        if _speed_key(other) == _speed_key(run):
            speed = run_folder.status(folder).seconds_per_step
            if speed is not None:
                return speed
    return None


def _speed_key(run: RunConfig) -> Sequence[object]:
    training = run.training
    return (
        run.base,
        run.dataset.resolution,
        training.batch_size,
        training.gradient_accumulation_steps,
        training.gradient_checkpointing,
        training.text_encoder_learning_rate > 0,
        training.learning_rate > 0,
    )
