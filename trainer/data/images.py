"""The only place that opens pictures: any file becomes upright 8-bit sRGB, or one sentence saying why not.

It never decodes a format outside `IMAGE_FORMATS`, never decodes more than `MAX_PIXELS`, and never passes on what a
file carries besides its pixels (EXIF, GPS, text chunks).
"""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms

from trainer.data.image_formats import (
    IMAGE_ERRORS,
    MAX_FILE_BYTES,
    MAX_JPEG_SCANS,
    frame_notes,
    hidden_damage_notes,
    jpeg_layout,
    open_allowed,
    refuse_bombs,
    refuse_png_surplus,
    too_large,
)
from trainer.data.issues import shown
from trainer.errors import DatasetError
from trainer.runs.atomic_files import atomic_write

# Our own limit is the line at which Pillow warns, and odd metadata costs nothing: warnings would only fill the log.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


def open_image(
    path: Path, background: tuple[int, int, int] = (255, 255, 255)
) -> tuple[Image.Image, tuple[str, ...]]:
    """The whole picture, upright, RGB, 8-bit sRGB, without metadata; and notes on what had to be done to it.

    Transparent parts show `background`, never the colour hidden under them. Of an animation the first frame is taken.
    Raises `DatasetError` naming the file and what to do.
    """
    return decode_image(read_image(path), path, background)


def open_alpha(path: Path) -> Image.Image:
    """How much of each place of the picture shows: upright, 8-bit grey, 255 where it is opaque. Raises `DatasetError`."""
    with _sentences(path):
        image = open_allowed(io.BytesIO(read_image(path)))
        refuse_bombs(image)
        image.load()
        if image.mode.startswith("I;16"):
            alpha = _eight_bit_grey(image)[1]
        else:
            alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        alpha = Image.new("L", image.size, 255) if alpha is None else alpha
        orientation = _orientation(image)
        return (
            alpha.transpose(_UPRIGHT[orientation])
            if orientation in _UPRIGHT and image.format != "TIFF"
            else alpha
        )


def image_size(path: Path) -> tuple[int, int]:
    """Upright (width, height) in pixels, from the header only: a file that passes may still be damaged further on.

    Raises `DatasetError` as `open_image` does.
    """
    with _sentences(path), _regular_file(path) as file:
        image = open_allowed(file)
        refuse_bombs(image)
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def save_thumbnail(path: Path, target: Path, side: int = 320) -> None:
    """Write a WebP of at most `side` x `side` pixels to `target`, without any metadata; whole or not at all.

    Raises `DatasetError` for the picture, `OSError` for the target.
    """
    image, _ = decode_image(read_image(path), path, draft_side=side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=80)
    atomic_write(target, encoded.getvalue())


def read_image(path: Path) -> bytes:
    """The bytes of a regular file: read once, so that what was checked is what is decoded and hashed.

    Raises `DatasetError`.
    """
    with _sentences(path), _regular_file(path) as file:
        return file.read()


def decode_image(
    data: bytes,
    path: Path,
    background: tuple[int, int, int] = (255, 255, 255),
    draft_side: int = 0,
) -> tuple[Image.Image, tuple[str, ...]]:
    """As `open_image`, from bytes already read; `path` is only named in messages.

    `draft_side` > 0 lets a JPEG be decoded at a reduced size of at least that many pixels a side.
    """
    with _sentences(path):
        if not data.strip():
            raise DatasetError("is empty: copy it again from where it came")
        scans, end = jpeg_layout(data)
        if scans > MAX_JPEG_SCANS:
            raise DatasetError(
                f"is a JPEG of {scans} scans, made to be slow to decode: save it anew as an ordinary JPEG"
            )
        image = open_allowed(io.BytesIO(data))
        refuse_bombs(image)
        if image.format == "PNG":
            refuse_png_surplus(image, data)
        # verify() checks PNG checksums that load() does not, and load() finds the cuts that verify() does not.
        open_allowed(io.BytesIO(data)).verify()
        if draft_side:
            image.draft("RGB", (draft_side, draft_side))
        notes = frame_notes(image)
        image.load()
        if not draft_side:
            notes += hidden_damage_notes(image, data, end)
        orientation = _orientation(image)
        rgb, colour_notes = _to_rgb(image, background)
        if (
            orientation in _UPRIGHT and image.format != "TIFF"
        ):  # Pillow has turned a TIFF while loading it
            rgb = rgb.transpose(_UPRIGHT[orientation])
        rgb.info = {}
        return rgb, tuple(notes + colour_notes)


def conversions(data: bytes, path: Path) -> tuple[tuple[str, str], ...]:
    """What decoding converts in a sound picture as a matter of course: (kind, words that follow "The picture").

    From the header only. Raises `DatasetError` as `open_image` does.
    """
    with _sentences(path):
        image = open_allowed(io.BytesIO(data))
        found = []
        with contextlib.suppress(*IMAGE_ERRORS):
            if Image.Image.getexif(image).get(_ORIENTATION, 1) in _UPRIGHT:
                found.append(
                    (
                        "rotated",
                        "lies on its side in the file and is turned upright, as its EXIF data says",
                    )
                )
        if image.has_transparency_data:
            found.append(("transparent", "is transparent in parts: they are shown on white"))
        sixteen = image.mode.startswith("I;16") or (image.format == "PNG" and data[24] == 16)
        if sixteen or image.mode == "CMYK":
            found.append(
                (
                    "converted",
                    f"has {'16 bits a channel' if sixteen else 'CMYK colours'}: it is converted to 8-bit RGB",
                )
            )
        icc = image.info.get("icc_profile")
        if icc and not _is_srgb(icc):
            found.append(("converted", "has a colour profile: its colours are converted to sRGB"))
        return tuple(found)


