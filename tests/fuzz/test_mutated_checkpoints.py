"""F2: a checkpoint with any byte changed, cut, added or moved is read as it was written, or refused."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from dreamrie.checkpoint import MANIFEST, STATE, TENSORS, read_checkpoint, write_checkpoint
from dreamrie.errors import CheckpointError
from tests.mutants.summary import FIGURE
from tests.small_states import same, state_of


def flip(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    changed = bytearray(content)
    changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def extend(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.randrange(1, 40))


def zero_a_block(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content))
    length = chance.randrange(1, 60)
    return content[:start] + bytes(min(length, len(content) - start)) + content[start + length :]


def move_a_block(content: bytes, chance: random.Random) -> bytes:
    first, second = sorted(chance.randrange(len(content)) for _ in range(2))
    return content[second:] + content[first:second] + content[:first]


def change_a_digit(content: bytes, chance: random.Random) -> bytes:
    places = [place for place, byte in enumerate(content) if 48 <= byte <= 57]
    changed = bytearray(content)
    if places:
        changed[chance.choice(places)] = 48 + chance.randrange(10)
    return bytes(changed)


CHANGES = (flip, cut, extend, zero_a_block, move_a_block, change_a_digit)


def fuzz(folder: Path, count: int, record: Callable[[str, object], None]) -> None:
    """Change one file of a checkpoint `count` times."""
    path = write_checkpoint(folder, 40, state_of(40))
    original = {name: (path / name).read_bytes() for name in (TENSORS, STATE, MANIFEST)}
    found: Counter[str] = Counter()
    for number in range(count):
        chance = random.Random(number)
        name = chance.choice(list(original))
        changed = chance.choice(CHANGES)(original[name], chance)
        (path / name).write_bytes(changed)
        try:
            state = read_checkpoint(path).state
        except CheckpointError:
            found["refused"] += 1
        else:
            found["identical" if same(state, state_of(40)) else "silent"] += 1
        (path / name).write_bytes(original[name])
    record(
        FIGURE,
        f"{count} changed checkpoints: {found['refused']} refused, {found['identical']} with the same content, "
        f"{found['silent']} read with another",
    )
    shutil.rmtree(path)
    assert found["silent"] == 0
    assert found["refused"] > 0.9 * count


def test_five_thousand_changed_checkpoints(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    fuzz(tmp_path, 5000, record_property)
