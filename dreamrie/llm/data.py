"""Examples to learn from or to be asked: three layouts of JSON, one message for each way a file can be wrong.

    commonsense    {"task": "piqa", "choices": [...], "answer": 1, "question": ...}, columns as in `templates.FORMS`
    LLM-Adapters   {"instruction": ..., "input": "", "output": "the correct answer is true", "answer": "true"}
    messages       {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}

"datasets:NAME" names a data set on the Hub, see `dreamrie.llm.hub_rows`.
A file holds one object a line, or one JSON list of objects; the layout of each object is known by its columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamrie.errors import ConfigError
from dreamrie.llm.hub_rows import MARK, load_rows, parse
from dreamrie.llm.templates import FORMS, Answers, Turn, ask

SUFFIXES = (".jsonl", ".json")
_ROLES = {"system", "user", "assistant"}
_FORMAT_LINE = re.compile(r"answer format:\s*(\S+)\s*$", re.IGNORECASE)
_LAYOUTS = "task, choices and answer; or instruction and output; or messages"


@dataclass(frozen=True)
class Example:
    """A question with its answer.

    Attributes:
        turns: everything before the answer.
        answer: what the assistant should say.
        choices: all that it could be asked to choose from, `answer` among them; empty for an open question.
        task: name of the task; the file's name for a layout without one.
        where: file and number of the row, for messages.
    """

    turns: tuple[Turn, ...]
    answer: str
    choices: tuple[str, ...]
    task: str
    where: str

    @property
    def correct(self) -> int:
        """Place of the answer among the choices."""
        return self.choices.index(self.answer)


def read_examples(
    places: Sequence[str],
    split: str,
    *,
    flag: str = "--data",
    tasks: Sequence[str] = (),
    rows_per_task: int | None = None,
    answers: Answers = "name",
) -> list[Example]:
    """Read files and folders in the order given.

    Args:
        places: paths of files, or of folders that hold TASK.SPLIT.jsonl; or data sets on the Hub.
        split: "train" or "test".
        flag: setting that names the places, for messages.
        tasks: use only rows of these; empty: all.
        rows_per_task: use only the first so many rows of each.
        answers: of commonsense rows, see `dreamrie.llm.templates.ask`.

    Returns:
        At least one example.

    Raises:
        ConfigError: a place is missing or holds nothing, a row is not of a known layout, or a task has no rows.
    """
    found: list[Example] = []
    counts: dict[str, int] = {}
    for place in places:
        for example in _of_place(place, split, flag, answers):
            number = counts.get(example.task, 0)
            counts[example.task] = number + 1
            if (not tasks or example.task in tasks) and (
                rows_per_task is None or number < rows_per_task
            ):
                found.append(example)
    absent = sorted(set(tasks) - set(counts))
    if absent:
        raise ConfigError(
            f"there is no row of task {absent[0]!r}\n"
            f"  where: --tasks; {flag} holds {', '.join(sorted(counts)) or 'none'}\n"
            "  what to do: name tasks that are there, or leave --tasks out"
        )
    if not found:
        raise ConfigError(
            f"there is no row\n  where: {flag} {' '.join(places)}\n  what to do: give a file with rows"
        )
    return found


def _wrong(what: str, where: str, remedy: str) -> ConfigError:
    """Three lines: what, where, what to do."""
    return ConfigError(f"{what}\n  where: {where}\n  what to do: {remedy}")


def _of_place(place: str, split: str, flag: str, answers: Answers) -> Iterator[Example]:
    """Rows of a path, or of a data set on the Hub."""
    if not place.startswith(MARK):
        for file in _files(Path(place).expanduser(), split, flag):
            yield from _rows(file, flag, answers)
        return
    name = Path(parse(place, flag).name)
    for number, row in enumerate(load_rows(place, split, flag), start=1):
        where = f"{name.name} row {number}"
        yield _example(row, name, where, f"{flag} {place}, row {number}", answers)


def _files(place: Path, split: str, flag: str) -> list[Path]:
    """Files of one place."""
    if place.is_dir():
        files = sorted(place.glob(f"*.{split}.jsonl"))
        if not files:
            raise _wrong(
                f"the folder holds no *.{split}.jsonl",
                f"{flag} {place}",
                "name the files themselves, or the folder that holds them",
            )
        return files
    if not place.is_file():
        raise _wrong("there is no such file or folder", f"{flag} {place}", "check the path")
    if place.suffix not in SUFFIXES:
        raise _wrong(
            f"the file ends in {place.suffix or 'nothing'}",
            f"{flag} {place}",
            f"give a file that ends in {' or '.join(SUFFIXES)}",
        )
    return [place]


def _rows(file: Path, flag: str, answers: Answers) -> Iterator[Example]:
    """All rows of a file."""
    where = f"{flag} {file}"
    try:
        text = file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise _wrong(f"the file cannot be read: {error}", where, "give UTF-8 text") from error
    if text.lstrip().startswith("["):
        rows = _parsed(text, where)
    else:
        lines = enumerate(text.splitlines(), start=1)
        rows = [_parsed(line, f"{where}, line {number}") for number, line in lines if line.strip()]
    for number, row in enumerate(rows, start=1):
        place = f"{file.name} row {number}"
        if not isinstance(row, dict):
            raise _wrong(
                f"a row is a {type(row).__name__}, not an object with columns",
                f"{where}, row {number}",
                f"give each row the columns {_LAYOUTS}",
            )
        yield _example(row, file, place, f"{where}, row {number}", answers)


def _parsed(text: str, where: str) -> Any:
    """JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"it is not JSON: {error}", where, "give one JSON object a line") from error


