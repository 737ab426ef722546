"""What the Dataset tab shows: pages of images, the issues of the dataset, and its sizes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.actions import dataset_images, dataset_scans, datasets
from app.actions.dataset_scans import DatasetScan
from app.actions.records import (
    BrowserData,
    BucketRow,
    CropsOverview,
    DatasetView,
    ImageCard,
    IssueGroup,
)
from trainer.curation import caption_edits, fixes, history
from trainer.data import captions, checks, dataset_files, token_count
from trainer.data import scan as dataset_scan
from trainer.data.issue import Issue

PAGE = 60  # images
MAX_FILES, MAX_TAGS = 100, 80

TITLES = {
    "unreadable": "Cannot be used",
    "misnamed": "Names without their ending",
    "duplicate": "The same image twice",
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
    "several-captions": "Several captions for one image",
    "orphan": "Captions and masks without an image",
    "case-twin": "Names that differ in capitals only",
    "no-trigger": "Without the trigger word",
    "shared-tag": "The same tag everywhere",
}
"""Titles of the kinds of issues."""
LEVELS = ("error", "warning", "note")
"""From the worst."""


def view(data: BrowserData) -> DatasetView:
    """Returns a page of images and everything about the dataset.

    Args:
        data: "dataset", "settings", "page" (from 0), and "filter": {"kind": ...} for images with
            an issue, {"tag": ...}, {"text": ...}, or nothing. "turn" only turns the page and does
            not look for changed files.
    """
    name = data.get("dataset")
    folder = datasets.resolve(name)
    shown: DatasetView = {
        "name": name,
        "examples": datasets.examples(),
        "cards": [],
        "groups": [],
        "total": 0,
    }
    current = dataset_scans.scan(data, again=not data.get("turn"))
    if not current.ended.is_set():
        return {**shown, "scanning": {"done": current.done, "total": current.total}}
    if current.error:
        return {**shown, "trouble": current.error, "undo": undo_label(folder)}
    items = _filtered(folder, current, data.get("filter"))
    pages = max(1, -(-len(items) // PAGE))
    page = min(max(int(data.get("page") or 0), 0), pages - 1)
    cards = _cards(str(name), folder, current, items[page * PAGE : (page + 1) * PAGE])
    total = len(current.items)
    return {
        **shown,
        "total": total,
        "matching": len(items),
        "page": page,
        "pages": pages,
        "cards": cards,
        "verdict": checks.verdict(total, current.issues) if total else "",
        "groups": groups(current.issues),
        "bare": sum(not caption for caption in current.captions.values()),
        "left_out": sum(issue.level == "error" for issue in current.issues),
        "tags": caption_edits.tag_counts(current.captions.values())[:MAX_TAGS],
        "undo": undo_label(folder),
        "limit": current.settings.caption_tokens,
    }


def undo_label(folder: Path) -> str:
    """Returns the label of the change that Undo would take back, "" if there is none."""
    entry = history.last(folder)
    return entry.label if entry else ""


# The images of a page


def _filtered(folder: Path, current: DatasetScan, wanted: object) -> list[dataset_scan.DatasetItem]:
    """Returns the images that match a filter. Any other value than a filter matches all."""
    if not isinstance(wanted, dict) or not wanted:
        return current.items
    return [item for item in current.items if _matches(folder, current, item, wanted)]


def _matches(
    folder: Path, current: DatasetScan, item: dataset_scan.DatasetItem, wanted: Mapping[str, object]
) -> bool:
    file = dataset_files.relative(item.path, folder)
    caption = current.captions.get(file, "")
    if wanted.get("tag"):
        tag = str(wanted["tag"]).casefold()
        return tag in [other.casefold() for other in captions.tags_of(caption)]
    if wanted.get("kind"):
        return any(
            issue.kind == wanted["kind"] and _is_about(issue, file) for issue in current.issues
        )
    text = str(wanted.get("text") or "").casefold()
    return text in file.casefold() or text in caption.casefold()


def _is_about(issue: Issue, file: str) -> bool:
    """Returns whether an issue is about an image or a file with its name, such as its caption."""
    if issue.file == file:
        return True
    return dataset_files.stem_of(Path(issue.file)) == dataset_files.stem_of(Path(file))


def _cards(
    name: str, folder: Path, current: DatasetScan, items: Sequence[dataset_scan.DatasetItem]
) -> list[ImageCard]:
    texts = [current.captions.get(dataset_files.relative(item.path, folder), "") for item in items]
    lengths = token_count.counter(current.tokenizer)(texts)
    cards: list[ImageCard] = []
    for item, caption, length in zip(items, texts, lengths, strict=True):
        key = dataset_images.key_of(item.path.relative_to(folder).as_posix())
        try:
            version = item.path.stat().st_mtime_ns
        except OSError:  # deleted since the scan
            continue
        cards.append({
            "file": dataset_files.relative(item.path, folder),
            "caption": caption,
            "tokens": length,
            "size": f"{item.width} × {item.height}",
            "ratio": item.width / item.height,
            "src": f"/thumb/{name}/{key}?v={version}",
            "large": f"/thumb/{name}/{key}?large=1&v={version}",
            "mask": dataset_images.mask_url(name, key, item.mask),
            "repeats": item.repeats,
            **datasets.crop_view(item, current.settings),
        })  # fmt: skip
    return cards


# Issues and sizes


def groups(issues: Sequence[Issue]) -> list[IssueGroup]:
    """Returns the issues by kind, the worst first, each kind with its fixes."""
    by_kind: dict[str, list[Issue]] = {}
    for issue in issues:
        by_kind.setdefault(issue.kind or issue.message, []).append(issue)
    shown = [_group(kind, same_kind) for kind, same_kind in by_kind.items()]
    return sorted(shown, key=lambda group: (LEVELS.index(group["level"]), -group["count"]))


def _group(kind: str, issues: Sequence[Issue]) -> IssueGroup:
    message = issues[0].message if len(issues) == 1 else "Good to know"
    return {
        "kind": issues[0].kind,
        "title": TITLES.get(kind, message),
        "level": min((issue.level for issue in issues), key=LEVELS.index),
        "count": len(issues),
        "files": [{"file": issue.file, "text": issue.message} for issue in issues[:MAX_FILES]],
        "cures": [
            {"name": name, "label": fixes.FIXES[name].label}
            for name in fixes.FIXES_FOR_KIND.get(kind, ())
        ],
    }


def crops_overview(data: BrowserData) -> CropsOverview:
    """Returns how many images are trained at each size."""
    current = dataset_scans.scan(data, again=False)
    counts: Counter[tuple[int, int]] = Counter()
    for item in current.items:
        counts[dataset_scan.crop_of(item, current.settings).bucket] += item.repeats
    rows: list[BucketRow] = []
    for (width, height), count in sorted(counts.items()):
        rows.append({"size": f"{width} × {height}", "count": count, "ratio": width / height})
    return {
        "buckets": rows,
        "crop": current.settings.crop,
        "resolution": current.settings.resolution,
    }
