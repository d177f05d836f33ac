"""Wrong Tensorion: the wrong unfolding, a fold that mixes entries, another Muon behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon

from dreamrie import tensorion as real
from dreamrie.tensorion import Unfolding
from tests.mutants import Law, Mutant, replaced
from tests.properties import test_tensorion_laws as laws


def _smaller_side(shape: torch.Size, unfolding: Unfolding) -> int:
    rows = math.prod(shape[dim] for dim in unfolding.rows)
    return min(rows, math.prod(shape) // rows)


def least_square(shape: torch.Size) -> Unfolding:
    """The smallest smaller side."""
    return min(real.unfoldings(len(shape)), key=lambda u: _smaller_side(shape, u))


def larger_side(shape: torch.Size) -> Unfolding:
    """The largest larger side."""
    return max(
        real.unfoldings(len(shape)), key=lambda u: math.prod(shape) / _smaller_side(shape, u)
    )


def output_against_the_rest(shape: torch.Size) -> Unfolding:
    """What Muon for convolutions usually takes."""
    return next(real.unfoldings(len(shape)))


def one_dimension_against_the_rest(shape: torch.Size) -> Unfolding:
    """Mode unfoldings alone."""
    modes = [u for u in real.unfoldings(len(shape)) if 1 in (len(u.rows), len(u.columns))]
    return max(modes, key=lambda u: _smaller_side(shape, u))


def smallest_nuclear_norm(momentum: Tensor) -> Unfolding:
    return min(
        real.unfoldings(momentum.ndim),
        key=lambda u: float(torch.linalg.matrix_norm(u.unfold(momentum), "nuc")),
    )


def largest_spectral_norm(momentum: Tensor) -> Unfolding:
    return max(
        real.unfoldings(momentum.ndim),
        key=lambda u: float(torch.linalg.matrix_norm(u.unfold(momentum), 2)),
    )


def square_for_nuclear(momentum: Tensor) -> Unfolding:
    return real.most_square(momentum.shape)


def unfold_without_permuting(self: Unfolding, tensor: Tensor) -> Tensor:
    rows = math.prod(tensor.shape[dim] for dim in self.rows)
    return tensor.reshape(rows, -1)


def fold_with_the_order_itself(self: Unfolding, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The permutation instead of its inverse: right as long as it is its own inverse."""
    order = (*self.rows, *self.columns)
    return matrix.reshape([shape[dim] for dim in order]).permute(order)


class _Original(Muon):
    """Muon with the scale max(1, rows / columns)^{1/2}."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **(options | {"adjust_lr_fn": "original"}))


class _WithoutDecay(real.Tensorion):
    def _step_group(self, group: dict[str, Any]) -> None:
        super()._step_group(group | {"weight_decay": 0.0})


class _Forgets(real.Tensorion):
    """The momentum of a step is not kept."""

    def _step_group(self, group: dict[str, Any]) -> None:
        super()._step_group(group)
        for state in self.state.values():
            state["momentum"] = torch.zeros_like(state["momentum"])


class _WritesTheGradient(real.Tensorion):
    def _step_group(self, group: dict[str, Any]) -> None:
        super()._step_group(group)
        for parameter in group["params"]:
            parameter.grad.zero_()


MATRIX = laws.law_t1_a_matrix_takes_the_steps_of_torch_muon_to_the_bit
KERNEL = laws.law_t2_a_kernel_takes_the_steps_of_its_most_square_matrix
SQUARE = laws.law_t3_no_unfolding_is_more_square
NUCLEAR = laws.law_t4_no_unfolding_has_a_larger_nuclear_norm
FOLDING = laws.law_t5_folding_undoes_unfolding


def _mutant(law: Law, name: str, why: str, owner: Any = real, **attributes: Any) -> Mutant:
    """Replaced attributes; the law always gets the module."""

    @contextmanager
    def broken() -> Iterator[Any]:
        with replaced(owner, **attributes):
            yield real

    return Mutant(f"tensorion: {name}", law, broken, why)


MUTANTS = [
    _mutant(MATRIX, "original scale", "max(1, m / n)^{1/2} is another unit", Muon=_Original),
    _mutant(MATRIX, "no decay", "decay is part of Muon", Tensorion=_WithoutDecay),
    _mutant(MATRIX, "no momentum", "the second step differs", Tensorion=_Forgets),
    _mutant(MATRIX, "gradient written", "p.grad is the caller's", Tensorion=_WritesTheGradient),
    _mutant(SQUARE, "least square", "smallest smaller side", most_square=least_square),
    _mutant(KERNEL, "least square, steps", "smallest smaller side", most_square=least_square),
    _mutant(SQUARE, "larger side", "the longest, not the squarest", most_square=larger_side),
    _mutant(
        *(SQUARE, "output against the rest", "16 x 72 has fewer directions than 48 x 24"),
        most_square=output_against_the_rest,
    ),
    _mutant(
        *(SQUARE, "modes alone", "pairs of dimensions are unfoldings too"),
        most_square=one_dimension_against_the_rest,
    ),
    _mutant(
        *(NUCLEAR, "smallest nuclear norm", "gains least"),
        largest_nuclear_norm=smallest_nuclear_norm,
    ),
    _mutant(
        *(NUCLEAR, "largest spectral norm", "prefers one direction"),
        largest_nuclear_norm=largest_spectral_norm,
    ),
    _mutant(
        *(NUCLEAR, "square for nuclear", "blind to the momentum"),
        largest_nuclear_norm=square_for_nuclear,
    ),
    _mutant(
        *(FOLDING, "unfold without permuting", "entries of other rows"),
        owner=Unfolding,
        unfold=unfold_without_permuting,
    ),
    _mutant(
        *(KERNEL, "unfold without permuting, steps", "orthogonalizes another matrix"),
        owner=Unfolding,
        unfold=unfold_without_permuting,
    ),
    _mutant(
        *(FOLDING, "fold by the order itself", "a permutation is not its inverse"),
        owner=Unfolding,
        fold=fold_with_the_order_itself,
    ),
]
