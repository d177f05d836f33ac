"""`python -m dreamrie evaluate-llm`: one table, nothing measured twice, one message for what cannot work."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dreamrie.__main__ import main
from dreamrie.adapter_peft import save_peft
from dreamrie.adapter_reading import load_adapter
from dreamrie.llm import commonsense
from dreamrie.llm import evaluating as real
from dreamrie.llm.data import read_examples
from dreamrie.llm.encoding import Encoder
from dreamrie.llm.evaluate import Accuracy, accuracies, choose
from dreamrie.llm.evaluating import Base, Questions
from dreamrie.llm.templates import Renderer
from dreamrie.lora import LowRank
from tests.llm import small
from tests.strategies import noise


def adapter(folder: Path, seed: int, size: float = 0.4) -> Path:
    """A PEFT folder that changes what the small model answers."""
    base = small.model()
    changes = {}
    for number, (name, module) in enumerate(base.named_modules()):
        if name.endswith(("q_proj", "down_proj")):
            out, in_ = module.weight.shape
            left, right = noise(seed + number, out, 2), noise(seed + 50 + number, 2, in_)
            changes[name] = LowRank(size * left, right)
    save_peft(folder, changes, {})
    return folder


@contextmanager
def world() -> Iterator[dict[str, str]]:
    """A model, rows, two adapters."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        small.write_rows(folder / "data" / "all.test.jsonl")
        yield {
            "model": str(small.save_model(folder / "model")),
            "data": str(folder / "data"),
            "one": str(adapter(folder / "one", 1)),
            "two": str(adapter(folder / "two", 900)),
            "record": str(folder / "results" / "record.json"),
        }


def answers_of(places: dict[str, str], name: str | None) -> dict[str, Accuracy]:
    """Accuracy of a model of its own, into whose weights the adapter was added."""
    model, examples = small.model(), read_examples([places["data"]], "test")
    if name is not None:
        for pair in load_adapter(small.model(), places[name]).pairs:
            model.get_submodule(pair.name).weight.data += pair.delta()
    return accuracies(examples, choose(model, encoder(), examples))


def encoder() -> Encoder:
    return Encoder(Renderer(small.tokenizer()), 768)


def asked(places: dict[str, str], **more: Any) -> Questions:
    return Questions([places["data"]], **more)


def law_lb7_each_adapter_is_asked_alone(impl: Any) -> None:
    """Accuracies are those of weights to which one adapter was added, whatever was asked before."""
    with world() as places:
        order = [places["one"], None, places["two"]]
        found = impl.evaluate(Base(places["model"]), order, asked(places))
        wanted = [answers_of(places, name) for name in ("one", None, "two")]
    assert list(found) == [places["one"], impl.RAW, places["two"]]
    assert list(found.values()) == wanted
    assert wanted[0] != wanted[1] != wanted[2] != wanted[0]


def test_lb7() -> None:
    law_lb7_each_adapter_is_asked_alone(real)


def law_lb8_a_record_is_of_these_weights(impl: Any) -> None:
    """What the record holds is not asked again; another training in the same folder is."""
    with world() as places:

        def found() -> dict[str, Accuracy]:
            order, record = [places["one"]], Path(places["record"])
            every = impl.evaluate(Base(places["model"]), order, asked(places), record=record)
            return dict(every[places["one"]])

        first = found()
        with mock.patch.object(commonsense, "choose", side_effect=AssertionError):
            assert found() == first
        shutil.rmtree(places["one"])
        shutil.copytree(places["two"], places["one"])
        assert found() == answers_of(places, "two") != first


def test_lb8() -> None:
    law_lb8_a_record_is_of_these_weights(real)


def test_the_table_is_read_by_people() -> None:
    """Wilson's interval behind one model, Student's over several adapters; the raw model is not one of them."""
    found = {
        real.RAW: {"boolq": Accuracy(1, 2), "piqa": Accuracy(1, 4)},
        "a": {"boolq": Accuracy(2, 2), "piqa": Accuracy(1, 4)},
        "b": {"boolq": Accuracy(2, 2), "piqa": Accuracy(3, 4)},
    }
    lines = real.table(found).splitlines()
    assert lines[0] == "| task | questions | raw model | a | b | 2 adapters |"
    assert lines[1] == "| --- | --- | --- | --- | --- | --- |"
    low, high = (100 * end for end in Accuracy(1, 2).interval())
    assert lines[2].startswith(f"| BoolQ | 2 | 50.0 ({low:.1f} to {high:.1f}) | 100.0 (")
    assert lines[2].endswith("| 100.0 (100.0 to 100.0) |")
    # mean 62.5 and 87.5: half-width 12.7062 * 17.6777 / sqrt(2)
    assert lines[4] == "| mean |  | 37.5 | 62.5 | 87.5 | 75.0 (-83.8 to 233.8) |"
    alone = real.table({"a": found["a"]}).splitlines()
    assert alone[0] == "| task | questions | a |"


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Base and adapter, by generation, on rows of one task."""
    with world() as places:
        words = ["evaluate-llm", "--model", places["model"], "--data", places["data"]]
        words += ["--adapter", places["one"], "--base", "--by", "generation"]
        words += [
            "--tasks",
            "piqa",
            "arc_easy",
            "--rows_per_task",
            "1",
            "--output",
            places["record"],
        ]
        assert main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        record = json.loads(Path(places["record"]).read_text("utf-8"))
    assert lines[0] == f"| task | questions | raw model | {places['one']} |"
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [["| piqa", "1"], ["| ARC-E", "1"]]
    assert sorted(entry["task"] for entry in record.values()) == [
        "arc_easy",
        "arc_easy",
        "piqa",
        "piqa",
    ]


def test_what_cannot_be_asked_is_one_message(caplog: pytest.LogCaptureFixture) -> None:
    with world() as places:
        words = ["evaluate-llm", "--model", places["model"], "--data", places["data"]]
        for more, message in (
            (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
            (["--adapter", "x", "x"], "--adapter names x more than once"),
            (["--adapter", places["data"]], "adapter_model.safetensors"),
            (["--tasks", "obqa", "none"], "there is no row of task 'none'"),
        ):
            caplog.clear()
            assert main([*words, *more]) == 2
            assert message in caplog.text


def test_the_base_is_packed_as_in_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter of a packed base is refused on the unpacked one, so the base can be packed here, too."""
    with world() as places, mock.patch.object(real, "load_language_model") as load:
        load.side_effect = RuntimeError("asked")
        flags = ["--model", places["model"], "--data", places["data"], "--quantization", "nf4"]
        with pytest.raises(RuntimeError, match="asked"):
            main(["evaluate-llm", *flags])
    assert load.call_args.kwargs["quantization"] == "nf4"
    with pytest.raises(SystemExit):
        main(["evaluate-llm", *flags[:-1], "nf5"])
    assert "choose from" in capsys.readouterr().err
