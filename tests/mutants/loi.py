"""Faults of locally optimal initialization: the theorem misread, the gradient misread, the caller disturbed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dreamrie.loi as real
import tests.reference.theorem as theorem
from dreamrie.errors import NumericalError
from dreamrie.fixed_rank import Point
from dreamrie.loi import driver, estimators, points, session
from dreamrie.loi.points import LeadingSvd
from dreamrie.lora import LoraPair
from tests.mutants import Law, Mutant, replaced
from tests.properties import test_loi_caller_laws as caller_laws
from tests.properties import test_loi_optimum_laws as optimum_laws

# The run-time checks of LOI are part of the method: refusing to start is being caught.
CAUGHT = (AssertionError, NumericalError)


def loi(
    name: str,
    law: Law,
    why: str,
    *broken: tuple[Any, str, Any],
    raises: tuple[type[BaseException], ...] = CAUGHT,
) -> Mutant:
    """A mutant of `dreamrie.loi` with attributes replaced in its parts."""

    @contextmanager
    def patched() -> Iterator[Any]:
        with ExitStack() as stack:
            for owner, attribute, wrong in broken:
                stack.enter_context(replaced(owner, **{attribute: wrong}))
            yield real

    return Mutant(name=name, law=law, broken=patched, why=why, raises=raises)


# ------------------------------------------------------------------------------------------------- the theorem


def same_index(svd: LeadingSvd, rank: int, alpha: float) -> Point:
    """U_1 V_1^T."""
    good = points_split(svd, rank, alpha)
    return Point(good.u, good.s, svd.right[:, :rank])


def overlapping(svd: LeadingSvd, rank: int, alpha: float) -> Point:
    """Right vectors r..2r-1: one index twice, one missing."""
    good = points_split(svd, rank, alpha)
    last = min(2 * rank, svd.right.shape[0], svd.left.shape[0]) - 1
    return Point(good.u, good.s, svd.right[:, last - rank : last])


def alpha_omitted(svd: LeadingSvd, rank: int, alpha: float) -> Point:
    """Algs. 5, 6 line 2 as printed."""
    good = points_split(svd, rank, alpha)
    return Point(good.u, torch.ones_like(good.s), good.v)


def sign_omitted(svd: LeadingSvd, rank: int, alpha: float) -> Point:
    """|alpha| U_1 V_2^T."""
    return points_split(svd, rank, abs(alpha))


def size_of_gradient(svd: LeadingSvd, rank: int, alpha: float) -> Point:
    """alpha times the singular values: the scale of the loss enters."""
    good = points_split(svd, rank, alpha)
    return Point(good.u, good.s * svd.values[:rank], good.v)


def energy_without_complement(point: Point, gradient: Tensor) -> float:
    """The core counted twice: I - u u^T forgotten."""
    right, left = gradient.T @ point.u, gradient @ point.v
    return float(left.square().sum() + right.square().sum())


def family_without_sigma(gradient: Tensor, rank: int, s: Tensor) -> Tensor:
    """(17) without Sigma_1 on the right."""
    u, sigma, vh = torch.linalg.svd(gradient, full_matrices=False)
    c = torch.linalg.inv(s)[rank:]
    left = torch.cat([u[:, :rank], u[:, rank : 2 * rank] * sigma[rank : 2 * rank]], 1) @ s[:, :rank]
    return left @ c @ vh[: 2 * rank]


def family_with_square_right_only(gradient: Tensor, rank: int, s: Tensor) -> Tensor:
    """The block row of C taken from S itself instead of its inverse."""
    u, sigma, vh = torch.linalg.svd(gradient, full_matrices=False)
    left = torch.cat([u[:, :rank], u[:, rank : 2 * rank] * sigma[rank : 2 * rank]], 1) @ s[:, :rank]
    right = torch.cat([sigma[:rank, None] * vh[:rank], vh[rank : 2 * rank]])
    return left @ s[rank:] @ right


points_split = points.split_point


# -------------------------------------------------------------------------------------------------- the gradient


def optimum_without_squares(self: LeadingSvd, rank: int) -> float:
    """(20) with the square on one side only."""
    return float(self.values[: 2 * rank].sum())


def basis_for_left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Alg. 3 without the rotation of its line 8: Q in place of Q U."""
    _, values, right = points.thin_svd(matrix)
    return torch.eye(matrix.shape[0], dtype=matrix.dtype), values, right


