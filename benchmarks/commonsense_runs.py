"""Single runs of the commonsense benchmark: one model in memory, adapters put on, trained, asked and taken off."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dreamrie.config import LlmConfig, config_of
from dreamrie.errors import ConfigError, NumericalError
from dreamrie.llm.borrowed import borrowed
from dreamrie.llm.data import Example
from dreamrie.llm.encoding import Encoded
from dreamrie.llm.evaluate import encode_choices, log_probabilities
from dreamrie.llm.prepare import build_task, read_request
from dreamrie.runlog import RunLog
from dreamrie.trainer import LoopSettings, make_accelerator, train
from dreamrie.trainer.starting import start_adapter

HELD_BACK, TEST = "held back", "test"


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: in tables.
        optimizer: as `train-llm` names it; its usual start comes with it.
        widths: rank of the trained change in units of --rank.
        rates: learning rates to choose from.
    """

    name: str
    optimizer: str
    widths: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Budget:
    """Everything that the numbers depend on, beside the run itself and the machine.

    Attributes:
        model: name, folder or GGUF file.
        data: folder with TASK.train.jsonl and TASK.test.jsonl.
        tasks: names.
        answers: what the model says, see `dreamrie.llm.templates.ask`.
        train_rows: of each task, to learn from.
        held_rows: of each task, those behind them, to choose the learning rate by.
        test_rows: of each task, for the result.
        rank: of the trained change.
        steps: of the optimizer.
        batch: examples in a step.
        loi_batches: for the start of riemannion.
        precision: "fp32" or "bf16", of base and forward pass.
    """

    model: str
    data: str
    tasks: tuple[str, ...]
    answers: str
    train_rows: int
    held_rows: int
    test_rows: int
    rank: int
    steps: int
    batch: int
    loi_batches: int
    precision: str


@dataclass(frozen=True)
class Run:
    """One training, or the raw model.

    Attributes:
        method: how; None for the raw model, which is not trained.
        rate: learning rate.
        seed: of the training.
        part: questions asked afterwards, `HELD_BACK` or `TEST`.
    """

    method: Method | None
    rate: float
    seed: int
    part: str

    @property
    def key(self) -> str:
        """Name in the file of results."""
        if self.method is None:
            return f"raw, {self.part}"
        return f"{self.method.name}, lr {self.rate:g}, seed {self.seed}, {self.part}"


