"""The smallest changes that make a run fit the memory of a device."""

import importlib.util

from trainer import config
from trainer.config import RunConfig
from trainer.training.estimate.device_memory import memory


def fit(run: RunConfig, device: str, available: float) -> dict[str, object]:
    """Returns the changes, by dotted path, that bring a run below `available` bytes.

    Changes that cost no quality come first. The effective batch stays the same: accumulation
    replaces what a smaller batch leaves out. If the run does not fit even with all changes, all are
    returned.
    """
    changes: dict[str, object] = {}

    def fits() -> bool:
        return memory(config.replace(run, changes), device).peak <= available

    if not fits() and memory(run, device).worst == "sample":
        changes["sampling.vae_tiling"] = True
    if not fits() and run.base.precision == "fp32" and device == "cuda":
        changes["base.precision"] = "auto"
    if not fits() and not run.training.gradient_checkpointing:
        changes["training.gradient_checkpointing"] = True
    effective = run.training.images_per_step
    batch = run.training.batch_size
    while not fits() and batch > 1:
        batch = max(smaller for smaller in range(1, batch) if effective % smaller == 0)
        changes["training.batch_size"] = batch
        changes["training.gradient_accumulation_steps"] = effective // batch
    if device == "cuda" and can_quantize(run):
        for bits in ("8bit", "4bit"):
            if not fits():
                changes["base.quantization"] = bits
    if not fits() and device == "cpu" and run.base.precision in ("auto", "fp32"):
        changes["base.precision"] = "bf16"
    return changes


def can_quantize(run: RunConfig) -> bool:
    """Returns whether the base can be stored in fewer bits than it is."""
    is_installed = importlib.util.find_spec("bitsandbytes") is not None
    is_whole = run.base.quantization == "none"
    return is_installed and is_whole and run.adapter.kind in ("lora", "rslora")
