"""Wrong fast steps: digits lost where Gram matrices need them, guards left out, layers mixed up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dreamrie.riemannion_fast as fast
from tests.mutants import Mutant, replaced
from tests.properties import test_riemannion_fast_laws as laws

_side_of = fast.side_of
_tall = fast._tall
_decompose = fast.decompose
_core_step = fast.core_step
_split = fast._split
_orthonormal = fast._orthonormal


def side_without_projection(gram: Tensor, rank: int, projected: bool) -> Any:
    return _side_of(gram, rank, False)


def tall_without_momentum(frame: Tensor, momentum: Tensor, gradient: Tensor, beta: float) -> Tensor:
    return _tall(frame, momentum, gradient, 0.0)


def decompose_in_fp32(matrix: Tensor) -> tuple[Tensor, ...]:
    """Eigenvectors of a Gram matrix of half the digits."""
    return tuple(part.double() for part in _decompose(matrix.float()))


def tall_in_fp32(frame: Tensor, momentum: Tensor, gradient: Tensor, beta: float) -> Tensor:
    return _tall(frame, momentum, gradient, beta).float()


def orthonormal_trusted(gram: Tensor) -> tuple[Tensor, ...]:
    """A tiny shift for columns that depend on each other, and no second look."""
    shifted = gram.clone()
    diagonal = shifted.diagonal(dim1=-2, dim2=-1)
    diagonal.mul_(1 + 1e-13)
    upper, whitening, good = _orthonormal(shifted)
    return upper, whitening, torch.ones_like(good)


def core_step_trusting_everything(*given: Any) -> Any:
    small = _core_step(*given)
    return small._replace(ok=torch.ones_like(small.ok))


def split_in_another_order(small: Any, counts: list[int]) -> Any:
    """Results of other layers, where several shapes are stepped at once."""
    return _split(type(small)(*(part.roll(1, 0) for part in small)), counts)


def no_exact_step(doubtful: Tensor, work: Any, result: Any) -> Any:
    return result


MUTANTS = [
    Mutant(
        "fast: gradient not projected",
        laws.law_fast_step_equals_the_exact_one,
        lambda: replaced(fast, side_of=side_without_projection),
        "the core enters twice",
    ),
    Mutant(
        "fast: momentum forgotten",
        laws.law_fast_step_equals_the_exact_one,
        lambda: replaced(fast, _tall=tall_without_momentum),
        "every step is the first",
    ),
    Mutant(
        "fast: SVD from a Gram matrix in fp32",
        laws.law_fast_step_equals_the_exact_one,
        lambda: replaced(fast, decompose=decompose_in_fp32),
        "half of the digits are lost",
    ),
    Mutant(
        "fast: tall products in fp32",
        laws.law_fast_frames_stay_orthonormal,
        lambda: replaced(fast, _tall=tall_in_fp32),
        "Cholesky of a Gram matrix in fp32 fails on columns that depend on each other",
        raises=(RuntimeError, ValueError),
    ),
    Mutant(
        "fast: columns that depend on each other trusted",
        laws.law_fast_frames_stay_orthonormal,
        lambda: replaced(fast, _orthonormal=orthonormal_trusted),
        "the new frames are not orthonormal",
        raises=(RuntimeError,),
    ),
    Mutant(
        "fast: the mask of fp64",
        laws.law_fast_step_masks_null_directions,
        lambda: replaced(fast, _MASK=1e-10),
        "rounding errors of the data become directions of length one",
    ),
    Mutant(
        "fast: rows of other layers",
        laws.law_fast_layers_do_not_see_each_other,
        lambda: replaced(fast, _split=split_in_another_order),
        "layers mix",
    ),
    Mutant(
        "fast: doubtful layers trusted",
        laws.law_fast_doubtful_layers_take_the_exact_step,
        lambda: replaced(fast, _exact_where=no_exact_step),
        "a left vector is a difference of rounding errors",
    ),
    Mutant(
        "fast: no guard",
        laws.law_fast_non_finite_layers_are_left_alone,
        lambda: replaced(fast, core_step=core_step_trusting_everything),
        "the layer moves on NaN",
    ),
]
