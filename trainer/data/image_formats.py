"""Image formats: which are decoded, what is refused, and how hidden damage is found.

Messages of `DatasetError` start with a verb ("is empty: ..."); `images` puts the file name first.
"""

import contextlib
import io
import re
import struct
import zlib
from typing import BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from trainer.errors import DatasetError

# Pillow chooses a decoder by content, whatever the name of the file. This list keeps the parsers
# of EPS (which runs Ghostscript), PSD, FITS and JPEG 2000 away from a file called x.png.
# Never set ImageFile.LOAD_TRUNCATED_IMAGES: the adapter would learn the grey halves.
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF")
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif",
    ".tiff", ".gif", ".avif", ".heic", ".heif", ".hif",
))  # fmt: skip

# 89 megapixels: Pillow itself warns of a decompression bomb above this size.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
MAX_FILE_BYTES = 512 * 2**20
# Encoders write about 10 scans. Decoding 300 scans of 25 megapixels took 13 s.
MAX_JPEG_SCANS = 64
# Searching larger images for hidden damage takes too much memory.
MAX_DAMAGE_SEARCH_PIXELS = 40_000_000
MIN_SIDE = 8  # pixels: one latent

# Everything that Pillow's decoders were seen to raise on damaged files.
IMAGE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError,
    MemoryError, RuntimeError, AttributeError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip

OTHER_CONTENT = (
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML or SVG file"),
    (b"<", "a web page, perhaps a failed download"),
    (b"8bps", "a Photoshop file"),
    (b"\0\0\0\x0cjp", "a JPEG 2000 file"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 file"),
    (b"%!ps", "a PostScript file"),
    (b"%pdf", "a PDF"),
    (b"pk\3\4", "a zip archive"),
    (b"riff", "a damaged WebP"),
    (b"\xff\xd8", "a damaged JPEG"),
    (b"\x89png", "a damaged PNG"),
    (b"gif8", "a damaged GIF"),
)
"""First bytes, in lower case, of files that no allowed decoder opens. The first match counts."""


def open_allowed(file: BinaryIO) -> Image.Image:
    """Opens an image in one of `IMAGE_FORMATS` without decoding its pixels."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        if "HEIF" not in Image.OPEN:
            pillow_heif.register_heif_opener()
    try:
        return Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        file.seek(0)
        raise DatasetError(_describe_content(file.read(512))) from None


def _describe_content(head: bytes) -> str:
    """Returns what a file seems to be, from its first bytes, and what to do about it."""
    save_as = "save it as JPEG or PNG in an image editor"
    if head[4:8] == b"ftyp":
        advice = save_as if "HEIF" in Image.OPEN else "install pillow-heif"
        return f"is a HEIC, AVIF or video file that cannot be decoded here: {advice}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, content in OTHER_CONTENT:
        if text.startswith(start):
            advice = "copy it again" if "damaged" in content else save_as
            return f"is {content}, not an image that can be used: {advice}"
    return f"is damaged or not an image: {save_as}"


# Refusals


def too_large() -> str:
    """Returns the message for an image of more than `MAX_PIXELS`."""
    return f"has more than {MAX_PIXELS // 10**6} million pixels: make it smaller"


def refuse_bad_size(image: Image.Image) -> None:
    """Raises `DatasetError` if the size or pixel type cannot be decoded safely and correctly."""
    width, height = image.size
    if width < 1 or height < 1:
        raise DatasetError(
            f"claims to be {width} x {height} pixels: the file is damaged, save it again"
        )
    if width * height >= MAX_PIXELS:
        raise DatasetError(f"({width} x {height}) {too_large()}")
    if image.mode in ("F", "I"):
        raise DatasetError(
            "has 32-bit pixels, whose white level is unknown: save it with 8 or 16 bits per channel"
        )


def refuse_png_surplus(image: Image.Image, data: bytes) -> None:
    """Raises `DatasetError` if a PNG's compressed pixels are larger than its raw pixels can be."""
    stored, position = 0, 8
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        if kind == b"IDAT":
            stored += length
        position += 12 + length
    width, height = image.size
    # 16-bit RGBA, one filter byte per row, and room for interlacing.
    max_raw = (width * 8 + 8) * height
    if stored > max_raw + max_raw // 64 + 4096:
        raise DatasetError(
            "holds far more data than its pixels need: it is not an ordinary PNG, save it again"
        )


# Animations


def frame_notes(image: Image.Image) -> list[str]:
    """Returns a note if the file has several frames or pages."""
    # `is_animated` reads at most one frame ahead; `n_frames` would read all of a long GIF.
    if image.format in ("MPO", "HEIF") or not getattr(image, "is_animated", False):
        return []
    if image.format == "TIFF":
        return ["has several pages: only the first is used"]
    return ["is animated: only its first frame is used"]


# Hidden damage


class JpegLayout(NamedTuple):
    """The structure of a JPEG, read without decoding it."""

    scans: int
    """0 for a file that is not a JPEG."""
    end: int
    """Position of the end marker, or the length of the file if it has none."""


# Inside a scan 0xFF is followed only by 00 or a restart marker, so any other marker ends it.
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])", re.DOTALL)
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA


