"""The commonsense benchmark: what is chosen, what is printed, what is not measured twice, and one small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import commonsense, commonsense_runs
from benchmarks.commonsense import (
    NAMES,
    RATES,
    RAW,
    SPECTRAL_RATES,
    TEST_SEEDS,
    TUNING_SEED,
)
from benchmarks.commonsense_runs import HELD_BACK, TEST, Run
from dreamrie.errors import ConfigError
from dreamrie.llm.data import Example
from tests.llm import small

METHODS = commonsense.methods_of(list(NAMES), len(RATES))


def entry(right: int, of: int = 20, log_probability: float = -5.0) -> dict[str, Any]:
    """As many questions of two tasks, the first `right` of each answered right."""
    text = "1" * right + "0" * (of - right)
    seconds = {"training": 1.0, "asking": 0.5}
    record = {"device": "cpu", "seconds": seconds, "log_probability": log_probability}
    return {**record, "right": {"piqa": text, "boolq": text}}


def results(best: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Everything measured; each method is best at the rate given, and as good with every seed as its place says."""
    found = {run.key: entry(8) | {"constant": {"boolq": 0.6}} for run in RAW.values()}
    for place, method in enumerate(METHODS):
        for rate in method.rates:
            likely = -5.0 if rate == best[method.name] else -6.0
            found[Run(method, rate, TUNING_SEED, HELD_BACK).key] = entry(12, log_probability=likely)
        for seed in TEST_SEEDS:
            run = Run(method, best[method.name], seed, TEST)
            found[run.key] = entry(16 - 2 * place + seed % 2)
    return found


BEST = {method.name: method.rates[place] for method, place in zip(METHODS, (2, 0, 3), strict=True)}


SETTINGS = {"model": "m", "precision": "fp32", "answers": "text", "tasks": ["piqa", "boolq"]} | {
    "steps": 5,
    "batch": 2,
    "rank": 3,
}


def test_methods_are_tuned_alike() -> None:
    """As many rates, over two decades, with a seed that no result uses."""
    assert {len(method.rates) for method in METHODS} == {7}
    for method in METHODS:
        assert method.rates[-1] / method.rates[0] == pytest.approx(100)
        steps = [b / a for a, b in zip(method.rates, method.rates[1:], strict=False)]
        assert steps == pytest.approx([100 ** (1 / 6)] * 6, rel=0.01)
    assert TUNING_SEED not in TEST_SEEDS
    assert {run.part for run in commonsense.tuning(METHODS)} == {HELD_BACK}
    assert len({run.key for run in commonsense.tuning(METHODS)}) == 21


def test_fewer_methods_and_rates_are_a_part_of_all() -> None:
    """So that a larger comparison goes on from the results of a smaller one."""
    few = commonsense.methods_of(["adamw", "riemannion"], 4)
    assert [method.name for method in few] == ["adamw, r", "riemannion, LOI, r"]
    for method, whole in zip(few, (RATES, SPECTRAL_RATES), strict=True):
        assert method.rates == (whole[0], whole[2], whole[4], whole[6])
    keys = {run.key for run in commonsense.tuning(METHODS)}
    assert {run.key for run in commonsense.tuning(few)} < keys


def test_the_rate_is_chosen_by_held_back_rows() -> None:
    """The likelier answers win, however many are right; a failed training never does."""
    found = results(BEST)
    method = METHODS[1]
    assert commonsense.best_rate(method, found) == RATES[0]
    key = Run(method, RATES[4], TUNING_SEED, HELD_BACK).key
    found[key] = entry(9, log_probability=-4.0)
    assert commonsense.best_rate(method, found) == RATES[4]
    found[key] = {"device": "cpu", "failed": "the loss was not finite"}
    assert commonsense.best_rate(method, found) == RATES[0]
    assert {run.rate for run in commonsense.trials(METHODS, found) if run.method == method} == {
        RATES[0]
    }


