"""Writes captions with models: a sentence, tags, or both for each image.

    BLIP, BLIP-2, GIT   one sentence
    Florence-2          several sentences, with the task in `TASK_PROMPTS`
    WD14 taggers        tags, from `model.onnx` and `selected_tags.csv`

A captioning job runs in its own process and is followed and stopped through files:

    DATASET/.atelier/captioning/events.jsonl   what the job has done, one event per line
    DATASET/.atelier/captioning/stop           stops the job after the current image
    DATASET/.atelier/captioning/.lock          held while the job runs

All captions of a job are one entry in the history, so one undo removes them. Models are read from
a folder or downloaded from Hugging Face. Their code is never executed, and weights must be
safetensors or ONNX. Importing this module does not import torch.
"""

import csv
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.curation import caption_edits, history
from trainer.data.dataset_files import relative
from trainer.data.images import open_image
from trainer.data.scan import DatasetItem, scan_dataset
from trainer.errors import ModelError, TrainerError
from trainer.models.cpu_threads import available_cores, set_by_person, use_threads_for
from trainer.runs import run_lock, run_requests
from trainer.runs.events import Captioned, CaptionsDone, EventLog, Failed, Progress, Warned

TASK_PROMPTS = {"florence": "<MORE_DETAILED_CAPTION>"}
"""The prompt of models whose `config.model_type` starts with the key. Other models need none."""

MAX_SENTENCE_TOKENS = 75
MAX_IMAGE_SIDE = 1024  # pixels; models reduce the image further
DEFAULT_TAGGER_SIDE = 448  # pixels; used if the ONNX file leaves the input size open

# Categories in `selected_tags.csv`; 0 is a general tag.
CHARACTER = 4
RATING = 9

EMOTICONS = frozenset((
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9",
    ">_o", "@_@", "^_^", "o_o", "u_u", "x_x",
))  # fmt: skip
"""Tags in which an underscore is not a space."""

SENTENCE_MODEL_FILES = ("*.json", "*.txt", "*.safetensors", "*.model")
TAGGER_FILES = ("model.onnx", "selected_tags.csv")
COMPLETE_DOWNLOADS = (
    TAGGER_FILES,
    ("config.json", "model.safetensors"),
    ("config.json", "model.safetensors.index.json"),
)
"""A model is in the Hugging Face cache if all files of one of these rows are."""

Describe = Callable[[Image.Image], str]
"""Returns the description of an RGB image, or "" if the model has none."""

Report = Callable[[str], None]
"""Receives a line of progress for the terminal."""


@dataclass(frozen=True)
class CaptionRequest:
    """The models and options of a captioning job."""

    model: str = ""
    """Folder or Hugging Face id of a model that writes sentences; empty for none."""
    tagger: str = ""
    """Folder or Hugging Face id of a tagger; its tags follow the sentence. Empty for none."""
    prefix: str = ""
    """Text in front of each caption."""
    overwrite: bool = False
    """Also replace existing captions."""
    threshold: float = 0.35
    """Tags with a lower score are dropped."""
    character_threshold: float = 0.85
    """The threshold for names of characters."""
    blacklist: tuple[str, ...] = ()
    """Tags that are never written."""


def ignore_report(line: str) -> None:
    """Discards a line of progress."""


def job_folder(dataset: Path) -> Path:
    """Returns the folder of a dataset's captioning job."""
    return history.own_folder(dataset) / "captioning"


def caption_dataset(dataset: Path, request: CaptionRequest, report: Report = ignore_report) -> int:
    """Writes captions for the images of a dataset and returns how many it wrote.

    An image that a model fails on is skipped with a warning. Raises `StateError` if a job is
    already running and `ModelError` if a model cannot be loaded.
    """
    folder = job_folder(dataset)
    folder.mkdir(exist_ok=True)
    lock = run_lock.acquire(folder)
    (folder / "events.jsonl").unlink(missing_ok=True)
    run_requests.withdraw(folder, "stop")
    log = EventLog(folder / "events.jsonl")
    try:
        return _caption_all(dataset, request, folder, log, report)
    except TrainerError as error:
        log.append(Failed(str(error)))
        raise
    finally:
        lock.release()


