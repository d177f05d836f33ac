"""The table of optimizers: its lines are true of the builders, and the page shows them."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from dreamrie.optimizer_table import OPTIMIZERS, Entry
from dreamrie.optimizers import build_optimizer
from tests.contracts.sources import ROOT
from tests.small_task import SmallTask

NAMES = sorted(OPTIMIZERS)
PAGE = ROOT / "docs" / "optimizers.md"


def row(name: str, entry: Entry) -> str:
    """The line of docs/optimizers.md for an optimizer."""
    momentum = "" if entry.momentum is None else f"{entry.momentum:g}"
    cells = (
        f"`{name}`",
        entry.summary,
        entry.lr_unit,
        f"{entry.learning_rate:g}",
        momentum,
        entry.state,
        "yes" if entry.gauge_invariant else "no",
        entry.anchor,
        entry.source,
    )
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_line(name: str) -> None:
    wanted = row(name, OPTIMIZERS[name])
    assert wanted in PAGE.read_text("utf-8").splitlines(), f"docs/optimizers.md needs\n{wanted}"


def test_the_page_shows_no_other_line() -> None:
    """An optimizer that is taken out is taken out of the page."""
    shown = re.findall(r"^\| `(\w+)` \| .* \| (?:yes|no) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert sorted(shown) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_builder_takes_what_the_line_says(name: str) -> None:
    entry = OPTIMIZERS[name]
    module, function = entry.builder.split(":")
    signature = inspect.signature(getattr(importlib.import_module(module), function))
    known = set(signature.parameters) - {"pairs", "lr", "weight_decay"}
    if name != "riemannion":  # takes whatever the class takes
        assert known == set(entry.options) | ({"momentum"} if entry.momentum is not None else set())
    assert entry.source
    assert 0 < entry.learning_rate <= 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_state_has_the_size_of_the_line(name: str) -> None:
    """Counted after a step, per layer with m outputs, n inputs and rank r; step counters of any kind count."""
    entry = OPTIMIZERS[name]
    task = SmallTask(init="orthonormal" if entry.needs_rank else "default")
    optimizer = build_optimizer(name, task.pairs, lr=1e-3)
    for t in (1, 2):
        task.loss(task.batch(t, 0)).backward()
        optimizer.step()
    values = [value for kept in optimizer.state.values() for value in kept.values()]
    found = sum(getattr(value, "numel", lambda: 1)() for value in values if value is not None)
    formula = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", entry.state)
    wanted = sum(eval(formula, {"m": p.out, "n": p.in_, "r": p.rank}) for p in task.pairs)
    assert found == wanted
