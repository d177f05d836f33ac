"""Read a safetensors file without trusting it: every byte accounted for, or `AdapterError`.

The file is read here by hand because the library's own reader keeps no account of what it lets through (the last of two
equal names, for one), and maps the file into memory, so that a later save to the same path would change the model.
Format: 8 bytes of little-endian length, that many bytes of JSON that begin with "{" and may end in spaces, data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dreamrie.adapter_file import (
    BASE_KEY,
    DIFFUSERS_FILE,
    DIGEST_KEY,
    FORMAT,
    FORMAT_KEY,
    LAYERS_KEY,
    SETTINGS_KEY,
    content_digest,
)
from dreamrie.adapter_peft import PEFT_FILE, PEFT_SETTINGS, settled
from dreamrie.adapter_spelling import one_name
from dreamrie.adapter_universal import plain_facts
from dreamrie.errors import AdapterError

# The header of 1,000 tensors takes 150 kB. Parsing more than this would cost memory and time before anything is known.
_LARGEST_HEADER = 4_000_000
_LARGEST_SIDE = 2**32
_MOST_AXES = 4
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_FACTS = "__metadata__"
_MARKS = (FORMAT_KEY, LAYERS_KEY, BASE_KEY)


@dataclass(frozen=True)
class Entry:
    """One tensor of the table.

    Attributes:
        dtype: a floating type.
        shape: every side at least 1.
        start: first byte, counted from the end of the header.
        end: one past the last byte.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Container:
    """The table of a file whose size is what the table says.

    Attributes:
        path: the file.
        entries: tensors by name; not empty.
        facts: text of the header, under the names that all files of dreamrie have; and, for a folder of PEFT, its
            settings as JSON under "adapter_config.json".
        offset: where the data begin.
        space: bytes of data.
    """

    path: Path
    entries: dict[str, Entry]
    facts: dict[str, str]
    offset: int
    space: int

    def tensors(self) -> dict[str, Tensor]:
        """Read the data into memory of the caller's own.

        Returns:
            The tensors by name.

        Raises:
            AdapterError: the file cannot be read, or has become shorter.
        """
        data = bytearray(self.space)
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.offset)
                found = stream.readinto(data)
        except OSError as error:
            raise AdapterError(damaged(self.path, str(error))) from error
        if found != self.space:
            raise AdapterError(damaged(self.path, "it has become shorter while it was read"))
        return {
            # A copy of its own puts each tensor at an address that fits its type.
            name: torch.frombuffer(data[e.start : e.end], dtype=e.dtype).reshape(e.shape)
            for name, e in self.entries.items()
        }


def find_adapter(directory_or_file: Path | str) -> Path:
    """The adapter file that a path stands for.

    Args:
        directory_or_file: folder of a training run or of PEFT, or the file itself.

    Returns:
        Path of a file that exists.

    Raises:
        AdapterError: there is none.
    """
    path = Path(directory_or_file)
    try:
        if path.is_dir():
            of_peft = (path / PEFT_FILE).is_file() and not (path / DIFFUSERS_FILE).is_file()
            path /= PEFT_FILE if of_peft else DIFFUSERS_FILE
        there = path.is_file()
    except (OSError, ValueError):  # a name that the system cannot even look up
        there = False
    if not there:
        raise AdapterError(
            f"there is no adapter {path}. Give the folder of a finished training, which holds {DIFFUSERS_FILE}, a "
            f"folder of PEFT, which holds {PEFT_FILE}, or the file itself."
        )
    return path


def open_container(directory_or_file: Path | str) -> Container:
    """Read and check the table of a file; the data stay on the disk.

    Args:
        directory_or_file: see `find_adapter`.

    Returns:
        A table that accounts for each byte of the file once.

    Raises:
        AdapterError: there is no file, it is empty of tensors, or is not exactly a safetensors file.
    """
    path = find_adapter(directory_or_file)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            table, offset = _read_table(stream, size)
        facts = plain_facts(_read_facts(table.pop(_FACTS, {})))
        entries = {name: _read_entry(name, value) for name, value in table.items()}
    # RecursionError: brackets nested thousands deep.
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(damaged(path, str(error) or type(error).__name__)) from error
    if not entries:
        raise AdapterError(
            f"the adapter {path} is empty: it holds no tensor. Train or copy it again."
        )
    _check_layout(path, entries, size - offset)
    return Container(path, entries, facts | _read_settings(path, facts), offset, size - offset)


def read_metadata(directory_or_file: Path | str) -> dict[str, str]:
    """Read what an adapter file says about itself; no weights are loaded, so its digest is not checked.

    Args:
        directory_or_file: see `find_adapter`.

    Returns:
        Facts of the header, such as `base_model`; few or none for files of other programs. See `Container.facts`.

    Raises:
        AdapterError: there is no file, or it is not exactly a safetensors file with tensors.
    """
    return open_container(directory_or_file).facts


def damaged(path: Path, reason: str) -> str:
    """The message about a file that is not what it should be.

    Args:
        path: the file.
        reason: what was found.

    Returns:
        A sentence with the remedy.
    """
    return (
        f"the adapter {path} cannot be read as safetensors ({reason}). The file is damaged or something else; copy or "
        "train it again."
    )


