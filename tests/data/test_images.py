"""Images: opened as a viewer shows them, and thumbnails without metadata."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from tests.corpus import encoded, flipped, frames, hidden_magenta, oriented, photo, png16, with_gps
from trainer.data.images import alpha_mask, image_size, open_alpha, open_image, save_thumbnail
from trainer.data.issue import printable
from trainer.errors import DatasetError


@pytest.fixture
def open_bytes(tmp_path):
    def open_bytes(data, name="x.png", **options):
        (tmp_path / name).write_bytes(data)
        return open_image(tmp_path / name, **options)

    return open_bytes


def close(a, b, by=2):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= by


def test_a_plain_image_is_unchanged(open_bytes):
    image, notes = open_bytes(encoded(photo(), "PNG"))
    assert (image.mode, image.size, notes) == ("RGB", (96, 64), ())
    assert close(image, photo(), 0)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(0, 10))
def test_exif_orientation_is_applied(open_bytes, tmp_path, kind, orientation):
    image, _ = open_bytes(oriented(kind, orientation))
    stored = photo()
    if 1 <= orientation <= 8:
        stored.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(stored)
    assert image.size == expected.size == image_size(tmp_path / "x.png")
    assert close(
        image.resize((12, 12), Image.Resampling.BOX),
        expected.resize((12, 12), Image.Resampling.BOX),
        12,
    )


def test_16_bit_grey_is_scaled_and_not_clipped(open_bytes):
    for colour, expected in (
        (0, 128),
        (2, 128),
        (6, 191),
    ):  # the last is half transparent, on white
        image, _ = open_bytes(png16(colour))
        assert set(np.unique(image)) == {expected}
    gradient = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    for kind in ("PNG", "TIFF"):
        image, _ = open_bytes(encoded(gradient, kind))
        assert np.asarray(image)[0, 0, 0] == 0 and np.asarray(image)[-1, -1, 0] == 255
        assert 120 < np.asarray(image).mean() < 135


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_colour_of_transparent_parts_is_never_shown(open_bytes, kind):
    for background in ((255, 255, 255), (10, 20, 30)):
        image, _ = open_bytes(hidden_magenta(kind), background=background)
        assert image.getpixel((0, 0)) == background
        assert image.getpixel((32, 32)) == (0, 128, 0)


def test_every_kind_of_transparency_shows_the_background(open_bytes):
    for mode, index in (("P", 3), ("L", 3), ("RGB", (3, 3, 3)), ("1", 0)):
        image = Image.new(mode, (64, 64), index)
        if mode == "P":
            image.putpalette(range(0, 12))
        result, _ = open_bytes(encoded(image, "PNG", transparency=index), background=(1, 2, 3))
        assert result.getpixel((5, 5)) == (1, 2, 3), mode
    image = Image.new("P", (64, 64), 3)
    image.putpalette(range(0, 12))
    assert open_bytes(encoded(image, "GIF", transparency=3))[0].getpixel((5, 5)) == (255, 255, 255)


def test_a_colour_profile_is_applied(open_bytes):
    lab = ImageCms.createProfile("LAB")
    image, notes = open_bytes(
        encoded(photo(), "PNG", icc_profile=ImageCms.ImageCmsProfile(lab).tobytes())
    )
    assert close(image, photo(), 0) and "profile" in notes[0]
    image, notes = open_bytes(encoded(photo(), "PNG", icc_profile=linear_rgb()))
    assert not close(image, photo(), 40) and notes == ()
    assert np.asarray(image).mean() > np.asarray(photo()).mean(), (
        "linear values are darker numbers than sRGB"
    )


def linear_rgb() -> bytes:
    """Returns an sRGB profile with curves of gamma 1.0 and another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for index in range(int.from_bytes(data[128:132], "big")):
        entry = 132 + 12 * index
        name = bytes(data[entry : entry + 4])
        at = int.from_bytes(data[entry + 4 : entry + 8], "big")
        size = int.from_bytes(data[entry + 8 : entry + 12], "big")
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            data[at : at + 12] = b"curv" + bytes(8)  # a curve of no points is the identity
        if name == b"desc":
            text = bytes(data[at : at + size])
            for encoding in ("utf-16-be", "ascii"):
                text = text.replace("sRGB".encode(encoding), "line".encode(encoding))
            data[at : at + size] = text
    return bytes(data)


