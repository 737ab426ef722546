"""The device and number format of a run, and asynchronous copies between host and device."""

import platform
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from trainer.errors import ConfigError
from trainer.models.cpu_threads import Threads

OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What the CPU allocator, cuBLAS, cuDNN and Metal report instead of an OutOfMemoryError."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> torch.device:
    """Returns the device that accelerate finds: CUDA, else Apple's GPU, else the CPU.

    A file written by `accelerate config` is not read. In distributed training each process gets
    its own GPU.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
    return Accelerator(mixed_precision="no").device


def device_name(device: torch.device, threads: Threads | None = None) -> str:
    """Returns the name shown to the user, such as "NVIDIA H200, 140 GB".

    The name of a CPU contains the number of threads, with its reason if `threads` has one.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GB"
    if device.type == "mps":
        return "Apple GPU"
    return f"CPU ({platform.machine()}, {threads or Threads(torch.get_num_threads())})"


def choose_precision(wanted: str, device: torch.device) -> str:
    """Returns "fp32", "bf16" or "fp16". Raises ConfigError if the device cannot compute in it."""
    if wanted == "auto":
        return _best_precision(device)
    if wanted == "bf16" and device.type == "cuda" and not _has_bf16(device):
        raise ConfigError(
            f"base.precision = bf16 does not work on {device_name(device)}; use auto or fp16."
        )
    if wanted == "fp16" and device.type == "cuda" and _is_gtx16(device):
        raise ConfigError(
            f"base.precision = fp16 gives wrong numbers on {device_name(device)}; use auto or fp32."
        )
    return wanted


def _best_precision(device: torch.device) -> str:
    if device.type != "cuda":
        return "fp32"
    if _has_bf16(device):
        return "bf16"
    return "fp32" if _is_gtx16(device) else "fp16"


def _has_bf16(device: torch.device) -> bool:
    """Returns whether the GPU computes in bfloat16; older ones report it and emulate it slowly."""
    capability: tuple[int, int] = torch.cuda.get_device_capability(device)
    return capability >= (8, 0)


def _is_gtx16(device: torch.device) -> bool:
    """Returns whether the GPU gives NaN in fp16 (pytorch issues 58123 and 77955)."""
    return "GTX 16" in torch.cuda.get_device_name(device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to the device without making the host wait.

    A copy from pageable memory would block until CUDA has staged it, so the tensor is pinned first.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception means that the device or the machine has too little memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY_MESSAGES)


class AsyncScalars:
    """Scalars copied to the host asynchronously.

    `values()` waits only for the kernels that produced the scalars, not for later ones.
    """

    def __init__(self, *scalars: Tensor) -> None:
        on_cuda = scalars[0].is_cuda
        stacked = torch.stack([scalar.detach().float() for scalar in scalars])
        self._values = stacked.to("cpu", non_blocking=on_cuda)
        self._arrival = torch.cuda.Event(blocking=True) if on_cuda else None
        if self._arrival:
            self._arrival.record()

    def values(self) -> list[float]:
        """Returns the scalars in the order in which they were given."""
        if self._arrival:
            self._arrival.synchronize()
        return cast(list[float], self._values.tolist())