def jpeg_layout(data: bytes) -> JpegLayout:
    """Returns the number of scans of a JPEG and the position of its end marker."""
    if not data.startswith(b"\xff\xd8"):
        return JpegLayout(0, len(data))
    scans, position = 0, 2
    while marker := _JPEG_MARKER.search(data, position):
        kind = marker[1][0]
        if kind == _END_OF_IMAGE:
            return JpegLayout(scans, marker.start())
        scans += kind == _START_OF_SCAN
        # Skip the segment, so that a thumbnail inside EXIF is not counted.
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return JpegLayout(scans, len(data))


def hidden_damage_notes(image: Image.Image, data: bytes, jpeg_end: int) -> list[str]:
    """Finds flipped bytes that a decoder ignores, and returns a note about them.

    After such damage an image uses too few or too many of its bytes. The pixels of an intact
    image change if its last bytes change, and do not change if more bytes follow.

    Measured on generated images: no intact image was reported (of 384 JPEG and 144 WebP). Of
    flips of 16 bytes it finds 2 of 3 in a JPEG, nearly all in a lossy WebP and few in a lossless
    one. Of holes of 4 kB it finds all except those between restart markers.

    `image` must be loaded. Raises `DatasetError` for a damaged WebP, in which everything after
    the damage is lost.
    """
    if image.width * image.height > MAX_DAMAGE_SEARCH_PIXELS:
        return []
    if image.format in ("JPEG", "MPO") and _is_jpeg_damaged(image.tobytes(), data, jpeg_end):
        return [
            "may be damaged inside: look at it, and copy it again if it has stripes or false "
            "colours"
        ]
    if image.format == "WEBP" and _is_webp_damaged(image.tobytes(), data):
        raise DatasetError("is damaged inside: copy it again from its source, or save it again")
    return []


def _is_jpeg_damaged(pixels: bytes, data: bytes, end: int) -> bool:
    head, tail = data[: end - 6], data[end - 6 : end]
    changed = bytes(byte if byte in (0, 0xFF) else byte ^ 0xFF for byte in tail)  # keeps markers
    more = b"\x5a\xa5\x3c\xc3" * 16 + b"\xff\xd9"
    uses_too_little = changed != tail and _pixels_of(head + changed + more) == pixels
    return uses_too_little or _pixels_of(head + tail + more) not in (None, pixels)


def _is_webp_damaged(pixels: bytes, data: bytes) -> bool:
    end = _webp_end(data)
    if not end:
        return False
    changed = bytes(byte ^ 0xFF for byte in data[end - 16 : end])
    return _pixels_of(data[: end - 16] + changed + data[end:]) == pixels


def _pixels_of(data: bytes) -> bytes | None:
    """Returns the decoded pixels of a changed file, or None if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "WEBP"]) as image:
            return image.tobytes()
    except IMAGE_ERRORS:
        return None


def _webp_end(data: bytes) -> int:
    """Returns the position after the pixels of a still WebP, or 0 for an animated one."""
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack("<4sI", data[position : position + 8])
        if kind in (b"VP8 ", b"VP8L"):
            return int(position + 8 + length)
        position += 8 + length + length % 2
    return 0
