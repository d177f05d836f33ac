"""Riemannion from the locally optimal start against AdamW on the usual LoRA, on commonsense questions.

    python -m benchmarks.commonsense --data FOLDER

FOLDER holds TASK.train.jsonl and TASK.test.jsonl. Every method sees the same examples in as many steps of the same
batch, at rank r; AdamW at rank 2r as well, because the change that riemannion leaves behind has rank up to 2r. Each has
as many learning rates to choose from; the choice is by the likelihood of the right answers to rows held back from
training, with a seed that no result uses. Then each trains with three other seeds at its own choice, and the test rows
are asked. Answers are by likelihood. The start of riemannion looks at some batches of those examples before the first
step.

What --output holds already is not measured again, so the command can be stopped at any time and given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.commonsense_runs import HELD_BACK, TEST, Bench, Budget, Method, Run, on_device
from dreamrie.errors import ConfigError, DreamrieError
from dreamrie.files import write_atomic
from dreamrie.llm.commonsense import TASKS, mean_accuracy, table
from dreamrie.llm.evaluate import Accuracy
from dreamrie.llm.models import ALIASES
from dreamrie.llm.paired import difference, mcnemar
from dreamrie.optimizer_table import OPTIMIZERS

RESULTS = Path(__file__).resolve().parent / "results" / "commonsense-smollm2.json"
# Two decades in steps of a factor 2.15; the units of the methods differ.
RATES = (1e-4, 2.15e-4, 4.64e-4, 1e-3, 2.15e-3, 4.64e-3, 1e-2)
SPECTRAL_RATES = (4.64e-4, 1e-3, 2.15e-3, 4.64e-3, 1e-2, 2.15e-2, 4.64e-2)
NAMES = {
    "riemannion": Method("riemannion, LOI, r", "riemannion", 1, SPECTRAL_RATES),
    "adamw": Method("adamw, r", "adamw", 1, RATES),
    "adamw-2r": Method("adamw, 2r", "adamw", 2, RATES),
}
TUNING_SEED, TEST_SEEDS = 0, (1, 2, 3)
RAW = {part: Run(None, 0.0, 0, part) for part in (HELD_BACK, TEST)}
Found = dict[str, dict[str, Any]]


# ------------------------------------------------------------------------- what is to be done


def methods_of(names: Sequence[str], rates: int) -> tuple[Method, ...]:
    """Keys of `NAMES`, the first to be compared with the others, with 7, 4, 3 or 2 rates, both ends among them."""
    found = [NAMES[name] for name in names]
    apart = (len(RATES) - 1) // (rates - 1)
    return tuple(dataclasses.replace(one, rates=one.rates[::apart]) for one in found)


def tuning(methods: Sequence[Method]) -> list[Run]:
    """Every method at each of its learning rates."""
    places = range(len(methods[0].rates))
    return [Run(m, m.rates[place], TUNING_SEED, HELD_BACK) for place in places for m in methods]


def best_rate(method: Method, found: Found) -> float:
    """Learning rate with the likeliest right answers to the held-back rows, which are too few to count right ones."""

    def merit(rate: float) -> float:
        entry = found[Run(method, rate, TUNING_SEED, HELD_BACK).key]
        return -math.inf if "failed" in entry else float(entry["log_probability"])

    return max(method.rates, key=merit)


def trials(methods: Sequence[Method], found: Found) -> list[Run]:
    """Each method at its best learning rate with every seed; all of `tuning` has been done."""
    return [Run(m, best_rate(m, found), seed, TEST) for seed in TEST_SEEDS for m in methods]


def missing(runs: Sequence[Run], found: Found) -> list[Run]:
    """Those without a result."""
    return [run for run in runs if run.key not in found]


# --------------------------------------------------------------------------------- doing it

_bench: Bench | None = None


def _begin(budget: Budget, device: str, threads: int) -> None:
    """Load the model, once in each process."""
    global _bench
    torch.set_num_threads(threads)
    on_device(device)
    _bench = Bench(budget)


def _do(run: Run) -> dict[str, Any]:
    """One run in this process."""
    if _bench is None:
        raise ConfigError("this process was not begun with a budget")
    return _bench.run(run)


class Clock:
    """Says whether one more run fits.

    Args:
        minutes: of all; None: no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._longest = 0.0

    def note(self, entry: Mapping[str, Any]) -> None:
        """Remember how long a run took."""
        self._longest = max(self._longest, sum(entry.get("seconds", {}).values()))

    def allows(self) -> bool:
        """Whether a run that is as long as the longest so far would end in time."""
        return self._end is None or time.monotonic() + self._longest < self._end


