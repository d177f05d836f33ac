"""Every law rejects its mutants: a test that no wrong implementation can fail is not a test."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.mutants import Mutant, all_mutants, is_caught
from tests.mutants.summary import PROPERTY

MUTANTS = all_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_law_rejects_the_mutant(
    mutant: Mutant, record_property: Callable[[str, object], None]
) -> None:
    """The law fails on the fault it was written against."""
    caught = is_caught(mutant)
    record_property(PROPERTY, (mutant.name, caught))
    assert caught, f"{mutant.name} survives {mutant.law.__name__}: {mutant.why}"


def test_there_are_enough_mutants() -> None:
    """A file of mutants that stops being collected is seen."""
    assert len(MUTANTS) >= 150
