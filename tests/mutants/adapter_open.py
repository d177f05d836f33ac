"""Faults of reading adapter files without a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from dreamrie import adapter_container, adapter_flat, adapter_open
from dreamrie.lora import LowRank
from tests import test_adapter_flat as flat_laws
from tests import test_adapter_open as open_laws
from tests.mutants import Law, Mutant, replaced
from tests.mutants.adapter_files import in_folder


def wrong(name: str, law: Law, why: str, impl: Any, owner: Any, **changed: Any) -> Mutant:
    """A mutant with attributes of a module replaced; the law calls `impl`, which looks them up."""

    @contextlib.contextmanager
    def broken() -> Iterator[Any]:
        with replaced(owner, **changed):
            yield impl

    return Mutant(name, law, broken, why)


def reading(name: str, law: Any, why: str, **changed: Any) -> Mutant:
    """A mutant of `adapter_open`, in an empty folder."""
    return wrong(name, in_folder(law), why, open_laws.REAL, adapter_open, **changed)


def flat(name: str, why: str, fault: Any) -> Mutant:
    """A mutant of the flat names."""
    law = flat_laws.law_flat_names_come_back
    return wrong(name, law, why, flat_laws.REAL, adapter_flat, layer_of_flat=fault)


# --------------------------------------------------------------------------------------------------------- reading

good_folded, good_scalings = adapter_open._folded, adapter_open.foreign_scalings


def scaling_left_out(change: LowRank, scaling: float) -> LowRank:
    return change


def scaling_in_both(change: LowRank, scaling: float) -> LowRank:
    return LowRank(scaling * change.left.double(), scaling * change.right.double())


def scaling_in_half_precision(change: LowRank, scaling: float) -> LowRank:
    return LowRank((change.left * scaling).half(), change.right)


def every_kind_is_lora(container: Any, **_: object) -> None:
    """Tensors of other formulas are looked over."""


def without_unknown_kinds(container: Any) -> Any:
    kept = {n: e for n, e in container.entries.items() if ".lora_" in n or n.endswith(".alpha")}
    return dataclasses.replace(container, entries=kept)


def opened_without_others(path: Any) -> Any:
    return without_unknown_kinds(good_container(path))


good_container = adapter_open.open_container


def dots_everywhere(name: str) -> str | None:
    """Down_blocks is one word."""
    return name.removeprefix("lora_unet_").replace("_", ".")


def first_of_the_words(name: str) -> str | None:
    """To_q is one word."""
    layer = good_flat(name)
    return None if layer is None else layer.replace("to_q", "to.q")


def without_numbers(name: str) -> str | None:
    """Numbers count."""
    layer = good_flat(name)
    return None if layer is None else layer.replace("net.0", "net.2")


good_flat = adapter_flat.layer_of_flat


def no_digest_checked(*_: Any) -> str:
    class Anything(str):
        __slots__ = ()

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = str.__hash__

    return Anything()


MUTANTS = [
    reading(
        "alpha left out without a model",
        open_laws.law_alpha_is_honoured,
        "alpha / r = 0.5 halves the change",
        _folded=scaling_left_out,
    ),
    reading(
        "alpha in both factors without a model",
        open_laws.law_alpha_is_honoured,
        "c enters once",
        _folded=scaling_in_both,
    ),
    reading(
        "scaled in half precision",
        open_laws.law_alpha_is_honoured,
        "a third of a number of fp16 is none",
        _folded=scaling_in_half_precision,
    ),
    reading(
        "LoHa read as LoRA",
        open_laws.law_other_kinds_are_refused_by_name,
        "another formula",
        _refuse_other_kinds=every_kind_is_lora,
        open_container=opened_without_others,
    ),
    wrong(
        "digest not compared without a model",
        in_folder(open_laws.law_a_changed_file_is_refused),
        "a changed value is not what was trained",
        open_laws.REAL,
        adapter_container,
        content_digest=no_digest_checked,
    ),
    flat("flat names with dots everywhere", "down_blocks is one word", dots_everywhere),
    flat("flat names with a dot inside to_q", "to_q is one word", first_of_the_words),
    flat("flat names of another place", "numbers count", without_numbers),
]
