"""A6, F1: a file accounts for each of its bytes once, or is refused before anything large is read."""

from __future__ import annotations

import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from dreamrie import adapter_container
from dreamrie.adapter_container import find_adapter, open_container, read_metadata
from dreamrie.adapter_file import DIFFUSERS_FILE
from dreamrie.errors import AdapterError
from tests.small_adapters import FACTS, join, save_small, split

REAL = SimpleNamespace(open_container=lambda *a, **k: adapter_container.open_container(*a, **k))
"""Looked up at each call, so that a mutant of the module is seen."""


def header_end(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "zero bytes": (lambda raw: b"", "0 bytes, which is too short"),
    "cut in the length": (lambda raw: raw[:7], "7 bytes, which is too short"),
    "cut after the length": (lambda raw: raw[:8], "header of .* bytes in a file of 8"),
    "cut in the header": (lambda raw: raw[:200], "header of .* bytes in a file of 200"),
    "cut after the header": (lambda raw: raw[: header_end(raw)], "is damaged: 0 bytes of weights"),
    "cut by a byte": (lambda raw: raw[:-1], "is damaged: .* bytes of weights"),
    "first byte lost": (lambda raw: raw[1:], "cannot be read"),
    "a byte more": (lambda raw: raw + b"\0", "is damaged: .* bytes of weights"),
    "a tensor's bytes more": (lambda raw: raw + b"\0" * 64, "is damaged: .* bytes of weights"),
    "bytes between": (
        lambda raw: raw[: header_end(raw)] + b"\0" * 4 + raw[header_end(raw) :],
        "is damaged: .* bytes of weights",
    ),
    "noise": (lambda raw: b"\xff" * 64, "cannot be read"),
    "text": (lambda raw: b"not a file at all", "cannot be read"),
    "a web page": (lambda raw: b"<!DOCTYPE html><html><body>404</body></html>", "cannot be read"),
    "a pickle": (lambda raw: b"PK\x03\x04" + raw[4:], "cannot be read"),
}


def law_a6_each_byte_of_the_file_counts(impl: Any, row: str) -> None:
    """6.1: truncated, zero bytes, no header, or bytes that no tensor owns: refused, and what was found is said."""
    change, said = BYTES[row]
    with tempfile.TemporaryDirectory() as folder:
        path = save_small(Path(folder))
        assert len(impl.open_container(path).entries) == 6
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(AdapterError, match=said) as caught:
            impl.open_container(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("row", BYTES)
def test_each_byte_of_the_file_counts(row: str) -> None:
    law_a6_each_byte_of_the_file_counts(REAL, row)


NAME = "unet.mix.lora_A.weight"
TABLES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a hole": (lambda t: shift(t, 4), "begins at byte"),
    "an overlap": (lambda t: shift(t, -4), "begins at byte"),
    "no type": (lambda t: t[NAME].pop("dtype"), "has no dtype, shape and data_offsets"),
    "a key more": (lambda t: t[NAME].update(extra=1), "has no dtype, shape and data_offsets"),
    "whole numbers": (
        lambda t: t[NAME].update(dtype="I32"),
        "of type 'I32'; allowed: F64, F32, F16, BF16",
    ),
    "a type that is a list": (lambda t: t[NAME].update(dtype=["F32"]), "of type"),
    "a narrower type": (lambda t: t[NAME].update(dtype="F16"), "takes another number of bytes"),
    "another shape": (lambda t: t[NAME].update(shape=[5, 7]), "takes another number of bytes"),
    "no rows": (lambda t: t[NAME].update(shape=[0, 7]), "impossible shape"),
    "minus one": (lambda t: t[NAME].update(shape=[-1, 7]), "impossible shape"),
    "true for one": (lambda t: t[NAME].update(shape=[True, 42]), "impossible shape"),
    "half a side": (lambda t: t[NAME].update(shape=[6.0, 7]), "impossible shape"),
    "a huge side": (lambda t: t[NAME].update(shape=[10**4000, 7]), "impossible shape"),
    "many axes": (lambda t: t[NAME].update(shape=[6, 7, 1, 1, 1]), "impossible shape"),
    "a shape that is a number": (lambda t: t[NAME].update(shape=42), "impossible shape"),
    "offsets backwards": (
        lambda t: t[NAME]["data_offsets"].reverse(),
        "takes another number of bytes",
    ),
    "three offsets": (lambda t: t[NAME]["data_offsets"].append(9), "impossible data_offsets"),
    "negative offsets": (
        lambda t: t[NAME].update(data_offsets=[-168, 0]),
        "impossible data_offsets",
    ),
    "an entry that is text": (lambda t: t.update({NAME: "F32"}), "has no dtype"),
    "a fact that is a number": (
        lambda t: t["__metadata__"].update(rank=4),
        "must map text to text",
    ),
    "facts that are a list": (lambda t: t.update(__metadata__=[]), "must map text to text"),
    "half a letter": (lambda t: t["__metadata__"].update(note="\ud83d"), "surrogates not allowed"),
    "half a letter in a name": (
        lambda t: t.update({"\ud83d": t.pop(NAME)}),
        "surrogates not allowed",
    ),
}


