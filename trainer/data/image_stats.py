"""Statistics of each image (size, sharpness, contrast, near duplicates), cached by content.

Entries are addressed by content, so a stale entry is never found. Deleting the cache only costs
time. An entry takes about 300 bytes, so memory use hardly grows with the number of images.
"""

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.data.image_formats import MIN_SIDE
from trainer.data.images import Conversion, conversions, decode_image, read_image
from trainer.data.issue import printable
from trainer.errors import DatasetError
from trainer.models.cpu_threads import available_cores
from trainer.runs.run_folder import outputs_folder

VERSION = 1  # part of every key: raise it when the statistics are computed differently
MEASURED_SIDE = 512  # pixels: about the size of training, not the size of the camera
# A file written this recently may be written again without a change in its modification time.
FRESH_SECONDS = 2.0
# Threads work because decoders release the interpreter lock. Each may hold 0.5 GB.
WORKERS = max(2, min(4, available_cores()))
SAVE_INTERVAL = 200  # images between two commits

GRADIENT_BYTES, COLOUR_BYTES = 16, 8 * 8 * 3  # of a signature


@dataclass(frozen=True)
class ImageStats:
    """Statistics of the content of one file. Only `error` is set if it cannot be used."""

    sha256: str
    error: str = ""
    """The error message without the name of the file: " is empty (0 bytes): ..."."""
    width: int = 0
    height: int = 0
    notes: tuple[str, ...] = ()
    """Repairs and suspected damage (`images.decode_image`)."""
    conversions: tuple[Conversion, ...] = ()
    blur: float = 0.0
    """0 sharp to 1 blurred (`blur_effect`)."""
    contrast: int = 255
    """Difference between the lightest and darkest grey, ignoring 2 % of the pixels at each end."""
    signature: str = ""
    """Hexadecimal: 128 bits of gradients, then 8 x 8 colours (`signature_of`)."""
    focus: tuple[float, float] = (0.5, 0.5)
    """The most interesting point, from left and top, 0 to 1 (`focus_of`)."""


# Reading a dataset


def stats_of_all(
    paths: Sequence[Path], progress: Callable[[int, int], None] | None = None
) -> Iterator[ImageStats]:
    """Yields the statistics of each file, in order.

    Reads only files that are new or changed, and decodes only contents that are not cached.
    Calls `progress(done, total)` after each file.
    """
    stored = _StatsCache()
    try:
        known = [stored.of_file(path) for path in paths]
        with ThreadPoolExecutor(WORKERS) as pool:
            results = pool.map(
                lambda path, stats: stats or _stats_of_file(path, stored), paths, known
            )
            for done, stats in enumerate(results, 1):
                yield stats
                if done % SAVE_INTERVAL == 0:
                    stored.save()
                if progress:
                    progress(done, len(paths))
    finally:
        stored.close()


def check_image(data: bytes, path: Path) -> tuple[Image.Image, tuple[str, ...]]:
    """Returns the decoded image and notes on it. Raises `DatasetError` if it cannot be trained."""
    image, notes = decode_image(data, path)
    if min(image.size) < MIN_SIDE:
        raise DatasetError(
            f"{printable(path.name)} has {image.width} x {image.height} pixels, "
            "too few to train on: use a larger one."
        )
    return image, notes


def _stats_of_file(path: Path, stored: "_StatsCache") -> ImageStats:
    try:
        stamp = stamp_of(path)
        data = read_image(path)
    # These errors concern the file at this moment, not its content, so they are not cached.
    except DatasetError as error:
        return ImageStats("", _without_name(error, path))
    except OSError as error:
        return ImageStats("", f" cannot be read ({error.strerror}): copy it again.")
    sha256 = hashlib.sha256(data).hexdigest()
    stats = stored.of_content(sha256) or _stats_of_content(data, sha256, path)
    stored.add(path, stamp, stats)
    return stats


def _stats_of_content(data: bytes, sha256: str, path: Path) -> ImageStats:
    try:
        image, notes = check_image(data, path)
        applied = conversions(data, path)
    except DatasetError as error:
        return ImageStats(sha256, _without_name(error, path))
    width, height = image.size
    image.thumbnail((MEASURED_SIDE, MEASURED_SIDE), Image.Resampling.BOX, reducing_gap=1.0)
    grey = image.convert("L")
    darkest, lightest = np.percentile(np.asarray(grey), (2, 98))
    return ImageStats(
        sha256,
        width=width,
        height=height,
        notes=notes,
        conversions=applied,
        blur=round(blur_effect(grey), 3),
        contrast=int(lightest - darkest),
        signature=signature_of(image),
        focus=focus_of(grey),
    )


