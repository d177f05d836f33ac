"""Writes by hand what Pillow cannot: PNG chunks, interlaced rows, TIFF tags, color profiles."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_file(
    size: tuple[int, int],
    depth: int,
    color_type: int,
    rows: bytes,
    extra: Sequence[tuple[bytes, bytes]] = (),
    interlaced: bool = False,
) -> bytes:
    """A PNG of rows that already have their filter byte; color type 0 is grey, 2 RGB, 4 LA, 6 RGBA."""
    header = struct.pack(">IIBBBBB", *size, depth, color_type, 0, 0, int(interlaced))
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, body) for name, body in chunks)


def png_bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    return png_file((width, height), 8, 2, b"")


# First row, first column, step of rows, step of columns of each of the seven passes (PNG specification, 8.2).
_ADAM7 = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)


def interlaced_rows(pixels: np.ndarray) -> bytes:
    """(height, width, 3) in the order of the seven passes."""
    found = b""
    for row, column, row_step, column_step in _ADAM7:
        for line in pixels[row::row_step, column::column_step]:
            found += b"\0" + line.tobytes() if line.size else b""
    return found


_TIFF_CODES = {1: "B", 3: "H", 4: "I", 8: "h", 9: "i", 11: "f"}


def tiff_file(
    size: tuple[int, int],
    bits: Sequence[int],
    photometric: int,
    data: bytes,
    tags: Mapping[int, tuple[int, Sequence[float]]] | None = None,
    order: str = "<",
) -> bytes:
    """An uncompressed TIFF of one strip; `tags` are (type, values) and win over the usual ones."""
    width, height = size
    usual: dict[int, tuple[int, Sequence[float]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, bits),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, [0]),
        277: (3, [len(bits)]),
        278: (4, [height]),
        279: (4, [len(data)]),
    }
    entries = usual | dict(tags or {})
    start = 8 + 2 + 12 * len(entries) + 4
    entries[273] = (4, [start])
    table, tail = struct.pack(order + "H", len(entries)), data
    for tag, (kind, values) in sorted(entries.items()):
        raw = struct.pack(f"{order}{len(values)}{_TIFF_CODES[kind]}", *values)
        if len(raw) > 4:
            place, tail = struct.pack(order + "I", start + len(tail)), tail + raw
        else:
            place = raw.ljust(4, b"\0")
        table += struct.pack(order + "HHI", tag, kind, len(values)) + place
    mark = b"II" if order == "<" else b"MM"
    return mark + struct.pack(order + "HI", 42, 8) + table + b"\0\0\0\0" + tail


def _fixed(*values: float) -> bytes:
    """s15Fixed16Number."""
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _profile(space: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """An ICC display profile of version 4 (ICC.1:2010, 7.2)."""
    white = _fixed(0.9642, 1.0, 0.8249)
    text = b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 8, 28)
    text += "test".encode("utf-16-be")
    all_tags = {b"desc": text, b"cprt": text, b"wtpt": b"XYZ " + bytes(4) + white, **tags}
    table, bodies, place = struct.pack(">I", len(all_tags)), b"", 132 + 12 * len(all_tags)
    for name, body in all_tags.items():
        table += struct.pack(">4sII", name, place + len(bodies), len(body))
        bodies += body + bytes(-len(body) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12s4s4s6I12s4s",
        *(128 + len(table) + len(bodies), b"", 0x04200000, b"mntr", space, b"XYZ "),
        *(struct.pack(">6H", 2026, 1, 1, 0, 0, 0), b"acsp", b"", 0, 0, 0, 0, 0, 0, white, b""),
    ) + bytes(44)
    return header + table + bodies


# Display P3 and sRGB, columns red, green, blue, adapted to D50.
P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def p3_profile() -> bytes:
    """Display P3, what phones save."""
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    tags = {n: b"XYZ " + bytes(4) + _fixed(*P3[:, i]) for i, n in enumerate(names)}
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + _fixed(*_CURVE)
    return _profile(b"RGB ", tags | {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def grey_profile(gamma: float) -> bytes:
    """Grey of an exponent."""
    curve = b"para" + bytes(4) + struct.pack(">HH", 0, 0) + _fixed(gamma)
    return _profile(b"GRAY", {b"kTRC": curve})


def to_linear(color: Sequence[float]) -> np.ndarray:
    """8-bit sRGB to light."""
    share = np.asarray(color, dtype=float) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def from_linear(light: np.ndarray) -> np.ndarray:
    """Light to 8-bit sRGB, without rounding."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def p3_in_srgb(color: Sequence[float]) -> tuple[float, ...]:
    """By the matrices, without a color management library."""
    return tuple(from_linear(np.linalg.solve(SRGB, P3 @ to_linear(color))).tolist())


def lab_in_srgb(lightness: float, a: float, b: float) -> tuple[float, ...]:
    """CIE L*a*b* of D50 to 8-bit sRGB."""
    fy = (lightness + 16) / 116
    f = np.array([fy + a / 500, fy, fy - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    return tuple(from_linear(np.linalg.solve(SRGB, xyz)).tolist())
