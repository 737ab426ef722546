"""What a run will take: steps, parameters, disk, memory and time, without torch.

The page shows these numbers before the start, and the trainer uses the same functions. The model
sizes and coefficients are described in docs/estimates.md.
"""

from trainer.training.estimate.costs import COSTS, Costs, Size, kind_by_name, size_of
from trainer.training.estimate.device_memory import (
    ADAPTER_BYTES,
    FRAGMENTATION,
    VAE_TILES,
    Memory,
    memory,
)
from trainer.training.estimate.disk import disk_bytes
from trainer.training.estimate.fitting import can_quantize, fit
from trainer.training.estimate.parameters import (
    FILE_BYTES,
    adapter_parameters,
    base_parameters,
    file_bytes,
    parameters_by_component,
    trainable_parameters,
    trigger_parameters,
)
from trainer.training.estimate.step_time import (
    expected_seconds_per_step,
    measured_seconds_per_step,
)
from trainer.training.estimate.steps import (
    images_per_pass,
    passes_per_image,
    save_steps,
    steps_for,
    total_steps,
)

__all__ = [
    "ADAPTER_BYTES",
    "COSTS",
    "FILE_BYTES",
    "FRAGMENTATION",
    "VAE_TILES",
    "Costs",
    "Memory",
    "Size",
    "adapter_parameters",
    "base_parameters",
    "can_quantize",
    "disk_bytes",
    "expected_seconds_per_step",
    "file_bytes",
    "fit",
    "images_per_pass",
    "kind_by_name",
    "measured_seconds_per_step",
    "memory",
    "parameters_by_component",
    "passes_per_image",
    "save_steps",
    "size_of",
    "steps_for",
    "total_steps",
    "trainable_parameters",
    "trigger_parameters",
]
