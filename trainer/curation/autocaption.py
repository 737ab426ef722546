"""Captions written by models: sentences by BLIP, BLIP-2, GIT or Florence-2, tags by a tagger of the WD14 kind.

    DATASET/.atelier/captioning/events.jsonl   what the job did, one event a line
    DATASET/.atelier/captioning/stop           its presence asks the job to end after the picture at hand
    DATASET/.atelier/captioning/.lock          held by the job for life

The job is one change of the journal, whatever it wrote. Models come from a folder, or from Hugging Face when asked; no code
of theirs is run, and weights are safetensors or ONNX. Importing this module brings in no torch.
"""

import csv
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.curation import caption_edits, history
from trainer.data.captions import relative
from trainer.data.images import open_image
from trainer.data.scan import DatasetItem, scan_dataset
from trainer.errors import ModelError, TrainerError
from trainer.runs import run_lock, run_requests
from trainer.runs.events import Captioned, CaptionsDone, EventLog, Failed, Progress, Warned

FLORENCE_TASK = "<MORE_DETAILED_CAPTION>"
LONGEST = 75  # tokens of a sentence
RATING = 9  # category of the tags that rate a picture; 0 is general, 4 a character
CHARACTER = 4
FACES_OF_SIGNS = frozenset(
    (
        "0_0",
        "(o)_(o)",
        "+_+",
        "+_-",
        "._.",
        "<o>_<o>",
        "<|>_<|>",
        "=_=",
        ">_<",
        "3_3",
        "6_9",
        ">_o",
        "@_@",
        "^_^",
        "o_o",
        "u_u",
        "x_x",
    )
)  # keep their _
SENTENCE_FILES = ("*.json", "*.txt", "*.safetensors", "*.model")
TAGGER_FILES = ("model.onnx", "selected_tags.csv")

Describe = Callable[[Image.Image], str]


@dataclass(frozen=True)
class Wish:
    """What is asked of a captioning job."""

    model: str = ""
    """Folder or Hugging Face id of a model that writes sentences; empty for none."""
    tagger: str = ""
    """Folder or Hugging Face id of a tagger; its tags follow the sentence. Empty for none."""
    prefix: str = ""
    """Put in front of each caption."""
    overwrite: bool = False
    """Also for pictures that have a caption; else those keep it."""
    threshold: float = 0.35
    """Tags less sure than this are left out."""
    character_threshold: float = 0.85
    """The same for names of characters."""
    blacklist: tuple[str, ...] = ()
    """Tags that are never written."""


def job_folder(dataset: Path) -> Path:
    return history.own_folder(dataset) / "captioning"


def caption_dataset(dataset: Path, wish: Wish, say: Callable[[str], None] = lambda _: None) -> int:
    """Captions the pictures of a dataset. Returns how many captions were written; events say the rest.

    Raises `TrainerError` where no model can be had; a picture that a model fails on is a warning.
    """
    folder = job_folder(dataset)
    folder.mkdir(exist_ok=True)
    lock = run_lock.acquire(folder)
    (folder / "events.jsonl").unlink(missing_ok=True)
    run_requests.withdraw(folder, "stop")
    log = EventLog(folder / "events.jsonl")
    try:
        return _caption_all(dataset, wish, folder, log, say)
    except TrainerError as error:
        log.append(Failed(str(error)))
        raise
    finally:
        lock.release()


def _caption_all(
    dataset: Path, wish: Wish, folder: Path, log: EventLog, say: Callable[[str], None]
) -> int:
    items, _ = scan_dataset(dataset)
    wanted = [item for item in items if wish.overwrite or not item.caption]
    log.append(Progress("loading", 0, len(wanted)))
    describers = load(wish, say)
    written, change = 0, f"Captions by {' and '.join(filter(None, (wish.model, wish.tagger)))}"
    stopped, started = False, time.time_ns()
    for done, item in enumerate(wanted):
        log.append(Progress("captioning", done, len(wanted)))
        if stopped := run_requests.requested(folder, "stop"):
            break
        file = relative(item.path, dataset)
        try:
            caption = describe(item, describers, wish)
        except TrainerError as error:
            log.append(Warned(f"{file} was passed over: {error}"))
            continue
        if not caption:
            log.append(Warned(f"{file} was passed over: the model finds nothing to say about it."))
            continue
        edit = caption_edits.caption_edit(item.path, caption)
        written += history.apply(dataset, change, [edit], merge=f"captioning {started}")
        log.append(Captioned(file, caption))
        say(f"{file}: {caption}")
    log.append(CaptionsDone(written, len(items) - len(wanted), stopped))
    return written


def describe(item: DatasetItem, describers: Sequence[Describe], wish: Wish) -> str:
    """The caption of one picture."""
    image, _ = open_image(item.path)
    image.thumbnail((1024, 1024), Image.Resampling.LANCZOS)
    parts = [part for describer in describers if (part := describer(image))]
    return caption_edits.prepend(wish.prefix)(", ".join(parts))


# Models


def load(wish: Wish, say: Callable[[str], None] = lambda _: None) -> list[Describe]:
    """The models of a wish, ready. Raises `ModelError`."""
    if not wish.model and not wish.tagger:
        raise ModelError("Which model? Give one that writes sentences, a tagger, or both.")
    describers: list[Describe] = []
    if wish.model:
        describers.append(load_describer(fetch(wish.model, say)))
    if wish.tagger:
        describers.append(load_tagger(fetch(wish.tagger, say), wish))
    return describers