def _example(
    row: Mapping[str, Any], file: Path, place: str, where: str, answers: Answers
) -> Example:
    """One row, by the layout that its columns show."""
    stem = file.name.split(".")[0]
    if "messages" in row:
        return _from_messages(row, stem, place, where)
    if "instruction" in row and "output" in row:
        return _from_instruction(row, stem, place, where)
    if {"task", "choices", "answer"} <= set(row):
        return _from_choices(row, place, where, answers)
    raise _wrong(
        f"the columns are {', '.join(sorted(map(str, row))) or 'none'}",
        where,
        f"give each row the columns {_LAYOUTS}",
    )


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    """A column that must be text."""
    value = row.get(column)
    if not isinstance(value, str):
        found = "missing" if column not in row else f"a {type(value).__name__}, not text"
        raise _wrong(f"column {column} is {found}", where, f"give {column} as text in each row")
    return value


def _from_choices(row: Mapping[str, Any], place: str, where: str, answers: Answers) -> Example:
    """A commonsense row."""
    task, choices, answer = row["task"], row["choices"], row["answer"]
    if task not in FORMS:
        raise _wrong(
            f"task {task!r} has no template", where, f"the tasks are {', '.join(sorted(FORMS))}"
        )
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    # Equal choices can be told apart by their number, but not where the choice itself is the answer.
    unnamed = answers == "text" or FORMS[task].choice is None
    if not texts or len(choices) < 2 or (unnamed and len(set(choices)) < 2):
        raise _wrong(
            f"column choices is {choices!r}", where, "give a list of at least two different texts"
        )
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise _wrong(
            f"column answer is {answer!r}", where, f"give a number from 0 to {len(choices) - 1}"
        )
    needed = {column for _, column in FORMS[task].fields}
    needed |= {label[1:-1] for label, _ in FORMS[task].fields if label.startswith("{")}
    for column in sorted(needed):
        _text(row, column, where)
    turns, said = ask(row, answers)
    return Example(turns, said[answer], said, task, place)


def _from_instruction(row: Mapping[str, Any], stem: str, place: str, where: str) -> Example:
    """A row of LLM-Adapters; its last line names the choices of the commonsense tasks."""
    question, output = _text(row, "instruction", where), _text(row, "output", where)
    extra = row.get("input") or ""
    user = f"{question}\n{extra}" if extra else question
    label, formats = row.get("answer"), _FORMAT_LINE.search(question)
    choices: tuple[str, ...] = ()
    if isinstance(label, str) and formats and output.endswith(label):
        head = output[: len(output) - len(label)]
        choices = tuple(head + choice for choice in formats[1].split("/"))
    if output not in choices:
        choices = ()
    return Example((("user", user),), output, choices, stem, place)


def _from_messages(row: Mapping[str, Any], stem: str, place: str, where: str) -> Example:
    """A conversation whose last turn is learned."""
    messages = row["messages"]
    turns: list[Turn] = []
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            turns = []
            break
        turns.append((message["role"], _text(message, "content", where)))
    if len(turns) < 2 or turns[-1][0] != "assistant":
        raise _wrong(
            "column messages is not a conversation that ends with the assistant",
            where,
            'give a list of {"role": "user" or "assistant" or "system", "content": text}',
        )
    return Example(tuple(turns[:-1]), turns[-1][1], (), stem, place)
