"""Checks: issues with images and captions, by the settings of the run."""

import pytest
from PIL import Image, ImageFilter

from tests.corpus import encoded, hidden_magenta, oriented, photo, png16, profile
from trainer import config
from trainer.cli.main import main
from trainer.data import checks, token_count
from trainer.data.scan import scan_dataset
from trainer.models.model_files import EMBEDDED_FOLDER

EXAMPLES = EMBEDDED_FOLDER.parent / "examples"


def at(resolution: int, **changes) -> config.Dataset:
    return config.Dataset(resolution=resolution, **{"bucket_step": 8, **changes})


def write(folder, name, data, caption="a cat on a mat"):
    (folder / name).write_bytes(data if isinstance(data, bytes) else encoded(data, "PNG"))
    (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder / name


def files_by_kind(folder, settings) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for issue in scan_dataset(folder, settings).issues:
        files.setdefault(issue.kind, []).append(issue.file)
    return files


def issue_of(kind, folder, settings):
    """Returns the only issue of a kind, or None."""
    issues = [issue for issue in scan_dataset(folder, settings).issues if issue.kind == kind]
    assert len(issues) <= 1
    return issues[0] if issues else None


def sharp(seed: int, size=(128, 128)) -> Image.Image:
    return photo(*size, seed=seed)


# Images


def test_pixels_are_checked(tmp_path):
    write(tmp_path, "a-good.png", sharp(1))
    write(tmp_path, "b-blurred.png", sharp(2).filter(ImageFilter.GaussianBlur(4)))
    write(tmp_path, "c-flat.png", sharp(3).point(lambda value: 100 + value // 10))
    write(tmp_path, "d-small.png", sharp(4, (40, 40)))
    write(tmp_path, "e-narrow.png", sharp(5, (400, 90)))
    assert files_by_kind(tmp_path, at(128)) == {
        "blurred": ["b-blurred.png"],
        "flat": ["c-flat.png"],
        "small": ["d-small.png"],
        "narrow": ["e-narrow.png"],
        "mixed-sizes": ["all images"],
        "shared-tag": ["all captions"],
    }


def test_the_example_images_have_no_faults():
    faults = {"blurred", "flat", "duplicate", "near-duplicate", "small", "odd-picture", "narrow"}
    for folder in EXAMPLES.iterdir():
        found = files_by_kind(folder, at(64))
        assert not faults & found.keys(), (folder, found)


def test_conversions_are_reported(tmp_path):
    write(tmp_path, "cmyk.jpg", encoded(photo(mode="CMYK"), "JPEG"))
    write(tmp_path, "deep.png", png16(2))
    write(tmp_path, "plain.jpg", encoded(photo(seed=4), "JPEG", icc_profile=profile("sRGB")))
    write(tmp_path, "see-through.png", hidden_magenta())
    write(tmp_path, "turned.jpg", oriented("JPEG", 6))
    found = files_by_kind(tmp_path, at(32))
    assert found["converted"] == ["cmyk.jpg", "deep.png"]
    assert found["transparent"] == ["see-through.png"]
    assert found["rotated"] == ["turned.jpg"]


# The settings of the run


def test_aspect_is_checked_by_the_setting(tmp_path):
    """An image that `max_aspect` allows is seen in full; the check once used a constant of 2."""
    write(tmp_path, "strip.png", sharp(1, (1024, 256)))
    assert issue_of("narrow", tmp_path, at(256, max_aspect=4.0)) is None
    assert issue_of("narrow", tmp_path, at(256, max_aspect=8.0)) is None
    default = issue_of("narrow", tmp_path, at(256)).message
    assert "48 %" in default  # the nearest bucket is 352 x 184
    assert "dataset.max_aspect = 2 " in default
    strict = issue_of("narrow", tmp_path, at(256, max_aspect=1.0)).message
    assert "25 %" in strict
    assert "dataset.max_aspect = 1 " in strict


def test_a_squeezed_image_is_not_narrow(tmp_path):
    write(tmp_path, "strip.png", sharp(1, (1024, 256)))
    assert issue_of("narrow", tmp_path, at(256, max_aspect=1.0, crop="none")) is None


def test_a_coarse_bucket_step_is_reported_as_the_reason(tmp_path):
    write(tmp_path, "photo.png", sharp(1, (384, 256)))
    assert issue_of("narrow", tmp_path, at(256)) is None
    message = issue_of("narrow", tmp_path, at(256, bucket_step=256)).message
    assert "67 %" in message
    assert "dataset.bucket_step = 256 " in message
    write(tmp_path, "photo.png", sharp(1, (1024, 256)))
    message = issue_of("narrow", tmp_path, at(256, bucket_step=256, max_aspect=8.0)).message
    assert "25 %" in message
    assert "dataset.bucket_step = 256 " in message


def test_share_reported_is_the_share_that_is_trained(tmp_path):
    """600 x 100 pixels become 384 x 64, of which 128 x 64 are seen."""
    write(tmp_path, "strip.png", sharp(2, (600, 100)))
    message = issue_of("narrow", tmp_path, config.Dataset()).message
    assert "Only 33 % of the image (600 x 100)" in message


def test_small_images_are_checked_by_the_highest_resolution(tmp_path):
    write(tmp_path, "a.png", sharp(1, (256, 256)))
    assert issue_of("small", tmp_path, at(256)) is None
    assert "resolution of 512" in issue_of("small", tmp_path, at(512)).message
    several = at(128, resolutions=(512, 256))
    assert "resolution of 512" in issue_of("small", tmp_path, several).message


def test_message_on_small_images_follows_allow_upscale(tmp_path):
    write(tmp_path, "a.png", sharp(1, (256, 256)))
    assert "trained at its own size" in issue_of("small", tmp_path, at(512)).message
    upscaled = issue_of("small", tmp_path, at(512, allow_upscale=True)).message
    assert "it is upscaled 2.0 times" in upscaled


def test_mixed_sizes_name_the_number_of_small_images(tmp_path):
    write(tmp_path, "large.png", sharp(1, (256, 256)))
    assert issue_of("mixed-sizes", tmp_path, at(256)) is None
    write(tmp_path, "small.png", sharp(2, (100, 100)))
    message = issue_of("mixed-sizes", tmp_path, at(256)).message
    assert message.startswith("1 of 2 images")
    assert "small.png" in message
    assert issue_of("mixed-sizes", tmp_path, at(64)) is None


# Duplicates


def test_duplicates_are_found_after_resizing_and_encoding(tmp_path):
    image = sharp(1, (300, 200))
    write(tmp_path, "a.png", image)
    write(tmp_path, "b.png", image)
    write(tmp_path, "c.jpg", encoded(image.resize((240, 160)), "JPEG", quality=60))
    write(tmp_path, "d.png", sharp(2, (300, 200)))
    write(tmp_path, "e.png", image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    duplicate = issue_of("duplicate", tmp_path, at(64))
    near = issue_of("near-duplicate", tmp_path, at(64))
    assert (duplicate.file, duplicate.detail) == ("b.png", "a.png")
    assert (near.file, near.detail) == ("c.jpg", "a.png")


@pytest.mark.parametrize(
    ("captioned", "original"),
    [("cat.png", "cat.png"), ("cat (1).png", "cat (1).png"), ("", "cat.png")],
)
def test_a_duplicate_is_the_one_without_caption_or_with_the_longer_name(
    tmp_path, captioned, original
):
    image = sharp(1, (300, 200))
    for name in ("cat (1).png", "cat.png"):
        write(tmp_path, name, image, "a cat" if name == captioned else "")
    issue = issue_of("duplicate", tmp_path, at(64))
    assert {issue.file, original} == {"cat.png", "cat (1).png"}
    assert issue.detail == original


# Captions


def test_captions_are_checked(tmp_path):
    captions = [
        "maya, 1girl, red hat",
        "1girl, sea",
        "1girl, " + "a tree, " * 60,
        "1girl",
        "MAYA, 1girl, x",
    ]
    for seed, caption in enumerate(captions):
        write(tmp_path, f"{seed}.png", sharp(seed), caption)
    write(tmp_path, "bare.png", sharp(7), " ")
    settings = at(64, trigger="maya")
    assert files_by_kind(tmp_path, settings) == {
        "no-caption": ["bare.png"],
        "long-caption": ["2.png"],
        "no-trigger": ["1.png", "2.png", "3.png"],
        "shared-tag": ["all captions"],
    }
    assert issue_of("shared-tag", tmp_path, settings).detail == "1girl"
    issues = scan_dataset(tmp_path, settings).issues
    assert checks.verdict(6, issues).startswith("6 of 6 images are usable, 5 have captions. Few")


def test_caption_length_is_checked_by_the_setting(tmp_path):
    write(tmp_path, "a.png", sharp(1), "tree " * 100)
    assert "100 tokens, but only 75" in issue_of("long-caption", tmp_path, at(64)).message
    assert issue_of("long-caption", tmp_path, at(64, caption_tokens=150)) is None


def test_each_line_of_a_wildcard_caption_is_measured_separately(tmp_path):
    """Training reads one line at a time, so two short lines are not a long caption."""
    write(tmp_path, "a.png", sharp(1), "tree " * 50 + "\n" + "lake " * 60)
    assert issue_of("long-caption", tmp_path, at(64)) is not None
    assert issue_of("long-caption", tmp_path, at(64, caption_wildcards=True)) is None
    (tmp_path / "a.txt").write_text("tree " * 50 + "\n" + "lake " * 80)
    message = issue_of("long-caption", tmp_path, at(64, caption_wildcards=True)).message
    assert "80 tokens" in message


def test_tokens_are_counted_with_the_tokenizer_of_the_base(tmp_path):
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


# Callers


def test_check_command_uses_the_settings_of_the_run(tmp_path, capsys):
    write(tmp_path, "strip.png", sharp(1, (1024, 256)))
    options = ["check", str(tmp_path), "--resolution", "256"]
    assert main(options) == 0
    assert "[narrow]" in capsys.readouterr().out
    assert main([*options, "--set", "dataset.max_aspect=4"]) == 0
    assert "[narrow]" not in capsys.readouterr().out


def test_check_command_uses_the_bucket_step_of_the_presets(tmp_path, capsys):
    """At 64 pixels the presets have steps of 8, in which a 3:2 image is not cropped much."""
    write(tmp_path, "photo.png", sharp(1, (384, 256)))
    assert main(["check", str(tmp_path), "--resolution", "64"]) == 0
    assert "[narrow]" not in capsys.readouterr().out
