"""What each picture of a dataset is like, worked out once for its content and kept on disk: size, sharpness, contrast, looks.

Addressed by content, so a stale entry cannot be found; losing the file costs time only. Memory does not grow with the
number of pictures: what is kept of each is about 300 bytes.
"""

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.data.image_formats import SMALLEST_SIDE
from trainer.data.images import conversions, decode_image, read_image
from trainer.data.issues import shown
from trainer.errors import DatasetError
from trainer.runs.run_folder import outputs_folder

VERSION = 1  # part of every key: raise it when facts are worked out differently
MEASURED_SIDE = (
    512  # pixels; sharpness is judged at the size that is trained, not at that of the camera
)
FRESH_SECONDS = 2.0  # a file changed this recently may change again without its time showing it
WORKERS = max(
    2, min(4, os.cpu_count() or 1)
)  # threads, as decoders let go of the interpreter; few, as each may hold 0.5 GB
BATCH = 200  # pictures between two writes to the disk


@dataclass(frozen=True)
class Facts:
    """What is known of the content of one file; of an unusable one only `error`."""

    sha256: str
    error: str = ""
    """A sentence without its first word, the name of the file: " is empty (0 bytes): ..."."""
    width: int = 0
    height: int = 0
    notes: tuple[str, ...] = ()
    """What had to be put right, or looks wrong (`pictures.decode_image`)."""
    conversions: tuple[tuple[str, str], ...] = ()
    """What is converted as a matter of course (`pictures.conversions`)."""
    blur: float = 0.0
    """0 sharp to 1 blurred (`blur_effect`)."""
    contrast: int = 255
    """Distance of the darkest from the lightest grey, 2 % at each end not counted."""
    look: str = ""
    """Hexadecimal: 128 bits of gradients, then 8 x 8 colours (`look_of`)."""
    focus: tuple[float, float] = (0.5, 0.5)
    """Where the picture is most interesting, from left and top, 0 to 1 (`focus_of`)."""


def check_image(data: bytes, path: Path) -> tuple[Image.Image, tuple[str, ...]]:
    """A picture that can be trained on, and notes on it. Raises `DatasetError` for one that cannot."""
    image, notes = decode_image(data, path)
    if min(image.size) < SMALLEST_SIDE:
        size = f"{image.width} x {image.height}"
        raise DatasetError(
            f"{shown(path.name)} has {size} pixels, too few to train on: use a larger one."
        )
    return image, notes


def inspect_all(
    paths: Sequence[Path], progress: Callable[[int, int], None] | None = None
) -> Iterator[Facts]:
    """The facts of each file, in order. Only files that are new or changed are read, and only unknown contents decoded."""
    memory = _Memory()
    try:
        known = [memory.of_file(path) for path in paths]
        with ThreadPoolExecutor(WORKERS) as pool:
            looks = pool.map(
                lambda pair: pair[1] or _look(pair[0], memory), zip(paths, known, strict=True)
            )
            for done, facts in enumerate(looks, 1):
                yield facts
                if done % BATCH == 0:
                    memory.save()
                if progress:
                    progress(done, len(paths))
    finally:
        memory.close()


def _look(path: Path, memory: "_Memory") -> Facts:
    try:
        stamp = stamp_of(path)
        data = read_image(path)
    except DatasetError as error:  # of this file at this moment, not of its content: not kept
        return Facts("", str(error).removeprefix(shown(path.name)))
    except OSError as error:
        return Facts("", f" cannot be read ({error.strerror}): copy it again.")
    sha256 = hashlib.sha256(data).hexdigest()
    facts = memory.of_content(sha256) or _facts(data, sha256, path)
    memory.keep(path, stamp, facts)
    return facts


def _facts(data: bytes, sha256: str, path: Path) -> Facts:
    try:
        image, notes = check_image(data, path)
        converted = conversions(data, path)
    except DatasetError as error:
        return Facts(sha256, str(error).removeprefix(shown(path.name)))
    width, height = image.size
    image.thumbnail((MEASURED_SIDE, MEASURED_SIDE), Image.Resampling.BOX, reducing_gap=1.0)
    grey = image.convert("L")
    darkest, lightest = np.percentile(np.asarray(grey), (2, 98))
    blur = round(blur_effect(grey), 3)
    return Facts(
        sha256,
        "",
        width,
        height,
        notes,
        converted,
        blur,
        int(lightest - darkest),
        look_of(image),
        focus_of(grey),
    )


def stamp_of(path: Path) -> str:
    """Differs when a file was written to, as far as its size, times and number can tell."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def blur_effect(grey: Image.Image) -> float:
    """How little a picture changes when it is blurred: 0 sharp to 1 blurred (Crete et al. 2007, "The Blur Effect", SPIE 6492).

    Of the two directions the more blurred one. Measured on the example pictures, 256 to 427 pixels: 0.14 to 0.31 as they
    are, 0.35 to 0.74 after a Gaussian of radius 2, 0.58 to 0.89 after one of radius 4. Pictures below 32 pixels count as sharp.
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