def image_format(data: bytes, path: Path) -> str:
    """The format by content, one of `IMAGE_FORMATS`. Raises `DatasetError`."""
    with _sentences(path):
        return str(open_allowed(io.BytesIO(data)).format)


def alpha_mask(path: Path) -> Image.Image | None:
    """What of a picture is not transparent, white, as an upright grey picture; None where all of it is. Raises `DatasetError`."""
    data = read_image(path)
    decode_image(data, path)  # all that may be wrong with it
    with _sentences(path):
        image = open_allowed(io.BytesIO(data))
        if not image.has_transparency_data:
            return None
        orientation = _orientation(image)
        alpha = image.convert("RGBA").getchannel("A")
        return alpha.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else alpha


def grey_png(data: bytes, path: Path) -> bytes:
    """A mask of any allowed format as a grey PNG without metadata; `path` is only named in messages. Raises `DatasetError`."""
    image, _ = decode_image(data, path)
    encoded = io.BytesIO()
    image.convert("L").save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def _is_srgb(icc: bytes) -> bool:
    with contextlib.suppress(ImageCms.PyCMSError, *IMAGE_ERRORS):
        return (
            "srgb"
            in (ImageCms.ImageCmsProfile(io.BytesIO(icc)).profile.profile_description or "").lower()
        )
    return True  # damaged: `decode_image` says so


@contextlib.contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Turn what decoders raise into one sentence that begins with the name of the file."""
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"{shown(Path(path).name)} {error}.") from None
    except FileNotFoundError:
        raise DatasetError(
            f"{shown(Path(path).name)} is no longer there: restore it or scan the folder again."
        ) from None
    except PermissionError:
        raise DatasetError(
            f"{shown(Path(path).name)} may not be read: change its permissions."
        ) from None
    except Image.DecompressionBombError:
        raise DatasetError(f"{shown(Path(path).name)} {too_large()}.") from None
    except IMAGE_ERRORS as error:
        reason = (shown(str(error)).strip() or type(error).__name__)[:160]
        raise DatasetError(
            f"{shown(Path(path).name)} is damaged or not a picture ({reason}): copy it again or save it anew as JPEG."
        ) from error


@contextlib.contextmanager
def _regular_file(path: Path) -> Iterator[BinaryIO]:
    # O_NONBLOCK: opening a FIFO must not wait for a writer. What was opened is checked, so it cannot be swapped.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if os.path.isdir(path):  # Windows refuses to open a folder with another error than POSIX
        raise DatasetError("is a folder, not a picture")
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DatasetError("is a pipe or a device, not a picture")
        if status.st_size == 0:
            raise DatasetError("is empty (0 bytes): copy it again from where it came")
        if status.st_size > MAX_FILE_BYTES:
            raise DatasetError(
                f"has {status.st_size >> 20} MB, the limit is {MAX_FILE_BYTES >> 20}: save it smaller"
            )
        yield file


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where it is absent, invalid or unreadable, or where Pillow applies it by itself."""
    if image.format == "TIFF":
        return 1
    try:
        value = Image.Image.getexif(image).get(
            _ORIENTATION, 1
        )  # the PNG plugin's own getexif would decode the picture
    except IMAGE_ERRORS:
        return 1
    return value if value in _UPRIGHT else 1


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> tuple[Image.Image, list[str]]:
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode.startswith("I;16"):
        image, alpha = _eight_bit_grey(image)
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha, image = rgba.getchannel("A"), rgba.convert("RGB")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    rgb, notes = _to_srgb(image, profile) if profile else (image.convert("RGB"), [])
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
    return rgb, notes


def _eight_bit_grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey scaled to 8 bits: Pillow's convert() would clip, turning nearly all of the picture white."""
    grey = np.asarray(image).astype(np.uint32)
    clear = image.info.get("transparency")
    alpha = (
        None if clear is None else Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8))
    )
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)), alpha


def _to_srgb(image: Image.Image, icc: bytes) -> tuple[Image.Image, list[str]]:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        space = profile.profile.xcolor_space.strip()
        if space != {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}[image.mode]:
            # Grey pictures often carry the RGB profile of the editor they came from.
            if not (space == "RGB" and image.mode == "L"):
                return image.convert("RGB"), [
                    f"has a colour profile for {shown(space)} pixels: it was ignored"
                ]
            image = image.convert("RGB")
        if "srgb" in (profile.profile.profile_description or "").lower():
            return image.convert("RGB"), []  # converting sRGB to sRGB could only round
        converted = ImageCms.profileToProfile(
            image, profile, ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
        assert converted is not None, "it is None only where the picture itself is changed"
        return converted, []
    except (ImageCms.PyCMSError, *IMAGE_ERRORS):
        return image.convert("RGB"), [
            "has a damaged colour profile: it was ignored, colours may be slightly off"
        ]
