"""Captions: found, decoded, cleaned and written back."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corpus import PNG
from trainer.data.captions import (
    clean_caption,
    decode_text,
    has_word,
    read_caption,
    with_trigger,
    write_caption,
)
from trainer.data.dataset_files import caption_path, suffix_of
from trainer.errors import DatasetError, DiskError


def put(folder, name, caption=None):
    (folder / name).write_bytes(PNG)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder / name


def test_caption_files_have_an_order_of_precedence(tmp_path):
    image = put(tmp_path, "x.png")
    for name, text in (("x.png.txt", "third"), ("x.caption", "second"), ("x.txt", "first")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        caption, issues = read_caption(image)
        assert caption == text
    assert [issue.file for issue in issues] == ["x.caption", "x.png.txt"]


def test_a_written_caption_is_read_back(tmp_path):
    image = put(tmp_path, "x" * 251 + ".png")
    write_caption(image, "żółć 😀")
    assert read_caption(image) == ("żółć 😀", [])
    assert caption_path(image).read_bytes() == "żółć 😀".encode()
    assert len(list(tmp_path.iterdir())) == 2


def test_writing_a_caption_follows_no_link(tmp_path):
    image = put(tmp_path, "x.png")
    secret = tmp_path / "secret"
    secret.write_text("old", encoding="utf-8")
    caption_path(image).symlink_to(secret)
    with pytest.raises(DatasetError, match="is a link"):
        write_caption(image, "new")
    assert secret.read_text(encoding="utf-8") == "old"


def test_a_failed_write_keeps_the_old_caption(tmp_path, monkeypatch):
    image = put(tmp_path, "x.png", caption="old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskError, match="No space"):
        write_caption(image, "new")
    assert read_caption(image)[0] == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.png", "x.txt"]


@settings(deadline=None)  # the machine may be busy
@given(st.binary(max_size=200))
def test_any_bytes_become_one_clean_line(data):
    text, _ = clean_caption(*decode_text(data))
    assert text == text.strip()
    assert len(text.splitlines()) <= 1
    assert "\0" not in text
    assert "\x1b" not in text
    text.encode("utf-8")


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1))
def test_utf8_captions_are_read_unchanged(text):
    assert decode_text(text.encode("utf-8")) == (text, [])


def test_lines_are_kept_apart_only_on_request():
    note = "held control characters: they were removed"
    assert clean_caption("one\n\ntwo\t\x07") == ("one, two", [note])
    assert clean_caption("one\n\ntwo\t\x07", separate_lines=True) == ("one\ntwo", [note])


@settings(deadline=None, max_examples=50)
@given(st.text("mayaMAYA_ ,1é", max_size=12))
def test_a_word_is_found_as_a_regular_expression_would(text):
    import re

    expected = bool(re.search(r"(?<!\w)maya(?!\w)", text, re.IGNORECASE))
    assert has_word(text, "maya") == expected


def test_the_trigger_is_added_once():
    assert with_trigger("a cat", "maya") == "maya, a cat"
    assert with_trigger("a photo of MAYA", "maya") == "a photo of MAYA"
    assert with_trigger("", "maya") == "maya"
    assert with_trigger("a cat", "") == "a cat"


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.PNG", ".png"),
        ("....png", ".png"),
        (".png", ""),
        ("a", ""),
        ("a.", ""),
        ("a.png.txt", ".txt"),
        ("", ""),
    ],
)
def test_suffix_is_the_extension_in_lower_case(name, suffix):
    assert suffix_of(name) == suffix