def on_device(name: str) -> None:
    """Let everything after this compute on a device.

    Args:
        name: "cpu", "cuda", or "auto": the GPU if there is one.

    Raises:
        ConfigError: there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no GPU here that torch can use; give --device cpu.")
    if name == "cpu" and torch.cuda.is_available():
        # accelerate would take the GPU.
        os.environ["ACCELERATE_USE_CPU"] = "yes"


class Bench:
    """A model in memory with the questions, ready for any number of runs.

    Args:
        budget: for all of them.

    Attributes:
        device: where it is, in words.
        counts: how many examples to learn from and questions there are.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._accelerator = make_accelerator("bf16" if budget.precision == "bf16" else "no")
        device = self._accelerator.device
        self.device = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        request = read_request(self._config(None, 0.0, 0), device)
        learned, held = split_rows(request.examples, budget.train_rows)
        asked = {HELD_BACK: held, TEST: request.held_out}
        seen = {example.turns for examples in asked.values() for example in examples}
        # PIQA asks some goals in both of its parts, with other solutions.
        learned = [example for example in learned if example.turns not in seen]
        self._request = dataclasses.replace(request, examples=learned, held_out=[])
        self._asked = asked
        self._questions: dict[str, list[list[Encoded]]] = {
            part: [encode_choices(request.encoder, example) for example in examples]
            for part, examples in asked.items()
        }
        self.counts = {"train": len(learned), **{part: len(rows) for part, rows in asked.items()}}

    def run(self, run: Run) -> dict[str, Any]:
        """Train if there is something to train, and ask.

        Args:
            run: which one.

        Returns:
            For JSON: `right`, for each task a text with 1 for each question answered right and 0 for each other;
            `log_probability`, mean over the questions of that of the right answer; `seconds` of training and of asking;
            for the raw model `constant`, see `constant_share`; for a training that found no end only `failed`, why.
        """
        model, started = self._request.language.model, time.perf_counter()
        found: dict[str, Any] = {"device": self.device}
        with borrowed(model):
            if run.method is None:
                found["constant"] = constant_share(self._request.examples, self._asked[run.part])
            else:
                try:
                    found |= self._train(run, run.method)
                except NumericalError as error:
                    return {**found, "failed": str(error).splitlines()[0]}
            trained = time.perf_counter()
            model.eval()
            found |= self._ask(run.part)
        asked = time.perf_counter()
        seconds = {"training": trained - started, "asking": asked - trained}
        return {**found, "seconds": {name: round(value, 2) for name, value in seconds.items()}}

    def _config(self, method: Method | None, rate: float, seed: int) -> LlmConfig:
        """Settings of `train-llm` for a run."""
        budget = self._budget
        values: dict[str, Any] = {
            "model": budget.model,
            "base_precision": budget.precision,
            "mixed_precision": "bf16" if budget.precision == "bf16" else "no",
            "data": [budget.data],
            "tasks": list(budget.tasks),
            "answers": budget.answers,
            "rows_per_task": budget.train_rows + budget.held_rows,
            "validation_data": [budget.data],
            "validation_rows": budget.test_rows,
            "train_batch_size": budget.batch,
            "max_train_steps": budget.steps,
            "rank": budget.rank,
            "seed": seed,
        }
        if method is not None:
            values |= {"optimizer": method.optimizer, "learning_rate": rate}
            values["rank"] = budget.rank * method.widths
            if method.optimizer == "riemannion":
                values["loi_batches"] = budget.loi_batches
        return config_of(LlmConfig, values)

    def _train(self, run: Run, method: Method) -> dict[str, Any]:
        """What `train-llm` does, but for files."""
        config = self._config(method, run.rate, run.seed)
        task = build_task(dataclasses.replace(self._request, config=config), 1)
        optimizer, _ = start_adapter(config, task)
        loop = LoopSettings(**config.loop_values())
        loop = dataclasses.replace(
            loop, validation_steps=None, score_steps=None, spectrum_steps=None
        )
        with RunLog(None, config.schedule.max_train_steps, quiet=True) as log:
            result = train(task, optimizer, loop, log, self._accelerator)
        if result.interrupted:
            raise KeyboardInterrupt
        return {"last_loss": result.last_loss, "skipped_steps": result.skipped_steps}

    def _ask(self, part: str) -> dict[str, Any]:
        """Answers by likelihood."""
        examples, on_gpu = self._asked[part], self._accelerator.device.type == "cuda"
        values = log_probabilities(
            self._request.language.model, self._questions[part], batch_size=64 if on_gpu else 8
        )
        right: dict[str, str] = {}
        for example, each in zip(examples, values, strict=True):
            hit = each.index(max(each)) == example.correct
            right[example.task] = right.get(example.task, "") + ("1" if hit else "0")
        own = [each[example.correct] for example, each in zip(examples, values, strict=True)]
        return {"right": right, "log_probability": sum(own) / len(own)}


def constant_share(learned: Sequence[Example], asked: Sequence[Example]) -> dict[str, float]:
    """What is right without reading the question: the answer that is the most frequent one among the rows to learn.

    Args:
        learned: rows to learn from.
        asked: questions.

    Returns:
        Share of each task whose questions all have the same choices.
    """
    found = {}
    for task in {example.task for example in asked}:
        own = [example for example in asked if example.task == task]
        if len({frozenset(example.choices) for example in own}) == 1:
            answers = [example.answer for example in learned if example.task == task]
            usual = max(sorted(set(answers)), key=answers.count)
            found[task] = sum(example.answer == usual for example in own) / len(own)
    return found


def split_rows(examples: Sequence[Example], first: int) -> tuple[list[Example], list[Example]]:
    """The first rows of each task, and those behind them that ask something else.

    Args:
        examples: of any tasks.
        first: how many of each task.

    Returns:
        Rows to learn from, and rows held back.

    Raises:
        ConfigError: a task has no row to hold back.
    """
    counts: dict[str, int] = {}
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        counts[example.task] = counts.get(example.task, 0) + 1
        parts[counts[example.task] > first].append(example)
    short = sorted(task for task, count in counts.items() if count <= first)
    if short:
        raise ConfigError(
            f"task {short[0]!r} has {counts[short[0]]} rows, and the first {first} are to be learned; "
            "lower --train_rows, so that rows are left to choose the learning rate by."
        )
    return parts
