"""Errors as one sentence with cause and cure, and as a report that can be shown to others."""

import errno
import os
import platform
import re
import sys
import traceback
from importlib import metadata
from pathlib import Path

from trainer.errors import TrainerError
from trainer.runs.atomic_files import FULL, READ_ONLY, atomic_write

NAME = "report.txt"
LOG_LINES = 200
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
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "ATELIER_AUTH")
KEPT = "The last state is kept."

KNOWN: list[tuple[str, str]] = [
    (r"MPS backend out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|can't allocate memory|not enough memory|out of memory",
     "Memory ran out. Close other programs that use the device, or choose a smaller dataset.resolution."),
    (r"no kernel image is available|not compatible with the current PyTorch|sm_\d+ is not compatible",
     "This torch was not built for this GPU. Install the torch edition of your GPU's CUDA version (pytorch.org, Get started)."),
    (r"Found no NVIDIA driver|driver version is insufficient|NVIDIA driver on your system is too old",
     "The NVIDIA driver is missing or too old for this torch. Update the driver, and restart the machine."),
    (r"Torch not compiled with CUDA enabled", "This torch has no CUDA. Install the CUDA edition of torch, or train on the CPU."),
    (r"CUDA error: (unspecified launch failure|an illegal memory access|device-side assert|uncorrectable ECC|unknown error)|CUDA error: the launch timed out",
     "The GPU failed in the midst of its work (overclocking, heat, a driver fault). Restart the machine, then press Resume."),
    (r"CUDNN_STATUS|cuDNN error|CUBLAS_STATUS",
     "A library of the GPU failed, most often for want of its memory or after a driver update. Close other programs, restart, and press Resume."),
    (r"memory_efficient_attention|xFormers|xformers",
     "The installed xformers does not fit torch or the GPU. Uninstall it (pip uninstall xformers): torch's own attention is then used."),
    (r"bitsandbytes|libbitsandbytes|CUDA Setup failed", "bitsandbytes does not work here. Set training.optimizer to adamw."),
    (r"unscale FP16 gradients", "The adapter is in half precision, which cannot be trained. Set base.precision to bf16 or fp32."),
    (r"GatedRepo|403 Client Error|Access to model .* is restricted|gated",
     "The base model asks for its licence to be accepted. Accept it on its Hugging Face page, sign in with `hf auth login`, and try again."),
    (r"RepositoryNotFound|401 Client Error|Repository Not Found|404 Client Error|EntryNotFound|RevisionNotFound",
     "Hugging Face has no such model, or it is private. Check base.model and base.revision, and sign in with `hf auth login`."),
    (r"SSLError|CERTIFICATE_VERIFY_FAILED", "The connection is not trusted: a proxy or a wrong clock. Check both, or give a model folder on this machine."),
    (r"LocalEntryNotFound|ConnectionError|MaxRetryError|NameResolutionError|ConnectTimeout|ReadTimeout|Network is unreachable|offline mode",
     "The network cannot be reached. Check it, or give the path of a model folder on this machine."),
    (r"HeaderTooLarge|InvalidHeader|MetadataIncompleteBuffer|SafetensorError|safetensors_rust",
     "A .safetensors file is damaged, most often by a download that was cut off. Download it again."),
    (r"UnpicklingError|invalid load key|weights_only", "A file is a pickle, which can run code when opened. Convert it to .safetensors first."),
    (r"size mismatch for|Missing key\(s\) in state_dict|Error\(s\) in loading state_dict",
     "Weights and configuration of the model do not belong together. Download the whole model again."),
    (r"Expected all tensors to be on the same device|should be the same device|mat1 and mat2 (shapes|must have the same dtype)",
     "Parts of the model do not fit each other. Please report this, with the report."),
    (r"DecompressionBomb|cannot identify image file|image file is truncated|broken data stream",
     "A picture is damaged or too large. Look at the Dataset tab, which names it, and take it out."),
    (r"UnicodeDecodeError|UnicodeEncodeError|codec can't", "A text is not UTF-8. Save the captions and settings as UTF-8."),
    (r"DLL load failed|undefined symbol|cannot open shared object file|ImportError|ModuleNotFoundError|numpy.dtype size changed",
     "An installed library is missing or does not fit the others. Install again: pip install -c constraints.txt -e ."),
    (r"RecursionError|maximum recursion depth", "A file is nested too deeply to be read; it is damaged or hostile. Take it out."),
    (r"BrokenPipeError|Broken pipe|EOFError", "Another process ended early. Press Resume."),
]  # fmt: skip
"""What the libraries are known to say -> cause and cure (from some hundred public threads about such trainers)."""

