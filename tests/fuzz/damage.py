"""Ways in which a safetensors file gets damaged, each drawn from a seeded stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from tests.small_adapters import join, split

Damage = Callable[[Random, bytes, bytes], bytes]


def bits(draw: Random, raw: bytes, other: bytes) -> bytes:
    """One to four bits flipped anywhere."""
    changed = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        changed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def bits_in_data(draw: Random, raw: bytes, other: bytes) -> bytes:
    """Flipped in the values: nothing about the form can tell."""
    table, data = split(raw)
    return join(table, bits(draw, data, other))


def cut(draw: Random, raw: bytes, other: bytes) -> bytes:
    """The end or the beginning lost."""
    place = draw.randrange(len(raw))
    return raw[:place] if draw.random() < 0.8 else raw[place + 1 :]


def extended(draw: Random, raw: bytes, other: bytes) -> bytes:
    """Bytes behind, before or inside; noise, zeros, or the file once more."""
    more = draw.choice((b"\0" * 8, b"\0", b" ", draw.randbytes(draw.randrange(1, 64)), raw))
    place = draw.choice((len(raw), len(raw), 0, draw.randrange(len(raw))))
    return raw[:place] + more + raw[place:]


def spliced(draw: Random, raw: bytes, other: bytes) -> bytes:
    """From some byte on another adapter of the same model; or a piece moved inside."""
    place = draw.randrange(9, len(raw))
    if draw.random() < 0.5:
        # Between the first and the last difference: otherwise it would be the other adapter, whole and sound.
        unlike = [n for n, (one, two) in enumerate(zip(raw, other, strict=True)) if one != two]
        place = draw.randrange(unlike[0] + 1, unlike[-1])
        return raw[:place] + other[place:]
    start, size = draw.randrange(len(raw)), draw.randrange(1, 64)
    piece = raw[start : start + size]
    changed = bytearray(raw)
    changed[place : place + len(piece)] = piece
    return bytes(changed)


def zeroed(draw: Random, raw: bytes, other: bytes) -> bytes:
    """A block that was never written to the disk."""
    size = draw.choice((1, 4, 16, 64, 512))
    place = draw.randrange(len(raw))
    end = min(len(raw), place + size)
    return raw[:place] + b"\0" * (end - place) + raw[end:]


def header(draw: Random, raw: bytes, other: bytes) -> bytes:
    """A valid header that says something else, and its true length or another."""
    table, data = split(raw)
    names = [name for name in table if name != "__metadata__"]
    name = draw.choice(names)
    row: dict[str, Any] = table[name]
    kind = draw.randrange(11)
    if kind == 0:
        table[draw.choice((name.replace("lora_A", "lora_B"), f"{name}x", name[5:]))] = table.pop(
            name
        )
    elif kind == 1:
        row["dtype"] = draw.choice(("F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "", None))
    elif kind == 2:
        row["shape"] = draw.choice(
            (row["shape"][::-1], [], [0], [*row["shape"], 1], [-1, 2], 7, [2**63])
        )
    elif kind == 3:
        row["data_offsets"] = [n + draw.choice((-4, 0, 4, 2**40)) for n in row["data_offsets"]]
    elif kind == 4:
        del table[name]
    elif kind == 5:
        table[f"{name}.copy"] = row
    elif kind == 6:
        row[draw.choice(("dtype", "extra"))] = draw.choice((1, [], "F32"))
    elif kind == 7:  # the same contents in another order
        draw.shuffle(names)
        table = {**{n: table[n] for n in names}, "__metadata__": table["__metadata__"]}
    elif kind == 8:
        text = json.dumps(table)[:-1] + "," + json.dumps({name: row})[1:]  # a name twice
        return len(text.encode()).to_bytes(8, "little") + text.encode() + data
    elif kind == 9:
        return draw.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little") + raw[8:]
    else:
        return (int.from_bytes(raw[:8], "little") + draw.choice((-8, -1, 1, 8))).to_bytes(
            8, "little"
        ) + raw[8:]
    return join(table, data)


def metadata(draw: Random, raw: bytes, other: bytes) -> bytes:
    """A fact changed, added, lost, renamed, or taken from another adapter."""
    table, data = split(raw)
    facts = table["__metadata__"]
    key = draw.choice(sorted(facts))
    kind = draw.randrange(7)
    if kind == 0:
        facts[key] += draw.choice(("x", " ", "\0", "é"))
    elif kind == 1:
        facts[draw.choice(("alpha", "lora_alpha", "lora_adapter_metadata", ""))] = draw.choice(
            ("", "1", "{}")
        )
    elif kind == 2:
        del facts[key]
    elif kind == 3:
        facts[f"{key}_"] = facts.pop(key)
    elif kind == 4:
        facts[key] = draw.choice((1, None, [], {"a": "b"}))
    elif kind == 5:
        facts["dreamrie_digest"] = split(other)[0]["__metadata__"]["dreamrie_digest"]
    else:
        table["__metadata__"] = split(other)[0]["__metadata__"]
    return join(table, data)


def swapped(draw: Random, raw: bytes, other: bytes) -> bytes:
    """Two tensors under each other's names, or a tensor's values in another order."""
    table, data = split(raw)
    rows = [row for name, row in table.items() if name != "__metadata__"]
    if draw.random() < 0.7:
        one, two = draw.sample(rows, 2)
        keys = draw.choice(
            (("data_offsets",), ("data_offsets", "shape"), ("data_offsets", "shape", "dtype"))
        )
        for key in keys:
            one[key], two[key] = two[key], one[key]
        return join(table, data)
    start, end = draw.choice(rows)["data_offsets"]
    half = start + 4 * draw.randrange(1, (end - start) // 4)
    return join(table, data[:start] + data[half:end] + data[start:half] + data[end:])


def anonymous(draw: Random, raw: bytes, other: bytes) -> bytes:
    """Every fact of the header gone, as a converter leaves it: now nothing says that a digest is missing."""
    table, data = split(raw)
    table["__metadata__"] = {}
    if draw.random() < 0.5:
        del table["__metadata__"]
    return join(table, data)


DAMAGES: tuple[Damage, ...] = (
    *(bits, bits_in_data, cut, extended, spliced, zeroed, header, header, metadata, swapped),
)


def damaged(seed: int, raw: bytes, other: bytes, *, foreign: bool = False) -> tuple[str, bytes]:
    """Case number `seed`: the kind of damage, and a file; one case in 50 is `anonymous`.

    Foreign files have no facts to damage.
    """
    draw = Random(seed)
    if foreign:
        chosen = draw.choice([damage for damage in DAMAGES if damage is not metadata])
        return chosen.__name__, chosen(draw, raw, other)
    chosen = anonymous if seed % 50 == 49 else draw.choice(DAMAGES)
    return chosen.__name__, chosen(draw, raw, other)