def test_an_animation_gives_its_first_frame_and_a_note(open_bytes):
    for kind in ("GIF", "WEBP", "PNG", "AVIF"):
        image, notes = open_bytes(frames(kind))
        assert image.size == (96, 64) and "animated" in notes[0]


def test_intact_images_are_not_reported_as_damaged(open_bytes):
    flat = Image.new("RGB", (101, 67), "white")
    for image in (flat, photo(101, 67), photo(101, 67, "L")):
        for options in ({}, {"quality": 100}, {"progressive": True}, {"restart_marker_rows": 1}):
            assert open_bytes(encoded(image, "JPEG", **options))[1] == (), options
        for options in ({}, {"lossless": True}, {"quality": 30}):
            assert open_bytes(encoded(image, "WEBP", **options))[1] == (), options


def test_damage_inside_a_file_is_found(open_bytes):
    data = encoded(photo(512, 384), "JPEG", quality=90)
    _, notes = open_bytes(data[:20000] + bytes(4096) + data[24096:])
    assert "damaged" in notes[0]
    with pytest.raises(DatasetError, match="damaged"):
        open_bytes(flipped(encoded(photo(512, 384), "WEBP")))


def test_error_messages_name_the_file(tmp_path, open_bytes):
    for data in (b"", b"<html>", b"%!PS", b"8BPS" + bytes(60), b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(DatasetError, match=r"^we\\nird\.png .*: .*\.$"):
            open_bytes(data, "we\nird.png")
    for missing in (open_image, image_size):
        with pytest.raises(DatasetError, match="gone.png does not exist any more"):
            missing(tmp_path / "gone.png")
    with pytest.raises(DatasetError, match="is a folder"):
        open_image(tmp_path)


def test_a_thumbnail_is_small_and_has_no_metadata(tmp_path):
    (tmp_path / "x.jpg").write_bytes(with_gps())
    save_thumbnail(tmp_path / "x.jpg", tmp_path / "t.webp", side=32)
    data = (tmp_path / "t.webp").read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, max(image.size)) == ("WEBP", 32)
        assert not image.getexif() and "exif" not in image.info and "icc_profile" not in image.info
    assert b"SECRET" not in data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.webp", "x.jpg"]
    assert "exif" not in open_image(tmp_path / "x.jpg")[0].info


def test_the_thumbnail_of_a_turned_image_is_upright(tmp_path):
    (tmp_path / "x.jpg").write_bytes(oriented("JPEG", 6))
    save_thumbnail(tmp_path / "x.jpg", tmp_path / "t.webp", side=48)
    with Image.open(tmp_path / "t.webp") as image:
        assert image.size == (32, 48)


def test_printable_text_has_escapes_for_invisible_characters():
    assert printable("a\nb\x1b[31m\u202ec\udcff") == "a\\nb\\x1b[31m\\u202ec\\xff"
    assert printable("żółć 😀👩‍👧.png") == "żółć 😀👩‍👧.png"


def test_a_mask_from_transparency_is_upright_and_white_where_opaque(tmp_path):
    image = Image.new("RGBA", (40, 20), (10, 20, 30, 255))
    image.paste((0, 0, 0, 0), (0, 0, 10, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned clockwise, so the left side is at the top
    image.save(tmp_path / "x.png", exif=exif)
    for mask in (alpha_mask(tmp_path / "x.png"), open_alpha(tmp_path / "x.png")):
        assert mask.size == (20, 40)
        assert set(np.asarray(mask)[:10].ravel()) == {0}
        assert set(np.asarray(mask)[10:].ravel()) == {255}


def test_an_opaque_image_needs_no_mask(tmp_path):
    photo().save(tmp_path / "x.png")
    assert alpha_mask(tmp_path / "x.png") is None
    assert open_alpha(tmp_path / "x.png").getextrema() == (255, 255)