ERRNO: list[tuple[tuple[int, ...], str]] = [
    (FULL, "The disk is full ({what}). Make room, and press Resume."),
    (
        READ_ONLY,
        "There is no permission to write or read ({what}). Give it, or choose another folder with $ATELIER_OUTPUTS.",
    ),
    ((errno.ENOENT,), "A file is gone ({what}). Put it back, and press Resume."),
    (
        (errno.EMFILE, errno.ENFILE),
        "Too many files are open ({what}). Close other programs, or raise the limit (ulimit -n).",
    ),
    (
        (errno.EIO, errno.ESTALE, errno.ENOTCONN),
        "The disk or the network drive fails ({what}). Check it; work on a local disk.",
    ),
    ((errno.ENAMETOOLONG,), "A name is too long ({what}). Shorten it."),
]


def explain(error: BaseException) -> str:
    """One sentence or two: the cause, and what to do. Errors of our own say it themselves."""
    if isinstance(error, TrainerError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{KNOWN[0][1]} {KEPT}"
    if isinstance(error, OSError) and error.errno is not None:
        what = ", ".join(str(part) for part in (error.strerror, error.filename) if part)
        sentence = next(
            (text for numbers, text in ERRNO if error.errno in numbers),
            "A file could not be read or written ({what}).",
        )
        return f"{sentence.format(what=what)} {KEPT}"
    said = f"{type(error).__name__}: {error}"
    for pattern, sentence in KNOWN:
        if re.search(pattern, said):
            return f"{sentence} {KEPT}"
    return (
        f"Something went wrong inside the trainer ({type(error).__name__}: {str(error)[:200]}). "
        f"{KEPT} Press Resume to try again; the report has the details."
    )


def without_secrets(text: str) -> str:
    """Tokens and passwords out."""
    for name in SECRETS:
        if len(os.environ.get(name, "")) > 3:
            text = text.replace(os.environ[name], f"<{name}>")
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "<token>", text)
    text = re.sub(r"(?i)(bearer |basic |token[=:] ?|password[=:] ?)[^\s\"',]+", r"\1<secret>", text)
    return re.sub(r"://[^/\s@]+@", "://<secret>@", text)


def redacted(text: str) -> str:
    """Secrets and the person's home folder out."""
    homes = {str(Path.home()), os.path.expanduser("~"), os.environ.get("USERPROFILE", "")}
    for home in sorted((home for home in homes if len(home) > 2), key=len, reverse=True):
        text = text.replace(home, "~")
    return re.sub(
        r"((?:/home|/Users)/|[A-Z]:\\Users\\)[^/\\\s:\"']+", r"\1<user>", without_secrets(text)
    )


def environment() -> str:
    lines = [f"{platform.platform()}, Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        lines.append(
            f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {torch.cuda.mem_get_info()[0] / 2**30:.1f} GB free"
        )
    return "\n".join(lines)


def write_report(folder: Path, sentence: str, error: BaseException | None = None) -> None:
    """Writes report.txt into the run folder: the sentence, the traceback, the environment, the settings and the end of the log."""
    log = folder / "log.txt"
    lines = (
        log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        if log.is_file()
        else []
    )
    sections = {
        "What happened": sentence,
        "Traceback": "".join(traceback.format_exception(error)) if error else "",
        "Environment": environment(),
        "Settings": (folder / "run.toml").read_text(encoding="utf-8", errors="replace"),
        f"Last {LOG_LINES} lines of the log": "\n".join(lines),
    }
    text = "\n\n".join(
        f"{title}\n{'-' * len(title)}\n{content.strip()}"
        for title, content in sections.items()
        if content.strip()
    )
    atomic_write(folder / NAME, redacted(text) + "\n")
