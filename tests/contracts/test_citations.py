"""P5: every equation, algorithm, lemma and theorem that the code cites is in the list kept with the references."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.contracts.sources import PACKAGE, ROOT
from tests.reference.symbols import SYMBOLS

_EQUATIONS = re.compile(r"\bEqs?\. ((?:\(\d+\)(?:, | and |-)?)+)")
_ALGORITHMS = re.compile(r"\bAlgs?\. (\d+(?:(?:, | and )\d+)*)")
_STATEMENTS = re.compile(r"\b(Lemma|Theorem|Prop\.) ((?:[A-Z]|\d+)\.\d+)")
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tests" / "reference").glob("*.py")])


def citations(text: str) -> set[str]:
    """`Eq. (10)`, `Alg. 4`, `Lemma D.1`, ... in the text; lists and ranges taken apart."""
    text = " ".join(text.replace("#", " ").split())
    found = {f"{kind} {number}" for kind, number in _STATEMENTS.findall(text)}
    for several in _EQUATIONS.findall(text):
        for first, last in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", several):
            found |= {f"Eq. ({n})" for n in range(int(first), int(last or first) + 1)}
    for several in _ALGORITHMS.findall(text):
        found |= {f"Alg. {number}" for number in re.findall(r"\d+", several)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_citation_is_in_the_list(path: Path) -> None:
    """A number without an entry is one that nobody has looked up."""
    assert citations(path.read_text("utf-8")) - set(SYMBOLS) == set()


def test_each_entry_is_cited() -> None:
    """The list holds what the code uses, and nothing else."""
    used = set().union(
        *(citations(path.read_text("utf-8")) for path in FILES if path.name != "symbols.py")
    )
    assert set(SYMBOLS) - used == set()


def test_lists_and_ranges_are_taken_apart() -> None:
    """Mutant: an unknown number hidden in a range, a list or behind a line end is seen."""
    text = "Eqs. (10)-(12), Algs. 4 and 5; Eqs. (2), (3). Lemma\n    D.1 and Theorem 5.1, see Eq.\n(99)."
    assert citations(text) == {
        *("Eq. (2)", "Eq. (3)", "Eq. (10)", "Eq. (11)", "Eq. (12)", "Eq. (99)"),
        *("Alg. 4", "Alg. 5", "Lemma D.1", "Theorem 5.1"),
    }
