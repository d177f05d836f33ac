"""Workers that load the model once and then train one stack after the other; the parent alone writes."""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.convergence.methods import parse_method, start_steps, usual_momentum
from benchmarks.convergence.plan import CONCEPTS, Budget, Cell, missing, setting_of
from benchmarks.convergence.records import Records, Scores
from benchmarks.convergence.scoring import Judge
from benchmarks.convergence.subjects import LOI_BATCHES, Shelf, Subjects
from benchmarks.convergence.training import OutOfTimeError, Stack
from dreamrie.diffusion.components import load_components
from dreamrie.init_table import INITS
from dreamrie.optimizer_table import OPTIMIZERS

# Failures in a row after which it is no use to go on.
MAX_FAILURES = 8
# After the deadline, for the scoring that a worker may be in.
GRACE_S = 15.0


@dataclass(frozen=True)
class Order:
    """What every worker has to know.

    Attributes:
        device: of the model. budget: of every training.
        concepts: that are trained on. graphs: record steps on a GPU.
        deadline: of `time.time`; nothing goes on after it.
        shelf: folder of what workers share.
    """

    device: str
    budget: Budget
    concepts: tuple[str, ...]
    graphs: bool
    deadline: float
    shelf: Path


class Job(NamedTuple):
    """Something for a worker: the base model of a concept, a start, or a cell.

    Attributes:
        kind: "base", "rows", "start" or "cell".
        cell: of a start, rows or cell.
        concepts: what it is about.
    """

    kind: str
    cell: Cell
    concepts: tuple[str, ...]


class Outcome(NamedTuple):
    """What came of a job.

    Attributes:
        job: as given. content: None where there was no time for it, or it failed.
        seconds: that it took. facts: what the worker's scores depend on. failure: in words, or nothing.
    """

    job: Job
    content: Any
    seconds: float
    facts: dict[str, Any]
    failure: str = ""


class _Worker:
    """The one of this process."""

    def __init__(self, order: Order) -> None:
        components = load_components(device=order.device)
        self.order = order
        budget = order.budget
        self.judge = Judge(components, order.concepts, budget.pictures)
        self.subjects = Subjects(components, Shelf(order.shelf), budget)
        self.stack = Stack(self.subjects, self.judge, budget, order.graphs)
        self.known: dict[tuple[str, int], float] = {}
        self.facts = {
            "steps": budget.steps,
            "batch": budget.batch,
            "marks": budget.marks,
            # What a method's name leaves out.
            "momenta": {name: usual_momentum(name) for name in OPTIMIZERS},
            "start_steps": start_steps(),
            "loi_batches": LOI_BATCHES,
            **self.judge.facts,
        }

    def __call__(self, job: Job) -> Outcome:
        started = time.time()
        kind = (job.cell.method, job.cell.rank)
        # What took longer than what is left is not begun.
        if started + self.known.get(kind, 0.0) > self.order.deadline:
            return Outcome(job, None, 0.0, self.facts)
        try:
            content = self._do(job)
        except OutOfTimeError:
            return Outcome(job, None, time.time() - started, self.facts)
        # One cell that cannot be trained must not end the others; a worker that exits would be waited for.
        except (Exception, SystemExit) as error:
            return Outcome(job, None, time.time() - started, self.facts, _in_words(error))
        seconds = time.time() - started
        if job.kind == "cell":
            self.known[kind] = seconds
        return Outcome(job, content, seconds, self.facts)

    def _do(self, job: Job) -> Any:
        cell = job.cell
        if job.kind == "base":
            return [self.stack.base(name) for name in job.concepts]
        if job.kind == "rows":
            return [len(self.subjects.rows(name, cell.seed).text) for name in job.concepts]
        if job.kind == "start":
            key, value = setting_of(cell)
            batches = int(value) if key == "batches" else LOI_BATCHES
            init = parse_method(cell.method).init
            return [
                len(self.subjects.start(n, cell.seed, cell.rank, init, batches))
                for n in job.concepts
            ]
        return self.stack.run(cell, job.concepts, self.order.deadline)


def _in_words(error: BaseException) -> str:
    """What went wrong, and where: the last lines of the traceback."""
    return "".join(traceback.format_exception(error)[-4:])


_WORKERS: list[_Worker | str] = []


def _settle() -> None:
    """Make this process a worker: one thread, silent, fp32 throughout."""
    torch.set_num_threads(1)
    # The numbers of a processor: LOI compares losses to 1e-5, which convolutions in TF32 do not keep.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def start_worker(order: Order) -> None:
    """Load everything, in a process of its own; a failure is told by the first job."""
    _settle()
    try:
        _WORKERS.append(_Worker(order))
    # A pool would start a new process for each that ends here, for ever.
    except (Exception, SystemExit) as error:
        _WORKERS.append(_in_words(error))


def work(job: Job) -> Outcome:
    """Do a job."""
    worker = _WORKERS[-1]
    if isinstance(worker, str):
        return Outcome(job, None, 0.0, {}, worker)
    return worker(job)