def _caption_all(
    dataset: Path, request: CaptionRequest, folder: Path, log: EventLog, report: Report
) -> int:
    items, _ = scan_dataset(dataset)
    chosen = [item for item in items if request.overwrite or not item.caption]
    log.append(Progress("loading", 0, len(chosen)))
    models = load_models(request, report)

    label = f"Captions by {' and '.join(filter(None, (request.model, request.tagger)))}"
    job = f"captioning {time.time_ns()}"  # edits of one job merge into one history entry
    written, stopped = 0, False
    for done, item in enumerate(chosen):
        log.append(Progress("captioning", done, len(chosen)))
        stopped = run_requests.requested(folder, "stop")
        if stopped:
            break
        file = relative(item.path, dataset)
        try:
            caption = describe(item, models, request)
        except TrainerError as error:
            log.append(Warned(f"{file} was skipped: {error}"))
            continue
        if not caption:
            log.append(Warned(f"{file} was skipped: the model returned an empty caption."))
            continue
        edit = caption_edits.caption_edit(item.path, caption)
        written += history.apply(dataset, label, [edit], merge=job)
        log.append(Captioned(file, caption))
        report(f"{file}: {caption}")
    log.append(CaptionsDone(written, len(items) - len(chosen), stopped))
    return written


def describe(item: DatasetItem, models: Sequence[Describe], request: CaptionRequest) -> str:
    """Returns the caption of one image: the prefix and each model's text, joined with commas."""
    image, _ = open_image(item.path)
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE), Image.Resampling.LANCZOS)
    texts = [model(image) for model in models]
    return caption_edits.prepend(request.prefix)(", ".join(filter(None, texts)))


# Models


def load_models(request: CaptionRequest, report: Report = ignore_report) -> list[Describe]:
    """Downloads and loads the models of a request. Raises `ModelError` if it names none."""
    if not request.model and not request.tagger:
        raise ModelError(
            "No captioning model is given: choose a model that writes sentences, a tagger, or both."
        )
    models: list[Describe] = []
    if request.model:
        models.append(load_sentence_model(fetch(request.model, report)))
    if request.tagger:
        models.append(load_tagger(fetch(request.tagger, report), request))
    return models


def load_sentence_model(folder: Path) -> Describe:
    """Loads a model that writes sentences, on the device that training would use.

    Raises `ModelError` if the folder does not contain such a model.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from trainer.models import libraries
    from trainer.models.device import choose_device

    libraries.configure_libraries()
    device = choose_device()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype=dtype
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{folder.name} is not a captioning model that can be used here ({_reason(error)}): "
            "choose a BLIP or Florence-2."
        ) from error
    # An image of 384 pixels has 24 x 24 patches.
    use_threads_for(model, device, 24)
    model.to(device).eval()
    prompts = [
        prompt for kind, prompt in TASK_PROMPTS.items() if model.config.model_type.startswith(kind)
    ]
    text = {"text": prompts[0]} if prompts else {}

    def describe(image: Image.Image) -> str:
        inputs = processor(images=image, return_tensors="pt", **text).to(device, model.dtype)
        with torch.no_grad():
            ids = model.generate(
                **inputs, max_new_tokens=MAX_SENTENCE_TOKENS, num_beams=3, do_sample=False
            )
        sentence: str = processor.batch_decode(ids, skip_special_tokens=True)[0]
        return sentence.strip()

    return describe


def load_tagger(folder: Path, request: CaptionRequest) -> Describe:
    """Loads a WD14 tagger, which returns its tags in order of falling score.

    `selected_tags.csv` has the name and category of each output of `model.onnx`. Raises
    `ModelError` if onnxruntime is not installed or the folder does not contain a tagger.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            'Taggers need onnxruntime, which is not installed: pip install "lora-atelier[tagger]".'
        ) from error
    try:
        session: Any = onnxruntime.InferenceSession(
            folder / "model.onnx", _onnx_options(), providers=["CPUExecutionProvider"]
        )
        with open(folder / "selected_tags.csv", encoding="utf-8", newline="") as file:
            tags = [(row["name"], int(row["category"])) for row in csv.DictReader(file)]
    except Exception as error:  # onnxruntime's exception classes are not part of its public API
        raise ModelError(
            f"{folder.name} is not a tagger that can be used here ({_reason(error)}): "
            "choose a WD14 tagger."
        ) from error
    source = session.get_inputs()[0]
    side = source.shape[1] if isinstance(source.shape[1], int) else DEFAULT_TAGGER_SIDE

    def describe(image: Image.Image) -> str:
        scores = session.run(None, {source.name: tagger_input(image, side)})[0][0]
        if len(scores) != len(tags):
            raise ModelError(
                f"The tagger has {len(scores)} outputs but {len(tags)} tags: "
                "download model.onnx and selected_tags.csv again, from the same version."
            )
        return ", ".join(choose_tags(scores, tags, request))

    return describe


