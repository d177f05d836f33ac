"""F1: damaged adapter files load identically or are refused: no crash, no silent change, no half-loaded model."""

from __future__ import annotations

import collections
import logging
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load
from torch import Tensor

from dreamrie import adapter_reading
from dreamrie.errors import AdapterError
from tests.fuzz.damage import anonymous, damaged
from tests.mutants.summary import FIGURE
from tests.small_adapters import TARGETS, Small, save_small, state_of

MEMORY_LIMIT = 500_000_000
TIME_LIMIT_S = 1.0


@dataclass
class Figures:
    """What became of the damaged files; the lists hold their numbers."""

    identical: int = 0
    refused: int = 0
    announced: int = 0
    silent: list[int] = field(default_factory=list)
    crashed: list[int] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)
    control_silent: int = 0
    slowest_s: float = 0.0
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)


def factors_of(loaded: Any) -> dict[str, tuple[bytes, bytes, float]]:
    """Bytes of both factors and the scaling, by layer."""
    return {
        pair.name: (
            pair.left.detach().numpy().tobytes(), pair.right.detach().numpy().tobytes(), pair.scaling
        )
        for pair in loaded.pairs
    }  # fmt: skip


class NaiveReader:
    """safetensors and PEFT as they are commonly used: what loads is taken as it is."""

    def __init__(self, raw: bytes) -> None:
        self._true = self._tensors(raw)
        ranks = {
            n.split(".lora_")[0]: int(t.shape[1]) for n, t in self._true.items() if "lora_B" in n
        }
        config = LoraConfig(
            r=max(ranks.values()), lora_alpha=max(ranks.values()), target_modules=TARGETS
        )
        self._model: Any = inject_adapter_in_model(config, Small())
        self._factors = {
            name.replace(".default.", "."): parameter
            for name, parameter in self._model.named_parameters()
            if ".lora_" in name
        }
        assert set(self._factors) == set(self._true)

    @staticmethod
    def _tensors(raw: bytes) -> dict[str, Tensor]:
        return {name.removeprefix("unet."): tensor for name, tensor in load(raw).items()}

    def loads_other_content(self, raw: bytes) -> bool:
        """Whether the file loads, and is not what was written."""
        with torch.no_grad():
            for parameter in self._factors.values():
                parameter.zero_()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                set_peft_model_state_dict(self._model, self._tensors(raw))
        except Exception:  # whatever a library raises: the user at least sees that
            return False
        return any(not torch.equal(p, self._true[name]) for name, p in self._factors.items())


def law_f1_identical_or_refused(impl: Any, count: int, folder: Path) -> Figures:
    """F1: of many damaged files, each loads with the very same content or is an `AdapterError`."""
    raw = save_small(folder / "one").read_bytes()
    other = save_small(folder / "two", seed=2).read_bytes()
    path, naive, found, model = folder / "damaged.safetensors", NaiveReader(raw), Figures(), Small()
    path.write_bytes(raw)
    loaded = impl.load_adapter(Small(), path)
    wanted, facts = factors_of(loaded), loaded.facts
    before = state_of(model)
    for number in range(count):
        kind, content = damaged(number, raw, other)
        found.kinds[kind] += 1
        found.control_silent += naive.loads_other_content(content)
        path.write_bytes(content)
        started = time.perf_counter()
        try:
            loaded = impl.load_adapter(model, path)
        except AdapterError:
            found.refused += 1
        except BaseException:  # F1 is about exactly these
            found.crashed.append(number)
        else:
            same = factors_of(loaded) == wanted
            if same and loaded.facts == facts and not loaded.unchecked:
                found.identical += 1
            elif same and loaded.unchecked and kind == anonymous.__name__:
                found.announced += 1
            else:
                found.silent.append(number)
            model = Small()
            before = state_of(model)
        found.slowest_s = max(found.slowest_s, time.perf_counter() - started)
        if state_of(model) != before:
            found.touched.append(number)
            model = Small()
            before = state_of(model)
    assert found.crashed == []
    assert found.silent == []
    assert found.touched == []
    return found


