"""The hostile corpus: odd and damaged images, captions, names and archives, with their verdicts.

`python -m tests.corpus FOLDER` writes all of it. Each row has a separate folder, so that no row
hides another. Everything is generated, so the repository contains no hostile file. A row that the
file system cannot hold raises `OSError`.
"""

import io
import os
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

ACCEPT, REPORTED, SKIPPED, REFUSED = "accept", "accept, reported", "skipped, reported", "refused"


@dataclass(frozen=True)
class Row:
    """Files with a verdict. `make(folder)` writes them and returns the path that it is about."""

    id: str
    table: str
    verdict: str
    make: Callable[[Path], Path]
    caption: str | None = None
    """The caption that must be read, if the row is about it."""


ROWS: list[Row] = []


def photo(width: int = 96, height: int = 64, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Returns a smooth image with some noise. Each seed gives a different one."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(seed).integers(0, 40, (height, width))
    channels = [
        (x * 2 + 67 * seed + noise) % 256,
        (y * 3 + 113 * seed + noise) % 256,
        (x + y + noise) % 256,
    ]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


JPG, PNG = encoded(photo(), "JPEG", quality=90), encoded(photo(), "PNG")
WEBP = encoded(photo(), "WEBP")


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file of a dataset, without this program's own folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".atelier" not in path.parts
    }


def add(
    table: str, row_id: str, verdict: str, make: Callable[[Path], Path], caption: str | None = None
) -> None:
    ROWS.append(Row(row_id, table, verdict, make, caption))


# Images


