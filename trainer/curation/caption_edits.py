"""Changes to many captions at once: worked out and shown first, then written through the journal.

A caption may have several lines, of which `dataset.caption_wildcards` takes one at a time: each is changed by itself.
Tags are the parts between commas. Nothing is written here.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import regex

from trainer.curation.history import Edit
from trainer.data.captions import MAX_CAPTION_BYTES, clean_caption
from trainer.data.checks import tags_of
from trainer.data.dataset_files import caption_path
from trainer.errors import DatasetError

PATTERN_SECONDS = 5.0  # for all captions together: some patterns take longer than the universe has
MAX_PATTERN = 1000  # characters

Operation = Callable[[str], str]
"""A line of a caption in, the new one out."""


@dataclass(frozen=True)
class Change:
    """What an operation does to the caption of one picture."""

    picture: Path
    before: str
    after: str


def prepend(text: str) -> Operation:
    """Puts `text` in front, where a caption does not begin with it."""
    front = clean_caption(text)[0]
    return lambda caption: (
        caption if not front or caption.startswith(front) else _joined(front, caption)
    )


def append(text: str) -> Operation:
    """Puts `text` at the end, where a caption does not end with it."""
    end = clean_caption(text)[0]
    return lambda caption: caption if not end or caption.endswith(end) else _joined(caption, end)


def replace(find: str, replacement: str, pattern: bool = False) -> Operation:
    """Replaces `find`, in the same capitals; as a `pattern` it is a regular expression, whose groups are \\1 in the replacement.

    All captions together get `PATTERN_SECONDS`. Raises `DatasetError` for a pattern that is none, or takes longer.
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
            f"The pattern cannot be used ({error}): mend it, or switch patterns off."
        ) from None
    end = time.monotonic() + PATTERN_SECONDS

    def replaced(caption: str) -> str:
        try:
            return compiled.sub(replacement, caption, timeout=max(0.001, end - time.monotonic()))
        except TimeoutError:
            raise DatasetError(
                "The pattern takes too long on these captions, and nothing was changed: write it more simply."
            ) from None
        except (regex.error, IndexError) as error:
            raise DatasetError(
                f"The replacement cannot be used ({error}): \\1 needs a group in the pattern."
            ) from None

    return replaced


def remove_tag(tag: str) -> Operation:
    return rename_tag(tag, "")


def rename_tag(tag: str, new: str) -> Operation:
    """Every tag that is `tag`, in whatever capitals, becomes `new`; with "" it goes."""
    wanted = tag.strip().casefold()

    def renamed(caption: str) -> str:
        tags = tags_of(caption)
        if wanted not in (tag.casefold() for tag in tags):
            return caption
        return ", ".join(
            filter(None, (new.strip() if tag.casefold() == wanted else tag for tag in tags))
        )

    return renamed


def sort_tags(keep_first: int = 0) -> Operation:
    """Tags in alphabetical order; the first ones, where the trigger word is, may stay."""

    def ordered(caption: str) -> str:
        tags = tags_of(caption)
        return (
            ", ".join(tags[:keep_first] + sorted(tags[keep_first:], key=str.casefold))
            if len(tags) > 1
            else caption
        )

    return ordered


def deduplicate(caption: str) -> str:
    """Each tag once, where it came first."""
    tags = tags_of(caption)
    first: dict[str, str] = {}
    for tag in tags:
        first.setdefault(tag.casefold(), tag)
    return ", ".join(first.values()) if len(first) < len(tags) else caption


def _joined(front: str, end: str) -> str:
    if not front or not end:
        return front or end
    return f"{front} {end}" if front[-1] in ",.;:!?" or end[0] in ",.;:" else f"{front}, {end}"


def plan(captions: Iterable[tuple[Path, str]], operation: Operation, tag: str = "") -> list[Change]:
    """What the operation would change, in order; with `tag` only in captions that have that tag. Raises `DatasetError`."""
    changes = []
    for picture, before in captions:
        if tag and tag.casefold() not in (other.casefold() for other in tags_of(before)):
            continue
        after = "\n".join(
            filter(None, (clean_caption(operation(line))[0] for line in before.split("\n")))
        )
        if len(after.encode("utf-8", "replace")) > MAX_CAPTION_BYTES:
            raise DatasetError(
                f"The caption of {picture.name} would become larger than {MAX_CAPTION_BYTES >> 20} MB."
            )
        if after != before:
            changes.append(Change(picture, before, after))
    return changes


def edits(changes: Sequence[Change]) -> list[Edit]:
    """The changes as edits for the journal."""
    return [caption_edit(change.picture, change.after) for change in changes]


def caption_edit(picture: Path, caption: str) -> Edit:
    return Edit(caption_path(picture), caption.encode("utf-8", "replace"))


def tag_counts(captions: Iterable[str]) -> list[tuple[str, int]]:
    """Each tag as first written and the number of captions that have it, the commonest first."""
    written: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for caption in captions:
        for folded, tag in {tag.casefold(): tag for tag in tags_of(caption)}.items():
            written.setdefault(folded, tag)
            counts[folded] += 1
    return [(written[folded], number) for folded, number in counts.most_common()]
