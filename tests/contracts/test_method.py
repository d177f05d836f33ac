"""P5: what the code cites of docs/method.md is there, and what that page cites of the tests is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.contracts.sources import PACKAGE, ROOT, product_files
from tests.contracts.test_counts import TESTS, functions_of

METHOD = ROOT / "docs" / "method.md"
_SECTIONS = re.compile(
    r"docs/method\.md(?:\]\(\S+\))? (\d+(?:\.\d+)?(?:(?:, | and )\d+(?:\.\d+)?)*)"
)
_HEADING = re.compile(r"^#{2,3} (\d+(?:\.\d+)?) \S", re.MULTILINE)
_OTHER_PAGES = re.compile(r"[\w/]+\.md\b")
FILES = sorted({*product_files(), *TESTS.rglob("*.py"), *ROOT.glob("*.md")} - {Path(__file__)})


def cited(text: str) -> set[str]:
    """Sections of docs/method.md that a text cites; comments and line ends taken out, lists taken apart."""
    text = " ".join(text.replace("#", " ").split())
    return {
        number for several in _SECTIONS.findall(text) for number in re.findall(r"[\d.]+", several)
    }


def headings() -> list[str]:
    """Section numbers of docs/method.md, in its order."""
    return _HEADING.findall(METHOD.read_text("utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_cited_section_exists(path: Path) -> None:
    """A section that is cited can be read, and so can every other page that is."""
    text = path.read_text("utf-8")
    assert cited(text) - set(headings()) == set()
    if path.is_relative_to(PACKAGE) or path.parent.name in {"properties", "reference"}:
        pages = set(_OTHER_PAGES.findall(text))
        assert {page for page in pages if not (ROOT / page).is_file()} == set()


def test_sections_are_in_order_and_cited() -> None:
    """No number stands twice; the sections that explain the code are cited by it."""
    numbers = [tuple(map(int, number.split("."))) for number in headings()]
    assert numbers == sorted(set(numbers))
    used = set().union(*(cited(path.read_text("utf-8")) for path in FILES))
    assert used >= {"2", "3", "4.1", "4.3", "4.7", "5.1", "5.2", "5.4", "9", "10"}


def test_sections_it_refers_to_itself_exist() -> None:
    """`(4.7)`, `section 5.2` and the like inside the page lead to a heading."""
    text = METHOD.read_text("utf-8")
    inside = set(re.findall(r"(?<!Eq\. )(?<!Eqs\. )\((\d\.\d)\)", text))
    inside |= set(re.findall(r"\bsection (\d+\.\d+)", text))
    assert len(inside) >= 4
    assert inside - set(headings()) == set()


def test_each_law_of_the_page_names_tests_that_exist() -> None:
    """Every row of the table points at functions by file and name; laws 1 to 22 have a row each."""
    laws = METHOD.read_text("utf-8").split("\n## 10 ")[1]
    rows = [line for line in laws.splitlines() if re.match(r"\| \d", line)]
    assert [int(re.findall(r"\d+", row)[0]) for row in rows] == list(range(1, 23))
    folder = TESTS / "properties"
    known = {f"{path.name}::{name}" for path in folder.glob("*.py") for name in functions_of(path)}
    for row in rows:
        named = re.findall(r"`(test_\w+\.py::\w+)`", row)
        assert named, row
        assert set(named) - known == set(), row


def test_lists_and_line_ends_are_taken_apart() -> None:
    """Mutant: an unknown section in a list or behind a line end is seen."""
    text = "see docs/method.md 4.3, 4.7 and 99.9.\n# Source: docs/method.md\n#     88 (b): no"
    assert cited(text) == {"4.3", "4.7", "99.9", "88"}
