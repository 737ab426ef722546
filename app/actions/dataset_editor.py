"""What the Dataset tab shows and does, as plain data: pages of pictures, the doctor's findings, changes to captions, crops and masks.

The last look at each dataset is kept in memory, so that turning a page or saving a caption reads nothing but that page.
"""

import base64
import binascii
import contextvars
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from app.actions import datasets
from trainer import config
from trainer.curation import caption_edits, crop_edits, fixes, history
from trainer.curation.history import Edit
from trainer.data import captions, checks, images, token_count
from trainer.data import scan as reading
from trainer.data.issues import Issue
from trainer.errors import ConfigError, DatasetError, TrainerError
from trainer.models import model_files

PAGE = 60  # cards at once, however many pictures there are
SHOWN_FILES, SHOWN_TAGS, SHOWN_CHANGES = 100, 80, 12
PATIENCE = 1.0  # seconds that a look may take before its progress is shown instead
MOST_MASK_BYTES = 2**21

TITLES = {
    "unreadable": "Cannot be used",
    "misnamed": "Names without their ending",
    "duplicate": "The same picture twice",
    "near-duplicate": "Nearly the same",
    "small": "Smaller than the resolution",
    "mixed-sizes": "Small and large ones mixed",
    "narrow": "Very long or narrow",
    "blurred": "Blurred",
    "flat": "Little contrast",
    "animated": "Animated",
    "odd-picture": "Perhaps damaged",
    "rotated": "Turned upright",
    "transparent": "Transparent",
    "converted": "Colours converted",
    "no-caption": "Without a caption",
    "long-caption": "Captions too long",
    "odd-caption": "Captions in another encoding",
    "unread-caption": "Captions not read",
    "several-captions": "Several captions for one picture",
    "orphan": "Captions and masks without a picture",
    "case-twin": "Names that differ in capitals only",
    "no-trigger": "Without the trigger word",
    "shared-tag": "The same tag everywhere",
}
ORDER = {"error": 0, "warning": 1, "note": 2}


@dataclass
class Look:
    """One dataset as it was last read."""

    settings: config.Dataset
    base: str
    signature: int = 0
    done: int = 0
    total: int = 0
    items: list[reading.DatasetItem] = field(default_factory=list)
    findings: list[Issue] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)
    error: str = ""
    ended: threading.Event = field(default_factory=threading.Event)


_looks: dict[Path, Look] = {}
_starting = threading.Lock()


def settings_of(data: dict) -> tuple[config.Dataset, str]:
    """The settings of the Train tab as the browser hands them back, and the base; where they are none, the defaults."""
    given = data.get("settings")
    given = given if isinstance(given, dict) else {}
    names = (
        "resolution",
        "bucket_step",
        "max_aspect",
        "allow_upscale",
        "crop",
        "trigger",
        "caption_tokens",
    )
    try:
        return config.from_dict(
            {"dataset": {name: given[name] for name in names if name in given}}
        ).dataset, str(given.get("base") or "")
    except ConfigError:
        return config.Dataset(), ""


def _tokenizer(base: str) -> Path | None:
    try:
        folder = model_files.locate(config.Base(model=base or config.EMBEDDED))
    except TrainerError:
        return None
    return folder / "tokenizer" if folder and (folder / "tokenizer").is_dir() else None


def look(data: dict, again: bool = True) -> Look:
    """The dataset as it is now, or, not `again`, as it was last read. A look that takes long goes on in the background."""
    folder = datasets.resolve(data.get("dataset"))
    settings, base = settings_of(data)
    with _starting:
        known = _looks.get(folder)
        fits = known is not None and (known.settings, known.base) == (settings, base)
        if (
            known
            and fits
            and (
                not again
                or not known.ended.is_set()
                or known.signature == datasets.signature(folder)
            )
        ):
            current = known
        else:
            current = _looks[folder] = Look(settings, base, datasets.signature(folder))
            # In this request's context: whose outputs folder it is, is known there.
            threading.Thread(
                target=contextvars.copy_context().run, args=(_read, folder, current), daemon=True
            ).start()
    current.ended.wait(PATIENCE)
    return current