def _without_name(error: DatasetError, path: Path) -> str:
    """Returns a message without the file name, which may differ for the same content."""
    return str(error).removeprefix(printable(path.name))


def stamp_of(path: Path) -> str:
    """Returns a stamp that changes when a file is written, from its size, times and inode."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


# Measurements


def blur_effect(grey: Image.Image) -> float:
    """Returns how little an image changes when it is blurred: 0 sharp to 1 blurred.

    The blurrier of the two directions counts (Crete et al. 2007, "The Blur Effect", SPIE 6492).
    On the example images (256 to 427 pixels) it is 0.14 to 0.31, after a Gaussian of radius 2
    0.35 to 0.74, and after one of radius 4 0.58 to 0.89. Images below 32 pixels count as sharp.
    """
    if min(grey.size) < 32:
        return 0.0
    pixels, worst = np.asarray(grey, dtype=np.float32), 0.0
    for values in (pixels, pixels.T):
        padded = np.pad(values, ((6, 5), (0, 0)), mode="edge")
        sums = np.cumsum(padded, axis=0, dtype=np.float64)
        blurred = (sums[11:] - sums[:-11]) / 11
        sharp_steps = np.abs(np.diff(values, axis=0))
        lost = np.maximum(sharp_steps - np.abs(np.diff(blurred, axis=0)), 0).sum()
        total = float(sharp_steps.sum())
        worst = max(worst, 1 - float(lost) / total if total else 0.0)
    return worst


def signature_of(image: Image.Image) -> str:
    """Returns a signature by which near duplicates are found, in hexadecimal.

    It holds the signs of 8 x 8 gradients across and down (dHash, 128 bits) and 8 x 8 colours.
    Gradients alone confuse drawings on a plain background; colours alone confuse landscapes.
    """
    across = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(image.convert("L").resize((8, 9), Image.Resampling.BOX), dtype=np.int16)
    rises = [(np.diff(across, axis=1) > 0).ravel(), (np.diff(down, axis=0) > 0).ravel()]
    gradients = np.packbits(np.concatenate(rises)).tobytes()
    colours = image.resize((8, 8), Image.Resampling.BOX).tobytes()
    return gradients.hex() + colours.hex()


def near_duplicates(
    signatures: Sequence[str], max_bits: int = 8, max_colour: float = 6.0
) -> list[tuple[int, int]]:
    """Returns (later, earlier) for each image that looks like an earlier one.

    At most `max_bits` of the 128 gradient bits differ, and the colours differ by at most
    `max_colour` of 255 on average. Each later image is paired with the first match.
    """
    if not signatures:
        return []
    raw = np.frombuffer(bytes.fromhex("".join(signatures)), np.uint8)
    raw = raw.reshape(len(signatures), GRADIENT_BYTES + COLOUR_BYTES)
    gradients = raw[:, :GRADIENT_BYTES].copy().view(np.uint64)
    colours = raw[:, GRADIENT_BYTES:].astype(np.int16)
    pairs = []
    for later in range(1, len(signatures)):
        differing = np.bitwise_count(gradients[:later] ^ gradients[later]).sum(axis=1)
        for earlier in np.flatnonzero(differing <= max_bits):
            if np.abs(colours[earlier] - colours[later]).mean() <= max_colour:
                pairs.append((later, int(earlier)))
                break
    return pairs


def focus_of(grey: Image.Image) -> tuple[float, float]:
    """Returns the centre of the salient part of an image, from left and top, 0 to 1.

    The saliency is the part of the spectrum that its surroundings do not predict (Hou and Zhang
    2007, CVPR, "Saliency Detection: A Spectral Residual Approach"), at 64 x 64, smoothed. The
    centre is weighted by its square. The method does not recognise faces.
    """
    pixels = np.asarray(grey.resize((64, 64), Image.Resampling.BOX), dtype=np.float64)
    if pixels.std() < 1:  # a plain image, in which only rounding errors would be salient
        return 0.5, 0.5
    spectrum = np.fft.fft2(pixels)
    log_size = np.log(np.abs(spectrum) + 1e-6)
    residual = log_size - _box_mean(log_size, 1)
    salient = _box_mean(np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2, 4)
    weights = np.clip(salient - np.median(salient), 0, None) ** 2
    total = float(weights.sum())
    if not np.isfinite(total) or total <= 0:
        return 0.5, 0.5
    centres = (np.arange(64) + 0.5) / 64
    x = float(weights.sum(0) @ centres) / total
    y = float(weights.sum(1) @ centres) / total
    return round(x, 3), round(y, 3)


def _box_mean(values: NDArray[np.float64], radius: int) -> NDArray[np.float64]:
    """Returns the mean over squares of 2 `radius` + 1 pixels, with repeated edges."""
    side = 2 * radius + 1
    padded = np.pad(values, radius, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    means: NDArray[np.float64] = windows.mean(axis=(2, 3))
    return means


# The cache


@cache
def _decoder_versions() -> str:
    """Returns a key that changes with the decoders, which may open other files then."""
    try:
        return f"{VERSION} {version('pillow')} {version('pillow-heif')}"
    except PackageNotFoundError:
        return f"{VERSION} {version('pillow')}"


class _StatsCache:
    """Statistics on disk, by content, and the content of each path while its stamp is the same.

    If the disk cannot be written, the cache lives in memory for this scan only.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        try:
            folder = outputs_folder() / "cache"
            folder.mkdir(parents=True, exist_ok=True)
            self.database = _open_database(folder / "pictures.sqlite")
        except (OSError, sqlite3.Error):
            self.database = _open_database(Path(":memory:"))

    def of_file(self, path: Path) -> ImageStats | None:
        try:
            stamp = stamp_of(path)
        except OSError:
            return None
        row = self._select(
            "SELECT sha256 FROM files WHERE path = ? AND stamp = ?",
            (os.fsencode(path.absolute()), stamp),
        )
        return self.of_content(row[0]) if row else None

    def of_content(self, sha256: str) -> ImageStats | None:
        row = self._select(
            "SELECT facts FROM contents WHERE sha256 = ? AND decoders = ?",
            (sha256, _decoder_versions()),
        )
        try:
            return _from_json(row[0]) if row else None
        except (ValueError, TypeError, KeyError):
            return None

    def add(self, path: Path, stamp: str, stats: ImageStats) -> None:
        self._execute(
            "INSERT OR REPLACE INTO contents VALUES (?, ?, ?)",
            (stats.sha256, _decoder_versions(), _to_json(stats)),
        )
        if time.time() - path.stat().st_mtime > FRESH_SECONDS:
            self._execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
                (os.fsencode(path.absolute()), stamp, stats.sha256),
            )

    def save(self) -> None:
        with self.lock:
            try:
                self.database.commit()
            except sqlite3.Error:  # the disk is full: the next scan computes the statistics again
                self.database.rollback()

    def close(self) -> None:
        self.save()
        self.database.close()

    def _select(self, query: str, values: tuple[object, ...]) -> tuple[Any, ...] | None:
        with self.lock:
            try:
                row: tuple[Any, ...] | None = self.database.execute(query, values).fetchone()
                return row
            except sqlite3.Error:
                return None

    def _execute(self, query: str, values: tuple[object, ...]) -> None:
        with self.lock:
            try:
                self.database.execute(query, values)
            except sqlite3.Error:  # another process writes for a long time, or the disk is full
                self.database.rollback()


