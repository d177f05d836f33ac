"""One generated file of each odd kind, and the color or the message that it must give."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, __version__

from tests.diffusion.odd_bytes import (
    from_linear,
    grey_profile,
    interlaced_rows,
    lab_in_srgb,
    p3_in_srgb,
    p3_profile,
    png_bomb,
    png_file,
    tiff_file,
    to_linear,
)

COLOR = (200, 40, 120)
# Two rare kinds of TIFF are read by 13 and refused, in words, by 12, which gradio asks for.
NEW_PILLOW = int(__version__.split(".")[0]) >= 13
# Four quarters, so that every turn and mirror shows; the shades come through JPEG unchanged.
QUARTERS = (((254, 0, 0), (0, 255, 1)), ((0, 0, 254), (255, 255, 255)))


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    `expected` is the mean color of the upper left, upper right, lower left and lower right quarter, or one color for
    all; None: refused with a message that `reason` is found in.
    """

    name: str
    content: bytes
    expected: Any = None
    reason: str = ""
    suffix: str = "png"


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    memory = io.BytesIO()
    image.save(memory, format=kind, **options)
    return memory.getvalue()


def flat(mode: str, color: Any) -> Image.Image:
    return Image.new(mode, (16, 16), color)


def quarters() -> Image.Image:
    """48 x 32: not square, and whole blocks of JPEG in each quarter."""
    pixels = np.repeat(np.repeat(np.array(QUARTERS, dtype=np.uint8), 16, 0), 24, 1)
    return Image.fromarray(pixels)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def on_white(color: Sequence[float], alpha: float) -> tuple[float, ...]:
    return tuple(alpha / 255 * c + 255 - alpha for c in color)


def plain() -> Iterator[Kind]:
    """Formats and suffixes."""
    picture = flat("RGB", COLOR)
    for kind in ("PNG", "BMP", "TIFF", "PPM", "GIF"):
        yield Kind(f"{kind}", saved(picture, kind), COLOR)
    yield Kind("PNG called JPEG", saved(picture, "PNG"), COLOR, suffix="jpg")
    yield Kind("WebP called PNG", saved(picture, "WEBP", lossless=True), COLOR)
    yield Kind("one pixel", saved(Image.new("RGB", (1, 1), COLOR), "PNG"), COLOR)
    pixels = np.array(quarters())
    rows = interlaced_rows(pixels)
    yield Kind("interlaced PNG", png_file((48, 32), 8, 2, rows, interlaced=True), QUARTERS)
    jpeg = {"quality": 100, "subsampling": 0}
    yield Kind("JPEG", saved(quarters(), "JPEG", **jpeg), QUARTERS)
    yield Kind("progressive JPEG", saved(quarters(), "JPEG", progressive=True, **jpeg), QUARTERS)
    yield Kind("grey JPEG", saved(flat("L", 77), "JPEG"), (77,) * 3)
    second = [Image.new("RGB", (48, 32), (9, 9, 9))]
    mpo = saved(quarters(), "MPO", save_all=True, append_images=second, **jpeg)
    yield Kind("MPO", mpo, QUARTERS, suffix="jpg")