def _read(folder: Path, current: Look) -> None:
    def progress(done: int, total: int) -> None:
        current.done, current.total = done, total

    try:
        settings = current.settings
        current.items, current.findings = reading.scan_dataset(
            folder,
            resolution=settings.resolution,
            trigger=settings.trigger,
            tokenizer=_tokenizer(current.base),
            caption_tokens=settings.caption_tokens,
            progress=progress,
        )
        current.captions = _captions(folder, (item.path for item in current.items))
    except (TrainerError, OSError) as error:
        is_empty = (
            not any(path.is_file() for path in reading.files_of(folder))
            if folder.is_dir()
            else True
        )
        current.error = "" if is_empty else str(error)
    finally:
        current.ended.set()


def _captions(folder: Path, chosen: Iterable[Path]) -> dict[str, str]:
    """As they are on the disk now, by the names that the browser has for the pictures and gives back."""
    metadata = captions.Metadata(folder, [])
    return {
        captions.relative(path, folder): captions.caption_of(
            path, folder, metadata, separate_lines=True
        )[0]
        for path in chosen
    }


# What is shown


def view(data: dict) -> dict:
    """A page of pictures and all around it. `filter`: {"kind": ...}, {"tag": ...} or {"text": ...}; `page` from 0."""
    name = data.get("dataset")
    folder = datasets.resolve(name)
    shown = {"name": name, "examples": datasets.examples(), "cards": [], "groups": [], "total": 0}
    current = look(data, again=not data.get("turn"))
    if not current.ended.is_set():
        return shown | {"scanning": {"done": current.done, "total": current.total}}
    if current.error:
        return shown | {"trouble": current.error, "undo": _undo(folder)}
    wanted = [item for item in current.items if _passes(folder, current, item, data.get("filter"))]
    pages = max(1, -(-len(wanted) // PAGE))
    page = min(max(int(data.get("page") or 0), 0), pages - 1)
    part = wanted[page * PAGE : (page + 1) * PAGE]
    return shown | {
        "total": len(current.items),
        "matching": len(wanted),
        "page": page,
        "pages": pages,
        "cards": _cards(str(name), folder, current, part),
        "verdict": checks.verdict(len(current.items), current.findings) if current.items else "",
        "groups": groups(current.findings),
        "bare": sum(not caption for caption in current.captions.values()),
        "left_out": sum(finding.level == "error" for finding in current.findings),
        "tags": caption_edits.tag_counts(current.captions.values())[:SHOWN_TAGS],
        "undo": _undo(folder),
        "limit": current.settings.caption_tokens,
    }


def _undo(folder: Path) -> str:
    entry = history.last(folder)
    return entry.label if entry else ""


def _passes(folder: Path, current: Look, item: reading.DatasetItem, wanted: object) -> bool:
    if not isinstance(wanted, dict) or not wanted:
        return True
    file = captions.relative(item.path, folder)
    caption = current.captions.get(file, "")
    if tag := wanted.get("tag"):
        return str(tag).casefold() in (other.casefold() for other in checks.tags_of(caption))
    if kind := wanted.get("kind"):
        stem = captions.stem_of(Path(file)).as_posix()
        return any(
            f.kind == kind and (f.file == file or captions.stem_of(Path(f.file)).as_posix() == stem)
            for f in current.findings
        )
    text = str(wanted.get("text") or "").casefold()
    return text in file.casefold() or text in caption.casefold()


def _cards(name: str, folder: Path, current: Look, items: list[reading.DatasetItem]) -> list[dict]:
    lengths = token_count.counter(_tokenizer(current.base))(
        [current.captions.get(captions.relative(item.path, folder), "") for item in items]
    )
    cards = []
    for item, length in zip(items, lengths, strict=True):
        file = captions.relative(item.path, folder)
        key = datasets.key_of(item.path.relative_to(folder).as_posix())
        try:
            version = item.path.stat().st_mtime_ns
        except OSError:  # gone since the last look
            continue
        cards.append({
            "file": file,
            "caption": current.captions.get(file, ""),
            "tokens": length,
            "size": f"{item.width} × {item.height}",
            "ratio": item.width / item.height,
            "src": f"/thumb/{name}/{key}?v={version}",
            "large": f"/thumb/{name}/{key}?large=1&v={version}",
            "mask": _mask_address(name, key, item.mask),
            "repeats": item.repeats,
            **datasets.crop_shown(item, current.settings),
        })  # fmt: skip
    return cards


def _mask_address(name: object, key: str, mask: Path | None) -> str:
    """Where the browser finds the mask of a picture, another address for each content; empty where there is none."""
    if mask is None or not mask.exists():
        return ""
    return f"/mask/{name}/{key}?v={mask.stat().st_mtime_ns}"


def groups(findings: list[Issue]) -> list[dict]:
    """The findings by kind, the worst first, each kind with its cures."""
    by_kind: dict[str, list[Issue]] = {}
    for finding in findings:
        by_kind.setdefault(finding.kind or finding.message, []).append(finding)
    shown = [
        {
            "kind": found[0].kind,
            "title": TITLES.get(kind, found[0].message if len(found) == 1 else "Good to know"),
            "level": min((finding.level for finding in found), key=ORDER.__getitem__),
            "count": len(found),
            "files": [
                {"file": finding.file, "text": finding.message} for finding in found[:SHOWN_FILES]
            ],
            "cures": [
                {"name": name, "label": fixes.FIXES[name].label}
                for name in fixes.FIXES_FOR_KIND.get(kind, ())
            ],
        }
        for kind, found in by_kind.items()
    ]
    return sorted(shown, key=lambda group: (ORDER[group["level"]], -group["count"]))


def crops_overview(data: dict) -> dict:
    """How many pictures are trained at each size."""
    current = look(data, again=False)
    counts = Counter(
        reading.crop_of(item, current.settings).bucket
        for item in current.items
        for _ in range(item.repeats)
    )
    rows = [
        {"size": f"{width} × {height}", "count": count, "ratio": width / height}
        for (width, height), count in sorted(counts.items())
    ]
    return {
        "buckets": rows,
        "crop": current.settings.crop,
        "resolution": current.settings.resolution,
    }


# What is done


def save_caption(data: dict) -> dict:
    picture = datasets.resolve_image(data.get("dataset"), data.get("file"))
    folder, file = datasets.resolve(data.get("dataset")), str(data.get("file"))
    text = str(data.get("caption", ""))
    if len(text.encode("utf-8", "replace")) > captions.MAX_CAPTION_BYTES:
        raise DatasetError(
            f"A caption may have {captions.MAX_CAPTION_BYTES >> 20} MB at most; shorten it."
        )
    history.apply(
        folder,
        f"The caption of {file}",
        [caption_edits.caption_edit(picture, text)],
        merge=f"caption {file}",
    )
    caption = captions.read_caption(picture, separate_lines=True)[0]
    current = _looks.get(folder)
    if current is not None:
        current.captions[file] = caption
    return {
        "caption": caption,
        "tokens": token_count.counter(_tokenizer(settings_of(data)[1]))([caption])[0],
        "undo": _undo(folder),
    }


def _operation(data: dict) -> caption_edits.Operation:
    text, find, replacement = (str(data.get(key) or "") for key in ("text", "find", "replacement"))
    match data.get("operation"):
        case "prepend":
            return caption_edits.prepend(text)
        case "append":
            return caption_edits.append(text)
        case "replace":
            return caption_edits.replace(find, replacement, bool(data.get("pattern")))
        case "rename":
            return caption_edits.rename_tag(find, replacement)
        case "remove":
            return caption_edits.remove_tag(find)
        case "sort":
            return caption_edits.sort_tags(1 if data.get("keep_first") else 0)
        case "deduplicate":
            return caption_edits.deduplicate
    raise DatasetError("There is no such change; reload the page.")


def _planned(data: dict) -> tuple[Path, list[caption_edits.Change]]:
    folder = datasets.resolve(data.get("dataset"))
    current = look(data, again=False)
    current.ended.wait()
    known = (
        (item.path, current.captions.get(captions.relative(item.path, folder), ""))
        for item in current.items
    )
    return folder, caption_edits.plan(known, _operation(data), str(data.get("only") or ""))


def preview_edit(data: dict) -> dict:
    """What a change of all captions would do, without doing it."""
    folder, changes = _planned(data)
    rows = [
        {"file": captions.relative(c.picture, folder), "before": c.before, "after": c.after}
        for c in changes[:SHOWN_CHANGES]
    ]
    return {"count": len(changes), "changes": rows}


def apply_edit(data: dict) -> dict:
    folder, changes = _planned(data)
    if list(_captions(folder, (c.picture for c in changes)).values()) != [
        c.before for c in changes
    ]:
        look(
            data
        )  # another program wrote captions meanwhile: what it wrote is changed, not replaced
        folder, changes = _planned(data)
    return {
        "changed": history.apply(
            folder, f"Changed {len(changes)} captions", caption_edits.edits(changes)
        )
    }


def cure(data: dict) -> dict:
    """Applies a cure to all findings of a kind, or to that of one `file`."""
    folder = datasets.resolve(data.get("dataset"))
    current = look(data)
    current.ended.wait()
    kind, file = data.get("kind"), data.get("file")
    found = [
        finding
        for finding in current.findings
        if finding.kind == kind and (file is None or finding.file == file)
    ]
    return {
        "changed": fixes.apply(
            folder,
            found,
            str(data.get("cure")),
            _tokenizer(current.base),
            current.settings.caption_tokens,
        )
    }


def undo(data: dict) -> dict:
    label, kept = history.undo(datasets.resolve(data.get("dataset")))
    return {"label": label, "kept": kept}


def remove_picture(data: dict) -> dict:
    """Takes a picture, its captions and its mask out; undo brings them back."""
    picture = datasets.resolve_image(data.get("dataset"), data.get("file"))
    folder = datasets.resolve(data.get("dataset"))
    history.apply(folder, f"Removed {picture.name}", fixes.exclude(folder, [picture]))
    return {"ok": True, "undo": _undo(folder)}


def move_crop(data: dict) -> dict:
    """Moves the crop of a picture to a `centre` [x, y], or with none back to where the crop mode puts it."""
    picture, folder = (
        datasets.resolve_image(data.get("dataset"), data.get("file")),
        datasets.resolve(data.get("dataset")),
    )
    edit = crop_edits.move(folder, picture, data.get("centre"))
    history.apply(folder, f"Moved the crop of {picture.name}", [edit], merge=f"crop {picture.name}")
    current = look(data)
    current.ended.wait()
    item = next(item for item in current.items if item.path == picture)
    return datasets.crop_shown(item, current.settings) | {"undo": _undo(folder)}


def save_mask(data: dict) -> dict:
    """A painted mask as base64 of a PNG is put beside its picture; without one the mask is taken away."""
    picture, folder = (
        datasets.resolve_image(data.get("dataset"), data.get("file")),
        datasets.resolve(data.get("dataset")),
    )
    if not data.get("mask"):
        _, masks = reading.pair_masks(
            [
                path
                for path in reading.files_of(folder)
                if path.suffix.lower() in images.IMAGE_SUFFIXES
            ]
        )
        gone = [Edit(masks[picture], None)] if picture in masks else []
        history.apply(folder, f"Removed the mask of {picture.name}", gone)
    else:
        try:
            content = base64.b64decode(str(data["mask"]), validate=True)
        except (ValueError, binascii.Error):
            raise DatasetError("The mask did not arrive whole; save it again.") from None
        if len(content) > MOST_MASK_BYTES:
            raise DatasetError(
                "The mask is too large; paint it with fewer details, or upload it as a file."
            )
        return put_mask(data, content, Path("mask.png"))
    return {"mask": "", "undo": _undo(folder)}


def put_mask(data: dict, content: bytes, name: Path) -> dict:
    """Any picture becomes the mask of `file`; it must have the same shape."""
    picture, folder = (
        datasets.resolve_image(data.get("dataset"), data.get("file")),
        datasets.resolve(data.get("dataset")),
    )
    target = captions.stem_of(picture).with_name(
        captions.stem_of(picture).name + reading.MASK_ENDINGS[0]
    )
    mask = images.grey_png(content, name)
    (width, height), (mask_width, mask_height) = (
        images.image_size(picture),
        images.decode_image(mask, name)[0].size,
    )
    if abs(width / height - mask_width / mask_height) > 0.02 * width / height:
        raise DatasetError(
            f"The mask ({mask_width} x {mask_height}) has not the shape of the picture ({width} x {height})."
        )
    history.apply(folder, f"The mask of {picture.name}", [Edit(target, mask)])
    key = datasets.key_of(picture.relative_to(folder).as_posix())
    return {"mask": _mask_address(data.get("dataset"), key, target), "undo": _undo(folder)}
