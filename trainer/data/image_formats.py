"""Which image formats are decoded, and what is refused or reported before and after decoding."""

import contextlib
import io
import re
import struct
import zlib
from typing import BinaryIO

from PIL import Image

from trainer.errors import DatasetError

# Pillow recognises files by content whatever their name, so the allow-list is what keeps the parsers of EPS (which runs
# Ghostscript), PSD, FITS and JPEG 2000 away from a file called x.png.
# Never set ImageFile.LOAD_TRUNCATED_IMAGES: grey halves would be trained on.
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF")
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
    ".avif", ".heic", ".heif", ".hif",
))  # fmt: skip
MAX_PIXELS = (
    Image.MAX_IMAGE_PIXELS or 89_478_485
)  # 89 megapixels, where Pillow itself begins to warn of a decompression bomb
MAX_FILE_BYTES = 512 * 2**20
MAX_JPEG_SCANS = (
    64  # encoders write about 10; each costs a decoding (300 scans of 25 megapixels took 13 s)
)
MAX_ROT_PIXELS = 40_000_000  # beyond, the search for hidden damage would take too much memory
SMALLEST_SIDE = 8  # pixels: one latent
# What Pillow's decoders were seen to raise on damaged files, and its relatives.
IMAGE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, MemoryError, RuntimeError,
    AttributeError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def open_allowed(file: BinaryIO) -> Image.Image:
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        if "HEIF" not in Image.OPEN:
            pillow_heif.register_heif_opener()
    try:
        return Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError:
        file.seek(0)
        raise DatasetError(_what_it_is(file.read(512))) from None


def _what_it_is(head: bytes) -> str:
    """For bytes that no allowed decoder recognises, what they seem to be and what to do."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    known = "save it as JPEG or PNG in a picture editor"
    if head[4:8] == b"ftyp":
        missing = "install pillow-heif" if "HEIF" not in Image.OPEN else known
        return f"is a HEIC, AVIF or video file that cannot be decoded here: {missing}"
    for start, kind in (
        (b"<svg", "an SVG drawing"), (b"<?xml", "an XML or SVG file"), (b"<", "a web page, perhaps a failed download"),
        (b"8bps", "a Photoshop file"), (b"\0\0\0\x0cjp", "a JPEG 2000 file"), (b"\xff\x4f\xff\x51", "a JPEG 2000 file"),
        (b"%!ps", "a PostScript file"), (b"%pdf", "a PDF"), (b"pk\3\4", "a zip archive"), (b"riff", "a damaged WebP"),
        (b"\xff\xd8", "a damaged JPEG"), (b"\x89png", "a damaged PNG"), (b"gif8", "a damaged GIF"),
    ):  # fmt: skip
        if text.startswith(start):
            return f"is {kind}, not a picture that can be used: {'copy it again' if 'damaged' in kind else known}"
    return f"is damaged or not a picture: {known}"


def refuse_bombs(image: Image.Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DatasetError(
            f"claims to be {width} x {height} pixels: the file is damaged, save it anew"
        )
    if width * height >= MAX_PIXELS:
        raise DatasetError(f"({width} x {height}) {too_large()}")
    if image.mode in ("F", "I"):
        raise DatasetError(
            "has 32-bit pixels, whose white is not known: save it with 8 or 16 bits a channel"
        )


def too_large() -> str:
    return f"has more than {MAX_PIXELS // 10**6} million pixels: make it smaller"


def jpeg_layout(data: bytes) -> tuple[int, int]:
    """Number of scans of a JPEG and where its end marker is, without decoding; (0, end) for anything else."""
    scans, position = 0, 2
    # Inside a scan 0xFF is followed by 00 or a restart marker only, so the next marker is found without decoding;
    # a marker with a length is stepped over, so a thumbnail inside EXIF is not counted.
    marker = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])", re.DOTALL)
    while data.startswith(b"\xff\xd8") and (found := marker.search(data, position)):
        kind, position = found[1][0], found.end()
        if kind == 0xD9:
            return scans, found.start()
        scans += kind == 0xDA
        position += int.from_bytes(data[position : position + 2], "big")
    return scans, len(data)


def hidden_damage_notes(image: Image.Image, data: bytes, jpeg_end: int) -> list[str]:
    """Find flipped bytes that decoders pass over: after them a picture uses too little or too much of its data.

    A sound picture changes when its last bytes do, and does not when more are added. Measured on made pictures: no
    sound one was named (0 of 384 JPEG, 0 of 144 WebP). Of flips of 16 bytes it finds 2 of 3 in a JPEG, nearly all in a
    lossy WebP and few in a lossless one; of holes of 4 kB all but those between restart markers.
    Raises `DatasetError` for a WebP, where all that follows the flip is lost.
    """
    if image.width * image.height > MAX_ROT_PIXELS:
        return []
    found = image.tobytes()

    def pixels(variant: bytes) -> bytes | None:
        try:
            with Image.open(io.BytesIO(variant), formats=["JPEG", "WEBP"]) as picture:
                return picture.tobytes()
        except IMAGE_ERRORS:
            return None

    if image.format in ("JPEG", "MPO"):
        head, tail = data[: jpeg_end - 6], data[jpeg_end - 6 : jpeg_end]
        changed = bytes(
            byte if byte in (0, 0xFF) else byte ^ 0xFF for byte in tail
        )  # 00 and FF are part of the syntax
        more = b"\x5a\xa5\x3c\xc3" * 16 + b"\xff\xd9"
        too_little = changed != tail and pixels(head + changed + more) == found
        if too_little or pixels(head + tail + more) not in (None, found):
            return [
                "may be damaged inside: look at it, and copy it again if it has stripes or false colours"
            ]
    elif image.format == "WEBP" and (end := _webp_end(data)):
        changed = bytes(byte ^ 0xFF for byte in data[end - 16 : end])
        if pixels(data[: end - 16] + changed + data[end:]) == found:
            raise DatasetError(
                "is damaged inside: copy it again from where it came, or save it anew"
            )
    return []


def _webp_end(data: bytes) -> int:
    """Where the pixels of a still WebP end; 0 where there are none."""
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack("<4sI", data[position : position + 8])
        if kind in (b"VP8 ", b"VP8L"):
            return position + 8 + length
        position += 8 + length + length % 2
    return 0


def refuse_png_surplus(image: Image.Image, data: bytes) -> None:
    """Refuse a PNG whose compressed pixels are larger than its raw pixels can be: it inflates to something else."""
    stored, position = 0, 8
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        stored += length if kind == b"IDAT" else 0
        position += 12 + length
    width, height = image.size
    most = (width * 8 + 8) * height  # 16-bit RGBA, one filter byte a row and room for interlacing
    if stored > most + most // 64 + 4096:
        raise DatasetError(
            "holds far more data than its pixels need: it is not an ordinary PNG, save it anew"
        )


def frame_notes(image: Image.Image) -> list[str]:
    # `is_animated` looks one frame ahead at most; `n_frames` would walk through all of a long GIF.
    if image.format in ("MPO", "HEIF") or not getattr(image, "is_animated", False):
        return []
    if image.format == "TIFF":
        return ["has several pages: only the first is used"]
    return ["is animated: only its first frame is used"]
