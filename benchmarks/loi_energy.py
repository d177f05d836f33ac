"""How much of the best possible gradient energy each estimator of LOI captures.

    python -m benchmarks.loi_energy

The yardstick is the gradient averaged over many batches that no estimator sees. A start X is worth
the energy |P_X(G)|^2 of that gradient G in its tangent space; the best start of rank r holds the
first 2r squared singular values of G (arXiv:2507.12142, Theorem 5.1). Printed is the ratio, over all
layers together and for the worst layer.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train_dreambooth
from dreamrie.config import parse_config
from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.loi import captured_energy, locally_optimal_init

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Share:
    """Captured part of the optimum.

    Attributes:
        name: estimator and number of batches.
        total: over all layers together.
        worst: of the layer where it is least.
        seconds: time of the initialization.
    """

    name: str
    total: float
    worst: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.name:<34} {self.total:8.4f} {self.worst:8.4f} {self.seconds:8.1f}"


def mean_gradients(task: DreamBoothTask, batches: Iterable[Any]) -> list[Tensor]:
    """Average the gradient at the base weight over batches.

    Args:
        task: its adapters change nothing, as before training.
        batches: what to average over.

    Returns:
        One (out, in) matrix of fp64 for each adapted layer.
    """
    weights = [pair.base_weight for pair in task.pairs]
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    count = 0
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches:
        count += 1
        for total, part in zip(sums, torch.autograd.grad(task.loss(batch), weights), strict=True):
            total += part
    for weight in weights:
        weight.requires_grad_(False)
    return [pair.as_matrix(total) / count for pair, total in zip(task.pairs, sums, strict=True)]


def measure(
    task: DreamBoothTask,
    gradients: Sequence[Tensor],
    name: str,
    estimator: str,
    batches: Iterable[Any],
) -> Share:
    """Initialize with an estimator and compare with what the yardstick gradient allows.

    Args:
        task: is moved to the new start.
        gradients: the yardstick, one (out, in) matrix for each layer.
        name: row of the table.
        estimator: as for `locally_optimal_init`.
        batches: what the estimator may see.

    Returns:
        Shares of the optimum.
    """
    started = time.perf_counter()
    locally_optimal_init(task.model, task.pairs, task.model_loss, batches, estimator=estimator)
    spent = time.perf_counter() - started
    captured, optimum = [], []
    for pair, gradient in zip(task.pairs, gradients, strict=True):
        point = pair.point()
        captured.append(captured_energy(type(point)(*(part.double() for part in point)), gradient))
        values = torch.linalg.svdvals(gradient)[: 2 * pair.rank]
        optimum.append(float(values.square().sum()))
    worst = min(part / best for part, best in zip(captured, optimum, strict=True))
    return Share(name, sum(captured) / sum(optimum), worst, spent)


def run(task: DreamBoothTask, loi_batches: int, yardstick_batches: int) -> list[Share]:
    """Measure the exact case, then every estimator.

    Args:
        task: with freshly attached adapters.
        loi_batches: what the estimators may see.
        yardstick_batches: what the yardstick averages over; none of them is shown to an estimator.

    Returns:
        Rows of the table.
    """
    few = list(task.loi_batches(loi_batches))
    own = mean_gradients(task, few)
    shares = [measure(task, own, "exact gradient, its own yardstick", "mean_gradient", few)]
    many = (task.batch(step, 0) for step in range(1, yardstick_batches + 1))
    gradients = mean_gradients(task, many)
    for estimator in ("mean_gradient", "sketch", "backprop_rsvd"):
        # Alg. 3 goes over its batches 2 (q + 1) = 4 times, so it gets a quarter of them.
        seen = few[: max(1, loi_batches // 4)] if estimator == "backprop_rsvd" else few
        name = f"{estimator}, {len(seen)} batches"
        shares.append(measure(task, gradients, name, estimator, seen))
    return shares


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table.

    Args:
        argv: `--yardstick_batches N`, `--config FILE`, and any flag of `train_dreambooth.py`.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--config", default=os.path.relpath(ROOT / "examples" / "demo.yaml"))
    parser.add_argument("--yardstick_batches", type=int, default=512)
    options, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(["--config", options.config, *flags, "--output_dir", folder])
        task = train_dreambooth.build_task(config, torch.device("cpu"), 1)
    count, size = len(task.pairs), config.data.train_batch_size
    print(f"{task.components.source.resolved}: {count} layers, rank {config.adapter.rank}")
    print(f"yardstick: mean gradient of {options.yardstick_batches} other batches of {size}")
    print(f"{'captured share of the optimum':<34} {'all':>8} {'worst':>8} {'seconds':>8}")
    for share in run(task, config.adapter.loi_batches, options.yardstick_batches):
        print(share, flush=True)


if __name__ == "__main__":
    sys.exit(main())
