"""Data sets through the library `datasets`: the name, the rows, and one message for each way it cannot be loaded."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dreamrie.errors import ConfigError
from dreamrie.llm import hub_rows
from dreamrie.llm.data import read_examples
from tests.llm import small

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="datasets is not installed"
)
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, which keeps what it has read in a folder of the test and asks no network."""
    datasets: Any = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


class Fake(ModuleType):
    """The library as far as it is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__("datasets")
        self.rows, self.asked = rows, []

    def load_dataset(self, *given: Any, **options: Any) -> list[dict[str, Any]]:
        self.asked.append((*given, options))
        return self.rows


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """In place of the library, installed or not."""
    made, errors = Fake([CHAT]), ModuleType("datasets.exceptions")
    errors.DatasetsError = type("DatasetsError", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", made)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", errors)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return made


def test_a_name_is_taken_apart(fake: Fake) -> None:
    """Configuration, revision and split reach the library; without a split it is that of the setting."""
    for place, split, asked in (
        ("datasets:me/chat", "train", ("me/chat", None, "train", None)),
        ("datasets:me/chat", "test", ("me/chat", None, "test", None)),
        ("datasets:me/chat:easy@v1#dev", "train", ("me/chat", "easy", "dev", "v1")),
        ("datasets:me/chat@0a1b2c", "test", ("me/chat", None, "test", "0a1b2c")),
        ("datasets:chat#validation", "test", ("chat", None, "validation", None)),
    ):
        assert list(hub_rows.load_rows(place, split, "--data")) == [CHAT]
        name, config, part, revision = asked
        assert fake.asked[-1] == (name, config, {"split": part, "revision": revision})
    for place in ("datasets:", "datasets:a#b#c", "datasets:a@", "datasets:a#s@r"):
        with pytest.raises(ConfigError, match=r"names no data set[\s\S]*--data"):
            hub_rows.parse(place, "--data")


def test_rows_are_read_as_those_of_files(fake: Fake) -> None:
    """The columns decide; an empty column is none; a row is named by data set and number."""
    fake.rows = [{**CHAT, "instruction": None}, {"messages": None, **small.ROWS[0]}]
    first, second = read_examples(["datasets:me/chat"], "train")
    assert (first.answer, first.task, first.where) == ("b", "chat", "chat row 1")
    assert (second.task, second.where) == ("boolq", "chat row 2")
    fake.rows = [CHAT, {"text": "a"}]
    with pytest.raises(
        ConfigError, match=r"the columns are text\n  where: --data datasets:me/chat, row 2"
    ):
        read_examples(["datasets:me/chat"], "train")
    fake.rows = []
    with pytest.raises(ConfigError, match="there is no row"):
        read_examples(["datasets:me/chat"], "train")


def test_without_the_library_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package datasets, not installed here"):
        read_examples(["datasets:me/chat"], "train")


@needs_datasets
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_folder_through_the_real_library(kind: str, real: Any, tmp_path: Path) -> None:
    """The same examples as from a file of JSON lines; rows of several tasks have other columns."""
    folder = tmp_path / "chat"
    folder.mkdir()
    rows = [row for row in small.ROWS if row["task"] in {"boolq", "piqa", "arc_easy"}]
    plain = small.write_rows(tmp_path / "rows.jsonl", rows)
    if kind == "jsonl":
        small.write_rows(folder / "train.jsonl", rows)
    else:
        real.Dataset.from_list(rows).to_parquet(str(folder / "train.parquet"))
    found = read_examples([f"datasets:{folder}"], "train")
    wanted = read_examples([str(plain)], "train")
    assert [(e.turns, e.answer, e.choices, e.task) for e in found] == [
        (e.turns, e.answer, e.choices, e.task) for e in wanted
    ]
    assert len(found) == 5
    for place, split in ((f"datasets:{folder}", "test"), (f"datasets:{folder}#dev", "train")):
        with pytest.raises(ConfigError, match="the data set cannot be loaded"):
            read_examples([place], split)
    with pytest.raises(ConfigError, match="the data set cannot be loaded"):
        read_examples(["datasets:nobody/nothing"], "train")


@needs_datasets
@pytest.mark.slow
def test_damaged_files_are_one_message(real: Any, tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "train.jsonl").write_text(json.dumps(CHAT)[:-9], "utf-8")
    with pytest.raises(ConfigError, match="the data set cannot be loaded"):
        read_examples([f"datasets:{tmp_path / 'chat'}"], "train")