def image_row(row_id: str, verdict: str, name: str, data: bytes | Callable[[], bytes]) -> None:
    """Adds a row with one image, and a caption so that a missing one is not an issue."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data() if callable(data) else data)
        path.with_suffix(".txt").write_text("a picture", encoding="utf-8")
        return path

    add("Images", row_id, verdict, make)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int,
    height: int,
    *chunks: bytes,
    depth: int = 8,
    colour: int = 2,
    pixels: bytes | None = None,
) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    idat = zlib.compress(b"\0" * (3 * width + 1) * height) if pixels is None else pixels
    end = png_chunk(b"IDAT", idat) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + end


def zeros(size: int) -> bytes:
    """Returns `size` zero bytes, deflated, without ever holding them in memory."""
    packer, block = zlib.compressobj(1), bytes(2**20)
    return (
        b"".join(packer.compress(block[: min(2**20, size - at)]) for at in range(0, size, 2**20))
        + packer.flush()
    )


def flipped(data: bytes, count: int = 16) -> bytes:
    middle = len(data) // 2
    return (
        data[:middle]
        + bytes(byte ^ 0xFF for byte in data[middle : middle + count])
        + data[middle + count :]
    )


def png16(colour: int) -> bytes:
    channels = {0: 1, 2: 3, 6: 4}[colour]
    row = b"\0" + struct.pack(">H", 0x8000) * channels * 64
    return png(64, 64, depth=16, colour=colour, pixels=zlib.compress(row * 64))


def palette(transparency: int | bytes | None) -> bytes:
    image = photo(mode="P")
    return (
        encoded(image, "PNG")
        if transparency is None
        else encoded(image, "PNG", transparency=transparency)
    )


def hidden_magenta(kind: str = "PNG") -> bytes:
    pixels = np.full((64, 64, 4), (255, 0, 255, 0), np.uint8)
    pixels[16:48, 16:48] = (0, 128, 0, 255)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    return encoded(Image.fromarray(pixels), kind, **options)


def oriented(kind: str, orientation: int) -> bytes:
    image = photo()
    exif = image.getexif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


def with_gps() -> bytes:
    image = photo()
    exif = image.getexif()
    exif[0x010F] = "SECRET-CAMERA"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)
    return encoded(image, "JPEG", exif=exif)


def profile(name: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def frames(kind: str, **options) -> bytes:
    images = [photo(seed=seed) for seed in range(3)]
    return encoded(images[0], kind, save_all=True, append_images=images[1:], **options)


def long_gif() -> bytes:
    data = encoded(photo(mode="P"), "GIF")
    start = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:start] + data[start:-1] * 3000 + b";"


def scan_bomb() -> bytes:
    data = encoded(photo(), "JPEG", progressive=True)
    last_scan = data.rindex(b"\xff\xda")
    return data[:last_scan] + data[last_scan:-2] * 300 + data[-2:]


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "print('code')")
    return file.getvalue()


def heic() -> bytes:
    import pillow_heif

    pillow_heif.register_heif_opener()
    return encoded(photo(), "HEIF")


for kind, suffix, data in (("jpg", ".jpg", JPG), ("png", ".png", PNG), ("webp", ".webp", WEBP)):
    image_row(f"ok_{kind}", ACCEPT, f"x{suffix}", data)
    image_row(f"trunc_half_{kind}", SKIPPED, f"x{suffix}", data[: len(data) // 2])
    image_row(f"trunc_tail_{kind}", SKIPPED, f"x{suffix}", data[:-12])
    image_row(f"trunc_hdr_{kind}", SKIPPED, f"x{suffix}", data[:20])
image_row("bitrot_jpg", REPORTED, "x.jpg", flipped(JPG))
image_row("bitrot_png", SKIPPED, "x.png", flipped(PNG))
# About 1 flip in 10 in a lossy WebP, and each in a lossless one, decodes without an error.
image_row("bitrot_webp", SKIPPED, "x.webp", lambda: flipped(encoded(photo(512, 384), "WEBP")))
image_row("zero_bytes", SKIPPED, "x.png", b"")
image_row("spaces", SKIPPED, "x.png", b" " * 300)
image_row("jpg_named_png", ACCEPT, "x.png", JPG)
image_row("jpg_noext", SKIPPED, "x", JPG)
image_row(
    "html_named_png", SKIPPED, "x.png", b"<!DOCTYPE html><html><script>alert(1)</script></html>"
)
image_row(
    "svg_named_png",
    SKIPPED,
    "x.png",
    b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
)
image_row(
    "eps_named_png",
    SKIPPED,
    "x.png",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n",
)
image_row("anim_gif", REPORTED, "x.gif", lambda: frames("GIF"))
image_row("anim_webp", REPORTED, "x.webp", lambda: frames("WEBP"))
image_row("anim_png", REPORTED, "x.png", lambda: frames("PNG"))
image_row("anim_avif", REPORTED, "x.avif", lambda: frames("AVIF"))
image_row("pages_tiff", REPORTED, "x.tif", lambda: frames("TIFF"))
image_row("png16_grey", ACCEPT, "x.png", lambda: png16(0))
image_row("png16_rgb", ACCEPT, "x.png", lambda: png16(2))
image_row("png16_rgba", ACCEPT, "x.png", lambda: png16(6))
image_row("tiff_float", SKIPPED, "x.tif", lambda: encoded(photo(mode="F"), "TIFF"))
image_row("tiff_int32", SKIPPED, "x.tif", lambda: encoded(photo(mode="I"), "TIFF"))
image_row("cmyk_jpg", ACCEPT, "x.jpg", lambda: encoded(photo(mode="CMYK"), "JPEG"))
image_row("palette_png", ACCEPT, "x.png", lambda: palette(None))
image_row("palette_trns_png", ACCEPT, "x.png", lambda: palette(bytes(range(0, 255, 5))))
image_row("palette_trns_bytes", ACCEPT, "x.png", lambda: palette(3))
image_row("rgba_hidden", ACCEPT, "x.png", hidden_magenta)
image_row("l_png", ACCEPT, "x.png", lambda: encoded(photo(mode="L"), "PNG"))
image_row("la_png", ACCEPT, "x.png", lambda: encoded(photo(mode="LA"), "PNG"))
image_row("one_bit_png", ACCEPT, "x.png", lambda: encoded(photo(mode="1"), "PNG"))
image_row("one_bit_bmp", ACCEPT, "x.bmp", lambda: encoded(photo(mode="1"), "BMP"))
image_row("rgba_webp", ACCEPT, "x.webp", lambda: hidden_magenta("WEBP"))
for orientation in (0, 3, 4, 5, 8):
    image_row(
        f"exif{orientation}_jpg", ACCEPT, "x.jpg", lambda value=orientation: oriented("JPEG", value)
    )
image_row("exif6_png", ACCEPT, "x.png", lambda: oriented("PNG", 6))
image_row("exif6_webp", ACCEPT, "x.webp", lambda: oriented("WEBP", 6))
image_row("exif6_tiff", ACCEPT, "x.tif", lambda: oriented("TIFF", 6))
image_row(
    "exif_garbage",
    ACCEPT,
    "x.jpg",
    lambda: encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40),
)
image_row("exif_gps", ACCEPT, "x.jpg", with_gps)
image_row(
    "icc_srgb", ACCEPT, "x.jpg", lambda: encoded(photo(), "JPEG", icc_profile=profile("sRGB"))
)
image_row(
    "icc_lab_in_rgb",
    REPORTED,
    "x.jpg",
    lambda: encoded(photo(), "JPEG", icc_profile=profile("LAB")),
)
image_row(
    "icc_garbage",
    REPORTED,
    "x.jpg",
    lambda: encoded(photo(), "JPEG", icc_profile=b"not a profile" * 20),
)
image_row(
    "ztxt_bomb",
    SKIPPED,
    "x.png",
    lambda: png(64, 64, png_chunk(b"zTXt", b"Comment\0\0" + zeros(64 * 2**20))),
)
image_row(
    "bomb_1bit",
    SKIPPED,
    "x.png",
    lambda: png(50000, 50000, depth=1, colour=0, pixels=zeros(6251 * 50000)),
)
image_row("bomb_header", SKIPPED, "x.png", lambda: png(13300, 13300, pixels=b""))
image_row("bomb_idat_extra", SKIPPED, "x.png", lambda: png(8, 8, pixels=zeros(64 * 2**20)))
image_row("tiny_1x1", SKIPPED, "x.png", lambda: encoded(photo(1, 1), "PNG"))
image_row("aspect_1_50", REPORTED, "x.png", lambda: encoded(photo(64, 3200), "PNG"))
image_row("zero_dim", SKIPPED, "x.png", lambda: png(0, 64))
image_row("avif", ACCEPT, "x.avif", lambda: encoded(photo(), "AVIF"))
image_row("heic", ACCEPT, "x.heic", heic)
image_row(
    "psd_named_png",
    SKIPPED,
    "x.png",
    b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 64, 64, 8, 3) + bytes(12) + bytes(64 * 192),
)
image_row("jp2", SKIPPED, "x.png", lambda: encoded(photo(), "JPEG2000"))
image_row("jp2_named_jp2", SKIPPED, "x.jp2", lambda: encoded(photo(), "JPEG2000"))
image_row("mpo", ACCEPT, "x.jpg", lambda: frames("MPO"))
image_row("jpg_noeoi", SKIPPED, "x.jpg", JPG[:-2])
image_row("jpg_trailing_zip", ACCEPT, "x.jpg", lambda: JPG + zipped("evil.py"))
image_row("jpg_progressive", ACCEPT, "x.jpg", lambda: encoded(photo(), "JPEG", progressive=True))
image_row("jpg_scan_bomb", SKIPPED, "x.jpg", scan_bomb)
image_row("gif_many_frames", REPORTED, "x.gif", long_gif)
image_row(
    "gif_frame_bigger",
    SKIPPED,
    "x.gif",
    lambda: (d := encoded(photo(mode="P"), "GIF"))[:6] + b"\xff" * 4 + d[10:],
)
image_row(
    "bmp_lying",
    SKIPPED,
    "x.bmp",
    lambda: (d := encoded(photo(), "BMP"))[:18] + struct.pack("<ii", 30000, 30000) + d[26:54],
)


@lambda make: add("Images", "dir_named_png", SKIPPED, make)
def dir_named_png(folder: Path) -> Path:
    (folder / "x.png").mkdir()
    return folder / "x.png"


# Special files


@lambda make: add("special", "fifo", SKIPPED, make)
def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "x.png")
    return folder / "x.png"


@lambda make: add("special", "symlink_outside", SKIPPED, make)
def symlink_outside(folder: Path) -> Path:
    outside = folder.parent / f"outside-{folder.name}.png"
    outside.write_bytes(PNG)
    (folder / "x.png").symlink_to(outside)
    return folder / "x.png"


@lambda make: add("special", "symlink_dangling", SKIPPED, make)
def symlink_dangling(folder: Path) -> Path:
    (folder / "x.png").symlink_to("nowhere.png")
    return folder / "x.png"


@lambda make: add("special", "symlink_loop", SKIPPED, make)
def symlink_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    return folder / "loop"


@lambda make: add("special", "caption_symlink_outside", REFUSED, make, "")
def caption_symlink_outside(folder: Path) -> Path:
    secret = folder.parent / f"secret-{folder.name}"
    secret.write_text("root:x:0:0", encoding="utf-8")
    (folder / "x.png").write_bytes(PNG)
    (folder / "x.txt").symlink_to(secret)
    return folder / "x.txt"


# Captions


def caption(row_id: str, verdict: str, data: bytes, text: str | None = None) -> None:
    def make(folder: Path) -> Path:
        (folder / "x.png").write_bytes(PNG)
        (folder / "x.txt").write_bytes(data)
        return folder / "x.txt"

    add("Captions", row_id, verdict, make, text)


CHINESE, RUSSIAN = "一只可爱的猫坐在窗台上，看着外面的雨", "Рыжая кошка сидит на окне"
caption("cap_gbk", REPORTED, CHINESE.encode("gbk"), CHINESE)
caption("cap_cp1251", REPORTED, RUSSIAN.encode("cp1251"), RUSSIAN)
caption("cap_cp1252", REPORTED, "un café à l'été".encode("cp1252"), "un café à l'été")
caption("cap_bom", ACCEPT, "a red cat".encode("utf-8-sig"), "a red cat")
caption("cap_utf16_bom", REPORTED, "a red cat".encode("utf-16"), "a red cat")
caption("cap_utf16_nobom", REPORTED, "a red cat".encode("utf-16-le"), "a red cat")
caption("cap_utf32", REPORTED, "a red cat".encode("utf-32"), "a red cat")
caption("cap_crlf", ACCEPT, b"a red cat\r\n", "a red cat")
caption("cap_cr", ACCEPT, b"a red cat\ra blue dog\r", "a red cat, a blue dog")
caption("cap_multiline", ACCEPT, b"a red cat.\non a mat\n\n", "a red cat. on a mat")
caption("cap_empty", REPORTED, b"", "")
caption("cap_blank", REPORTED, b" \n\t\n ", "")
caption("cap_100k", REPORTED, b"a cat, " * 15_000)
caption("cap_10mb", SKIPPED, b"a cat, " * 1_500_000, "")
caption("cap_nul", REPORTED, b"a red\0 cat\0", "a red cat")
caption("cap_ctrl", REPORTED, b"a \x1b[31mred\x1b[0m\x07 cat", "a red cat")
caption("cap_surrogate", REPORTED, b"a red \xed\xa0\x80cat", "a red cat")
caption("cap_overlong", REPORTED, b"a red \xc0\xafcat", "a red cat")
caption("cap_rtl", ACCEPT, "\u202ea red\u202c cat \u200bקט".encode(), "a red cat קט")
caption("cap_emoji", ACCEPT, "a 👩‍👩‍👧 family".encode(), "a 👩‍👩‍👧 family")


@lambda make: add("Captions", "cap_dir", REPORTED, make, "")
def cap_dir(folder: Path) -> Path:
    (folder / "x.png").write_bytes(PNG)
    (folder / "x.txt").mkdir()
    return folder / "x.txt"


# File names


def named(row_id: str, verdict: str, *names: str, caption_name: str = "") -> None:
    """Adds a row of captioned images with these names. The verdict is about the first."""

    def make(folder: Path) -> Path:
        for seed, name in enumerate(names):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(photo(seed=seed), "PNG"))
            text = path.with_name(caption_name or path.name[:-4] + ".txt")
            text.write_text("a cat", encoding="utf-8")
        return folder / names[0]

    add("File names", row_id, verdict, make, "a cat")


for row_id, name in {
    "nm_unicode": "żółć データ.png",
    "nm_emoji": "cat 😀👩‍👩‍👧.png",
    "nm_rtl": "\u202egnp.exe.png",
    "nm_newline": "a\nb.png",
    "nm_tab": "a\tb.png",
    "nm_dash": "-rf.png",
    "nm_dashdash": "--output_dir=x.png",
    "nm_squote": "it's.png",
    "nm_dquote": 'a "cat".png',
    "nm_subst": "$(touch PWNED).png",
    "nm_backtick": "`touch PWNED`.png",
    "nm_semicolon": "a; touch PWNED.png",
    "nm_amp": "a && b.png",
    "nm_pipe": "a|b.png",
    "nm_pct": "%2e%2e%2fx.png",
    "nm_fmt": "%s%n{0}.png",
    "nm_html": "<img src=x onerror=alert(1)>.png",
    "nm_backslash": "..\\..\\x.png",
    "nm_colon": "a:stream.png",
    "nm_con": "CON.png",
    "nm_trail_dot": "a...png",
    "nm_trail_space": "a .png",
    "nm_lead_space": " a.png",
    "nm_255": "a" * 251 + ".png",
    "nm_255u": "ż" * 125 + "a.png",
    "nm_dots": "....png",
    "nm_tilde": "~.png",
    "nm_dollar": "$HOME.png",
    "nm_nfc": "caf\u00e9.png",
}.items():
    named(row_id, ACCEPT, name)
named("nm_badutf8", REPORTED, os.fsdecode(b"bad\xff\xfename.png"))
named("nm_nfd", ACCEPT, "cafe\u0301.png", "caf\u00e9.png")
named("nm_case_lo", ACCEPT, "dup.png", "DUP.png")
named("nm_case_up", REPORTED, "DUP.png", "dup.png")
named("nm_png_txt", ACCEPT, "other.png", caption_name="other.png.txt")
named("nm_png_txt2", ACCEPT, "other.v2.png", caption_name="other.v2.png.txt")
named("nm_caption_ext", ACCEPT, "x.png", caption_name="x.caption")
named("nm_kohya_folder", ACCEPT, "10_cat/x.png")


@lambda make: add("File names", "nm_ext_txt", ACCEPT, make, "a cat")
def shared_caption(folder: Path) -> Path:
    (folder / "x.png").write_bytes(PNG)
    (folder / "x.jpg").write_bytes(JPG)
    (folder / "x.txt").write_text("a cat", encoding="utf-8")
    return folder / "x.jpg"


def junk(row_id: str, name: str) -> None:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(b"\0\0\0\1Bud1" + bytes(100))
        return folder / name

    add("File names", row_id, SKIPPED, make)


junk("nm_thumbs", "Thumbs.db")
junk("nm_dsstore", ".DS_Store")
junk("nm_appledouble", "._x.png")


# Archives


def archive(
    row_id: str,
    verdict: str,
    entries: list[tuple[str, bytes]],
    change: Callable[[bytes], bytes] = bytes,
) -> None:
    """Adds a zip of good images, captions and `entries`. `change` damages its bytes."""

    def make(folder: Path) -> Path:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in [("good.png", PNG), ("good.txt", b"a cat"), *entries]:
                info = zipfile.ZipInfo(name)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = (
                    stat.S_IFLNK | 0o777 if row_id == "zip_symlink" else stat.S_IFREG | 0o6755
                ) << 16
                packed.writestr(info, data)
        (folder / "x.zip").write_bytes(change(file.getvalue()))
        return folder / "x.zip"

    add("Archives", row_id, verdict, make)


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def encrypted(data: bytes) -> bytes:
    for signature, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        at = data.index(signature) + offset
        data = patched(data, at, bytes([data[at] | 1]))
    return data


def lie_about_size(data: bytes) -> bytes:
    """Changes the size of the last entry to 10 bytes, in both headers."""
    for signature, offset in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        data = patched(data, data.rindex(signature) + offset, struct.pack("<I", 10))
    return data


def overlap(data: bytes) -> bytes:
    """Makes the second entry start at the first."""
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    return patched(data, second + 42, struct.pack("<I", 0))


JPG2 = encoded(photo(seed=9), "JPEG")
archive("zip_ok", ACCEPT, [])
archive("zip_dotdot", REFUSED, [("../evil.png", PNG)])
archive("zip_dotdot_mid", REFUSED, [("x/../../evil.png", PNG)])
archive("zip_abs", REFUSED, [("/tmp/evil.png", PNG)])
archive("zip_backslash", REFUSED, [("..\\evil.png", PNG)])
archive("zip_drive", REFUSED, [("C:/evil.png", PNG)])
archive("zip_setuid", ACCEPT, [("setuid.png", PNG)])
archive("zip_nested", SKIPPED, [("inner.zip", zipped("evil.py"))])
archive(
    "zip_macosx",
    ACCEPT,
    [("__MACOSX/._good.png", b"\0"), ("._good.png", b"\0"), (".DS_Store", b"\0")],
)
archive("zip_folders", ACCEPT, [("a/good.png", PNG), ("b/good.png", PNG), ("b/good.txt", b"a dog")])
archive("zip_dup", REPORTED, [("good.png", JPG2), ("good.txt", b"a dog")])
archive("zip_case", REPORTED, [("GOOD.png", JPG2), ("GOOD.txt", b"a dog")])
archive("zip_file_and_dir", REFUSED, [("a.png", PNG), ("a.png/b.png", PNG)])
archive("zip_longname", REPORTED, [("ż" * 150 + ".png", PNG), ("ż" * 150 + ".txt", b"a dog")])
archive("zip_deep", SKIPPED, [("d/" * 2000 + "deep.png", PNG)])
archive(
    "zip_pth",
    SKIPPED,
    [("evil.pth", b"\x80\4."), ("evil.py", b"raise SystemExit"), ("evil.so", b"\x7fELF")],
)
archive("zip_trunc", REFUSED, [], lambda data: data[:-30])
archive("zip_encrypted", REFUSED, [], encrypted)
archive("zip_size_lie", REFUSED, [("lie.txt", bytes(2**26))], lie_about_size)
archive(
    "zip_name_mismatch",
    REFUSED,
    [],
    lambda data: patched(data, data.index(b"good.png"), b"evil.png"),
)
archive("zip_symlink", REFUSED, [("link.png", b"/etc/passwd")])
archive("zip_overlap", REFUSED, [], overlap)
archive(
    "zip_crc", REFUSED, [], lambda data: patched(data, data.index(b"good.png") + 20, b"\0\0\0\0")
)
archive("zip_garbage", REFUSED, [], lambda data: b"PK\3\4" + bytes(500))
archive("zip_empty", REFUSED, [], lambda data: b"")
archive("zip_crowded", REFUSED, [], lambda data: data + b"PK\1\2" * 20_001)


@lambda make: add("special", "fifo_named_zip", SKIPPED, make)
def fifo_named_zip(folder: Path) -> Path:
    os.mkfifo(folder / "x.zip")
    return folder / "x.zip"


def build(root: Path) -> dict[str, Path | OSError]:
    """Writes every row below `root`.

    Returns the path that each row's verdict is about, or the reason why it cannot exist here.
    """
    made: dict[str, Path | OSError] = {}
    for row in ROWS:
        folder = root / row.table.replace(" ", "_") / row.id
        folder.mkdir(parents=True)
        try:
            made[row.id] = row.make(folder)
        except (
            OSError,
            ImportError,
            AttributeError,
        ) as error:  # AttributeError: no os.mkfifo on Windows
            made[row.id] = OSError(f"{row.id} cannot be created here: {error}")
    return made


if __name__ == "__main__":
    for name, path in build(Path(sys.argv[1])).items():
        print(f"{name}\t{path!r}")
