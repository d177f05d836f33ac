"""Three layouts of rows, and one message for each way a file can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dreamrie.errors import ConfigError
from dreamrie.llm.data import read_examples
from tests.llm import small

ADAPTERS = {
    "instruction": "Please answer the following question with true or false, question: is ice cold?\n\n"
    "Answer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}
CHAT = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
}


def test_commonsense_rows(tmp_path: Path) -> None:
    path = small.write_rows(tmp_path / "rows.jsonl")
    examples = read_examples([str(path)], "train")
    assert [example.task for example in examples] == [row["task"] for row in small.ROWS]
    assert [example.correct for example in examples] == [row["answer"] for row in small.ROWS]
    assert examples[3].where == "rows.jsonl row 4"


def test_the_layout_of_llm_adapters(tmp_path: Path) -> None:
    """One JSON list; the choices are read from the answer format."""
    path = tmp_path / "commonsense_15k.json"
    path.write_text(json.dumps([ADAPTERS, {**ADAPTERS, "input": "more"}]), "utf-8")
    first, second = read_examples([str(path)], "train")
    assert first.turns == (("user", ADAPTERS["instruction"]),)
    assert first.choices == ("the correct answer is true", "the correct answer is false")
    assert (first.answer, first.correct) == ("the correct answer is true", 0)
    assert second.turns[0][1].endswith("\nmore")
    assert first.task == "commonsense_15k"


def test_an_open_instruction_has_no_choices(tmp_path: Path) -> None:
    path = small.write_rows(tmp_path / "x.jsonl", [{"instruction": "Say hi", "output": "hi"}])
    (example,) = read_examples([str(path)], "train")
    assert (example.choices, example.answer) == ((), "hi")


def test_messages_learn_the_last_turn(tmp_path: Path) -> None:
    (example,) = read_examples([str(small.write_rows(tmp_path / "x.jsonl", [CHAT]))], "train")
    assert example.turns == (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert example.answer == "d"


def test_a_folder_gives_its_split(tmp_path: Path) -> None:
    small.write_rows(tmp_path / "piqa.train.jsonl", small.ROWS[2:4])
    small.write_rows(tmp_path / "boolq.train.jsonl", small.ROWS[:2])
    small.write_rows(tmp_path / "boolq.test.jsonl", small.ROWS[:1])
    tasks = [example.task for example in read_examples([str(tmp_path)], "train")]
    assert tasks == ["boolq", "boolq", "piqa", "piqa"]
    assert len(read_examples([str(tmp_path)], "test")) == 1


def test_tasks_and_rows_are_limited(tmp_path: Path) -> None:
    path = str(small.write_rows(tmp_path / "rows.jsonl"))
    found = read_examples([path], "train", tasks=["piqa", "boolq"], rows_per_task=1)
    assert [example.where for example in found] == ["rows.jsonl row 1", "rows.jsonl row 3"]
    with pytest.raises(ConfigError, match="no row of task 'pica'"):
        read_examples([path], "train", tasks=["pica"])


GOOD = small.ROWS[2]
BAD: dict[str, tuple[Any, str]] = {
    "other columns": ({"text": "a"}, "the columns are text"),
    "no columns": ({}, "the columns are none"),
    "no object": ([1], "a row is a list"),
    "unknown task": ({**GOOD, "task": "copa"}, "task 'copa' has no template"),
    "one choice": ({**GOOD, "choices": ["a"]}, "column choices is"),
    "choices no texts": ({**GOOD, "choices": [1, 2]}, "column choices is"),
    "equal answers": ({**small.ROWS[0], "choices": ["True", "True"]}, "column choices is"),
    "answer beyond": ({**GOOD, "answer": 2}, "column answer is 2"),
    "answer as text": ({**GOOD, "answer": "1"}, "column answer is '1'"),
    "answer a switch": ({**GOOD, "answer": True}, "column answer is True"),
    "question missing": (
        {key: value for key, value in GOOD.items() if key != "question"},
        "column question is missing",
    ),
    "question a number": ({**GOOD, "question": 3}, "column question is a int, not text"),
    "activity missing": (
        {key: value for key, value in small.ROWS[5].items() if key != "activity"},
        "column activity is missing",
    ),
    "output a number": ({"instruction": "a", "output": 1}, "column output is a int"),
    "no answer": ({"messages": CHAT["messages"][:3]}, "does not end|ends with the assistant"),
    "messages no list": ({"messages": "hi"}, "ends with the assistant"),
    "unknown role": ({"messages": [{"role": "tool", "content": "a"}]}, "ends with the assistant"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_wrong_row_is_one_message(name: str, tmp_path: Path) -> None:
    """What was wrong, in which row of which file, and what to give."""
    row, words = BAD[name]
    path = small.write_rows(tmp_path / "rows.jsonl", [GOOD, row])
    with pytest.raises(ConfigError, match=words) as caught:
        read_examples([str(path)], "train")
    assert f"--data {path}, row 2" in str(caught.value)
    assert "what to do: " in str(caught.value)


def test_missing_data_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b", "utf-8")
    (tmp_path / "empty.jsonl").write_text("\n", "utf-8")
    (tmp_path / "broken.jsonl").write_text('{"task": ', "utf-8")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    for place, words in {
        "nowhere.jsonl": "there is no such file",
        "": r"holds no \*\.train\.jsonl",
        "rows.csv": "ends in .csv",
        "empty.jsonl": "there is no row",
        "broken.jsonl": "it is not JSON.*",
        "bytes.jsonl": "cannot be read",
    }.items():
        with pytest.raises(ConfigError, match=words) as caught:
            read_examples([str(tmp_path / place)], "train")
        assert str(tmp_path / place) in str(caught.value)


def test_the_shared_rows_are_read() -> None:
    """The real data, where it is present: all rows of the eight tasks, both splits."""
    folder = Path(os.environ.get("DREAMRIE_DATA", "../shared/data")) / "commonsense"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    for split in ("train", "test"):
        examples = read_examples([str(folder)], split)
        assert len({example.task for example in examples}) == 8
        lines = sum(len(p.read_text("utf-8").splitlines()) for p in folder.glob(f"*.{split}.jsonl"))
        assert len(examples) == lines
