"""A task for the training loop that takes a millisecond a step: two adapted layers learn a random function."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamrie.lora import LoraPair, attach_lora
from dreamrie.optimizers import build_optimizer
from dreamrie.runlog import RunLog
from dreamrie.trainer import LoopSettings, TrainResult

SIZES = (12, 10, 7)
RANK = 2


class SmallTask:
    """Regression on a stream of points: point n depends on (seed, n) alone, as in every real task.

    Args:
        samples_per_step: points of one optimizer step; places the steps in the stream.
        batch_size: points of a micro-batch.
        init: start of the adapters.
        dtype: of everything.
        seed: of the data; the model and the adapters are always the same.
        spoil: changes the loss of a step, to make it bad: (step, loss) -> loss.
        use_dora: train magnitudes too.
    """

    name = "small"

    def __init__(
        self,
        *,
        batch_size: int = 6,
        samples_per_step: int = 6,
        init: str = "orthonormal",
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        spoil: Callable[[int, Tensor], Tensor] = lambda step, loss: loss,
        dropout: float = 0.0,
        use_dora: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        self.model: nn.Module = nn.Sequential(
            nn.Linear(SIZES[0], SIZES[1]),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(SIZES[1], SIZES[2]),
        ).to(dtype)
        with torch.no_grad():
            for parameter in self.model.parameters():
                shape = parameter.shape
                parameter.copy_(torch.randn(shape, generator=generator, dtype=torch.float64) / 3)
        self.teacher = torch.randn(SIZES[0], SIZES[2], generator=generator, dtype=dtype)
        self.pairs: list[LoraPair] = attach_lora(
            self.model, RANK, ["0", "3"], init=init, generator=generator, use_dora=use_dora
        )
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.batch_size, self.samples_per_step = batch_size, samples_per_step
        self.seed, self.dtype, self.spoil = seed, dtype, spoil
        self.saved: list[dict[str, str]] = []
        self.validated: list[int] = []

    def batch(self, step: int, micro: int) -> tuple[int, Tensor]:
        first = (step - 1) * self.samples_per_step + micro * self.batch_size
        rows = []
        for position in range(first, first + self.batch_size):
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + position + 7)
            rows.append(torch.randn(SIZES[0], generator=generator, dtype=self.dtype))
        return step, torch.stack(rows)

    def loss(self, batch: tuple[int, Tensor]) -> Tensor:
        step, points = batch
        error = self.model(points) - (points @ self.teacher).sin()
        return self.spoil(step, error.square().mean())

    def describe(self, batch: tuple[int, Tensor]) -> str:
        return f"{len(batch[1])} points of step {batch[0]}"

    def validate(self, step: int, directory: Path) -> dict[str, float]:
        assert not torch.is_grad_enabled()
        self.model.eval()
        self.validated.append(step)
        return {"size": sum(float(pair.delta().norm()) for pair in self.pairs)}

    def save(self, directory: Path, metadata: dict[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.saved.append(metadata)
        torch.save(self.deltas(), directory / "small.pt")

    def deltas(self) -> list[Tensor]:
        return [pair.delta() for pair in self.pairs]

    def factors(self) -> list[Tensor]:
        return [p.detach().clone() for pair in self.pairs for p in pair.parameters]


@dataclass
class Outcome:
    """What a small training left behind."""

    task: SmallTask
    optimizer: torch.optim.Optimizer
    result: TrainResult
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [record for record in self.records if "loss" in record]


def train_small(
    loop: Any,
    folder: Path,
    task: SmallTask,
    *,
    name: str = "riemannion",
    lr: float = 0.05,
    weight_decay: float = 0.0,
    accelerator: Any = None,
    **settings: Any,
) -> Outcome:
    """Train `task` with `loop.train`, where `loop` is the real module or one with a fault."""
    optimizer = build_optimizer(name, task.pairs, lr=lr, weight_decay=weight_decay)
    settings = {"max_steps": 8, "scheduler": "constant"} | settings
    with RunLog(folder, settings["max_steps"], quiet=True) as log:
        result = loop.train(task, optimizer, LoopSettings(**settings), log, accelerator)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return Outcome(task, optimizer, result, [json.loads(line) for line in lines])


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    """Largest relative difference of two lists of matrices."""
    pairs = zip(first, second, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