def law_f1_foreign_files_load_as_they_stand(impl: Any, count: int, folder: Path) -> Figures:
    """F1: without a digest, what loads is every tensor of the file as safetensors reads it, finite, or nothing."""
    raw, other = (
        anonymous(Random(0), save_small(folder / str(n), seed=n).read_bytes(), b"") for n in (1, 2)
    )
    path, found, model = folder / "damaged.safetensors", Figures(), Small()
    before = state_of(model)
    for number in range(count):
        kind, content = damaged(number, raw, other, foreign=True)
        found.kinds[kind] += 1
        path.write_bytes(content)
        try:
            loaded = impl.load_adapter(model, path)
        except AdapterError:
            found.refused += 1
        except BaseException:  # F1 is about exactly these
            found.crashed.append(number)
        else:
            found.identical += content == raw
            found.announced += bool(loaded.unchecked)
            if not _stands_in(load(content), loaded):
                found.silent.append(number)
            model = Small()
            before = state_of(model)
        if state_of(model) != before:
            found.touched.append(number)
            model = Small()
            before = state_of(model)
    assert found.crashed == []
    assert found.silent == []
    assert found.touched == []
    assert found.refused + found.announced == count
    return found


def _stands_in(tensors: dict[str, Tensor], loaded: Any) -> bool:
    """Whether the adapter is what the file says, all of it, and finite."""
    rest = dict(tensors)
    same = []
    for pair in loaded.pairs:
        for parameter, part in ((pair.right, "A"), (pair.left, "B")):
            names = [
                n for n in rest if n.removeprefix("unet.") == f"{pair.name}.lora_{part}.weight"
            ]
            value = rest.pop(names[0]) if len(names) == 1 else torch.tensor(torch.nan)
            same.append(bool(value.isfinite().all()) and torch.equal(parameter, value.float()))
    return not rest and all(same)


def test_damaged_foreign_files_load_as_they_stand(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    """Precondition: many do load, since nothing but a digest can see a changed value."""
    with caplog.at_level(logging.CRITICAL):
        found = law_f1_foreign_files_load_as_they_stand(adapter_reading, 1_000, tmp_path)
    record_property(
        FIGURE,
        f"1000 damaged foreign files: {found.refused} refused, {found.announced} loaded with a warning",
    )
    assert found.announced > 250
    assert found.refused > 250


def check(
    count: int,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    record: Callable[[str, object], None],
) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with caplog.at_level(logging.WARNING, logger="dreamrie.adapter_reading"):
        found = law_f1_identical_or_refused(adapter_reading, count, folder)
    spent = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    record(
        FIGURE,
        f"{count} damaged adapters in {spent:.0f} s: {found.refused} refused, {found.identical} identical, "
        f"{found.announced} identical but without digest (warned), {len(found.silent)} silent, "
        f"{len(found.crashed)} crashed; slowest {1000 * found.slowest_s:.1f} ms, {grown / 1e6:.0f} MB; "
        f"plain safetensors loads {found.control_silent} of them with other content",
    )
    # Preconditions: each kind of damage was tried, and not everything is refused.
    assert len(found.kinds) == 10
    assert min(found.kinds.values()) >= count // 60
    assert found.identical >= count // 200
    assert found.announced == count // 50
    assert caplog.text.count("it has no digest") == found.announced
    assert found.refused == count - found.identical - found.announced
    assert found.slowest_s < TIME_LIMIT_S
    assert grown < MEMORY_LIMIT
    # The control: damage that a plain reader lets through, so that a reader without digest would fail here.
    assert found.control_silent > count / 4


def test_damaged_files_are_refused_or_load_identically(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    check(2_000, tmp_path, caplog, record_property)


@pytest.mark.slow
def test_more_damaged_files(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    """The same, and 18,000 others."""
    check(20_000, tmp_path, caplog, record_property)
