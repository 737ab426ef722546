"""The only module that opens images. Every file becomes upright 8-bit sRGB, or an error message.

Only the formats in `image_formats.IMAGE_FORMATS` are decoded, and never more than `MAX_PIXELS`.
Metadata of a file (EXIF, GPS, text) is dropped. All functions raise `DatasetError` with a message
that names the file and the remedy.
"""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
    refuse_bad_size,
    refuse_png_surplus,
    too_large,
)
from trainer.data.issue import printable
from trainer.errors import DatasetError
from trainer.runs.atomic_files import atomic_write

# Our own size limit is the one that Pillow warns at, and odd metadata is harmless: these warnings
# would only fill the log.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")

WHITE = (255, 255, 255)

_ORIENTATION_TAG = 0x0112
_TRANSPOSE_FOR_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = 5  # orientations from here on exchange width and height


class Conversion(NamedTuple):
    """A conversion that decoding applies to an intact image."""

    kind: str
    """The kind of the issue: "rotated", "transparent" or "converted"."""
    description: str
    """Continues a sentence that starts with "The image"."""


# Reading files


def open_image(
    path: Path, background: tuple[int, int, int] = WHITE
) -> tuple[Image.Image, tuple[str, ...]]:
    """Returns the image, upright, in 8-bit sRGB and without metadata, and notes on its repairs.

    Transparent parts show `background`, never the colour hidden under them. Of an animation it
    returns the first frame.
    """
    return decode_image(read_image(path), path, background)


def read_image(path: Path) -> bytes:
    """Returns the bytes of a regular file.

    Reading once guarantees that the bytes checked are the bytes decoded and hashed.
    """
    with _named_errors(path), _regular_file(path) as file:
        return file.read()


def image_size(path: Path) -> tuple[int, int]:
    """Returns the upright (width, height) in pixels from the header. The pixels may be damaged."""
    with _named_errors(path), _regular_file(path) as file:
        image = open_allowed(file)
        refuse_bad_size(image)
        width, height = image.size
        return (height, width) if _orientation(image) >= _SIDEWAYS else (width, height)


def open_alpha(path: Path) -> Image.Image:
    """Returns the opacity of each pixel: upright, 8-bit grey, 255 for opaque."""
    with _named_errors(path):
        image = open_allowed(io.BytesIO(read_image(path)))
        refuse_bad_size(image)
        alpha = _alpha_channel(image) or Image.new("L", image.size, 255)
        return _upright(alpha, _orientation(image))


def alpha_mask(path: Path) -> Image.Image | None:
    """Returns the mask of the opaque parts, upright and grey, or None if all of it is opaque."""
    data = read_image(path)
    decode_image(data, path)  # refuses a damaged file
    with _named_errors(path):
        image = open_allowed(io.BytesIO(data))
        alpha = _alpha_channel(image) if image.has_transparency_data else None
        return _upright(alpha, _orientation(image)) if alpha else None


def save_thumbnail(path: Path, target: Path, side: int = 320) -> None:
    """Writes a WebP of at most `side` x `side` pixels to `target`, atomically.

    Raises `OSError` if the target cannot be written.
    """
    image, _ = decode_image(read_image(path), path, draft_side=side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=80)
    atomic_write(target, encoded.getvalue())


