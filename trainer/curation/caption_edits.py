"""Changes to many captions at once: planned and shown first, then written through `history`.

A caption may have several lines, of which `dataset.caption_wildcards` reads one at a time. Each
line is changed separately. Tags are the parts between commas. Nothing is written here.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import regex

from trainer.curation.history import Edit
from trainer.data.captions import MAX_CAPTION_BYTES, clean_caption, tags_of
from trainer.data.dataset_files import caption_path
from trainer.errors import DatasetError

PATTERN_SECONDS = 5.0  # for all captions together: some patterns would never finish
MAX_PATTERN = 1000  # characters

Operation = Callable[[str], str]
"""Returns the new text of a line of a caption."""


@dataclass(frozen=True)
class Change:
    """The effect of an operation on the caption of one image."""

    image: Path
    before: str
    after: str


# Operations


def prepend(text: str) -> Operation:
    """Puts `text` in front of captions that do not start with it."""
    front = clean_caption(text)[0]

    def prepended(caption: str) -> str:
        if not front or caption.startswith(front):
            return caption
        return _joined(front, caption)

    return prepended


def append(text: str) -> Operation:
    """Puts `text` at the end of captions that do not end with it."""
    end = clean_caption(text)[0]

    def appended(caption: str) -> str:
        if not end or caption.endswith(end):
            return caption
        return _joined(caption, end)

    return appended


def replace(find: str, replacement: str, pattern: bool = False) -> Operation:
    r"""Replaces `find`, with the same capitals.

    With `pattern` it is a regular expression, whose groups are `\1` in the replacement. All
    captions together may take `PATTERN_SECONDS`. Raises `DatasetError` if the pattern is invalid,
    and the operation raises it if the pattern takes longer.
    """
    if not find:
        return lambda caption: caption
    if not pattern:
        return lambda caption: caption.replace(find, replacement)
    if len(find) > MAX_PATTERN:
        raise DatasetError(f"The pattern is longer than {MAX_PATTERN} characters: shorten it.")
    try:
        compiled = regex.compile(find)
    except regex.error as error:
        raise DatasetError(
            f"The pattern is not a valid regular expression ({error}): correct it, or switch "
            "patterns off."
        ) from None
    end = time.monotonic() + PATTERN_SECONDS

    def replaced(caption: str) -> str:
        try:
            return compiled.sub(replacement, caption, timeout=max(0.001, end - time.monotonic()))
        except TimeoutError:
            raise DatasetError(
                "The pattern takes too long on these captions, and nothing was changed: write a "
                "simpler one."
            ) from None
        except (regex.error, IndexError) as error:
            raise DatasetError(
                f"The replacement cannot be used ({error}): \\1 needs a group in the pattern."
            ) from None

    return replaced


def remove_tag(tag: str) -> Operation:
    """Removes a tag, ignoring capitals."""
    return rename_tag(tag, "")


def rename_tag(tag: str, new: str) -> Operation:
    """Renames a tag, ignoring capitals; with "" it is removed."""
    wanted, new = tag.strip().casefold(), new.strip()

    def renamed(caption: str) -> str:
        tags = tags_of(caption)
        if wanted not in (tag.casefold() for tag in tags):
            return caption
        changed = [new if tag.casefold() == wanted else tag for tag in tags]
        return ", ".join(filter(None, changed))

    return renamed


def sort_tags(keep_first: int = 0) -> Operation:
    """Sorts tags alphabetically, except the first ones, such as the trigger word."""

    def ordered(caption: str) -> str:
        tags = tags_of(caption)
        if len(tags) < 2:
            return caption
        return ", ".join(tags[:keep_first] + sorted(tags[keep_first:], key=str.casefold))

    return ordered


def deduplicate(caption: str) -> str:
    """Removes repeated tags, ignoring capitals, and keeps the first of each."""
    tags = tags_of(caption)
    first: dict[str, str] = {}
    for tag in tags:
        first.setdefault(tag.casefold(), tag)
    return ", ".join(first.values()) if len(first) < len(tags) else caption


def _joined(front: str, end: str) -> str:
    if not front or not end:
        return front or end
    has_separator = front[-1] in ",.;:!?" or end[0] in ",.;:"
    return f"{front} {end}" if has_separator else f"{front}, {end}"


# Planning


def plan(captions: Iterable[tuple[Path, str]], operation: Operation, tag: str = "") -> list[Change]:
    """Returns the changes that the operation would make, in order.

    With `tag` it changes only captions that have that tag. Raises `DatasetError` if a caption
    would become too large.
    """
    changes = []
    for image, before in captions:
        if tag and tag.casefold() not in (other.casefold() for other in tags_of(before)):
            continue
        lines = [clean_caption(operation(line))[0] for line in before.split("\n")]
        after = "\n".join(filter(None, lines))
        if len(after.encode("utf-8", "replace")) > MAX_CAPTION_BYTES:
            raise DatasetError(
                f"The caption of {image.name} would be larger than "
                f"{MAX_CAPTION_BYTES >> 20} MB: shorten the replacement."
            )
        if after != before:
            changes.append(Change(image, before, after))
    return changes


def edits(changes: Sequence[Change]) -> list[Edit]:
    """Returns the changes as edits for `history`."""
    return [caption_edit(change.image, change.after) for change in changes]


def caption_edit(image: Path, caption: str) -> Edit:
    """Returns the edit that saves a caption."""
    return Edit(caption_path(image), caption.encode("utf-8", "replace"))


def tag_counts(captions: Iterable[str]) -> list[tuple[str, int]]:
    """Returns each tag as first written and the number of captions with it, the commonest first."""
    written: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for caption in captions:
        for folded, tag in {tag.casefold(): tag for tag in tags_of(caption)}.items():
            written.setdefault(folded, tag)
            counts[folded] += 1
    return [(written[folded], number) for folded, number in counts.most_common()]