def orthonormal_transposed(matrix: Tensor) -> Tensor:
    """Alg. 3 line 4 as printed: the transpose inside qr."""
    return torch.linalg.qr(matrix.T).Q


def with_point_only(pairs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Alg. 6 lines 7-8: the gradient at W + X instead of W + X - X0."""
    lefts = [pair.left_matrix().detach()[:, : pair.rank].clone() for pair in pairs]
    return lefts, [pair.right_matrix().detach()[: pair.rank].clone() for pair in pairs]


def with_current_adapter(pairs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The gradient where the adapter happens to stand."""
    lefts = [pair.left_matrix().detach().clone() for pair in pairs]
    return lefts, [pair.right_matrix().detach().clone() for pair in pairs]


def first_batch_only(model: Any, pairs: Any, loss: Any, batches: Any, generator: Any) -> Any:
    return estimators.mean_gradient(model, pairs, loss, itertools.islice(batches, 1), generator)


def summed(model: Any, pairs: Any, loss: Any, batches: Any, generator: Any) -> Any:
    """The sum of the gradients called their mean."""
    found, count = estimators.mean_gradient(model, pairs, loss, batches, generator)
    return [svd._replace(matrix=svd.matrix * count) for svd in found], count


def scaling_left_in(model: Any, pairs: Any, loss: Any, batches: Any, generator: Any) -> Any:
    """The factor gradients taken for G Omega and Psi^T G although they are c times that."""
    found, count = estimators.sketch(model, pairs, loss, batches, generator)
    both = zip(found, pairs, strict=True)
    return [svd._replace(values=svd.values * pair.scaling) for svd, pair in both], count


def sketch_without_least_squares(range_sketch: Tensor, test_left: Tensor, corange: Tensor) -> Any:
    """Q (Q^T Psi) (Psi^T G): right only for an orthonormal square Psi."""
    basis = points.orthonormal(range_sketch)
    core, values, right = points.thin_svd(basis.T @ test_left @ corange)
    return LeadingSvd(basis @ core, values, right)


def one_sided_sketch(range_sketch: Tensor, test_left: Tensor, corange: Tensor) -> Any:
    """G Omega taken for G."""
    left, values, right = points.thin_svd(range_sketch)
    pad = right.new_zeros(corange.shape[1], right.shape[1])
    pad[: right.shape[0]] = right[: pad.shape[0]]
    return LeadingSvd(left, values, pad)


def without_power(*args: Any, oversample: Any = None, power: int = 1) -> Any:
    return estimators.backprop_rsvd(*args, oversample=oversample, power=0)


def no_restore(self: Any) -> None:
    """The streams run on."""


# --------------------------------------------------------------------------------------------------- the caller


@contextmanager
def in_train_mode(model: nn.Module) -> Iterator[None]:
    """Everything but eval mode, so dropout is on."""
    with session.undisturbed(model):
        model.train()
        yield


@contextmanager
def left_in_eval(model: nn.Module) -> Iterator[None]:
    with session.undisturbed(model):
        yield
    model.eval()


@contextmanager
def all_in_train_afterwards(model: nn.Module) -> Iterator[None]:
    """One mode for the whole model, whatever its parts had."""
    training = model.training
    with session.undisturbed(model):
        yield
    model.train(training)


@contextmanager
def flags_left(model: nn.Module) -> Iterator[None]:
    with session.undisturbed(model):
        yield
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def leaving_grads(model: Any, pairs: Any, loss: Any, batches: Any, generator: Any) -> Any:
    """loss.backward() in place of autograd.grad."""
    found = estimators.mean_gradient(model, pairs, loss, batches, generator)
    for pair in pairs:
        pair.base_weight.grad = torch.zeros_like(pair.base_weight)
    return found


def torch_only(self: Any) -> None:
    """python's and numpy's streams run on."""
    torch.set_rng_state(self._torch)


def start_without_anchor(self: LoraPair, point: Point, anchored: bool) -> None:
    set_start(self, point, anchored)
    with torch.no_grad():
        self.left_matrix()[:, self.rank :] = 0


def start_with_rewritten_base(self: LoraPair, point: Point, anchored: bool) -> None:
    """W' = W - X0, Eq. (15)."""
    start_without_anchor(self, point, anchored)
    with torch.no_grad():
        self.base_weight -= self.delta().to(self.base_weight).reshape(self.base_weight.shape)


set_start = LoraPair.set_start

MUTANTS = [
    loi(
        "LOI with equal indices (U1, V1)", optimum_laws.law_l1_start_reaches_the_optimum,
        "holds the first r directions twice", (points, "split_point", same_index),
    ),
    loi(
        "LOI split with one index shared", optimum_laws.law_l1_start_reaches_the_optimum,
        "one of 2r directions is missing", (points, "split_point", overlapping),
    ),
    loi(
        "LOI start checked by nobody", caller_laws.law_l3_step_zero,
        "the run-time check refuses a start that misses the optimum",
        (driver, "split_point", same_index),
    ),
    loi(
        "alpha omitted (Algs. 5, 6 l. 2)", optimum_laws.law_13_start_is_alpha_u1_v2,
        "spectral norm 1 instead of |alpha|", (points, "split_point", alpha_omitted),
    ),
    loi(
        "sign of alpha omitted", optimum_laws.law_13_start_is_alpha_u1_v2,
        "-X0 is another point", (points, "split_point", sign_omitted),
    ),
    loi(
        "LOI start as large as the gradient", optimum_laws.law_13_start_is_alpha_u1_v2,
        "the scale of the loss enters", (points, "split_point", size_of_gradient),
    ),
    loi(
        "projected energy with the core counted twice", optimum_laws.law_l1_start_reaches_the_optimum,
        "shows when U and V share indices, 2r > min(out, in)",
        (real, "captured_energy", energy_without_complement),
    ),
    Mutant(
        "(17) without Sigma1", optimum_laws.law_13_every_member_of_the_family_is_optimal,
        lambda: replaced(theorem, optimal_family=family_without_sigma),
        "share 0.9 for a general S",
    ),
    Mutant(
        "(17) with S in place of its inverse", optimum_laws.law_13_every_member_of_the_family_is_optimal,
        lambda: replaced(theorem, optimal_family=family_with_square_right_only),
        "the blocks do not meet in one tangent space",
    ),
    loi(
        "Alg. 6 l. 7-8: gradient at W + X", optimum_laws.law_l5_gradient_is_taken_at_the_base_weight,
        "another point of the loss", (estimators, "without_change", with_point_only),
    ),
    loi(
        "gradient at the current adapter", optimum_laws.law_l5_gradient_is_taken_at_the_base_weight,
        "a trained adapter would be differentiated", (estimators, "without_change", with_current_adapter),
    ),
    loi(
        "gradients summed, not averaged", optimum_laws.law_l5_gradient_is_taken_at_the_base_weight,
        "reported energies grow with the number of batches", (real, "mean_gradient", summed),
    ),
    loi(
        "LOI from one batch only", optimum_laws.law_l7_averaging_beats_one_batch,
        "noise twice the signal", (driver, "mean_gradient", first_batch_only),
    ),
    loi(
        "scaling left in the sketch", optimum_laws.law_l5_products_by_backward,
        "values are c times too large", (real, "sketch", scaling_left_in),
    ),
    loi(
        "sketch without least squares", optimum_laws.law_14_sketch,
        "Psi is not orthonormal", (estimators, "sketch_svd", sketch_without_least_squares),
    ),
    loi(
        "sketch of one side", optimum_laws.law_14_sketch,
        "G Omega has not the right vectors of G", (estimators, "sketch_svd", one_sided_sketch),
    ),
    loi(
        "(20) with one square", optimum_laws.law_13_first_riemannian_gradient_is_optimal,
        "energies are squares on both sides", (LeadingSvd, "optimum", optimum_without_squares),
    ),
    loi(
        "gradients summed: reported energy", optimum_laws.law_13_first_riemannian_gradient_is_optimal,
        "the report would grow with the number of batches", (driver, "mean_gradient", summed),
    ),
    loi(
        "Alg. 3 line 4: a transpose inside qr", optimum_laws.law_14_randomized_svd_by_backward,
        "the shapes do not fit", (estimators, "orthonormal", orthonormal_transposed),
        raises=(RuntimeError,),
    ),
    loi(
        "Alg. 3 line 8: Q in place of Q U", optimum_laws.law_l2_share_of_the_optimum_over_spectra,
        "a basis is not the singular vectors", (estimators, "thin_svd", basis_for_left_vectors),
    ),
    loi(
        "BackPropRSVD without power iterations", optimum_laws.law_14_randomized_svd_by_backward,
        "1e-6 needs q = 4", (real, "backprop_rsvd", without_power),
    ),
    loi(
        "BackPropRSVD with q = 0", optimum_laws.law_l2_share_of_the_optimum_over_spectra,
        "q = 1 is the default", (real, "backprop_rsvd", without_power),
    ),
    loi(
        "BackPropRSVD with fresh noise in each pass", optimum_laws.law_14_fixed_objective,
        "products of different gradients", (session.RandomState, "restore", no_restore),
    ),
    loi(
        "random streams not restored after LOI", caller_laws.law_l9_nothing_is_left_behind,
        "the first batch would differ", (session.RandomState, "restore", no_restore),
        raises=(AssertionError,),
    ),
    loi(
        "only torch's stream restored after LOI", caller_laws.law_l9_nothing_is_left_behind,
        "augmentation draws from python and numpy", (session.RandomState, "restore", torch_only),
        raises=(AssertionError,),
    ),
    loi(
        "model left in eval mode after LOI", caller_laws.law_l9_nothing_is_left_behind,
        "dropout would be off in training", (driver, "undisturbed", left_in_eval),
    ),
    loi(
        "one train mode for all parts after LOI", caller_laws.law_l9_nothing_is_left_behind,
        "a frozen part in eval mode would train", (driver, "undisturbed", all_in_train_afterwards),
    ),
    loi(
        "gradient flags left on after LOI", caller_laws.law_l9_nothing_is_left_behind,
        "the base would train", (driver, "undisturbed", flags_left),
    ),
    loi(
        "gradients left behind by LOI", caller_laws.law_l9_nothing_is_left_behind,
        "the base weight keeps a .grad", (driver, "mean_gradient", leaving_grads),
    ),
    loi(
        "dropout on while estimating", caller_laws.law_l6_dropout_is_off_while_estimating,
        "the gradient of another function", (driver, "undisturbed", in_train_mode),
    ),
    loi(
        "LOI without an anchor", caller_laws.law_l3_step_zero,
        "the function moves by X0 at step 0", (LoraPair, "set_start", start_without_anchor),
    ),
    loi(
        "LOI without an anchor, unchecked", caller_laws.law_l3_step_zero,
        "the law sees it without the run-time checks",
        (LoraPair, "set_start", start_without_anchor),
        (driver, "_check_layer", lambda pair, room, svd, alpha: driver.LayerReport(
            pair.name, pair.rank, alpha, 1.0, 1.0, math.nan, 1.0)),
    ),
    loi(
        "LOI rewrites the base", caller_laws.law_l4_base_weights_keep_their_bytes,
        "W' = W - X0 is rounded and not the stock base",
        (LoraPair, "set_start", start_with_rewritten_base),
    ),
    loi(
        "alpha below lr accepted", caller_laws.law_l8_alpha_must_not_be_below_lr,
        "the product of both steps is larger than the steps", (driver, "_ALPHA_PER_LR", 0.1),
        raises=(AssertionError, pytest.fail.Exception),
    ),
]  # fmt: skip
