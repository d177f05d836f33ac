"""A stranger adds an optimizer with one file and one line, as docs/optimizers.md says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dreamrie.trainer as loop
from dreamrie.errors import ConfigError
from dreamrie.optimizer_table import OPTIMIZERS, Entry
from dreamrie.optimizers import build_optimizer, describe_optimizer
from tests.contracts.sources import ROOT
from tests.small_task import SmallTask, train_small

GUIDE = (ROOT / "docs" / "optimizers.md").read_text("utf-8").partition("## Add an optimizer")[2]
FILE, LINE = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)[:2]


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file of the guide on the path, its line in the table; returns the name."""
    (tmp_path / "signs.py").write_text(FILE, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    table: dict[str, Entry] = {}
    exec(LINE, {"Entry": Entry, "OPTIMIZERS": table})
    ((name, entry),) = table.items()
    monkeypatch.setitem(OPTIMIZERS, name, entry)
    monkeypatch.delitem(sys.modules, "signs", raising=False)
    return name


def test_the_guide_trains(added: str, tmp_path: Path) -> None:
    """Both blocks of the guide as they stand, through the trainer with its schedule: every step is the one promised."""
    run = train_small(loop, tmp_path / "run", SmallTask(init="default"), name=added, lr=0.01)
    task, momenta = SmallTask(init="default"), {}
    for record in run.steps:
        task.loss(task.batch(record["step"], 0)).backward()
        with torch.no_grad():
            for p in (p for pair in task.pairs for p in (pair.left, pair.right)):
                assert p.grad is not None
                momenta[p] = 0.9 * momenta.get(p, 0.0) + p.grad
                p -= record["lr"] * momenta[p].sign()
                p.grad = None
    assert len(run.steps) == run.result.steps > 5
    for found, wanted in zip(run.task.factors(), task.factors(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_the_added_one_is_named_and_refuses_like_the_others(added: str) -> None:
    task = SmallTask()
    assert describe_optimizer(added, task.pairs) == f"{added} (rank-2r baseline)"
    with pytest.raises(ConfigError, match=f"core_map is not a setting of {added}"):
        build_optimizer(added, task.pairs, lr=0.1, core_map="namo")


@pytest.mark.slow
def test_the_line_is_enough_for_the_flag(tmp_path: Path) -> None:
    """In a process whose table has the line, both commands offer the name, with its own defaults."""
    (tmp_path / "signs.py").write_text(FILE, "utf-8")
    program = f"""
from dreamrie.optimizer_table import OPTIMIZERS, Entry
{LINE}
from dreamrie.config import parse_config
flags = ["--instance_data_dir", ".", "--instance_prompt", "a photo of a sks dog", "--optimizer", "signs"]
settings = parse_config(flags).optimizer
print(settings.optimizer, settings.learning_rate, settings.momentum)
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "signs 0.0003 0.9\n", run.stderr


def test_a_builder_that_is_not_there_is_named(
    added: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for builder in ("signs:other", "no_such_file:build"):
        entry = Entry(builder, "none", "nowhere", "none", 1e-3, "0")
        monkeypatch.setitem(OPTIMIZERS, "lost", entry)
        with pytest.raises(ConfigError, match=rf"'lost': its builder '{builder}' cannot be loaded"):
            build_optimizer("lost", SmallTask().pairs, lr=0.1)