def test_the_tables_say_what_was_measured() -> None:
    lines = commonsense.report(METHODS, results(BEST), SETTINGS).splitlines()
    assert lines[0] == "m, fp32, answers by text, 5 steps of 2 examples, r = 3; piqa, boolq; on cpu"
    assert "| raw model | -5.00 (40.0) | |" in lines
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert rows["adamw, r - raw model"].startswith("| adamw, r - raw model | +33.3 (")
    assert rows["riemannion, LOI, r - adamw, 2r"].startswith(
        "| riemannion, LOI, r - adamw, 2r | +20.0 ("
    )
    # 8 of 20 right and 17: 18 questions of the two tasks gained, none lost
    assert rows["riemannion, LOI, r - raw model"].endswith("| 7.6e-06, 3.1e-05, 7.6e-06 |")
    assert "| raw model | 40.0 | 40.0 | 40.0 |" in lines
    assert any(
        line.startswith("| adamw, r | 73.3 | 73.3 | 73.3 (66.2 to 80.5) |") for line in lines
    )
    held = next(line for line in lines if line.startswith("| adamw, r | 0.0001"))
    assert held.startswith("| adamw, r | 0.0001: -5.00 (60.0), 0.000215: -6.00 (60.0), ")
    assert held.endswith(" | 0.0001 (edge) |")
    assert (
        "Answering boolq the same always, as most of its training rows, is right on 60.0 %."
        in lines
    )


def test_tables_wait_for_their_numbers() -> None:
    found = results(BEST)
    last = found.pop(Run(METHODS[2], BEST[METHODS[2].name], 3, TEST).key)
    assert "Test rows" not in commonsense.report(METHODS, found, SETTINGS)
    assert "Held-back rows" in commonsense.report(METHODS, found, SETTINGS)
    found.pop(Run(METHODS[0], RATES[6], TUNING_SEED, HELD_BACK).key)
    assert commonsense.report(METHODS, found, SETTINGS).count("\n") == 1
    found = results(BEST)
    failed = Run(METHODS[2], BEST[METHODS[2].name], 3, TEST).key
    found[failed] = {"device": last["device"], "failed": "the loss was not finite"}
    assert f"no table: these trainings failed: {failed}" in commonsense.report(
        METHODS, found, SETTINGS
    )


def test_nothing_begins_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is expected to take as long as the longest before it."""
    now = [100.0]
    monkeypatch.setattr(commonsense.time, "monotonic", lambda: now[0])
    clock = commonsense.Clock(2.0)
    assert clock.allows()
    clock.note({"seconds": {"training": 50.0, "asking": 10.0}})
    clock.note({"failed": "x"})
    now[0] = 159.0
    assert clock.allows()
    now[0] = 160.0
    assert not clock.allows()
    assert commonsense.Clock(None).allows()


def test_rows_are_split_and_never_shared() -> None:
    """The first of each task are learned, the others are held back."""
    rows = [
        Example((("user", f"{n}?"),), "a", ("a", "b"), task, "") for n in range(4) for task in "xy"
    ]
    learned, held = commonsense_runs.split_rows(rows, 3)
    assert [row.turns[0][1] for row in learned] == ["0?", "0?", "1?", "1?", "2?", "2?"]
    assert [(row.task, row.turns[0][1]) for row in held] == [("x", "3?"), ("y", "3?")]
    with pytest.raises(ConfigError, match="task 'x' has 4 rows, and the first 4 are to be learned"):
        commonsense_runs.split_rows(rows, 4)


def test_a_constant_answer_is_the_usual_one_of_the_training_rows() -> None:
    def rows(task: str, answers: str, choices: str) -> list[Example]:
        return [Example((("user", "?"),), each, tuple(choices), task, "") for each in answers]

    learned = rows("boolq", "TTF", "TF") + rows("piqa", "a", "ab")
    asked = rows("boolq", "TFFF", "TF") + rows("piqa", "a", "ab") + rows("piqa", "c", "cd")
    assert commonsense_runs.constant_share(learned, asked) == {"boolq": 0.25}


def test_devices_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(commonsense_runs.torch.cuda, "is_available", lambda: False)
    commonsense_runs.on_device("cpu")
    with pytest.raises(ConfigError, match="no GPU here"):
        commonsense_runs.on_device("cuda")
    assert "ACCELERATE_USE_CPU" not in commonsense_runs.os.environ
    monkeypatch.setattr(commonsense_runs.torch.cuda, "is_available", lambda: True)
    commonsense_runs.on_device("cuda")
    assert "ACCELERATE_USE_CPU" not in commonsense_runs.os.environ
    # Through monkeypatch, so that it is gone afterwards.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "no")
    commonsense_runs.on_device("cpu")
    assert commonsense_runs.os.environ["ACCELERATE_USE_CPU"] == "yes"


# ------------------------------------------------------------------------------- one small run


def world(folder: Path) -> list[str]:
    """A model of a few thousand numbers and rows of two tasks; returns the flags."""
    model = small.save_model(folder / "model")
    (folder / "data").mkdir()
    for split, count in (("train", 7), ("test", 4)):
        for task, choices in (("boolq", ["True", "False"]), ("piqa", ["pull", "push"])):
            rows = [
                {"task": task, "choices": choices, "answer": n % 2, "question": f"{split} {n}"}
                for n in range(count)
            ]
            small.write_rows(folder / "data" / f"{task}.{split}.jsonl", rows)
    flags = ["--data", str(folder / "data"), "--model", str(model), "--tasks", "piqa", "boolq"]
    flags += ["--train_rows", "4", "--rank", "2", "--steps", "1", "--batch", "2"]
    return [*flags, "--loi_batches", "1", "--output", str(folder / "results.json")]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods with one rate and one seed."""
    short = [commonsense.Method(m.name, m.optimizer, m.widths, RATES[-1:]) for m in METHODS[:2]]
    monkeypatch.setattr(commonsense, "methods_of", lambda *_: tuple(short))
    monkeypatch.setattr(commonsense, "TEST_SEEDS", (1,))