_TABLES = (
    "CREATE TABLE IF NOT EXISTS files"
    " (path BLOB PRIMARY KEY, stamp TEXT, sha256 TEXT) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS contents"
    " (sha256 TEXT, decoders TEXT, facts TEXT, PRIMARY KEY (sha256, decoders)) WITHOUT ROWID",
)


def _open_database(path: Path) -> sqlite3.Connection:
    """Opens the database, or creates a new one if it is damaged."""
    for _ in range(2):
        database = sqlite3.connect(path, timeout=5, check_same_thread=False)
        try:
            # A power cut may damage the file, which is then created again.
            database.execute("PRAGMA synchronous = OFF")
            for table in _TABLES:
                database.execute(table)
            database.commit()
            return database
        except sqlite3.OperationalError:  # busy or read-only, not damaged
            database.close()
            raise
        except sqlite3.DatabaseError:
            database.close()
            path.unlink(missing_ok=True)
    raise sqlite3.DatabaseError("The image cache is damaged and cannot be replaced.")


_STORED_NAMES = {"signature": "look"}
"""Fields whose name in the database differs."""


def _to_json(stats: ImageStats) -> str:
    data = {
        _STORED_NAMES.get(field.name, field.name): getattr(stats, field.name)
        for field in fields(stats)
    }
    return json.dumps(data, separators=(",", ":"))


def _from_json(text: str) -> ImageStats:
    stored = json.loads(text)
    data = {
        field.name: stored[_STORED_NAMES.get(field.name, field.name)]
        for field in fields(ImageStats)
    }
    data["notes"] = tuple(data["notes"])
    data["focus"] = tuple(data["focus"])
    data["conversions"] = tuple(Conversion(*row) for row in data["conversions"])
    return ImageStats(**data)
