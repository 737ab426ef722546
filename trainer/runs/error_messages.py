"""Explains errors in plain sentences, and writes report.txt for bug reports."""

import errno
import os
import platform
import re
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from trainer.errors import TrainerError
from trainer.runs.atomic_files import FULL, READ_ONLY, atomic_write

REPORT_FILE = "report.txt"
LOG_LINES = 200
"""How many lines of the log the report contains."""
LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "xformers",
    "bitsandbytes",
    "pillow",
    "gradio",
    "numpy",
)
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "ATELIER_AUTH")
MIN_SECRET_LENGTH = 4
CHECKPOINT_KEPT = "The last checkpoint is kept."


class KnownError(NamedTuple):
    """An error of a library, recognised by its message."""

    patterns: tuple[str, ...]
    """Regular expressions, any of which matches "TypeName: message"."""
    cause: str
    action: str


OUT_OF_MEMORY = KnownError(
    (
        "MPS backend out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "can't allocate memory",
        "not enough memory",
        "out of memory",
    ),
    "Memory ran out.",
    "Close other programs that use the device, or choose a smaller dataset.resolution.",
)

# Collected from some hundred public threads about trainers like this one. The first match counts.
KNOWN_ERRORS: list[KnownError] = [
    OUT_OF_MEMORY,
    KnownError(
        (
            "no kernel image is available",
            "not compatible with the current PyTorch",
            r"sm_\d+ is not compatible",
        ),
        "This torch was not built for this GPU.",
        "Install the torch build for your GPU's CUDA version (pytorch.org, Get started).",
    ),
    KnownError(
        (
            "Found no NVIDIA driver",
            "driver version is insufficient",
            "NVIDIA driver on your system is too old",
        ),
        "The NVIDIA driver is missing or too old for this torch.",
        "Update the driver, then restart the machine.",
    ),
    KnownError(
        ("Torch not compiled with CUDA enabled",),
        "This torch has no CUDA support.",
        "Install the CUDA build of torch, or train on the CPU.",
    ),
    KnownError(
        (
            "CUDA error: unspecified launch failure",
            "CUDA error: an illegal memory access",
            "CUDA error: device-side assert",
            "CUDA error: uncorrectable ECC",
            "CUDA error: unknown error",
            "CUDA error: the launch timed out",
        ),
        "The GPU failed during a computation (overclocking, heat or a driver fault).",
        "Restart the machine, then press Resume.",
    ),
    KnownError(
        ("CUDNN_STATUS", "cuDNN error", "CUBLAS_STATUS"),
        "A GPU library failed, most often because GPU memory ran out or the driver was updated.",
        "Close other programs, restart the machine, and press Resume.",
    ),
    KnownError(
        ("memory_efficient_attention", "xFormers", "xformers"),
        "The installed xformers does not fit torch or the GPU.",
        "Uninstall it (pip uninstall xformers): the trainer then uses torch's attention.",
    ),
    KnownError(
        ("bitsandbytes", "libbitsandbytes", "CUDA Setup failed"),
        "bitsandbytes does not work on this machine.",
        "Set training.optimizer to adamw.",
    ),
    KnownError(
        ("unscale FP16 gradients",),
        "The adapter is in half precision, which cannot be trained.",
        "Set base.precision to bf16 or fp32.",
    ),
    KnownError(
        ("GatedRepo", "403 Client Error", r"Access to model .* is restricted", "gated"),
        "You have to accept the licence of the base model first.",
        "Accept it on its Hugging Face page, sign in with `hf auth login`, and try again.",
    ),
    KnownError(
        (
            "RepositoryNotFound",
            "401 Client Error",
            "Repository Not Found",
            "404 Client Error",
            "EntryNotFound",
            "RevisionNotFound",
        ),
        "Hugging Face has no such model, or it is private.",
        "Check base.model and base.revision, and sign in with `hf auth login`.",
    ),
    KnownError(
        ("SSLError", "CERTIFICATE_VERIFY_FAILED"),
        "The connection is not trusted, because of a proxy or a wrong clock.",
        "Check both, or choose a model folder on this machine.",
    ),
    KnownError(
        (
            "LocalEntryNotFound",
            "ConnectionError",
            "MaxRetryError",
            "NameResolutionError",
            "ConnectTimeout",
            "ReadTimeout",
            "Network is unreachable",
            "offline mode",
        ),
        "The network cannot be reached.",
        "Check it, or choose a model folder on this machine.",
    ),
    KnownError(
        (
            "HeaderTooLarge",
            "InvalidHeader",
            "MetadataIncompleteBuffer",
            "SafetensorError",
            "safetensors_rust",
        ),
        "A .safetensors file is damaged, most often because its download was interrupted.",
        "Download it again.",
    ),
    KnownError(
        ("UnpicklingError", "invalid load key", "weights_only"),
        "A file is a pickle, which can run code when it is opened.",
        "Convert it to .safetensors first.",
    ),
    KnownError(
        (
            "size mismatch for",
            r"Missing key\(s\) in state_dict",
            r"Error\(s\) in loading state_dict",
        ),
        "The weights and the configuration of the model do not belong together.",
        "Download the whole model again.",
    ),
    KnownError(
        (
            "Expected all tensors to be on the same device",
            "should be the same device",
            "mat1 and mat2 (shapes|must have the same dtype)",
        ),
        "Parts of the model do not fit each other.",
        "This is a bug: please report it, with the report.",
    ),
    KnownError(
        (
            "DecompressionBomb",
            "cannot identify image file",
            "image file is truncated",
            "broken data stream",
        ),
        "An image is damaged or too large.",
        "Find its name on the Dataset tab, and remove it.",
    ),
    KnownError(
        ("UnicodeDecodeError", "UnicodeEncodeError", "codec can't"),
        "A text file is not UTF-8.",
        "Save the captions and settings as UTF-8.",
    ),
    KnownError(
        (
            "DLL load failed",
            "undefined symbol",
            "cannot open shared object file",
            "ImportError",
            "ModuleNotFoundError",
            "numpy.dtype size changed",
        ),
        "An installed library is missing or does not fit the others.",
        "Install everything again: pip install -c constraints.txt -e .",
    ),
    KnownError(
        ("RecursionError", "maximum recursion depth"),
        "A file is nested too deeply, so it is damaged or hostile.",
        "Remove it.",
    ),
    KnownError(
        ("BrokenPipeError", "Broken pipe", "EOFError"),
        "Another process ended early.",
        "Press Resume.",
    ),
]

