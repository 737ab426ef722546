"""Which device and number format a run uses, what that device is called, and how numbers travel to it and back without waiting."""

import platform

import torch
from accelerate import Accelerator
from torch import Tensor

from trainer.errors import ConfigError

# What torch reports if it raises no OutOfMemoryError: the CPU's allocator, cuBLAS and cuDNN, Metal.
OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> torch.device:
    """The device accelerate finds: CUDA, else Apple's, else the CPU. What `accelerate config` left on the machine is not read.

    Of several processes that train as one each has its own GPU.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    return Accelerator(mixed_precision="no").device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GB"
    return {"mps": "Apple GPU"}.get(
        device.type, f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    )


def choose_precision(wanted: str, device: torch.device) -> str:
    """ "fp32", "bf16" or "fp16". Raises ConfigError for one the device cannot do."""
    if wanted == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if _has_bf16(device) else "fp32" if _is_gtx16(device) else "fp16"
    if wanted == "bf16" and device.type == "cuda" and not _has_bf16(device):
        raise ConfigError(
            f"base.precision = bf16 does not work on {device_name(device)}; use auto or fp16."
        )
    if wanted == "fp16" and device.type == "cuda" and _is_gtx16(device):
        raise ConfigError(
            f"base.precision = fp16 gives wrong numbers on {device_name(device)}; use auto or fp32."
        )
    return wanted


def _has_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (
        8,
        0,
    )  # older cards say yes, and emulate it slowly


def _is_gtx16(device: torch.device) -> bool:
    return "GTX 16" in torch.cuda.get_device_name(
        device
    )  # fp16 gives NaN there (pytorch issues 58123, 77955)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device. With CUDA, for which pageable memory would have to wait, the host goes on at once."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def ran_out(error: BaseException) -> bool:
    """Returns whether an exception means that the device or the machine has too little memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY_MESSAGES)


class AsyncScalars:
    """Scalars on their way from the device. Who reads them waits for the work they come from, not for what was launched since."""

    def __init__(self, *scalars: Tensor):
        on_cuda = scalars[0].is_cuda
        self._values = torch.stack([scalar.detach().float() for scalar in scalars]).to(
            "cpu", non_blocking=on_cuda
        )
        self._arrival = torch.cuda.Event(blocking=True) if on_cuda else None
        if self._arrival:
            self._arrival.record()

    def values(self) -> list[float]:
        if self._arrival:
            self._arrival.synchronize()
        return self._values.tolist()