@contextlib.contextmanager
def _regular_file(path: Path) -> Iterator[BinaryIO]:
    if os.path.isdir(path):  # Windows raises a different error than POSIX when opening a folder
        raise DatasetError("is a folder, not an image")
    # O_NONBLOCK keeps open() from waiting for the writer of a FIFO. The open file is checked, not
    # its path, so that it cannot be exchanged after the check.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DatasetError("is a pipe or a device, not an image")
        if status.st_size == 0:
            raise DatasetError("is empty (0 bytes): copy it again from its source")
        if status.st_size > MAX_FILE_BYTES:
            raise DatasetError(
                f"has {status.st_size >> 20} MB, the limit is {MAX_FILE_BYTES >> 20}: "
                "save it smaller"
            )
        yield file


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Converts errors of decoders into a `DatasetError` that starts with the name of the file."""
    name = printable(Path(path).name)
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"{name} {error}.") from None
    except FileNotFoundError:
        raise DatasetError(
            f"{name} does not exist any more: restore it or scan the folder again."
        ) from None
    except PermissionError:
        raise DatasetError(f"{name} cannot be read: change its permissions.") from None
    except Image.DecompressionBombError:
        raise DatasetError(f"{name} {too_large()}.") from None
    except IMAGE_ERRORS as error:
        reason = (printable(str(error)).strip() or type(error).__name__)[:160]
        raise DatasetError(
            f"{name} is damaged or not an image ({reason}): copy it again or save it as JPEG."
        ) from error


# Decoding bytes


def decode_image(
    data: bytes,
    path: Path,
    background: tuple[int, int, int] = WHITE,
    draft_side: int = 0,
) -> tuple[Image.Image, tuple[str, ...]]:
    """Does the work of `open_image` on bytes. `path` is only used in messages.

    If `draft_side` > 0, a JPEG may be decoded at a reduced size of at least that many pixels per
    side, and is not searched for hidden damage.
    """
    with _named_errors(path):
        if not data.strip():
            raise DatasetError("is empty: copy it again from its source")
        layout = jpeg_layout(data)
        if layout.scans > MAX_JPEG_SCANS:
            raise DatasetError(
                f"is a JPEG of {layout.scans} scans, made to be slow to decode: "
                "save it again as an ordinary JPEG"
            )
        image = open_allowed(io.BytesIO(data))
        refuse_bad_size(image)
        if image.format == "PNG":
            refuse_png_surplus(image, data)
        # verify() checks PNG checksums, which load() does not; load() finds files that are cut
        # short, which verify() does not.
        open_allowed(io.BytesIO(data)).verify()
        if draft_side:
            image.draft("RGB", (draft_side, draft_side))
        notes = frame_notes(image)
        image.load()
        if not draft_side:
            notes += hidden_damage_notes(image, data, layout.end)
        orientation = _orientation(image)
        rgb, colour_notes = _to_rgb(image, background)
        rgb = _upright(rgb, orientation)
        rgb.info = {}
        return rgb, tuple(notes + colour_notes)


def image_format(data: bytes, path: Path) -> str:
    """Returns the format by content, one of `IMAGE_FORMATS`."""
    with _named_errors(path):
        return str(open_allowed(io.BytesIO(data)).format)


def grey_png(data: bytes, path: Path) -> bytes:
    """Converts a mask of any allowed format to a grey PNG without metadata."""
    image, _ = decode_image(data, path)
    encoded = io.BytesIO()
    image.convert("L").save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def conversions(data: bytes, path: Path) -> tuple[Conversion, ...]:
    """Returns the conversions that decoding applies to an intact image, from its header."""
    with _named_errors(path):
        image = open_allowed(io.BytesIO(data))
        found = []
        if _exif_orientation(image) in _TRANSPOSE_FOR_ORIENTATION:
            reason = "is stored on its side and is turned upright, according to its EXIF data"
            found.append(Conversion("rotated", reason))
        if image.has_transparency_data:
            reason = "is partly transparent: these parts are shown on white"
            found.append(Conversion("transparent", reason))
        is_16_bit = image.mode.startswith("I;16") or (image.format == "PNG" and data[24] == 16)
        if is_16_bit or image.mode == "CMYK":
            colours = "16 bits per channel" if is_16_bit else "CMYK colours"
            found.append(Conversion("converted", f"has {colours}: it is converted to 8-bit RGB"))
        icc = image.info.get("icc_profile")
        if icc and not _is_srgb_or_damaged(icc):
            reason = "has a colour profile: its colours are converted to sRGB"
            found.append(Conversion("converted", reason))
        return tuple(found)


# Orientation


def _exif_orientation(image: Image.Image) -> object:
    """Returns the EXIF orientation as it is stored, or 1 if it is absent or unreadable."""
    try:
        # The PNG plugin's own getexif() would decode the whole image.
        return Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except IMAGE_ERRORS:
        return 1


def _orientation(image: Image.Image) -> int:
    """Returns the orientation 2 to 8 that still has to be applied, or 1 for none.

    Pillow itself turns a TIFF while loading it.
    """
    value = 1 if image.format == "TIFF" else _exif_orientation(image)
    return next((known for known in _TRANSPOSE_FOR_ORIENTATION if known == value), 1)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    transpose = _TRANSPOSE_FOR_ORIENTATION.get(orientation)
    return image if transpose is None else image.transpose(transpose)


# Colours


def _alpha_channel(image: Image.Image) -> Image.Image | None:
    """Returns the opacity in 8-bit grey, or None if the image has no transparency."""
    image.load()
    if image.mode.startswith("I;16"):
        return _eight_bit_grey(image)[1]
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> tuple[Image.Image, list[str]]:
    """Converts a loaded image to sRGB on the background colour, with notes on its profile."""
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
    """Scales 16-bit grey to 8 bits and returns it with its opacity, if any.

    Pillow's convert() would clip, so nearly all of the image would be white.
    """
    grey = np.asarray(image).astype(np.uint32)
    transparent = image.info.get("transparency")
    alpha = None
    if transparent is not None:
        alpha = Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8))
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)), alpha


def _to_srgb(image: Image.Image, icc: bytes) -> tuple[Image.Image, list[str]]:
    """Converts an image in mode L, RGB or CMYK to sRGB, with a note if its profile is ignored."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        space = profile.profile.xcolor_space.strip()
        # Grey images often carry the RGB profile of the editor they came from.
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if space != {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}[image.mode]:
            note = f"has a colour profile for {printable(space)} pixels: it was ignored"
            return image.convert("RGB"), [note]
        if _is_srgb(profile):  # converting sRGB to sRGB could only round
            return image.convert("RGB"), []
        converted = ImageCms.profileToProfile(
            image,
            profile,
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        assert converted is not None, "it is None only with inPlace=True"
        return converted, []
    except (ImageCms.PyCMSError, *IMAGE_ERRORS):
        note = "has a damaged colour profile: it was ignored, colours may be slightly off"
        return image.convert("RGB"), [note]


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    description: Any = profile.profile.profile_description
    return "srgb" in (description or "").lower()


def _is_srgb_or_damaged(icc: bytes) -> bool:
    """Returns whether decoding needs no conversion. It reports a damaged profile itself."""
    try:
        return _is_srgb(ImageCms.ImageCmsProfile(io.BytesIO(icc)))
    except (ImageCms.PyCMSError, *IMAGE_ERRORS):
        return True
