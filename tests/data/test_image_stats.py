"""Image statistics: measured once per content, and cached."""

import json
import math
import os
import sqlite3

import pytest
from PIL import Image, ImageDraw

from tests.corpus import encoded, photo
from trainer import config
from trainer.data import image_stats
from trainer.data.image_stats import focus_of
from trainer.data.scan import scan_dataset

SMALL = config.Dataset(resolution=64, bucket_step=8)


def write(folder, name, seed):
    (folder / name).write_bytes(encoded(photo(128, 128, seed=seed), "PNG"))
    return folder / name


@pytest.fixture
def folder(tmp_path, outputs):
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that were decoded rather than read from the cache."""
    names, real = [], image_stats.decode_image

    def decode(data, path):
        names.append(path.name)
        return real(data, path)

    monkeypatch.setattr(image_stats, "decode_image", decode)
    return names


def age(folder):
    """Makes files old, because the time of a file written just now is not trusted."""
    for path in folder.iterdir():
        os.utime(path, (1_700_000_000, 1_700_000_000))


def test_a_content_is_decoded_once(folder, decoded):
    for seed in range(3):
        write(folder, f"{seed}.png", seed)
    (folder / "bad.png").write_bytes(b"<html>")
    age(folder)
    first = scan_dataset(folder, SMALL).items
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "bad.png"]
    (folder / "0.png").rename(folder / "moved.png")
    (folder / "bad.png").rename(folder / "worse.png")
    decoded.clear()
    items, issues = scan_dataset(folder, SMALL)
    assert decoded == []
    moved, original = items[-1], first[0]
    assert moved.path.name == "moved.png"
    assert (moved.sha256, moved.width, moved.focus) == (
        original.sha256,
        original.width,
        original.focus,
    )
    error = next(issue.message for issue in issues if issue.level == "error")
    assert error.startswith("worse.png ")


def test_a_changed_image_is_decoded_again(folder, decoded):
    write(folder, "a.png", 1)
    age(folder)
    before = scan_dataset(folder, SMALL).items[0].sha256
    write(folder, "a.png", 2)
    age(folder)
    assert scan_dataset(folder, SMALL).items[0].sha256 != before
    assert decoded == ["a.png", "a.png"]


def test_a_damaged_cache_is_replaced(folder, outputs, decoded):
    path = write(folder, "a.png", 1)
    age(folder)
    scan_dataset(folder, SMALL)
    (outputs / "cache" / "pictures.sqlite").write_bytes(b"not a database" * 1000)
    assert scan_dataset(folder, SMALL).items[0].path == path
    assert len(decoded) == 2
    scan_dataset(folder, SMALL)
    assert len(decoded) == 2


def test_cached_statistics_keep_the_names_of_earlier_versions(folder, outputs):
    """Entries written before the fields were renamed must still be found."""
    write(folder, "a.png", 1)
    scan_dataset(folder, SMALL)
    database = sqlite3.connect(outputs / "cache" / "pictures.sqlite")
    (text,) = database.execute("SELECT facts FROM contents").fetchone()
    database.close()
    assert json.loads(text).keys() == {
        "sha256", "error", "width", "height", "notes", "conversions", "blur", "contrast", "look",
        "focus",
    }  # fmt: skip


@pytest.mark.parametrize(("x", "y"), [(0.2, 0.3), (0.8, 0.2), (0.5, 0.75)])
def test_focus_is_at_a_spot_that_stands_out(x, y):
    image = Image.new("L", (300, 300), 90)
    box = [300 * x - 12, 300 * y - 12, 300 * x + 12, 300 * y + 12]
    ImageDraw.Draw(image).rectangle(box, fill=235)
    assert math.dist(focus_of(image), (x, y)) < 0.12


def test_focus_of_a_plain_image_is_its_centre():
    assert focus_of(Image.new("L", (300, 200), 7)) == (0.5, 0.5)
