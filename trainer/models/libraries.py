"""What must be said to the libraries before they are read: call `configure_libraries` first."""

import ctypes
import sys
import warnings

import torch


def configure_libraries() -> None:
    """Keeps xformers out of a process without CUDA, float32 fast, and the libraries' own chatter out of the log.

    Diffusers imports xformers wherever it is installed; without CUDA its kernels cannot load, and it says so in ten lines.
    """
    import diffusers.utils.import_utils as diffusers_imports
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    if not torch.cuda.is_available():
        diffusers_imports._xformers_available = False
        keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = (
        True  # for what stays in float32, as torch has it for convolutions by itself
    )
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def keep_freed_memory() -> None:
    """Tells glibc to keep large blocks that are freed: a step on a CPU asks for the same again at once.

    Otherwise each goes back to the system and comes anew page by page, half a million page faults a step of Stable Diffusion 1.5, a
    fifth of its time (benchmarks/step.py). The numbers are those of `man 3 mallopt`; other C libraries have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)
