"""A dry run of `train-llm` says what a training will take, although texts differ in length."""

from __future__ import annotations

import functools
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from dreamrie.config import LlmConfig, config_of
from dreamrie.errors import NumericalError
from dreamrie.llm import rehearsal as real
from dreamrie.llm.data import Example
from dreamrie.llm.encoding import Encoded, Encoder
from dreamrie.llm.prepare import Request, build_task, read_request
from dreamrie.llm.scorer import AccuracyScorer
from dreamrie.llm.task import CausalLmTask
from dreamrie.llm.templates import Renderer
from dreamrie.runlog import RunLog
from dreamrie.trainer import LoopSettings, make_accelerator, train
from dreamrie.trainer import rehearsal as parts
from dreamrie.trainer.starting import start_adapter
from tests.contracts.sources import ROOT
from tests.llm import small

LINE = re.compile(
    r"# time: about (\d+) s after loading \(initialization (\d+), steps (\d+), scores (\d+)\)"
)
MEMORY = re.compile(r"# memory: about ([\d.]+) GiB of the process at its peak")

ROWS = [
    Encoded((7,) * (4 + number * number // 9), (8, 2)[: 1 + number % 2] * (1 + number % 5), "row")
    for number in range(37)
]
"""Lengths from 5 to 155, most of them short; the longest answers are not behind the longest prompts."""

SVDS, STEP, PASS = 900.0, 30.0, 20.0
"""Seconds of the world below: of a start without its batches, of an optimizer step without its, of any pass."""

VALUES: dict[str, Any] = {
    "model": "any",
    "data": ["any"],
    "validation_data": ["any"],
    "rank": 3,
    "loi_batches": 9,
    "max_train_steps": 25,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "score_steps": 10,
}


class World:
    """Everything takes a time that is known: a pass 20 s, and a second for each token, padding included.

    Attributes:
        now: seconds since the beginning.
        seen: sizes of the passes of starts, steps and scorings.
    """

    def __init__(self, packing: bool = False) -> None:
        self.now = 0.0
        self.seen: dict[str, list[tuple[int, int]]] = {"start": [], "steps": [], "scores": []}
        self.config = config_of(LlmConfig, {**VALUES, "packing": packing})
        pair: Any = SimpleNamespace(left=torch.zeros(1))
        model: Any = None
        self.task = CausalLmTask(
            model, [pair], ROWS, batch_size=2, seed=4, max_length=160, samples_per_step=6
        )
        self.task._packing = packing
        self.task.model = self.model()

    def spend(self, part: str, tokens: int, logits: int) -> None:
        """A forward pass."""
        self.seen[part].append((tokens, logits))
        self.now += PASS + tokens

    def take(self, part: str, batch: Any) -> None:
        self.spend(part, batch.tokens.numel(), len(batch.tokens) * len(batch.columns))

    def timed(self, action: Callable[[], object]) -> float:
        before = self.now
        action()
        return self.now - before

    def start(self, config: Any, task: Any) -> tuple[Any, str]:
        self.now += SVDS
        for batch in task.loi_batches(config.adapter.loi_batches):
            self.take("start", batch)
        return SimpleNamespace(param_groups=[]), ""

    def train(self, task: Any, _: Any, settings: LoopSettings, *__: Any) -> Any:
        before = self.now
        for step in range(1, settings.max_steps + 1):
            self.now += STEP
            for micro in range(settings.accumulation):
                self.take("steps", task.batch(step, micro))
        return SimpleNamespace(interrupted=False, seconds=self.now - before)

    def model(self) -> Any:
        """A language model that has no opinion."""

        def forward(**asked: Any) -> Any:
            rows, columns = len(asked["input_ids"]), len(asked["logits_to_keep"])
            self.spend("scores", asked["input_ids"].numel(), rows * columns)
            return SimpleNamespace(logits=torch.zeros(rows, columns, 259))

        made = mock.Mock(side_effect=forward, config=SimpleNamespace(vocab_size=259))
        made.parameters.side_effect = lambda: iter([torch.zeros(1)])
        return made

    def request(self) -> Request:
        """Fifty rows to ask, of many lengths."""
        turns = [(("user", "ask " * (1 + number * number // 60)),) for number in range(50)]
        held_out = [
            Example(turn, "a", ("a", "bb" * 9), f"task {number % 2}", f"row {number}")
            for number, turn in enumerate(turns)
        ]
        language: Any = None
        encoder = Encoder(Renderer(small.tokenizer(), "chat"), 768)
        return Request(self.config, language, [], held_out, encoder)


def estimated(impl: Any, world: World, done: int = 0) -> parts.Estimate:
    """What a dry run finds in such a world."""
    accelerator = SimpleNamespace(num_processes=1, is_main_process=True)
    with (
        mock.patch.multiple(parts, timed=world.timed, start_adapter=world.start, train=world.train),
        mock.patch.object(impl, "timed", world.timed),
    ):
        found: parts.Estimate = impl._estimate(
            world.config, world.request(), world.task, accelerator, done
        )
    return found


@functools.cache
def happened(packing: bool) -> tuple[list[float], dict[str, list[tuple[int, int]]]]:
    """What the training takes there: seconds of start, steps and scores; and the sizes of its passes."""
    world = World(packing)
    request, settings = world.request(), LoopSettings(**world.config.loop_values())
    scorer = AccuracyScorer(world.task.model, request.encoder, request.held_out)
    seconds = [
        world.timed(lambda: world.start(world.config, world.task)),
        world.timed(lambda: world.train(world.task, None, settings)),
        # After 0, 10, 20 and 25 steps.
        4 * world.timed(lambda: scorer(0)),
    ]
    return seconds, world.seen


def law_ll21_the_time_is_that_of_all_batches(impl: Any) -> None:
    """Start, steps and scores within a twentieth, where a batch takes a fixed time and a second for each token."""
    for packing in (False, True):
        found, (wanted, _) = estimated(impl, World(packing)), happened(packing)
        assert [found.start, found.steps, found.looks] == pytest.approx(wanted, rel=0.05)


def law_ll22_the_largest_batches_are_tried(impl: Any) -> None:
    """The memory is that of the longest batch, and of the widest output; of a start, without state, the longest."""
    for packing in (False, True):
        tried, (_, whole) = World(packing), happened(packing)
        estimated(impl, tried)
        for part, seen in tried.seen.items():
            longest, widest = (max(size[i] for size in whole[part]) for i in (0, 1))
            assert longest == max(size[0] for size in seen)
            assert widest == max(size[1] for size in seen) or part == "start"


def test_ll21() -> None:
    law_ll21_the_time_is_that_of_all_batches(real)


def test_ll22() -> None:
    law_ll22_the_largest_batches_are_tried(real)


def test_a_training_that_goes_on_has_less_to_do() -> None:
    """After 20 of 25 steps: five steps, and the scores of the last one; their batches are other ones."""
    whole, rest = (estimated(real, World(), done) for done in (0, 20))
    assert rest.steps == pytest.approx(whole.steps / 5, rel=0.3)
    assert rest.looks == pytest.approx(whole.looks / 4)
    assert estimated(real, World(), done=25).steps == 0.0


def test_of_a_long_training_some_batches_are_looked_at() -> None:
    """Evenly spaced, over all steps and all places in a step."""
    found = real.every_batch(11, 3010, 4, real.stride_of(12_000, 4))
    assert len(found) == real.LOOKED_AT
    assert (found[:3], found[-1]) == ([(11, 0), (11, 3), (12, 2)], (3010, 1))
    assert real.every_batch(1, 2, 2, real.stride_of(4, 2)) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    # Every fourth of four would be the same place of each step.
    assert [real.stride_of(count, 4) for count in (0, 4_000, 16_000)] == [1, 1, 5]


def test_processes_are_given_the_same_batches() -> None:
    """Two processes of two micro-batches each: the places 0 and 1 of a step are one batch."""
    task: Any = SimpleNamespace(batch=lambda *key: key)
    chosen = [real.Size(1, 1, (9, number)) for number in range(4)]
    only = real.Only(task, chosen, 2, 2)
    assert [only.batch(1, micro)[1] for micro in range(4)] == [0, 0, 1, 1]
    assert [only.batch(2, micro)[1] for micro in range(4)] == [2, 2, 3, 3]
    starts = real.Only(task, chosen[:3], 1, 2)
    assert [batch[1] for batch in starts.loi_batches(6)] == [0, 0, 1, 1, 2, 2]


@contextmanager
def prepared(folder: Path, **more: Any) -> Iterator[tuple[LlmConfig, Request, CausalLmTask, Any]]:
    """A small llama, rows of many lengths, and what `train-llm` makes of them."""
    rows = [
        {"instruction": f"{'so ' * (number * number % 140)}? Answer format: yes/no", "answer": word}
        for number, word in enumerate(("yes", "no", "no") * 14)
    ]
    data = str(
        small.write_rows(folder / "rows.jsonl", [{**r, "output": r["answer"]} for r in rows])
    )
    model = small.save_model(folder / "model")
    values = {"model": str(model), "data": [data], "validation_data": [data], **more}
    config = config_of(LlmConfig, {**values, "output_dir": str(folder / "run"), "rank": 2})
    accelerator = make_accelerator()
    request = read_request(config, accelerator.device)
    yield request.config, request, build_task(request, 1), accelerator


def test_a_try_that_fails_is_told(tmp_path: Path) -> None:
    """Too little memory is the answer to a question, not a fault; nor is a loss that is not finite."""
    with prepared(tmp_path, max_train_steps=2) as (config, request, task, accelerator):
        for error in (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
            NumericalError("CUDA out of memory. Tried to allocate 9 GiB\n  where: here"),
        ):
            with mock.patch.object(parts, "start_adapter", side_effect=error):
                said = real.rehearse(config, request, task, accelerator)
            assert said == (
                "# time and memory: not estimated, because a short try failed: "
                "CUDA out of memory. Tried to allocate 9 GiB"
            )
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.slow
def test_the_time_is_near_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a fifth of processor time; the estimates are from before and after, as a busy machine drifts."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    settings = {"max_train_steps": 40, "gradient_accumulation_steps": 2, "score_steps": 20}
    with prepared(tmp_path, loi_batches=20, **settings) as (config, request, task, accelerator):
        before = real._estimate(config, request, task, accelerator, 0)
        assert not (tmp_path / "run").exists()
    began = time.process_time()
    optimizer, _ = start_adapter(config, task)
    start = time.process_time() - began
    scorer = AccuracyScorer(task.model, request.encoder, request.held_out)
    with RunLog(tmp_path / "run", 40) as log:
        loop = LoopSettings(**config.loop_values())
        result = train(task, optimizer, loop, log, accelerator, scorer)
    after = real._estimate(config, request, task, accelerator, 0)
    assert (before.steps + after.steps) / 2 == pytest.approx(result.seconds, rel=0.2)
    total = start + result.seconds + result.scoring_seconds
    sums = [found.start + found.steps + found.looks for found in (before, after)]
    assert sum(sums) / 2 == pytest.approx(total, rel=0.2)


@pytest.mark.slow
def test_the_memory_is_near_what_happens(tmp_path: Path) -> None:
    """Within a fifth, where one row of twenty is long; the command says so, and writes nothing."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    small.model(**sizes).save_pretrained(tmp_path / "model")
    small.tokenizer().save_pretrained(tmp_path / "model")
    texts = ["be " * (200 if number == 7 else 5 + number) for number in range(20)]
    rows = small.write_rows(
        tmp_path / "rows.jsonl", [{"instruction": text, "output": "yes"} for text in texts]
    )
    words = ["--model", str(tmp_path / "model"), "--data", str(rows), "--rank", "2"]
    words += ["--train_batch_size", "10", "--max_train_steps", "8", "--loi_batches", "4"]
    command = [sys.executable, "-m", "dreamrie", "train-llm", *words]
    command += ["--output_dir", str(tmp_path / "run")]
    said = subprocess.run(
        [*command, "--dry_run"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    seconds, memory = LINE.search(said), MEMORY.search(said)
    assert seconds is not None
    assert memory is not None
    assert not (tmp_path / "run").exists()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert float(memory.group(1)) * 2**30 == pytest.approx(usage.ru_maxrss * 1024, rel=0.2)