def done(
    runs: Sequence[Run], pool: ProcessPoolExecutor | None, jobs: int, clock: Clock
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Results as they come; those that are not in time are left out."""
    waiting, going = list(runs), dict[Future[dict[str, Any]], Run]()
    while going or (waiting and clock.allows()):
        if pool is None:
            run = waiting.pop(0)
            entry = _do(run)
            clock.note(entry)
            yield run, entry
            continue
        while waiting and len(going) < jobs and clock.allows():
            run = waiting.pop(0)
            going[pool.submit(_do, run)] = run
        for future in wait(going, return_when=FIRST_COMPLETED).done:
            entry = future.result()
            clock.note(entry)
            yield going.pop(future), entry


# ------------------------------------------------------------------------------- the results


def accuracies_of(entry: Mapping[str, Any]) -> dict[str, Accuracy]:
    """Of each task."""
    return {
        task: Accuracy(text.count("1"), len(text)) for task, text in sorted_tasks(entry["right"])
    }


def sorted_tasks(right: Mapping[str, str]) -> list[tuple[str, str]]:
    """In the order of Table 1."""
    return sorted(right.items(), key=lambda item: TASKS.index(item[0]))


def right_of(entry: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Whether each question was answered right."""
    return {task: [digit == "1" for digit in text] for task, text in sorted_tasks(entry["right"])}


def report(methods: Sequence[Method], found: Found, settings: Mapping[str, Any]) -> str:
    """As much of the tables as there are results for, below what they are of."""
    devices = sorted({entry["device"] for entry in found.values()})
    lines = [
        "{model}, {precision}, answers by {answers}, {steps} steps of {batch} examples, r = {rank}; ".format(
            **settings
        )
        + f"{', '.join(settings['tasks'])}; on {', '.join(devices) or 'nothing yet'}",
        "",
    ]
    if not missing([*tuning(methods), RAW[HELD_BACK]], found):
        lines += tuning_table(methods, found)
        if not missing([*trials(methods, found), RAW[TEST]], found):
            lines += ["", *test_table(methods, found)]
    return "\n".join(lines)


def tuning_table(methods: Sequence[Method], found: Found) -> list[str]:
    """Both measures at each learning rate; the chosen one is marked, and so is a choice at the edge."""

    def both(run: Run) -> str:
        entry = found[run.key]
        if "failed" in entry:
            return "failed"
        return f"{entry['log_probability']:.2f} ({100 * mean_accuracy(accuracies_of(entry)):.1f})"

    lines = [
        f"Held-back rows, seed {TUNING_SEED}: mean log-probability of the right answer (mean accuracy in percent)",
        "",
        "| method | learning rate: log-probability (accuracy) | chosen |",
        "| --- | --- | --- |",
        f"| raw model | {both(RAW[HELD_BACK])} | |",
    ]
    for method in methods:
        best, rates = best_rate(method, found), method.rates
        cells = [f"{rate:g}: {both(Run(method, rate, TUNING_SEED, HELD_BACK))}" for rate in rates]
        edge = " (edge)" if best in (rates[0], rates[-1]) else ""
        lines.append(f"| {method.name} | {', '.join(cells)} | {best:g}{edge} |")
    return lines


def test_table(methods: Sequence[Method], found: Found) -> list[str]:
    """Accuracy of each method, and differences that are paired by question."""
    raw = found[RAW[TEST].key]
    runs = {m: [run for run in trials(methods, found) if run.method == m] for m in methods}
    entries = {method: [found[run.key] for run in own] for method, own in runs.items()}
    failed = [run.key for own in runs.values() for run in own if "failed" in found[run.key]]
    if failed:
        return [f"no table: these trainings failed: {'; '.join(failed)}"]
    named = {m.name: [accuracies_of(entry) for entry in entries[m]] for m in methods}
    questions = sum(len(text) for text in raw["right"].values())
    lines = [
        f"Test rows, accuracy in percent; {questions} questions, {len(TEST_SEEDS)} seeds; 95 % intervals over seeds",
        "",
        table({"raw model": [accuracies_of(raw)], **named}),
        "",
        *(
            f"Answering {task} the same always, as most of its training rows, is right on {100 * share:.1f} %."
            for task, share in sorted(raw["constant"].items())
        ),
        "Differences of mean accuracy in points; 95 % intervals over questions (paired bootstrap), and McNemar's p of",
        "each seed, all questions together",
        "",
        "| difference | points | p |",
        "| --- | --- | --- |",
    ]
    before = [right_of(raw)] * len(TEST_SEEDS)
    after = {m: [right_of(entry) for entry in entries[m]] for m in methods}
    ours, *others = methods
    pairs = [(m.name, "raw model", before, after[m]) for m in methods]
    pairs += [(ours.name, other.name, after[other], after[ours]) for other in others]
    for name, against, first, second in pairs:
        whole, low, high = (100 * value for value in difference(first, second))
        chances = ", ".join(f"{mcnemar(a, b):.2g}" for a, b in zip(first, second, strict=True))
        lines.append(
            f"| {name} - {against} | {whole:+.1f} ({low:+.1f} to {high:+.1f}) | {chances} |"
        )
    return lines


def read_results(path: Path, settings: Mapping[str, Any]) -> Found:
    """What was measured before.

    Raises:
        ConfigError: the file is of another budget, or no file of results.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
        before, found = dict(content["settings"]), dict(content["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no file of results: {error}; give another --output."
        ) from error
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        name = changed[0]
        raise ConfigError(
            f"{path} holds results for {name} {before.get(name)!r}, and now {name} is {settings[name]!r}; "
            "give another --output, or the same settings."
        )
    return found


def write_results(path: Path, settings: Mapping[str, Any], found: Found) -> None:
    """Everything so far, in the order in which it was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "runs": found}
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


