"""The language task with the interface of `tests.small_task.SmallTask`, so that the laws of the loop run on both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamrie.llm.encoding import Encoded
from dreamrie.llm.task import CausalLmTask, TextBatch
from dreamrie.lora import attach_lora
from tests.llm import small

RANK = 3
LAYERS = ["self_attn.q_proj", "mlp.down_proj"]
ROWS = [
    Encoded((5, 6, 7)[: 1 + number % 3], (8 + number, 40, 2)[: 1 + number % 3], f"row {number}")
    for number in range(11)
]


class LanguageTask:
    """A model of one layer learns the ends of eleven short rows.

    Args:
        samples_per_step: rows of one optimizer step.
        batch_size: rows of a micro-batch.
        init: start of the adapters.
        dtype: of everything.
        seed: of the order of the rows.
        spoil: changes the loss of a step, to make it bad: (step, loss) -> loss.
        dropout: of the adapters.
    """

    name = "small language model"

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
    ) -> None:
        self.model: Any = small.model(num_hidden_layers=1).to(dtype)
        generator = torch.Generator().manual_seed(5)
        self.pairs = attach_lora(
            self.model, RANK, LAYERS, init=init, dropout=dropout, generator=generator
        )
        for pair in self.pairs:
            for factor in (pair.left, pair.right):
                factor.data = factor.data.to(dtype)
        self.task = CausalLmTask(
            self.model,
            self.pairs,
            ROWS,
            batch_size=batch_size,
            samples_per_step=samples_per_step,
            seed=seed,
            max_length=16,
        )
        self.spoil = spoil
        self.saved: list[dict[str, str]] = []

    def batch(self, step: int, micro: int) -> tuple[int, TextBatch]:
        return step, self.task.batch(step, micro)

    def loss(self, batch: tuple[int, TextBatch]) -> Tensor:
        return self.spoil(batch[0], self.task.loss(batch[1]))

    def describe(self, batch: tuple[int, TextBatch]) -> str:
        return self.task.describe(batch[1])

    def validate(self, step: int, directory: Path) -> dict[str, float]:
        return self.task.validate(step, directory)

    def save(self, directory: Path, metadata: dict[str, str]) -> None:
        self.task.save(directory, metadata)
        self.saved.append(metadata)

    def deltas(self) -> list[Tensor]:
        return [pair.delta() for pair in self.pairs]

    def factors(self) -> list[Tensor]:
        return [p.detach().clone() for pair in self.pairs for p in (pair.left, pair.right)]
