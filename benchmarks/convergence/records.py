"""The JSON of finished trainings: small enough to lie in the repository, written whole after every cell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.convergence.plan import Cell
from dreamrie.files import write_atomic

# Scores are kept as whole numbers of this size, losses of that one.
UNIT, LOSS_UNIT = 1e-4, 1e-6
BASE = ("image", "margin", "text", "ceiling", "loss")
AT_A_MARK = 3
Scores = list[int | None]
"""Image similarity, prompt margin and held-out loss at each mark in turn, then text similarity at the end; None: blank
pictures, or a loss that is not finite."""


def as_units(value: float, unit: float = UNIT) -> int:
    """A number as it is kept."""
    return round(value / unit)


@dataclass
class Records:
    """All finished trainings.

    Attributes:
        facts: what they have in common: length, marks, pictures, sampler, encoders.
        base: `BASE` of the base model for each concept, in units.
        cells: scores of each concept by cell.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    base: dict[str, list[int]] = field(default_factory=dict)
    cells: dict[Cell, dict[str, Scores]] = field(default_factory=dict)

    @property
    def marks(self) -> list[int]:
        """Steps that were scored."""
        return list(self.facts["marks"])

    def add(self, cell: Cell, scores: dict[str, Scores]) -> None:
        """Take in what a stack has found."""
        self.cells.setdefault(cell, {}).update(scores)

    def text(self) -> str:
        """The file: a line for each cell."""
        rows = [
            json.dumps([*cell, self.cells[cell]], separators=(",", ":"))
            for cell in sorted(self.cells)
        ]
        head = {"facts": self.facts, "base": self.base}
        start = json.dumps(head, separators=(",", ":"))[:-1]
        return start + ',"cells":[\n' + ",\n".join(rows) + "\n]}\n"

    def write(self, path: Path) -> None:
        """Write the file; at no time is it half written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, self.text().encode())

    def expect(self, facts: dict[str, Any], path: Path) -> None:
        """Go on with these facts.

        Args:
            facts: of the trainings to come.
            path: for the message.

        Raises:
            SystemExit: the finished trainings had others.
        """
        other = [name for name, value in facts.items() if self.facts.get(name, value) != value]
        if other:
            raise SystemExit(
                f"{path} holds trainings with other facts: "
                + ", ".join(f"{name} {self.facts[name]!r}, now {facts[name]!r}" for name in other)
                + "; give another --output"
            )
        self.facts = {**self.facts, **facts}


def read_records(paths: Sequence[Path]) -> Records:
    """Read one file, or several with the same facts; one that does not exist is empty."""
    found = Records()
    for path in paths:
        if not path.is_file():
            continue
        content = json.loads(path.read_text("utf-8"))
        found.expect(content["facts"], path)
        found.base.update(content["base"])
        for *key, scores in content["cells"]:
            found.add(Cell(*key), scores)
    return found