OS_ERRORS: list[tuple[tuple[int, ...], str]] = [
    (FULL, "The disk is full ({details}). Make room, and press Resume."),
    (
        READ_ONLY,
        "No permission to read or write ({details}). "
        "Grant it, or choose another folder with $ATELIER_OUTPUTS.",
    ),
    ((errno.ENOENT,), "A file is missing ({details}). Put it back, and press Resume."),
    (
        (errno.EMFILE, errno.ENFILE),
        "Too many files are open ({details}). "
        "Close other programs, or raise the limit (ulimit -n).",
    ),
    (
        (errno.EIO, errno.ESTALE, errno.ENOTCONN),
        "The disk or the network drive failed ({details}). Check it, or use a local disk.",
    ),
    ((errno.ENAMETOOLONG,), "A file name is too long ({details}). Shorten it."),
]
"""Sentences by the error numbers they explain."""
OTHER_OS_ERROR = "Cannot read or write a file ({details})."


def explain(error: BaseException) -> str:
    """Returns the cause of an error and what to do about it, in a few sentences.

    A TrainerError contains that already.
    """
    if isinstance(error, TrainerError):
        return str(error)
    known = _explain_known(error)
    if known:
        return f"{known} {CHECKPOINT_KEPT}"
    return (
        f"Something went wrong inside the trainer ({type(error).__name__}: {str(error)[:200]}). "
        f"{CHECKPOINT_KEPT} Press Resume to try again; the report contains the details."
    )


def _explain_known(error: BaseException) -> str:
    """Returns the explanation of an error of the system or a library, or "" if it is unknown."""
    if isinstance(error, MemoryError):
        return f"{OUT_OF_MEMORY.cause} {OUT_OF_MEMORY.action}"
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_os_error(error)
    text = f"{type(error).__name__}: {error}"
    for known in KNOWN_ERRORS:
        if any(re.search(pattern, text) for pattern in known.patterns):
            return f"{known.cause} {known.action}"
    return ""


def _explain_os_error(error: OSError) -> str:
    details = ", ".join(str(part) for part in (error.strerror, error.filename) if part)
    for numbers, sentence in OS_ERRORS:
        if error.errno in numbers:
            return sentence.format(details=details)
    return OTHER_OS_ERROR.format(details=details)


def without_secrets(text: str) -> str:
    """Replaces tokens and passwords."""
    for name in SECRET_VARIABLES:
        secret = os.environ.get(name, "")
        if len(secret) >= MIN_SECRET_LENGTH:
            text = text.replace(secret, f"<{name}>")
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "<token>", text)
    credentials = r"(?i)(bearer |basic |token[=:] ?|password[=:] ?)[^\s\"',]+"
    text = re.sub(credentials, r"\1<secret>", text)
    return re.sub(r"://[^/\s@]+@", "://<secret>@", text)


def redacted(text: str) -> str:
    """Replaces secrets, the home folder and the names of users in paths."""
    homes = {str(Path.home()), os.path.expanduser("~"), os.environ.get("USERPROFILE", "")}
    # The longest first: one home can be the start of another. A home of "/" or "C:" is skipped.
    for home in sorted(homes, key=len, reverse=True):
        if len(home) > 2:
            text = text.replace(home, "~")
    user_in_path = r"((?:/home|/Users)/|[A-Z]:\\Users\\)[^/\\\s:\"']+"
    return re.sub(user_in_path, r"\1<user>", without_secrets(text))


def environment() -> str:
    """Returns the versions of the system and the libraries, and the GPU if torch is loaded."""
    lines = [f"{platform.platform()}, Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    # Importing torch here could fail for the same reason that is being reported.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] / 2**30
        lines.append(
            f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {free:.1f} GB free"
        )
    return "\n".join(lines)


def write_report(folder: Path, sentence: str, error: BaseException | None = None) -> None:
    """Writes report.txt into the run folder, without secrets.

    It contains the sentence, the traceback, the environment, the settings and the end of the log.
    """
    sections = {
        "What happened": sentence,
        "Traceback": "".join(traceback.format_exception(error)) if error else "",
        "Environment": environment(),
        "Settings": (folder / "run.toml").read_text(encoding="utf-8", errors="replace"),
        f"Last {LOG_LINES} lines of the log": _end_of_log(folder),
    }
    parts = []
    for title, content in sections.items():
        if content.strip():
            parts.append(f"{title}\n{'-' * len(title)}\n{content.strip()}")
    text = "\n\n".join(parts)
    atomic_write(folder / REPORT_FILE, f"{redacted(text)}\n")


def _end_of_log(folder: Path) -> str:
    log = folder / "log.txt"
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])