def shift(table: dict[str, Any], by: int) -> None:
    table[NAME]["data_offsets"] = [n + by for n in table[NAME]["data_offsets"]]


@pytest.mark.parametrize("row", TABLES)
def test_the_table_has_one_form(row: str, tmp_path: Path) -> None:
    change, said = TABLES[row]
    path = save_small(tmp_path)
    table, data = split(path.read_bytes())
    path.write_bytes(join(table, data))
    assert NAME in open_container(path).entries
    change(table)
    path.write_bytes(join(table, data))
    with pytest.raises(AdapterError, match=said):
        open_container(path)


TEXTS = {
    "a list": ("[]", "no safetensors header"),
    "spaces first": (" {}", "no safetensors header"),
    "two tables": ("{}{}", "Extra data"),
    "nested": ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "recursion"),
    "not a number": (
        '{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
        "NaN in the header",
    ),
    "digits": ('{"a":{"dtype":"F32","shape":[' + "9" * 9_000 + '],"data_offsets":[0,4]}}', "4300"),
    "a name twice": ('{"a":1,"a":2}', "'a' stands twice"),
    "a key twice": (
        '{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "'dtype' stands twice",
    ),
    "UTF-16": ("{}".encode("utf-16-le").decode("latin-1"), "cannot be read"),
    "nothing in it": ("{}", "is empty: it holds no tensor"),
    "facts alone": ('{"__metadata__":{"format":"pt"}}', "is empty: it holds no tensor"),
}


@pytest.mark.parametrize("row", TEXTS)
def test_the_header_is_one_table(row: str, tmp_path: Path) -> None:
    text, said = TEXTS[row]
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode("latin-1") + b"\0" * 4)
    with pytest.raises(AdapterError, match=said) as caught:
        open_container(path)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("length", [0, 100, 4_000_001, 90_000_000, 2**40, 2**63, 2**64 - 1])
def test_an_absurd_length_costs_nothing(length: int, tmp_path: Path) -> None:
    """F1: far below 500 MB and 1 s, though the file is as large as it claims (sparse)."""
    path = tmp_path / "file.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(min(length + 8, 200_000_000) if length > 100 else 9)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(AdapterError, match=f"a header of {length} bytes in a file of"):
        open_container(path)
    spent, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert spent < 0.1


def test_weights_that_are_not_there_are_not_allocated(tmp_path: Path) -> None:
    """A table that announces 4 TB in a file of 100 bytes."""
    entry = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    path = tmp_path / "file.safetensors"
    path.write_bytes(join({"unet.mix.lora_A.weight": entry}, b"\0" * 8))
    with pytest.raises(AdapterError, match=f"8 bytes of weights, {2**42} are announced"):
        open_container(path)


def test_a_sound_file_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    """Every type and number of axes; an odd number of bytes before a tensor, too."""
    generator = torch.Generator().manual_seed(0)
    types = {"b": torch.bfloat16, "c": torch.float32, "d": torch.float64, "a": torch.float16}
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for (name, dtype), shape in zip(
            types.items(), [(3,), (2, 3), (1, 2, 3, 1), ()], strict=True
        )
    }
    path = tmp_path / "file.safetensors"
    table, data = split(save(tensors, metadata={"note": "ä"}))
    # safetensors puts the widest type first; the other way round nothing is aligned.
    place, moved = 0, b""
    for name in sorted(tensors):
        piece = data[slice(*table[name]["data_offsets"])]
        table[name]["data_offsets"] = [place, place + len(piece)]
        place, moved = place + len(piece), moved + piece
    path.write_bytes(join(table, moved))
    container = open_container(path)
    found = container.tensors()
    wanted = load(path.read_bytes())
    assert container.facts == {"note": "ä"}
    assert set(found) == set(wanted) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert torch.equal(wanted[name], tensor)


def test_a_file_that_shrinks_or_goes_is_noticed(tmp_path: Path) -> None:
    """Between its table and its values."""
    path = save_small(tmp_path)
    container = open_container(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="become shorter"):
        container.tensors()
    path.unlink()
    with pytest.raises(AdapterError, match="No such file"):
        container.tensors()


@pytest.mark.parametrize("name", ["nowhere", "a\0b", "x" * 5_000])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"there is no adapter .*{name[:100]}"):
        find_adapter(tmp_path / name)
    with pytest.raises(AdapterError, match=DIFFUSERS_FILE):
        find_adapter(str(tmp_path))


def test_what_a_file_says_is_read_without_its_weights(tmp_path: Path) -> None:
    """From the folder or the file; damage to the values is not looked for, damage to the form is."""
    path = save_small(tmp_path)
    facts = read_metadata(tmp_path)
    assert FACTS.items() <= facts.items()
    raw = path.read_bytes()
    path.write_bytes(raw[:-4] + b"\0" * 4)
    assert read_metadata(str(path)) == facts == json.loads(raw[8 : header_end(raw)])["__metadata__"]
    path.write_bytes(raw[:-4])
    with pytest.raises(AdapterError, match="is damaged"):
        read_metadata(path)
