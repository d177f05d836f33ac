"""Sound pictures of many kinds, and ways in which their files get damaged, drawn from a seeded stream."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image

from tests.diffusion.odd_bytes import grey_profile, interlaced_rows, p3_profile, png_file
from tests.diffusion.odd_images import saved

Damage = Callable[[Random, bytes, bytes], bytes]
_EXTREMES = (
    b"\0",
    b"\1",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xff\xff",
    bytes(4),
    b"\x7f\xff\xff\xff",
    b"\xff" * 4,
)


def sound_pictures() -> dict[str, bytes]:
    """Small files, by a name that begins with their format."""
    pixels = np.random.default_rng(5).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    pixels[:, :20] = np.arange(30, dtype=np.uint8)[:, None, None] * 8
    color, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x011A] = "maker", 6, 72.0
    clear = color.copy()
    clear.putalpha(color.getchannel("R"))
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    indexed, grey = color.quantize(16), color.convert("L")
    facts = {"exif": exif, "icc_profile": p3_profile()}
    frames = {"save_all": True, "append_images": [color.transpose(Image.Transpose.ROTATE_180)]}
    rows = interlaced_rows(pixels)
    return {
        "PNG": saved(color, "PNG"),
        "PNG with facts": saved(color, "PNG", **facts),
        "PNG with alpha": saved(clear, "PNG"),
        "PNG of 16 bits": saved(deep, "PNG", icc_profile=grey_profile(1.8)),
        "PNG with palette": saved(indexed, "PNG", transparency=3),
        "PNG of 1 bit": saved(color.convert("1"), "PNG"),
        "PNG interlaced": png_file((40, 30), 8, 2, rows, interlaced=True),
        "PNG animated": saved(color, "PNG", **frames),
        "JPEG": saved(color, "JPEG"),
        "JPEG with facts": saved(color, "JPEG", **facts),
        "JPEG progressive": saved(color, "JPEG", progressive=True, exif=exif),
        "JPEG grey": saved(grey, "JPEG", icc_profile=grey_profile(1.8)),
        "JPEG of ink": saved(color.convert("CMYK"), "JPEG"),
        "JPEG of two": saved(color, "MPO", **frames),
        "WEBP": saved(color, "WEBP"),
        "WEBP with facts": saved(color, "WEBP", **facts),
        "WEBP lossless": saved(clear, "WEBP", lossless=True),
        "WEBP with alpha": saved(clear, "WEBP"),
        "WEBP animated": saved(color, "WEBP", **frames),
    }


def bits(draw: Random, raw: bytes, other: bytes) -> bytes:
    """One to four bits flipped anywhere."""
    changed = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 4))):
        changed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(draw: Random, raw: bytes, other: bytes) -> bytes:
    """The end, the beginning or a piece inside lost."""
    place, size = draw.randrange(len(raw)), draw.randrange(1, 64)
    return draw.choice((raw[:place], raw[:-size], raw[place:], raw[:place] + raw[place + size :]))


def spliced(draw: Random, raw: bytes, other: bytes) -> bytes:
    """The beginning of one file and the end of another, or a piece of another inside."""
    here, there = draw.randrange(len(raw)), draw.randrange(len(other))
    if draw.random() < 0.5:
        return raw[:here] + other[there:]
    return raw[:here] + other[there : there + draw.randrange(1, 200)] + raw[here:]


def zeroed(draw: Random, raw: bytes, other: bytes) -> bytes:
    """A block that was never written to the disk."""
    place, size = draw.randrange(len(raw)), draw.choice((1, 4, 16, 64, 512))
    end = min(len(raw), place + size)
    return raw[:place] + bytes(end - place) + raw[end:]


def header(draw: Random, raw: bytes, other: bytes) -> bytes:
    """Numbers at the beginning replaced by extreme ones: sizes, depths, counts, lengths."""
    changed = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 3))):
        place, word = draw.randrange(4, min(len(raw), 120)), draw.choice(_EXTREMES)
        changed[place : place + len(word)] = word
    return bytes(changed)


def size_claimed(draw: Random, raw: bytes, other: bytes) -> bytes:
    """Another width and height where the format keeps them, up to what is let through and beyond."""
    width, height = (draw.choice((0, 1, 39, 41, 300, 3_000, 6_000, 16_383, 65_535)) for _ in "wh")
    changed = bytearray(raw)
    if raw.startswith(b"\x89PNG"):
        changed[16:24] = struct.pack(">II", width, height)
    elif raw.startswith(b"RIFF") and raw[12:16] == b"VP8X":
        words = (max(n, 1) - 1 for n in (width, height))
        changed[24:30] = b"".join(struct.pack("<I", n)[:3] for n in words)
    elif raw.startswith(b"RIFF"):
        place = {b"VP8 ": 26, b"VP8L": 21}.get(raw[12:16], 26)
        changed[place : place + 4] = struct.pack("<HH", width, height)
    else:
        place = max(raw.find(b"\xff\xc0"), raw.find(b"\xff\xc2"))
        changed[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(changed)


DAMAGES: tuple[Damage, ...] = (bits, bits, cut, spliced, zeroed, header, header, size_claimed)


def with_true_checksums(raw: bytes) -> bytes:
    """A PNG as a faulty program writes it: wrong inside, but each checksum fits."""
    changed, place = bytearray(raw), 8
    while place + 12 <= len(raw):
        (length,) = struct.unpack(">I", raw[place : place + 4])
        end = place + 8 + length
        crc = struct.pack(">I", zlib.crc32(raw[place + 4 : end]))
        changed[end : end + 4] = crc[: max(0, len(raw) - end)]
        place = end + 4
    return bytes(changed)


def damaged(seed: int, sound: dict[str, bytes]) -> tuple[str, str, bytes]:
    """Case number `seed`: kind of picture, kind of damage, and the file."""
    draw = Random(seed)
    name, damage = draw.choice(sorted(sound)), draw.choice(DAMAGES)
    content = damage(draw, sound[name], sound[draw.choice(sorted(sound))])
    if content.startswith(b"\x89PNG") and draw.random() < 0.7:
        content = with_true_checksums(content)
    return name.split()[0], damage.__name__, content
