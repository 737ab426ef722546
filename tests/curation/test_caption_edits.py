"""Changes to many captions: each operation, and patterns that are wrong or slow."""

from pathlib import Path

import pytest

from trainer.curation import caption_edits
from trainer.errors import DatasetError


def changed(caption, operation):
    changes = caption_edits.plan([(Path("x.png"), caption)], operation)
    return changes[0].after if changes else caption


@pytest.mark.parametrize(
    ("operation", "before", "after"),
    [
        (caption_edits.prepend("maya"), "a cat", "maya, a cat"),
        (caption_edits.prepend("maya"), "maya, a cat", "maya, a cat"),
        (caption_edits.prepend("maya, "), "", "maya,"),
        (caption_edits.append("high quality"), "a cat.", "a cat. high quality"),
        (caption_edits.append("high quality"), "a cat", "a cat, high quality"),
        (caption_edits.append("a cat"), "a cat", "a cat"),
        (caption_edits.replace("cat", "dog"), "a cat, catfish", "a dog, dogfish"),
        (caption_edits.replace(r"\bcat\b", "dog", True), "a cat, catfish", "a dog, catfish"),
        (caption_edits.replace(r"(\w+) (\w+)", r"\2 \1", True), "red cat", "cat red"),
        (caption_edits.replace("a.b", "x"), "a.b axb", "x axb"),
        (caption_edits.remove_tag("Red Hat"), "maya, red hat, sea", "maya, sea"),
        (caption_edits.rename_tag("sea", "ocean"), "seaside, sea", "seaside, ocean"),
        (caption_edits.sort_tags(1), "maya, z, a", "maya, a, z"),
        (caption_edits.deduplicate, "a, b, A, c, b", "a, b, c"),
        (caption_edits.replace("", "x"), "a", "a"),
        (caption_edits.replace("cat", "a\nb\x1b[0m"), "cat", "a, b"),
    ],
)
def test_each_operation_changes_a_caption(operation, before, after):
    assert changed(before, operation) == after


def test_each_line_is_changed_separately():
    assert changed("a cat\na dog", caption_edits.prepend("maya")) == "maya, a cat\nmaya, a dog"


@pytest.mark.parametrize(
    ("find", "replacement", "message"),
    [
        ("(", "x", "not a valid regular expression"),
        ("a", r"\1", "needs a group"),
        ("x" * 2000, "", "longer than 1000"),
        ("(a|aa)+$", "", "takes too long"),
    ],
)
def test_a_bad_pattern_is_an_error_message(monkeypatch, find, replacement, message):
    monkeypatch.setattr(caption_edits, "PATTERN_SECONDS", 0.2)
    with pytest.raises(DatasetError, match=message):
        changed("a" * 60 + "b", caption_edits.replace(find, replacement, True))


def test_a_caption_cannot_become_too_large():
    with pytest.raises(DatasetError, match="larger than"):
        changed("a" * 2000, caption_edits.replace("a", "b" * 1000))


def test_tags_are_counted_ignoring_capitals():
    captions = ["Maya, sea", "maya, SEA, sea", "tree"]
    assert caption_edits.tag_counts(captions) == [("Maya", 2), ("sea", 2), ("tree", 1)]


def test_a_change_can_be_limited_to_captions_with_a_tag():
    captions = [(Path("0"), "Maya, sea"), (Path("1"), "maya, SEA, sea"), (Path("2"), "tree")]
    changes = caption_edits.plan(captions, caption_edits.append("x"), tag="tree")
    assert [(change.image, change.after) for change in changes] == [(Path("2"), "tree, x")]