def _onnx_options() -> Any:
    """Returns options for ONNX Runtime: a thread per core, and waiting threads that do not spin."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    count = os.environ.get(set_by_person(), "")
    options.intra_op_num_threads = int(count) if count.isdecimal() else available_cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def choose_tags(
    scores: Sequence[float], tags: Sequence[tuple[str, int]], request: CaptionRequest
) -> list[str]:
    """Returns the names of the tags above their threshold, the highest score first.

    `tags` holds the name and category of each score. Ratings are never returned.
    """
    blacklist = {_spaced(tag) for tag in request.blacklist}
    thresholds = {CHARACTER: request.character_threshold, RATING: float("inf")}
    chosen = []
    for score, (tag, category) in zip(scores, tags, strict=True):
        name = _spaced(tag)
        threshold = thresholds.get(category, request.threshold)
        if float(score) >= threshold and name not in blacklist:
            chosen.append((float(score), name))
    return [name for _, name in sorted(chosen, reverse=True)]


def tagger_input(image: Image.Image, side: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Returns an image as WD14 taggers expect it: [1, side, side, 3] float32, BGR, 0 to 255.

    The image is padded to a square with white.
    """
    square = Image.new("RGB", (max(image.size),) * 2, (255, 255, 255))
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.ascontiguousarray(pixels[None, :, :, ::-1])


def _spaced(tag: str) -> str:
    """Returns a tag in lower case with spaces for underscores, except in emoticons."""
    tag = tag.strip().lower()
    return tag if tag in EMOTICONS else tag.replace("_", " ")


# Downloads


def download_bytes(model: str) -> int:
    """Returns how many bytes `fetch` would download: 0 if the model is on this machine.

    Sends a request to Hugging Face. Raises `ModelError` if the model does not exist.
    """
    if _local_folder(model):
        return 0
    return sum(size for _, size in _remote_files(model))


def fetch(model: str, report: Report = ignore_report) -> Path:
    """Returns the folder of a model, downloading it if it is not on this machine yet.

    Raises `ModelError` if it cannot be downloaded.
    """
    folder = _local_folder(model)
    if folder:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    files = _remote_files(model)
    report(f"Downloading {model}: {sum(size for _, size in files) / 1e6:.0f} MB.")
    try:
        return Path(snapshot_download(model, allow_patterns=[name for name, _ in files]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(_download_failed(model, error)) from error


def _local_folder(model: str) -> Path | None:
    """Returns the folder that `model` names, or its folder in the Hugging Face cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ModelError(
            f"{model} is neither a folder nor a Hugging Face id such as "
            "Salesforce/blip-image-captioning-base."
        )
    for names in COMPLETE_DOWNLOADS:
        files = [try_to_load_from_cache(model, name) for name in names]
        if all(isinstance(file, str) for file in files):
            return Path(str(files[0])).parent
    return None


def _remote_files(model: str) -> list[tuple[str, int]]:
    """Returns the name and size in bytes of each file that has to be downloaded."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        siblings = HfApi().model_info(model, files_metadata=True, timeout=15).siblings or []
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(_download_failed(model, error)) from error
    sizes = {file.rfilename: file.size or 0 for file in siblings}
    patterns = TAGGER_FILES if "selected_tags.csv" in sizes else SENTENCE_MODEL_FILES
    needed = []
    for name, size in sizes.items():
        is_needed = any(fnmatch(name, pattern) for pattern in patterns)
        if is_needed and "/" not in name:  # subfolders hold other formats of the same weights
            needed.append((name, size))
    if not any(name.endswith((".safetensors", ".onnx")) for name, _ in needed):
        raise ModelError(
            f"{model} has no weights in a safe format (safetensors or ONNX): choose another model."
        )
    return needed


def _download_failed(model: str, error: Exception) -> str:
    return (
        f"{model} is not on this machine and cannot be downloaded ({_reason(error)}): "
        "go online, check its name, or give its folder."
    )


def _reason(error: Exception) -> str:
    """Returns the first line of an error, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