# ------------------------------------------------------------------------------- the command


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--data", required=True, help="folder of the rows")
    add("--model", default="smollm2-135m", help="as for train-llm (smollm2-135m)")
    add("--tasks", nargs="+", default=["boolq", "arc_easy", "piqa"], choices=TASKS)
    add("--answers", choices=("text", "name"), default="text", help="as for train-llm (text)")
    add("--methods", nargs="+", choices=NAMES, default=list(NAMES), help="ours first (all)")
    add(
        "--rates",
        type=int,
        choices=(7, 4, 3, 2),
        default=7,
        help="to choose from, of two decades (7)",
    )
    add("--train_rows", type=int, default=700, help="of each task, to learn from (700)")
    add("--held_rows", type=int, default=300, help="of each task, to choose rates by (300)")
    add("--test_rows", type=int, default=1000, help="of each task, at most (1000)")
    add("--rank", type=int, default=8, help="r (8)")
    add("--steps", type=int, default=120, help="of the optimizer (120)")
    add("--batch", type=int, default=16, help="examples in a step (16)")
    add("--loi_batches", type=int, default=8, help="for the start of riemannion (8)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of base and forward (fp32)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    add("--jobs", type=int, default=1, help="processes, each with a model of its own (1)")
    add("--limit_minutes", "--limit-minutes", type=float, help="start nothing that would end later")
    add("--output", type=Path, default=RESULTS, help="JSON")
    return parser


def budget_of(options: argparse.Namespace) -> tuple[Budget, dict[str, Any]]:
    """What the flags ask for, and what of it the file of results is bound to."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Budget)}
    budget = Budget(**{**values, "tasks": tuple(options.tasks)})
    settings = {**dataclasses.asdict(budget), "tasks": list(budget.tasks)}
    # Wherever they lie, the rows and the weights decide.
    settings |= {
        "model": ALIASES[budget.model].file if budget.model in ALIASES else Path(budget.model).name,
        "data": digest_of(Path(budget.data), budget.tasks),
    }
    # Defaults of riemannion that no flag of this command sets.
    own = OPTIMIZERS["riemannion"]
    return budget, settings | {"momentum": own.momentum, "start_steps": own.start_steps}


def digest_of(folder: Path, tasks: Sequence[str]) -> str:
    """Of the rows that may be used."""
    digest = hashlib.sha256()
    for task in tasks:
        for split in ("train", "test"):
            file = folder / f"{task}.{split}.jsonl"
            if not file.is_file():
                raise ConfigError(f"there is no {file}; give --data a folder that holds it.")
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, print the tables.

    Args:
        argv: flags.

    Returns:
        0: all is there; 3: the time was over before.
    """
    options = make_parser().parse_args(argv)
    budget, settings = budget_of(options)
    found, clock = read_results(options.output, settings), Clock(options.limit_minutes)
    methods = methods_of(options.methods, options.rates)
    total = len(tuning(methods)) + len(methods) * len(TEST_SEEDS) + len(RAW)
    on_device(options.device)
    setup = (budget, options.device, 1 if options.jobs > 1 else torch.get_num_threads())
    pool = None
    planned = [*RAW.values(), *tuning(methods)]
    complete = not missing(planned, found) and not missing(trials(methods, found), found)
    if not complete and options.jobs > 1:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(options.jobs, context, initializer=_begin, initargs=setup)
    elif not complete:
        _begin(*setup)
    try:
        # The test rows wait until the rates are chosen.
        for plan in (lambda: planned, lambda: trials(methods, found)):
            for run, entry in done(missing(plan(), found), pool, options.jobs, clock):
                found[run.key] = entry
                write_results(options.output, settings, found)
                print(said(run, entry), f"[{len(found)} of {total}]", flush=True)
            if missing(plan(), found):
                break
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    print(report(methods, found, settings))
    if missing(planned, found) or missing(trials(methods, found), found):
        print(f"{len(found)} runs are done, {total} are needed; the same command goes on from here")
        return 3
    return 0


def said(run: Run, entry: Mapping[str, Any]) -> str:
    """A run in a line."""
    if "failed" in entry:
        return f"{run.key}: failed, {entry['failed']}"
    seconds = " and ".join(f"{value:.1f} s {name}" for name, value in entry["seconds"].items())
    return f"{run.key}: {100 * mean_accuracy(accuracies_of(entry)):.1f} % ({seconds})"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DreamrieError as error:
        sys.exit(f"error: {error}")
