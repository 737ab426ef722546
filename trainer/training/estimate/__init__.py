"""What a run will take: steps, parameters, bytes and time, worked out before it starts and without torch.

The trainer uses the very same functions, so that what the page says is what happens.
"""

from trainer.training.estimate.costs import COSTS, VAE_WIDTH, Costs, Size, kind_by_name, size_of
from trainer.training.estimate.device_memory import (
    ADAPTER_BYTES,
    BYTES,
    FORWARD_KEPT,
    FRAGMENTS,
    LIBRARIES_BYTES,
    QUANTIZED_BYTES,
    TEXT_KEPT,
    VAE_TILES,
    Memory,
    can_quantize,
    fit,
    memory,
)
from trainer.training.estimate.disk import disk_bytes
from trainer.training.estimate.parameters import (
    FILE_BYTES,
    TOKEN_TABLE,
    adapter_parameters,
    base_parameters,
    file_bytes,
    parameters_by_component,
    trainable_parameters,
    trigger_parameters,
)
from trainer.training.estimate.step_time import (
    OPERATIONS_PER_SECOND,
    STEP_OVERHEAD,
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
    "BYTES",
    "COSTS",
    "Costs",
    "FILE_BYTES",
    "FORWARD_KEPT",
    "FRAGMENTS",
    "LIBRARIES_BYTES",
    "Memory",
    "OPERATIONS_PER_SECOND",
    "QUANTIZED_BYTES",
    "STEP_OVERHEAD",
    "Size",
    "TEXT_KEPT",
    "TOKEN_TABLE",
    "VAE_TILES",
    "VAE_WIDTH",
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
