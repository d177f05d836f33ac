"""Every law rejects its mutants: a test that no wrong implementation can fail is not a test."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest

from tests.contracts.sources import ROOT, dotted_name
from tests.contracts.test_counts import functions_of
from tests.mutants import Mutant, all_mutants, is_caught
from tests.mutants.summary import PROPERTY

MUTANTS = all_mutants()


def marks_of(mutant: Mutant) -> list[pytest.MarkDecorator]:
    """A law that is tried from end to end is broken there, too."""
    marks = getattr(importlib.import_module(mutant.law.__module__), "pytestmark", [])
    every = marks if isinstance(marks, list) else [marks]
    return [mark for mark in every if mark.name == "end_to_end"]


@pytest.mark.parametrize(
    "mutant", [pytest.param(one, id=one.name, marks=marks_of(one)) for one in MUTANTS]
)
def test_the_law_rejects_the_mutant(
    mutant: Mutant, record_property: Callable[[str, object], None]
) -> None:
    """The law fails on the fault it was written against."""
    caught = is_caught(mutant)
    record_property(PROPERTY, (mutant.name, caught))
    assert caught, f"{mutant.name} survives {mutant.law.__name__}: {mutant.why}"


# Below: the optimizer sees one p.grad, whatever sum it came from, so no fault of a step can break this one. The loop's
# own law of accumulation (test_trainer_laws.py) is the one with mutants.
WITHOUT_MUTANTS = {"law_o17_accumulation_is_linear"}


def test_each_law_has_a_mutant() -> None:
    """T1: a law that no fault is known to break may be one that nothing can break."""
    tried = {(mutant.law.__module__, mutant.law.__name__) for mutant in MUTANTS}
    laws = {
        (dotted_name(path), name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in functions_of(path)
        if name.startswith("law_") and name not in WITHOUT_MUTANTS
    }
    assert len(laws) > 80
    assert sorted(laws - tried) == []


def test_there_are_enough_mutants() -> None:
    """A file of mutants that stops being collected is seen."""
    assert len(MUTANTS) >= 150