def load_describer(folder: Path) -> Describe:
    """A model that writes a sentence about a picture, on the device that training would take."""
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
            f"{folder.name} is no captioning model for use here ({_reason(error)}): choose a BLIP or Florence-2."
        ) from error
    model.to(device).eval()
    is_florence = model.config.model_type.startswith("florence")

    @torch.no_grad()
    def describe(image: Image.Image) -> str:
        given = {"text": FLORENCE_TASK} if is_florence else {}
        inputs = processor(images=image, return_tensors="pt", **given).to(device, model.dtype)
        ids = model.generate(**inputs, max_new_tokens=LONGEST, num_beams=3, do_sample=False)
        return processor.batch_decode(ids, skip_special_tokens=True)[0].strip()

    return describe


def load_tagger(folder: Path, wish: Wish) -> Describe:
    """A tagger of the WD14 kind: `model.onnx`, and `selected_tags.csv` with the name and category of each output."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            'Taggers need onnxruntime, which is not installed: pip install "lora-atelier[tagger]".'
        ) from error
    try:
        session: Any = onnxruntime.InferenceSession(
            folder / "model.onnx", providers=["CPUExecutionProvider"]
        )
        with open(folder / "selected_tags.csv", encoding="utf-8", newline="") as file:
            tags = [(row["name"], int(row["category"])) for row in csv.DictReader(file)]
    except (
        Exception
    ) as error:  # onnxruntime raises classes of its own that it does not name in public
        raise ModelError(
            f"{folder.name} is no tagger for use here ({_reason(error)}): choose one of the WD14 kind."
        ) from error
    source = session.get_inputs()[0]
    side = source.shape[1] if isinstance(source.shape[1], int) else 448
    never = {_words(tag) for tag in wish.blacklist}
    limits = {CHARACTER: wish.character_threshold, RATING: float("inf")}

    def describe(image: Image.Image) -> str:
        scores = session.run(None, {source.name: tagger_input(image, side)})[0][0]
        if len(scores) != len(tags):
            raise ModelError(
                f"The tagger has {len(scores)} outputs and {len(tags)} tags: its two files do not belong together."
            )
        named = [
            (float(score), _words(name), limits.get(kind, wish.threshold))
            for score, (name, kind) in zip(scores, tags, strict=True)
        ]
        sure = sorted(
            ((score, name) for score, name, limit in named if score >= limit), reverse=True
        )
        return ", ".join(name for _, name in sure if name not in never)

    return describe


def tagger_input(image: Image.Image, side: int) -> np.ndarray:
    """The picture as WD14 taggers were trained: padded to a square with white, BGR, 0 to 255, [1, side, side, 3] float32."""
    square = Image.new("RGB", (max(image.size),) * 2, (255, 255, 255))
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.ascontiguousarray(pixels[None, :, :, ::-1])


def _words(tag: str) -> str:
    tag = tag.strip().lower()
    return tag if tag in FACES_OF_SIGNS else tag.replace("_", " ")


# Getting them


def download_bytes(model: str) -> int:
    """What would have to be fetched for a model: 0 where it is on this machine. Asks Hugging Face; raises `ModelError`."""
    return 0 if _on_this_machine(model) else sum(size for _, size in _remote_files(model))


def fetch(model: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of a model, downloaded where it is not on this machine yet. Raises `ModelError`."""
    if found := _on_this_machine(model):
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    files = _remote_files(model)
    say(f"Downloading {model}: {sum(size for _, size in files) / 1e6:.0f} MB.")
    try:
        return Path(snapshot_download(model, allow_patterns=[name for name, _ in files]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(_no_download(model, error)) from error


def _on_this_machine(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ModelError(
            f"{model} is neither a folder nor a Hugging Face id such as Salesforce/blip-image-captioning-base."
        )
    for names in (
        TAGGER_FILES,
        ("config.json", "model.safetensors"),
        ("config.json", "model.safetensors.index.json"),
    ):
        found = [try_to_load_from_cache(model, name) for name in names]
        if all(isinstance(file, str) for file in found):
            return Path(str(found[0])).parent
    return None


def _remote_files(model: str) -> list[tuple[str, int]]:
    from fnmatch import fnmatch

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = [
            (file.rfilename, file.size or 0)
            for file in HfApi().model_info(model, files_metadata=True, timeout=15).siblings or []
        ]
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(_no_download(model, error)) from error
    likes = (
        TAGGER_FILES if any(name == "selected_tags.csv" for name, _ in files) else SENTENCE_FILES
    )
    wanted = [
        (name, size)
        for name, size in files
        if "/" not in name and any(fnmatch(name, like) for like in likes)
    ]
    if not any(name.endswith((".safetensors", ".onnx")) for name, _ in wanted):
        raise ModelError(
            f"{model} has no weights in a safe format (safetensors or ONNX): choose another model."
        )
    return wanted


def _no_download(model: str, error: Exception) -> str:
    return f"{model} is not on this machine and cannot be downloaded ({_reason(error)}): go online, check its name, or give its folder."


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