def modes() -> Iterator[Kind]:
    """Modes of 8 bits and fewer."""
    half = Image.fromarray(np.arange(32).reshape(1, 32).repeat(4, 0) % 2 == 1)
    for kind in ("PNG", "TIFF", "BMP"):
        yield Kind(f"1-bit {kind}", saved(half, kind), (127.5,) * 3)
    yield Kind("P", saved(flat("RGB", COLOR).quantize(4), "PNG"), COLOR)
    yield Kind("CMYK TIFF", saved(flat("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0))
    tiff = saved(flat("YCbCr", (150, 128, 128)), "TIFF")
    if NEW_PILLOW:
        yield Kind("YCbCr TIFF", tiff, (150,) * 3)
    else:
        yield Kind("YCbCr TIFF", tiff, reason="truncated")
    lab = lab_in_srgb(60, 40, -30)
    yield Kind("LAB TIFF", tiff_file((1, 1), [8] * 3, 8, bytes([153, 40, 226])), lab)
    # Pillow stores CMYK inverted and names Adobe. Here the values are stored as they are, and nobody is named.
    ink = flat("CMYK", (20, 200, 200, 30))
    red = tuple((255 - c) * (255 - 30) / 255 for c in (20, 200, 200))
    adobe = saved(ink, "JPEG", quality=100)
    yield Kind("CMYK JPEG of Adobe", adobe, red, suffix="jpg")
    other = saved(flat("CMYK", (235, 55, 55, 225)), "JPEG", quality=100)
    start = other.index(b"\xff\xee")
    length = struct.unpack(">H", other[start + 2 : start + 4])[0]
    other = other[:start] + other[start + 2 + length :]
    yield Kind("CMYK JPEG of others", other, red, suffix="jpg")


def deep() -> Iterator[Kind]:
    """More than 8 bits: true means that a clip would turn to white."""
    ramp = np.linspace(0, 65535, 65536).astype(np.uint16).reshape(256, 256).T.copy().ravel()
    np.random.default_rng(0).shuffle(ramp)
    ramp = ramp.reshape(256, 256)
    middle = (127.5,) * 3
    # A quarter of 16384 shuffled values strays by less than 1/255 from the mean of all; seed chosen for that.
    yield Kind("16-bit grey PNG", saved(Image.fromarray(ramp), "PNG"), middle)
    yield Kind("16-bit grey TIFF", saved(Image.fromarray(ramp), "TIFF"), middle)
    yield Kind("16-bit PGM", saved(Image.fromarray(ramp), "PPM"), middle)
    big = tiff_file((256, 256), [16], 1, ramp.astype(">u2").tobytes(), order=">")
    yield Kind("16-bit TIFF, big-endian", big, middle)
    two = struct.pack("<2H", 257 * 60, 257 * 60)
    yield Kind("16-bit TIFF, 0 is white", tiff_file((2, 1), [16], 0, two), (195,) * 3)
    yield Kind("12-bit TIFF", tiff_file((2, 1), [12], 1, b"\x80\x08\x00"), (127.5,) * 3)
    yield Kind("12-bit PGM", b"P5 2 1 4095\n" + struct.pack(">2H", 1024, 1024), (64,) * 3)
    color = b"\0" + struct.pack(">3H", *(257 * c for c in COLOR))
    yield Kind("16-bit RGB PNG", png_file((1, 1), 16, 2, color), COLOR)
    shares = np.full((4, 4), 0.4, dtype=np.float32)
    yield Kind("float TIFF", saved(Image.fromarray(shares), "TIFF"), (102,) * 3)
    yield Kind("PFM", saved(Image.fromarray(shares), "PPM"), (102,) * 3)
    eight = saved(Image.fromarray(shares * 300), "TIFF")
    yield Kind("float TIFF of 8-bit values", eight, None, "120.*range from 0 to 1")
    nan = np.where(np.eye(4) > 0, np.nan, shares).astype(np.float32)
    yield Kind("float TIFF with NaN", saved(Image.fromarray(nan), "TIFF"), None, "nan.*range")
    three = struct.pack("<3f", 0.5, 0.5, 0.5)
    floats = tiff_file((1, 1), [32] * 3, 2, three, {339: (3, [3] * 3)})
    yield Kind("float TIFF in color", floats, None, "floats in color")
    whole = Image.fromarray(np.full((4, 4), 600, dtype=np.int32))
    yield Kind("32-bit TIFF", saved(whole, "TIFF"), None, "mode I .*no range.*600")
    stated = {339: (3, [2]), 340: (9, [-500]), 341: (9, [500])}
    data = struct.pack("<i", 100)
    yield Kind("32-bit TIFF, range stated", tiff_file((1, 1), [32], 1, data, stated), (153,) * 3)
    wrong = tiff_file((1, 1), [32], 1, struct.pack("<i", 501), stated)
    yield Kind("32-bit TIFF, range broken", wrong, None, "501.*range from -500 to 500")
    signed = tiff_file((1, 1), [16], 1, struct.pack("<h", -9), {339: (3, [2])})
    yield Kind("16-bit TIFF with signs", signed, None, "no range")


def transparent() -> Iterator[Kind]:
    """Hidden color must not appear; half of it is half white."""
    mixed = on_white(COLOR, 100)
    white = (255,) * 3
    yield Kind("RGBA", saved(flat("RGBA", (*COLOR, 100)), "PNG"), mixed)
    yield Kind("RGBA TIFF", saved(flat("RGBA", (*COLOR, 100)), "TIFF"), mixed)
    webp = saved(flat("RGBA", (*COLOR, 100)), "WEBP", lossless=True)
    yield Kind("WebP with alpha", webp, mixed, suffix="webp")
    deep_row = b"\0" + struct.pack(">4H", *(257 * c for c in (*COLOR, 100)))
    yield Kind("16-bit RGBA PNG", png_file((1, 1), 16, 6, deep_row), mixed)
    yield Kind("LA", saved(flat("LA", (40, 100)), "PNG"), on_white((40,) * 3, 100))
    indexed = flat("RGBA", (*COLOR, 100)).convert("PA")
    yield Kind("PA TIFF", saved(indexed, "TIFF"), on_white(_web(), 100))
    premultiplied = {338: (3, [1])}
    # Premultiplied 20 at alpha 100 is the color 51, on white 20 + 155.
    tiff = tiff_file((1, 1), [8, 8], 1, bytes([20, 100]), premultiplied)
    if NEW_PILLOW:
        yield Kind("La TIFF", tiff, (175,) * 3)
    else:
        yield Kind("La TIFF", tiff, reason="of a kind not read here")
    rgba = tiff_file((1, 1), [8] * 4, 2, bytes([20, 0, 40, 100]), premultiplied)
    yield Kind("RGBa TIFF", rgba, (175, 155, 195))
    indexed = flat("RGB", COLOR).quantize(2)
    yield Kind("P, one entry transparent", saved(indexed, "PNG", transparency=0), white)
    table = bytes([100, 255])
    yield Kind("P, table of alpha", saved(indexed, "PNG", transparency=table), mixed)
    yield Kind("GIF, transparent", saved(indexed, "GIF", transparency=0), white, suffix="gif")
    # 8 pixels of one shade, which is never white: so it must not be seen, and beside another key it must.
    for depth, shade in ((1, 0), (2, 1), (4, 5), (8, 85), (16, 85 * 257)):
        row = b"\0" + (b"\0" if depth == 1 else b"\x55" * depth)
        seen = (255 * shade // (2**depth - 1),) * 3
        for name, key, mean in (("this", shade, white), ("another", 2**depth - 1, seen)):
            hole = [(b"tRNS", struct.pack(">H", key))]
            name = f"{depth}-bit grey PNG, {name} grey transparent"
            yield Kind(name, png_file((8, 1), depth, 0, row, hole), mean)
    key = struct.pack(">3H", *(257 * c for c in COLOR))
    content = png_file((1, 1), 16, 2, b"\0" + key, [(b"tRNS", key)])
    yield Kind("16-bit RGB PNG, a color transparent", content, white)


def _web() -> tuple[int, ...]:
    """The color that Pillow's fixed palette has for COLOR."""
    found = flat("RGBA", (*COLOR, 100)).convert("PA").convert("RGB").getpixel((0, 0))
    assert isinstance(found, tuple)
    return tuple(int(c) for c in found)


def profiles() -> Iterator[Kind]:
    """Color profiles, whole and broken."""
    p3, seen = p3_profile(), p3_in_srgb((180, 90, 60))
    picture = flat("RGB", (180, 90, 60))
    yield Kind("Display P3", saved(picture, "PNG", icc_profile=p3), seen)
    yield Kind("Display P3 palette", saved(picture.quantize(2), "PNG", icc_profile=p3), seen)
    clear = flat("RGBA", (180, 90, 60, 100))
    yield Kind("Display P3 with alpha", saved(clear, "PNG", icc_profile=p3), on_white(seen, 100))
    shade = flat("L", 90)
    linear = tuple(from_linear(np.full(3, 90 / 255)).tolist())
    yield Kind("linear grey", saved(shade, "PNG", icc_profile=grey_profile(1.0)), linear)
    gamma = tuple(from_linear(np.full(3, (90 / 255) ** 1.8)).tolist())
    yield Kind("grey of gamma 1.8", saved(shade, "JPEG", icc_profile=grey_profile(1.8)), gamma)
    deep_shade = Image.fromarray(np.full((4, 4), 90 * 257, dtype=np.uint16))
    options = {"icc_profile": grey_profile(1.0)}
    yield Kind("16-bit linear grey", saved(deep_shade, "PNG", **options), linear)
    yield Kind("grey with a profile of color", saved(shade, "PNG", icc_profile=p3), (90,) * 3)
    for name, profile in (
        ("cut", p3[:200]),
        ("nonsense", b"\7" * 300),
        ("of grey", grey_profile(1.8)),
    ):
        yield Kind(f"profile {name}", saved(picture, "PNG", icc_profile=profile), (180, 90, 60))
    assert np.abs(np.subtract(seen, (180, 90, 60))).max() > 10
    assert np.abs(np.subtract(linear, 90)).min() > 50
    assert to_linear([90])[0] < 0.2


# How a picture must be stored so that the tag turns it back.
_STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
    99: None,
}


def turned() -> Iterator[Kind]:
    """EXIF."""
    for tag, turn in _STORED_AS.items():
        stored = quarters() if turn is None else quarters().transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = tag
        jpeg = saved(stored, "JPEG", quality=100, subsampling=0, exif=exif)
        yield Kind(f"EXIF {tag}, JPEG", jpeg, QUARTERS, suffix="jpg")
        yield Kind(f"EXIF {tag}, PNG", saved(stored, "PNG", exif=exif), QUARTERS)
        if tag in (3, 6):
            yield Kind(f"EXIF {tag}, TIFF", saved(stored, "TIFF", exif=exif), QUARTERS)
            webp = saved(stored, "WEBP", lossless=True, exif=exif)
            yield Kind(f"EXIF {tag}, WebP", webp, QUARTERS)
    # Pillow's exif_transpose writes the EXIF anew, and fails on a tag of the wrong type that it need not look at.
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", 6
    wrong_tag = exif.tobytes().replace(b"\x01\x0f\0\2", b"\x01\x11\0\2")
    stored = quarters().transpose(Image.Transpose.ROTATE_90)
    jpeg = saved(stored, "JPEG", quality=100, subsampling=0, exif=wrong_tag)
    yield Kind("EXIF 6 beside a damaged tag", jpeg, QUARTERS, suffix="jpg")
    for name, broken in (("cut", b"Exif\0\0MM\0*"), ("nonsense", b"Exif\0\0M\xcd\0*" + b"\7" * 40)):
        jpeg = saved(quarters(), "JPEG", quality=100, subsampling=0, exif=broken)
        yield Kind(f"EXIF {name}", jpeg, QUARTERS, suffix="jpg")


def several() -> Iterator[Kind]:
    """More than one picture in a file."""
    frames = [flat("RGB", (shade, 0, 0)) for shade in (0, 100, 200)]
    names = {
        "GIF": "animated GIF",
        "PNG": "APNG",
        "WEBP": "animated WebP",
        "TIFF": "multi-page TIFF",
    }
    for kind, name in names.items():
        content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        yield Kind(name, content, None, "animation or multi-page")
    yield Kind("ICO", saved(flat("RGBA", (*COLOR, 255)), "ICO"), None, "an icon", "ico")


def damaged() -> Iterator[Kind]:
    """Cut, flipped, claimed too large, or no picture at all."""
    png = saved(noise(), "PNG")
    for at in (20, 60, len(png) // 4, len(png) // 2, 3 * len(png) // 4):
        yield Kind(f"PNG cut after {at} bytes", png[:at], None, "not a picture|cannot be decoded")
    for less in (1, 4, 12, 20, 40):
        yield Kind(f"PNG without its last {less} bytes", png[:-less], None, "cannot be decoded")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    yield Kind("PNG with one bit flipped", bytes(flipped), None, "damaged")
    jpeg = saved(noise(), "JPEG")
    for share in (2, 5, 9):
        cut = jpeg[: len(jpeg) * share // 10]
        yield Kind(f"JPEG cut after {share} tenths", cut, None, "[Tt]runcated")
    yield Kind("JPEG without its last byte", jpeg[:-1], None, "truncated")
    claimed = jpeg.replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 6_000, 8_000))
    yield Kind("JPEG that claims 48 megapixels", claimed, None, "so small a file")
    plain = saved(Image.new("L", (3_000, 3_000), 90), "JPEG", progressive=True, optimize=True)
    yield Kind("JPEG of one shade", plain, (90,) * 3)
    webp = saved(noise(), "WEBP")
    yield Kind("WebP cut", webp[: len(webp) // 2], None, "cannot be decoded|WebP")
    for width, height in ((9_500, 9_400), (15_000, 12_000), (30_000, 30_000)):
        name = f"PNG that claims {width * height // 10**6} megapixels"
        yield Kind(name, png_bomb(width, height), None, "pixels")
    yield Kind("strip", png_bomb(1, 10_000), None, "narrower than 1 to 10")
    heic = b"\0\0\0\x18ftypheic" + bytes(40)
    yield Kind("HEIC", heic, None, "HEIC.*convert it to PNG or JPEG", "heic")
    yield Kind("video", b"\0\0\0\x18ftypisom" + bytes(40), None, "a video", "mp4")
    yield Kind("zero bytes", b"", None, "empty")
    yield Kind("web page", b"<!DOCTYPE html><p>not found", None, "web page", "jpg")
    yield Kind("text", b"a photo of a sks dog", None, "not a picture .20 bytes", "txt")
    yield Kind("SVG", b"<svg xmlns='x'></svg>", None, "SVG", "svg")
    yield Kind("PDF", b"%PDF-1.7\n", None, "a PDF", "pdf")
    yield Kind(".DS_Store", b"\0\0\0\1Bud1" + bytes(100), None, "not a picture")


GROUPS = (plain, modes, deep, transparent, profiles, turned, several, damaged)
KINDS = {kind.name: kind for group in GROUPS for kind in group()}
