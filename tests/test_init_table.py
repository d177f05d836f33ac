"""The table of starts: what it offers is what settings, files and docs know; a new one is a file and a line."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

import dreamrie.init_table
from dreamrie.config import parse_config
from dreamrie.config.method import check_method
from dreamrie.config.schema import OptimizerSettings, StartSettings
from dreamrie.config.train_config import GROUPS
from dreamrie.errors import ConfigError
from dreamrie.init_table import INITS, Init
from dreamrie.lora import attach_lora, start_pairs
from dreamrie.lora.inits.start import builder
from dreamrie.optimizer_table import OPTIMIZERS
from tests.contracts.sources import ROOT
from tests.reference import nets

NEEDED = ["--instance_data_dir", "p", "--instance_prompt", "a photo of a sks dog"]

STRANGER = '''
import torch
from dreamrie.fixed_rank import Point
from dreamrie.lora.inits import Request, write_point

def ones(request: Request) -> str:
    """Unit vectors."""
    for pair in request.pairs:
        u, v = (torch.eye(side, pair.rank, dtype=torch.float64) for side in (pair.out, pair.in_))
        write_point(pair, Point(u, torch.full((pair.rank,), 0.25, dtype=torch.float64), v))
    return "as asked"
'''


def test_the_settings_offer_what_the_table_holds() -> None:
    (choices, _) = get_args(GROUPS["adapter"].model_fields["init"].annotation)
    assert get_args(choices) == tuple(INITS)


def test_the_table_is_light() -> None:
    """`--help` reads it."""
    tree = ast.parse(Path(str(dreamrie.init_table.__file__)).read_text("utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "dataclasses", "typing"}
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))


def test_a_stranger_adds_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file and one line: for `attach_lora`, for `start_pairs`, with the checks of all starts."""
    (tmp_path / "strangers_start.py").write_text(STRANGER, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(INITS, "ones", Init("strangers_start:ones", "unit vectors", "own"))
    at_once = attach_lora(nets.net(), 2, nets.TARGETS, init="ones")
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS, init=INITS["ones"].layout)
    assert start_pairs("ones", model, pairs) == "ones, as asked"
    for pair in (*at_once, *pairs):
        assert pair.point().s.tolist() == pytest.approx([0.25, 0.25], abs=1e-15)
        assert float(pair.delta().abs().max()) == 0.0


@pytest.mark.parametrize("name", INITS)
def test_each_start_goes_with_the_optimizers_that_can_leave_it(name: str) -> None:
    """Refused are starts without rank where an optimizer needs one, and anchors where it would move them."""
    entry = INITS[name]
    assert builder(entry).__doc__
    for optimizer, kind in OPTIMIZERS.items():
        adapter, settings = StartSettings(init=name), OptimizerSettings(optimizer=optimizer)
        if (kind.needs_rank and not entry.anchored) or (
            kind.anchor == "refused" and entry.anchored
        ):
            with pytest.raises(ValueError, match=f"init '{name}'.*use --init"):
                check_method(adapter, settings)
            continue
        check_method(adapter, settings)
        assert INITS[adapter.attach_init].anchored == entry.anchored
        assert INITS[adapter.attach_init].needs != "batches"


def test_number_of_batches_belongs_to_starts_that_see_some() -> None:
    for name, entry in INITS.items():
        flags = [*NEEDED, "--optimizer", "adamw", "--init", name, "--loi_batches", "7"]
        if entry.needs == "batches":
            facts = parse_config(flags).file_facts()["init"]
            assert facts.startswith(name)
            assert "7 batches" in facts
            continue
        with pytest.raises(ConfigError, match="--loi_batches"):
            parse_config(flags)


def test_the_page_holds_the_table() -> None:
    text = (ROOT / "docs" / "inits.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", text, re.M)
    assert rows == [
        (name, entry.summary, entry.needs, "2r" if entry.anchored else "r", entry.source)
        for name, entry in INITS.items()
    ]
