"""Process-wide settings of torch, diffusers and transformers.

Call `configure_libraries()` before you import a pipeline, a model or a scheduler.
"""

import ctypes
import sys
import warnings

import torch

from trainer.models.cpu_threads import limit_to_cores


def configure_libraries() -> None:
    """Turns on TF32, silences the libraries, and keeps xformers out of a process without CUDA.

    Also limits torch to as many threads as the process has cores.

    Diffusers imports xformers whenever it is installed. Without CUDA its kernels cannot load, and
    it prints ten lines about that.
    """
    import diffusers.utils.import_utils as diffusers_imports
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    if not torch.cuda.is_available():
        diffusers_imports._xformers_available = False
        keep_freed_memory()
    limit_to_cores()
    # For the layers that stay in float32. Torch already does the same for convolutions.
    torch.backends.cuda.matmul.allow_tf32 = True
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks, because the next step on a CPU allocates them again.

    By default glibc returns each block to the system, and the next allocation faults it in page by
    page. In Stable Diffusion 1.5 these are half a million page faults per step, a fifth of its time
    (benchmarks/step.py). The constants are documented in `man 3 mallopt`. C libraries other than
    glibc have no such function, and then nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)