def _read_table(stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The JSON table and the place where the data begin."""
    if size < 8:
        raise ValueError(f"{size} bytes, which is too short for a header")
    length = int.from_bytes(stream.read(8), "little")
    # Before anything of that length is read: the number may be absurd.
    if not 0 < length <= min(size - 8, _LARGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    text = stream.read(length).decode("utf-8")
    if not text.startswith("{"):
        raise ValueError("no safetensors header")
    table = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    return table, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON allows a name twice, and most readers keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in the header")
    for name in found:
        name.encode("utf-8")  # half a surrogate pair is no text
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} in the header")


def _read_facts(facts: object) -> dict[str, str]:
    if not isinstance(facts, Mapping) or not all(isinstance(v, str) for v in facts.values()):
        raise ValueError(f"{_FACTS} must map text to text")
    for value in facts.values():
        value.encode("utf-8")
    return dict(facts)


def _read_settings(path: Path, facts: Mapping[str, str]) -> dict[str, str]:
    """The settings beside PEFT's file, which belong to its contents; nothing for other files."""
    place = path.with_name(PEFT_SETTINGS)
    if path.name != PEFT_FILE or not place.is_file():
        if SETTINGS_KEY in facts:
            raise AdapterError(
                f"the adapter {path} is incomplete: {PEFT_SETTINGS} was written beside it and is missing. Copy the "
                "whole folder again."
            )
        return {}
    try:
        if place.stat().st_size > _LARGEST_HEADER:
            raise ValueError("it is too large")
        text = place.read_text("utf-8")
        settings = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        if not isinstance(settings, dict):
            raise TypeError("it is no table")
        return {PEFT_SETTINGS: settled(settings)}
    # RecursionError: brackets nested thousands deep.
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise AdapterError(
            f"the settings {place} of an adapter cannot be read: {error or type(error).__name__}. Copy the folder "
            "again."
        ) from error


def _read_entry(name: str, value: object) -> Entry:
    """A row of the table in the one form that the format knows."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} has no dtype, shape and data_offsets")
    dtype, shape, span = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name!r} is of type {dtype!r}; allowed: {', '.join(_DTYPES)}")
    if (
        not _are_counts(shape)
        or len(shape) > _MOST_AXES
        or not all(0 < n < _LARGEST_SIDE for n in shape)
    ):
        raise ValueError(f"{name!r} has an impossible shape")
    if not _are_counts(span) or len(span) != 2:
        raise ValueError(f"{name!r} has impossible data_offsets")
    start, end = span
    if end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{name!r} of shape {shape} takes another number of bytes")
    return Entry(_DTYPES[dtype], tuple(shape), start, end)


def _are_counts(value: object) -> bool:
    """A list of whole numbers from 0 on; JSON's true is none."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_layout(path: Path, entries: Mapping[str, Entry], space: int) -> None:
    """The tensors lie one behind the other and fill the file."""
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != place:
            raise AdapterError(damaged(path, f"{name!r} begins at byte {entry.start}, not {place}"))
        place = entry.end
    if place != space:
        raise AdapterError(
            f"the adapter {path} is damaged: {space} bytes of weights, {place} are announced. Copy it again."
        )


def check_format(container: Container) -> bool:
    """Find out whether a file has a digest; one that must have one has it.

    Args:
        container: the file.

    Returns:
        Whether it has.

    Raises:
        AdapterError: another version of the format, or a header of dreamrie that lacks a part.
    """
    facts = container.facts
    version = facts.get(FORMAT_KEY, FORMAT)
    if version != FORMAT:
        raise AdapterError(
            f"the adapter {container.path} is of format {version!r}, and this dreamrie reads {FORMAT!r}. Use the "
            "dreamrie that wrote it, or copy the file again if it is damaged."
        )
    marks = [key for key in facts if key.startswith(_MARKS)]
    if DIGEST_KEY in facts and (FORMAT_KEY not in facts or LAYERS_KEY not in facts):
        raise AdapterError(
            f"the adapter {container.path} is damaged: its header has a digest but lacks {FORMAT_KEY} or {LAYERS_KEY}. "
            "Copy it again."
        )
    if marks and DIGEST_KEY not in facts:
        raise AdapterError(
            f"the adapter {container.path} is damaged: its header has {marks[0]} but no {DIGEST_KEY}, which was "
            "removed or renamed. Copy it again."
        )
    return DIGEST_KEY in facts


def check_layers(container: Container, found: Iterable[str]) -> None:
    """A file of dreamrie names its layers, so that whole layers cannot get lost unnamed.

    Args:
        container: a file with digest.
        found: layers that it has tensors for.

    Raises:
        AdapterError: a promised layer has none.
    """
    there = {one_name(layer) for layer in found}
    promised = container.facts[LAYERS_KEY].split("\n")
    missing = sorted(layer for layer in promised if one_name(layer) not in there)
    lost = [f"{name}.{part}" for name in missing for part in ("lora_A", "lora_B")]
    if lost:
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        raise AdapterError(
            f"the adapter {container.path} is damaged: {len(lost)} of {2 * len(promised)} tensors are missing: "
            f"{', '.join(lost[:4])}{more}. Copy it again."
        )


def check_digest(container: Container, tensors: Mapping[str, Tensor]) -> None:
    """Compare the contents with the digest that was written with them.

    Args:
        container: a file with digest.
        tensors: its contents.

    Raises:
        AdapterError: a value, name, type or fact was changed.
    """
    if content_digest(tensors, container.facts) != container.facts[DIGEST_KEY]:
        raise AdapterError(
            f"the adapter {container.path} is damaged: its digest differs from the one in its header, so a value or a "
            "fact was changed since it was written. Copy or train it again."
        )
