"""What is wrong with a picture or a caption is said, with its reason; what is right is not."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from tests.corpus import encoded, hidden_magenta, oriented, photo, png16, profile
from trainer.data import checks, token_count
from trainer.data.scan import scan_dataset
from trainer.models.model_files import EMBEDDED_FOLDER

EXAMPLES = EMBEDDED_FOLDER.parent / "examples"


def write(folder, name, data, caption="a cat on a mat"):
    (folder / name).write_bytes(data if isinstance(data, bytes) else encoded(data, "PNG"))
    (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder / name


def kinds(folder, **options) -> dict[str, list[str]]:
    """Kind -> the files it was found in."""
    found: dict[str, list[str]] = {}
    for finding in scan_dataset(folder, **options)[1]:
        found.setdefault(finding.kind, []).append(finding.file)
    return found


def sharp(seed: int, size=(128, 128)) -> Image.Image:
    return photo(*size, seed=seed)


def test_pictures_are_judged_by_their_pixels(tmp_path):
    write(tmp_path, "a-good.png", sharp(1))
    write(tmp_path, "b-blurred.png", sharp(2).filter(ImageFilter.GaussianBlur(4)))
    write(tmp_path, "c-flat.png", sharp(3).point(lambda value: 100 + value // 10))
    write(tmp_path, "d-small.png", sharp(4, (40, 40)))
    write(tmp_path, "e-narrow.png", sharp(5, (400, 90)))
    found = kinds(tmp_path, resolution=128)
    assert found == {
        "blurred": ["b-blurred.png"], "flat": ["c-flat.png"], "small": ["d-small.png"], "narrow": ["e-narrow.png"],
        "mixed-sizes": ["all pictures"], "shared-tag": ["all captions"],
    }  # fmt: skip


def test_the_example_pictures_have_no_faults():
    for folder in EXAMPLES.iterdir():
        found = kinds(folder, resolution=64)
        faults = {"blurred", "flat", "duplicate", "near-duplicate", "small", "odd-picture"}
        assert not faults & found.keys(), (folder, found)


def test_conversions_are_said(tmp_path):
    write(tmp_path, "cmyk.jpg", encoded(photo(mode="CMYK"), "JPEG"))
    write(tmp_path, "deep.png", png16(2))
    write(tmp_path, "lab.jpg", encoded(photo(seed=3), "JPEG", icc_profile=profile("LAB")))
    write(tmp_path, "plain.jpg", encoded(photo(seed=4), "JPEG", icc_profile=profile("sRGB")))
    write(tmp_path, "see-through.png", hidden_magenta())
    write(tmp_path, "turned.jpg", oriented("JPEG", 6))
    found = kinds(tmp_path, resolution=32)
    assert found["converted"] == ["cmyk.jpg", "deep.png"] + ["lab.jpg"] * (
        "lab.jpg" in found["converted"]
    )
    assert found["transparent"] == ["see-through.png"] and found["rotated"] == ["turned.jpg"]


def test_twins_are_found_though_saved_anew(tmp_path):
    image = sharp(1, (300, 200))
    write(tmp_path, "a.png", image)
    write(tmp_path, "b.png", image)
    write(tmp_path, "c.jpg", encoded(image.resize((240, 160)), "JPEG", quality=60))
    write(tmp_path, "d.png", sharp(2, (300, 200)))
    write(tmp_path, "e.png", image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    found = {
        finding.kind: (finding.file, finding.detail)
        for finding in scan_dataset(tmp_path, resolution=64)[1]
    }
    assert found["duplicate"] == ("b.png", "a.png") and found["near-duplicate"] == (
        "c.jpg",
        "a.png",
    )
    assert (
        sum(
            finding.kind == "near-duplicate" for finding in scan_dataset(tmp_path, resolution=64)[1]
        )
        == 1
    )


@pytest.mark.parametrize(
    "captioned, kept", [("cat.png", "cat.png"), ("cat (1).png", "cat (1).png"), ("", "cat.png")]
)
def test_of_twins_the_captioned_one_stays_else_the_one_that_is_no_copy(tmp_path, captioned, kept):
    image = sharp(1, (300, 200))
    for name in ("cat (1).png", "cat.png"):
        write(tmp_path, name, image, "a cat" if name == captioned else "")
    found = {
        finding.kind: (finding.file, finding.detail)
        for finding in scan_dataset(tmp_path, resolution=64)[1]
    }
    assert found["duplicate"] == ({"cat.png": "cat (1).png", "cat (1).png": "cat.png"}[kept], kept)


def test_captions_are_judged(tmp_path):
    for seed, caption in enumerate(
        [
            "maya, 1girl, red hat",
            "1girl, sea",
            "1girl, " + "a tree, " * 60,
            "1girl",
            "MAYA, 1girl, x",
        ]
    ):
        write(tmp_path, f"{seed}.png", sharp(seed), caption)
    write(tmp_path, "bare.png", sharp(7), " ")
    findings = scan_dataset(tmp_path, resolution=64, trigger="maya")[1]
    found = {
        kind: [f.file for f in findings if f.kind == kind] for kind in {f.kind for f in findings}
    }
    assert found == {
        "no-caption": ["bare.png"],
        "long-caption": ["2.png"],
        "no-trigger": ["1.png", "2.png", "3.png"],
        "shared-tag": ["all captions"],
    }
    assert not [
        f
        for f in scan_dataset(tmp_path, resolution=64, caption_tokens=225)[1]
        if f.kind == "long-caption"
    ]
    assert next(f.detail for f in findings if f.kind == "shared-tag") == "1girl"
    assert checks.verdict(6, findings).startswith(
        "6 of 6 pictures are usable, 5 have captions. Few"
    )


@settings(deadline=None, max_examples=50)
@given(st.text("mayaMAYA_ ,1é", max_size=12))
def test_a_word_is_found_as_a_regular_expression_would(text):
    import re

    assert checks.has_word(text, "maya") == bool(
        re.search(r"(?<!\w)maya(?!\w)", text, re.IGNORECASE)
    )


def test_tokens_are_those_of_the_base(tmp_path):
    from transformers import CLIPTokenizer

    folder = EMBEDDED_FOLDER / "tokenizer"
    real = CLIPTokenizer.from_pretrained(folder)
    texts = [
        "a zorbit on a green background",
        "",
        "it's 12 o'clock!",
        "Ünïcode  żółć 😀",
        "a, b, c. " * 40,
    ]
    expected = [len(real(text, add_special_tokens=False).input_ids) for text in texts]
    assert token_count.counter(folder)(texts) == expected
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert token_count.counter(tmp_path)(texts) == expected
    assert token_count.counter(None)(["a red, cat"]) == [4]


# The memory of what was seen


@pytest.fixture
def decoded(monkeypatch):
    """Names of the pictures that were really decoded."""
    from trainer.data import image_stats

    seen, real = [], image_stats.decode_image
    monkeypatch.setattr(
        image_stats,
        "decode_image",
        lambda data, path: (seen.append(path.name), real(data, path))[1],
    )
    return seen


def age(folder):
    """As if it had lain there for a while: a file just written to is never trusted by its time."""
    for path in folder.iterdir():
        os.utime(path, (1_700_000_000, 1_700_000_000))


def test_a_content_is_decoded_once(tmp_path, outputs, decoded):
    folder = tmp_path / "set"
    folder.mkdir()
    for seed in range(3):
        write(folder, f"{seed}.png", sharp(seed))
    write(folder, "bad.png", b"<html>")
    age(folder)
    first = scan_dataset(folder, resolution=64)
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "bad.png"]
    (folder / "0.png").rename(folder / "moved.png")
    (folder / "bad.png").rename(folder / "worse.png")
    decoded.clear()
    items, findings = scan_dataset(folder, resolution=64)
    assert decoded == []
    assert [(item.sha256, item.width, item.focus) for item in items][-1] == [
        (i.sha256, i.width, i.focus) for i in first[0]
    ][0]
    assert next(f.message for f in findings if f.level == "error").startswith("worse.png ")


def test_a_changed_picture_is_seen_and_a_damaged_memory_is_forgotten(tmp_path, outputs, decoded):
    folder = tmp_path / "set"
    folder.mkdir()
    path = write(folder, "a.png", sharp(1))
    age(folder)
    before = scan_dataset(folder, resolution=64)[0][0].sha256
    write(folder, "a.png", sharp(2))
    age(folder)
    assert scan_dataset(folder, resolution=64)[0][0].sha256 != before and decoded == [
        "a.png",
        "a.png",
    ]
    (outputs / "cache" / "pictures.sqlite").write_bytes(b"not a database" * 1000)
    assert scan_dataset(folder, resolution=64)[0][0].path == path and len(decoded) == 3
    assert scan_dataset(folder, resolution=64) and len(decoded) == 3
