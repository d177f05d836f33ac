"""Commonsense rows asked in their own words: the question alone, and a choice itself as the answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dreamrie.config import LlmConfig, config_of
from dreamrie.errors import ConfigError
from dreamrie.llm import templates as real
from dreamrie.llm.data import read_examples
from dreamrie.llm.prepare import read_request
from tests.llm import small


def law_lb6_a_bare_question_shows_no_choice(impl: Any) -> None:
    """One turn of the user that holds every text of the question and no other word; the answers are the choices."""
    for row in small.ROWS:
        turns, answers = impl.ask(row, "text")
        assert answers == tuple(row["choices"])
        ((role, text),) = turns
        assert role == "user"
        own = [row[name] for name in ("activity", "context", "sentence", "question") if name in row]
        assert re.split(r"\n|: ", text) == own


def test_lb6() -> None:
    law_lb6_a_bare_question_shows_no_choice(real)


def test_rows_are_read_either_way(tmp_path: Path) -> None:
    """The same answer is right; equal texts can be told apart by name only."""
    file = small.write_rows(tmp_path / "rows.jsonl")
    named, bare = (read_examples([str(file)], "test", answers=a) for a in ("name", "text"))
    for row, one, other in zip(small.ROWS, named, bare, strict=True):
        assert (one.correct, other.correct) == (row["answer"], row["answer"])
        assert one.task == other.task
    row = {**small.ROWS[2], "choices": ["push", "push"]}
    file.write_text(json.dumps(row), "utf-8")
    assert read_examples([str(file)], "test")[0].correct == 1
    with pytest.raises(ConfigError, match="column choices is"):
        read_examples([str(file)], "test", answers="text")


def test_the_setting_reaches_both_kinds_of_rows(tmp_path: Path) -> None:
    """`--answers text` is how rows are learned, and how held-out rows are asked."""
    rows, model = small.write_rows(tmp_path / "rows.jsonl"), small.save_model(tmp_path / "model")
    values = {"model": str(model), "data": [str(rows)], "validation_data": [str(rows)]}
    values |= {"answers": "text", "output_dir": str(tmp_path / "run")}
    request = read_request(config_of(LlmConfig, values), "cpu")
    assert (
        request.examples == request.held_out == read_examples([str(rows)], "test", answers="text")
    )
