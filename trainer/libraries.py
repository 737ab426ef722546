"""What must be said to the libraries before they are read: call `settle` first."""

import warnings

import torch


def settle() -> None:
    """Keeps xformers out of a process without CUDA, and the libraries' own chatter out of the log.

    Diffusers imports xformers wherever it is installed; without CUDA its kernels cannot load, and it says so in ten lines.
    """
    import diffusers.utils.import_utils as diffusers_imports
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    if not torch.cuda.is_available():
        diffusers_imports._xformers_available = False
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