def test_what_is_asked_is_not_learned(tmp_path: Path) -> None:
    """A question that stands in the test rows as well, with other choices, is left out of the training rows."""
    flags = world(tmp_path)
    file = tmp_path / "data" / "piqa.train.jsonl"
    row = {"task": "piqa", "choices": ["sit", "stand"], "answer": 0, "question": "test 2"}
    file.write_text(json.dumps(row) + "\n" + file.read_text("utf-8"), "utf-8")
    budget, settings = commonsense.budget_of(commonsense.make_parser().parse_args(flags))
    bench = commonsense_runs.Bench(budget)
    # Of four rows each, PIQA loses "test 2", and BoolQ "train 3", which is held back in PIQA.
    assert bench.counts == {"train": 6, HELD_BACK: 7, TEST: 8}
    assert (settings["model"], settings["tasks"]) == ("model", ["piqa", "boolq"])
    alias = commonsense.make_parser().parse_args([*flags, "--model", "smollm2-135m"])
    assert commonsense.budget_of(alias)[1]["model"] == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_stopped_benchmark_goes_on(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    few: None,
) -> None:
    """The raw model alone is in time; then everything else, and at last nothing at all."""
    flags, file = world(tmp_path), tmp_path / "results.json"
    with mock.patch.object(commonsense.Clock, "allows", side_effect=lambda: not file.exists()):
        assert commonsense.main(flags) == 3
    assert (
        "1 runs are done, 6 are needed; the same command goes on from here"
        in capsys.readouterr().out
    )
    first = json.loads(file.read_text("utf-8"))
    assert list(first["runs"]) == ["raw, held back"]
    assert commonsense.main(flags) == 0
    second = json.loads(file.read_text("utf-8"))
    assert second["runs"]["raw, held back"] == first["runs"]["raw, held back"]
    assert len(second["runs"]) == 6
    assert {task: len(text) for task, text in second["runs"]["raw, test"]["right"].items()} == {
        "boolq": 4,
        "piqa": 4,
    }
    likely = [run["log_probability"] for run in second["runs"].values()]
    assert len(set(likely)) == 6
    capsys.readouterr()
    monkeypatch.setattr(commonsense, "_begin", None)
    assert commonsense.main(flags) == 0
    assert "| riemannion, LOI, r - adamw, r |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds results for steps 1, and now steps is 2"):
        commonsense.main([*flags, "--steps", "2"])
    file.write_text("[]", "utf-8")
    with pytest.raises(ConfigError, match="is no file of results"):
        commonsense.main(flags)


@pytest.mark.slow
def test_processes_find_the_same_as_one(tmp_path: Path, few: None) -> None:
    """Two processes with a model each: the numbers of one, to the last bit."""
    flags = world(tmp_path)
    assert commonsense.main(flags) == 0
    assert commonsense.main([*flags, "--jobs", "2", "--output", str(tmp_path / "two.json")]) == 0
    one, two = (
        json.loads((tmp_path / name).read_text("utf-8"))["runs"]
        for name in ("results.json", "two.json")
    )
    assert set(one) == set(two)
    for key, found in one.items():
        assert {**found, "seconds": 0} == {**two[key], "seconds": 0}