def jobs_of(
    todo: Sequence[tuple[Cell, tuple[str, ...]]], stack: int = len(CONCEPTS)
) -> Iterator[Job]:
    """Cells in their order; what their stacks share comes before the first cell of a rank and seed.

    Args:
        todo: cells with their concepts.
        stack: trainings in one stack at most.

    Yields:
        One job after the other.
    """
    made: set[tuple[Any, ...]] = set()
    stages: dict[tuple[int, int], list[tuple[Cell, tuple[str, ...]]]] = {}
    for cell, concepts in todo:
        stages.setdefault((cell.rank, cell.seed), []).append((cell, concepts))
    for cells in stages.values():
        # A row once for each concept and seed, one of each start for a concept, seed, rank and number of batches.
        for cell, concepts in cells:
            method, (name, value) = parse_method(cell.method), setting_of(cell)
            wanted: list[tuple[str, tuple[Any, ...]]] = [("rows", (cell.seed,))]
            if INITS[method.init].needs == "batches":
                batches = int(value) if name == "batches" else LOI_BATCHES
                wanted.append(("start", (method.init, cell.seed, cell.rank, batches)))
            for kind, key in wanted:
                for concept in concepts:
                    if (kind, key, concept) not in made:
                        made.add((kind, key, concept))
                        yield Job(kind, cell, (concept,))
        for cell, concepts in cells:
            for start in range(0, len(concepts), stack):
                yield Job("cell", cell, concepts[start : start + stack])


@dataclass(frozen=True)
class Task:
    """What is to be done.

    Attributes:
        cells: in the order of their value. concepts: of each cell.
        budget: of every training.
        stack: trainings side by side at most. workers: processes. device: of the model. graphs: record steps.
        minutes: when to stop; None: when all is done.
    """

    cells: Sequence[Cell]
    concepts: tuple[str, ...] = CONCEPTS
    budget: Budget = field(default_factory=Budget)
    stack: int = len(CONCEPTS)
    workers: int = 1
    device: str = "cpu"
    graphs: bool = True
    minutes: float | None = None


def run(task: Task, records: Records, path: Path) -> bool:
    """Train and score what is missing; the file is written after every cell.

    Args:
        task: see there.
        records: finished trainings, are added to.
        path: of the file.

    Returns:
        Whether everything is done.
    """
    started = time.time()
    todo = missing(task.cells, task.concepts, records.cells)
    jobs = [
        Job("base", Cell("", 0, 0.0, 0), (name,))
        for name in task.concepts
        if name not in records.base
    ]
    jobs += jobs_of(todo, task.stack)
    if not jobs:
        return True
    deadline = started + 60 * task.minutes if task.minutes else float("inf")
    with tempfile.TemporaryDirectory() as folder:
        order = Order(
            task.device,
            task.budget,
            task.concepts,
            task.graphs,
            deadline,
            Path(folder),
        )
        print(f"{sum(len(concepts) for _, concepts in todo)} trainings are missing", flush=True)
        context = multiprocessing.get_context("spawn")
        with context.Pool(task.workers, start_worker, (order,)) as pool:
            results, failures = pool.imap_unordered(work, jobs), 0
            for outcome in _until(results, deadline + GRACE_S):
                records.expect(outcome.facts, path)
                _take(outcome, records, path, time.time() - started)
                failures = failures + 1 if outcome.failure else 0
                if failures == MAX_FAILURES:
                    raise SystemExit(f"{failures} failures in a row: given up")
    compared = all(name in records.base for name in task.concepts)
    return compared and not missing(task.cells, task.concepts, records.cells)


def _until(results: Any, end: float) -> Iterator[Outcome]:
    """Outcomes as they come; a worker that was killed from outside is not waited for beyond the end."""
    while True:
        left = None if end == float("inf") else max(0.0, end - time.time())
        try:
            yield results.next(left)
        except StopIteration:
            return
        except multiprocessing.TimeoutError:
            print("some workers did not answer in time and are given up", flush=True)
            return


def _take(outcome: Outcome, records: Records, path: Path, elapsed: float) -> None:
    """Keep and say what a worker has found."""
    job, content, cell = outcome.job, outcome.content, outcome.job.cell
    said = f"{cell.method} rank {cell.rank} lr {cell.lr:g} seed {cell.seed} {cell.setting}".rstrip()
    if outcome.failure:
        print(f"FAILED {job.kind} {said} {' '.join(job.concepts)}\n{outcome.failure}", flush=True)
    if content is None:
        return
    if job.kind == "base":
        records.base[job.concepts[0]] = content[0]
        records.write(path)
    if job.kind == "cell":
        scores: dict[str, Scores] = content
        records.add(cell, scores)
        records.write(path)
        print(
            f"{elapsed:6.0f} s  {said}: {len(job.concepts)} trainings in {outcome.seconds:.0f} s",
            flush=True,
        )


def best_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
