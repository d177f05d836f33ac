"""Where the time of a whole training step goes: Riemannion beside AdamW on a plain LoRA, part by part, in turns.

    python -m benchmarks.phases

On the CPU a part is the time that its one thread has worked, so that other programs count less than on a clock. On a
GPU each part ends when the device is done, so that the parts add up to more than a step that is not watched.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import train_dreambooth
from benchmarks.timing import machine, wait_for
from dreamrie.config import parse_config
from dreamrie.files import write_atomic
from dreamrie.optimizers import build_optimizer
from dreamrie.riemannion import Riemannion

RESULTS = Path(__file__).resolve().parent / "results"
PLAIN = "adamw, LoRA of rank r"
CONTENDERS = {
    "riemannion": ("--optimizer", "riemannion", "--init", "loi"),
    PLAIN: ("--optimizer", "adamw", "--init", "default"),
    "adamw, same adapters": ("--optimizer", "adamw", "--init", "loi"),
}
PARTS = ("batch", "forward", "backward", "norm", "clip", "optimizer", "zero")


@dataclass(frozen=True)
class Training:
    """A task, its optimizer, and the norm above which gradients are clipped (0: never)."""

    task: Any
    optimizer: Optimizer
    limit: float


class Clock:
    """Milliseconds from one call to the next.

    Args:
        device: that is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.read = time.perf_counter if device.type == "cuda" else time.thread_time
        self.lap()

    def lap(self) -> float:
        """Time since the last call."""
        wait_for(self.device)
        now = self.read()
        passed = 1e3 * (now - getattr(self, "last", now))
        self.last = now
        return passed


def one_step(training: Training, number: int, device: torch.device) -> dict[str, float]:
    """Take a step as the training loop does, norm read back and all.

    Args:
        training: see `Training`.
        number: of the step, from 1.
        device: of the task.

    Returns:
        Milliseconds of each of `PARTS`.
    """
    task, optimizer = training.task, training.optimizer
    factors = [factor for pair in task.pairs for factor in (pair.left, pair.right)]
    clock = Clock(device)
    batch = task.batch(number, 0)
    found = [clock.lap()]
    loss = task.loss(batch)
    found.append(clock.lap())
    loss.backward()
    found.append(clock.lap())
    if isinstance(optimizer, Riemannion):
        norm = optimizer.tangent_grad_norm(for_step=True)
    else:
        norm = nn.utils.get_total_norm([f.grad for f in factors if f.grad is not None])
    size = float(norm)
    found.append(clock.lap())
    if training.limit and size > training.limit:
        nn.utils.clip_grads_with_norm_(factors, training.limit, norm.to(loss))
    found.append(clock.lap())
    optimizer.step()
    found.append(clock.lap())
    optimizer.zero_grad()
    found.append(clock.lap())
    return dict(zip(PARTS, found, strict=True))


def make_training(
    config: str, rank: int, flags: Sequence[str], device: torch.device, extra: Sequence[str]
) -> Training:
    """The model of a settings file with the adapters and the limit that a method has by default."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", config, *extra, *flags, "--rank", str(rank), "--output_dir", folder]
        settings = parse_config(words)
        task = train_dreambooth.build_task(settings, device, 1)
    kind = settings.optimizer.optimizer
    if kind == "adamw":
        factors = [factor for pair in task.pairs for factor in (pair.left, pair.right)]
        optimizer: Optimizer = AdamW(factors, lr=1e-4, fused=True)
    else:
        optimizer = build_optimizer(kind, task.pairs, lr=1e-3)
    return Training(task, optimizer, settings.optimizer.max_grad_norm or 0.0)


def measure(
    trainings: Mapping[str, Training], rounds: int, device: torch.device, warmups: int = 3
) -> dict[str, dict[str, list[float]]]:
    """Let all trainings take steps in turns.

    Args:
        trainings: by name.
        rounds: steps of each that count.
        device: of all of them.
        warmups: steps of each before.

    Returns:
        By name and part, one number a round; "all" is the sum of the parts of a round.
    """
    found: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in (*PARTS, "all")} for name in trainings
    }
    for number in range(1, warmups + rounds + 1):
        for name, training in trainings.items():
            spent = one_step(training, number, device)
            if number > warmups:
                for part, value in (*spent.items(), ("all", sum(spent.values()))):
                    found[name][part].append(value)
    return found


def summary(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """Fastest and median round of each part, and the sum of the fastest.

    Args:
        found: see `measure`.

    Returns:
        One row for each training.
    """
    rows = []
    for name, parts in found.items():
        fastest = {part: round(min(values), 3) for part, values in parts.items()}
        medians = {part: round(statistics.median(values), 3) for part, values in parts.items()}
        total = round(sum(fastest[part] for part in PARTS), 3)
        rows.append(
            {"name": name, "fastest_ms": fastest, "median_ms": medians, "sum_of_fastest_ms": total}
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The fastest round of each part as text, and ratios to AdamW on the plain LoRA."""
    lines = [f"{'fastest round, ms':<24}" + "".join(f"{row['name']:>24}" for row in rows)]
    for part in (*PARTS, "all"):
        values = "".join(f"{row['fastest_ms'][part]:24.2f}" for row in rows)
        lines.append(f"{part:<24}{values}")
    lines.append(
        f"{'sum of the parts':<24}" + "".join(f"{row['sum_of_fastest_ms']:24.2f}" for row in rows)
    )
    plain = next(row for row in rows if row["name"] == PLAIN)
    for label, pick in (
        ("times plain, sum", lambda row: row["sum_of_fastest_ms"]),
        ("times plain, median", lambda row: row["median_ms"]["all"]),
    ):
        lines.append(f"{label:<24}" + "".join(f"{pick(row) / pick(plain):24.3f}" for row in rows))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the numbers.

    Args:
        argv: see `--help`; any flag of `train_dreambooth.py` is for the trainings.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4], help="of the adapters")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each training")
    parser.add_argument("--config", default="examples/demo.yaml", help="settings")
    parser.add_argument(
        "--output", type=Path, help="file for the numbers; default phases-DEVICE.json"
    )
    options, extra = parser.parse_known_args(argv)
    device = torch.device(options.device)
    torch.set_num_threads(1)
    facts = machine(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    found: list[dict[str, Any]] = []
    for rank in options.ranks:
        trainings = {
            name: make_training(options.config, rank, flags, device, extra)
            for name, flags in CONTENDERS.items()
        }
        rows = summary(measure(trainings, options.rounds, device))
        print(
            f"\n{options.config}, rank {rank}, {options.rounds} rounds\n{table(rows)}", flush=True
        )
        found += [{"rank": rank, **row} for row in rows]
    output = options.output or RESULTS / f"phases-{device.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, (json.dumps({**facts, "rows": found}, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