def look_of(image: Image.Image) -> str:
    """The picture seen small: which of its 8 x 8 neighbours are lighter across and down (dHash, 128 bits), and their colours.

    The gradients alone confuse drawings on plain ground; the colours alone confuse landscapes.
    """
    across = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(image.convert("L").resize((8, 9), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(
        np.concatenate([(np.diff(across, axis=1) > 0).ravel(), (np.diff(down, axis=0) > 0).ravel()])
    )
    return bits.tobytes().hex() + image.resize((8, 8), Image.Resampling.BOX).tobytes().hex()


def focus_of(grey: Image.Image) -> tuple[float, float]:
    """The centre of what stands out: the part of the spectrum that its surroundings do not foretell (Hou and Zhang 2007, CVPR,
    "Saliency Detection: A Spectral Residual Approach"), at 64 x 64, smoothed, weighed by its square. It knows no faces.
    """
    pixels = np.asarray(grey.resize((64, 64), Image.Resampling.BOX), dtype=np.float64)
    if pixels.std() < 1:  # plain: what would stand out is rounding
        return 0.5, 0.5
    spectrum = np.fft.fft2(pixels)
    log_size = np.log(np.abs(spectrum) + 1e-6)
    residual = log_size - _box_mean(log_size, 1)
    salient = _box_mean(np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2, 4)
    weights = np.clip(salient - np.median(salient), 0, None) ** 2
    total = float(weights.sum())
    if not np.isfinite(total) or total <= 0:
        return 0.5, 0.5
    places = (np.arange(64) + 0.5) / 64
    return round(float(weights.sum(0) @ places) / total, 3), round(
        float(weights.sum(1) @ places) / total, 3
    )


def _box_mean(values: np.ndarray, radius: int) -> np.ndarray:
    """Mean over a square of 2 `radius` + 1, edges repeated."""
    window = np.lib.stride_tricks.sliding_window_view(
        np.pad(values, radius, mode="edge"), (2 * radius + 1, 2 * radius + 1)
    )
    return window.mean(axis=(2, 3))


def near_twins(looks: Sequence[str], bits: int = 8, colours: float = 6.0) -> list[tuple[int, int]]:
    """(later, earlier) for each picture that looks like an earlier one: at most `bits` of 128 differ, and `colours` of 255 on average."""
    if not looks:
        return []
    raw = np.frombuffer(bytes.fromhex("".join(looks)), np.uint8).reshape(len(looks), 16 + 192)
    gradients = raw[:, :16].copy().view(np.uint64)
    palette = raw[:, 16:].astype(np.int16)
    twins = []
    for later in range(1, len(looks)):
        differing = np.bitwise_count(gradients[:later] ^ gradients[later]).sum(axis=1)
        for earlier in np.flatnonzero(differing <= bits):
            if np.abs(palette[earlier] - palette[later]).mean() <= colours:
                twins.append((later, int(earlier)))
                break
    return twins


@cache
def _decoders() -> str:
    """What could not be opened yesterday may be today, with other decoders."""
    try:
        return f"{VERSION} {version('pillow')} {version('pillow-heif')}"
    except PackageNotFoundError:
        return f"{VERSION} {version('pillow')}"


class _Memory:
    """The facts on disk: of a path, while its stamp is the same, and of a content. Without a disk to write to, of this scan only."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        try:
            folder = outputs_folder() / "cache"
            folder.mkdir(parents=True, exist_ok=True)
            self.base = _open(folder / "pictures.sqlite")
        except (OSError, sqlite3.Error):
            self.base = _open(Path(":memory:"))

    def of_file(self, path: Path) -> Facts | None:
        try:
            stamp = stamp_of(path)
        except OSError:
            return None
        row = self._one(
            "SELECT sha256 FROM files WHERE path = ? AND stamp = ?",
            (os.fsencode(path.absolute()), stamp),
        )
        return self.of_content(row[0]) if row else None

    def of_content(self, sha256: str) -> Facts | None:
        row = self._one(
            "SELECT facts FROM contents WHERE sha256 = ? AND decoders = ?", (sha256, _decoders())
        )
        try:
            return _read(row[0]) if row else None
        except (ValueError, TypeError, KeyError):
            return None

    def keep(self, path: Path, stamp: str, facts: Facts) -> None:
        text = json.dumps(asdict(facts), separators=(",", ":"))
        self._do(
            "INSERT OR REPLACE INTO contents VALUES (?, ?, ?)", (facts.sha256, _decoders(), text)
        )
        if time.time() - path.stat().st_mtime > FRESH_SECONDS:
            self._do(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
                (os.fsencode(path.absolute()), stamp, facts.sha256),
            )

    def save(self) -> None:
        with self.lock:
            try:
                self.base.commit()
            except sqlite3.Error:  # a full disk: the facts are worked out again next time
                self.base.rollback()

    def close(self) -> None:
        self.save()
        self.base.close()

    def _one(self, query: str, values: tuple) -> tuple | None:
        with self.lock:
            try:
                return self.base.execute(query, values).fetchone()
            except sqlite3.Error:
                return None

    def _do(self, query: str, values: tuple) -> None:
        with self.lock:
            try:
                self.base.execute(query, values)
            except sqlite3.Error:  # another process writes for long, or the disk is full
                self.base.rollback()


def _open(path: Path) -> sqlite3.Connection:
    """The database, made anew where it is damaged."""
    for _ in range(2):
        base = sqlite3.connect(path, timeout=5, check_same_thread=False)
        try:
            base.execute("PRAGMA synchronous = OFF")  # what a power cut damages is made anew
            base.execute(
                "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, stamp TEXT, sha256 TEXT) WITHOUT ROWID"
            )
            base.execute(
                "CREATE TABLE IF NOT EXISTS contents (sha256 TEXT, decoders TEXT, facts TEXT, PRIMARY KEY (sha256, decoders)) WITHOUT ROWID"
            )
            base.commit()
            return base
        except sqlite3.OperationalError:  # busy or read-only, not damaged
            base.close()
            raise
        except sqlite3.DatabaseError:
            base.close()
            path.unlink(missing_ok=True)
    raise sqlite3.DatabaseError("The cache cannot be made anew.")


def _read(text: str) -> Facts:
    data = json.loads(text)
    for name in ("notes", "focus"):
        data[name] = tuple(data[name])
    data["conversions"] = tuple(map(tuple, data["conversions"]))
    return Facts(**{field.name: data[field.name] for field in fields(Facts)})
