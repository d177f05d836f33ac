"""Faults on a quantized base: its numbers read, its bytes written or not covered by the fingerprint."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dreamrie.errors import ConfigError
from dreamrie.llm import task
from dreamrie.loi.session import stored
from dreamrie.lora import LoraPair, LowRank, fingerprint
from dreamrie.lora.inits import loi
from tests.llm import test_quantized as laws
from tests.llm.packed import WasReadError
from tests.mutants import Mutant, each, replaced

_change, _loss = task.change_of, task.CausalLmTask.loss
_TRAINS = laws.law_ll14_a_packed_base_trains_as_its_dense_twin
_COVERS = laws.law_ll15_the_fingerprint_covers_bytes_and_scales


@contextmanager
def beginning(**wrong: Any) -> Iterator[Any]:
    """The module of the task, while its start is wrong."""
    with replaced(loi, **wrong):
        yield task


@contextmanager
def loss(wrong: Any) -> Iterator[Any]:
    with replaced(task.CausalLmTask, loss=wrong):
        yield task


def of_the_whole_weight(pair: LoraPair) -> LowRank:
    """The change and the weight that it is added to."""
    change = _change(pair)
    left = change.left + 0 * pair.as_matrix(pair.base_weight.float())[:, :1]
    return LowRank(left, change.right)


def writes_the_base(self: Any, batch: Any) -> Tensor:
    """A bit of each base weight flips."""
    for pair in self.pairs[:1]:
        for part in stored(pair.base_weight.detach()).values():
            with torch._C.DisableTorchFunctionSubclass():
                part.view(torch.uint8).reshape(-1)[0] ^= 1
    return _loss(self, batch)


def first_part(tensor: Tensor, name: str = "") -> dict[str, Tensor]:
    return dict(list(stored(tensor, name).items())[:1])


MUTANTS = [
    Mutant(
        name="quantized: start by the full gradient",
        law=each(_TRAINS, [("wrapped", "riemannion")]),
        broken=lambda: beginning(
            locally_optimal_init=functools.partial(
                lambda *a, start, **k: start(*a, **{**k, "estimator": "mean_gradient"}),
                start=loi.locally_optimal_init,
            )
        ),
        why="packed numbers take no gradient",
        raises=(ConfigError,),
    ),
    Mutant(
        name="quantized: the file holds the whole weight",
        law=each(_TRAINS, [("bytes", "adamw")]),
        broken=lambda: replaced(task, change_of=of_the_whole_weight),
        why="nobody but the layer can read its weight",
        raises=(WasReadError,),
    ),
    Mutant(
        name="quantized: base written",
        law=each(_TRAINS, [("bytes", "riemannion")]),
        broken=lambda: loss(writes_the_base),
        why="the adapter belongs to the base as it was",
    ),
    Mutant(
        name="quantized: scales not covered",
        law=each(_COVERS, ["bytes"]),
        broken=lambda: replaced(fingerprint, _beside=lambda model: []),
        why="equal bytes with other scales are other weights",
    ),
    Mutant(
        name="quantized: first part only",
        law=each(_COVERS, ["wrapped"]),
        broken=lambda: replaced(fingerprint, stored=first_part),
        why="equal bytes with other scales are other weights",
    ),
]
