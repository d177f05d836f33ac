"""Faults of the starts: another part of the weight, other inputs, another gradient, and promises that nobody holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamrie.errors import NumericalError
from dreamrie.fixed_rank import Point
from dreamrie.init_table import Init
from dreamrie.lora import LoraPair
from dreamrie.lora.inits import corda, eva, inputs, lora_ga, spectral, start, stiefel, zero
from dreamrie.lora.inits.request import Request
from tests.mutants import Law, Mutant, replaced
from tests.properties import test_lora_inits_laws as laws

_CHANGES = laws.law_i1_a_start_changes_nothing
_FRAMES = laws.law_i2_random_frames
_PARTS = laws.law_i3_parts_of_the_weight
_CORDA = laws.law_i4_corda_is_oriented_by_the_inputs
_EVA = laws.law_i5_eva_is_pefts
_GA = laws.law_i6_lora_ga_is_pefts
_STEP = laws.law_i7_riemannion_goes_on_from_each
_REFUSED = laws.law_i8_a_bad_start_is_refused
NO_ERROR = (AssertionError, pytest.fail.Exception)


def wrong(
    name: str,
    law: Law,
    why: str,
    owner: Any,
    raises: tuple[type[BaseException], ...] = (),
    **attributes: Any,
) -> Mutant:
    """A mutant with attributes of one module or class replaced."""

    @contextmanager
    def broken() -> Iterator[Any]:
        with replaced(owner, **attributes):
            yield start

    return Mutant(name=name, law=law, broken=broken, why=why, raises=raises)


good_rows, good_covariance, good_oriented = (
    inputs.as_rows,
    corda.scaled_covariance,
    corda.oriented,
)
good_mean, good_hand_over, good_frames = lora_ga.mean_gradient, lora_ga._hand_over, stiefel._frames
good_set_start, good_components = LoraPair.set_start, eva.get_eva_state_dict
good_builder = start.builder


def product_left_in_fp32(request: Request) -> str:
    """PEFT's orthogonal start as it comes."""
    return zero.from_peft(request)


@contextmanager
def modes_left(model: Any) -> Iterator[None]:
    """The model runs as it is, with dropout."""
    yield


def point_alone(self: LoraPair, point: Point, anchored: bool) -> None:
    """The frozen half keeps what it was."""
    own = self.left_matrix()[:, self.rank :].detach().clone()
    good_set_start(self, point, anchored)
    with torch.no_grad():
        self.left_matrix()[:, self.rank :].copy_(own)


def anchor_added(entry: Init) -> Callable[[Request], str]:
    """W + X0 + X0 is where the gradients are taken."""

    def begin(request: Request) -> str:
        said = good_builder(entry)(request)
        with torch.no_grad():
            for pair in request.pairs:
                pair.left_matrix()[:, pair.rank :].neg_()
        return said

    return begin


def frames_of_normal_numbers(request: Request, pair: LoraPair, size: float) -> Point:
    """Columns of length one that are not orthogonal."""
    point = good_frames(request, pair, size)
    mixed = point.u @ torch.tensor([[1.0, 0.6], [0.0, 0.8]], dtype=point.u.dtype)
    return point._replace(u=mixed)


def same_frames(request: Request, pair: LoraPair, size: float) -> Point:
    """Whatever the seed is."""
    request.generator.manual_seed(0)
    return good_frames(request, pair, size)


def largest_triples(request: Request) -> str:
    for pair in request.pairs:
        u, s, vh = torch.linalg.svd(pair.as_matrix(pair.base_weight.detach()), full_matrices=False)
        r = pair.rank
        spectral.write_point(pair, Point(u[:, :r], s[:r], vh[:r].T))
    return ""


def columns_of_the_kernel_last(
    pair: LoraPair, seen: Tensor, places: Tensor | None = None
) -> Tensor:
    """Patches in the order (kh, kw, in)."""
    rows = good_rows(pair, seen, places)
    if seen.ndim != 4:
        return rows
    return rows.reshape(len(rows), seen.shape[1], -1).transpose(1, 2).reshape(len(rows), -1)


def middle_pixels(pair: LoraPair, seen: Tensor, places: Tensor | None = None) -> Tensor:
    """One patch of each picture."""
    rows = good_rows(pair, seen, places)
    return rows[4::9] if seen.ndim == 4 else rows


def covariance_without_units(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double()


def central_covariance(rows: Tensor) -> Tensor:
    return good_covariance(rows - rows.mean(dim=0))


def undamped(weight: Tensor, covariance: Tensor, rank: int) -> Point:
    with replaced(corda, DAMPING=1e-9):
        return good_oriented(weight, covariance, rank)


def weight_alone(weight: Tensor, covariance: Tensor, rank: int) -> Point:
    return good_oriented(weight, torch.eye(len(covariance)).to(covariance), rank)


def first_batch(*arguments: Any, **options: Any) -> Any:
    model, pairs, loss, batches, generator = arguments
    return good_mean(model, pairs, loss, list(batches)[:1], generator, **options)


def twice_the_gradient(twin: Any, gradient: Tensor) -> None:
    good_hand_over(twin, 2 * gradient)


def transposed_gradient(twin: Any, gradient: Tensor) -> None:
    """The rows in another order."""
    good_hand_over(twin, gradient.flip(0))


def fewer_passes(model: Any, loader: Any, *arguments: Any, **options: Any) -> Any:
    return good_components(model, loader[:1], *arguments, **options)


def nothing_held(*_: Any) -> None:
    """A check that is not made."""


MUTANTS = [
    wrong(
        "inits: orthogonal product left at fp32",
        _CHANGES,
        "a product of 1e-8 moves an fp64 model",
        zero,
        (NumericalError,),
        orthogonal=product_left_in_fp32,
    ),
    wrong(
        "inits: dropout while looking at batches",
        _CHANGES,
        "the caller's random stream is used up",
        start,
        undisturbed=modes_left,
    ),
    wrong(
        "inits: anchor of the placeholder",
        _CHANGES,
        "the function moves at step 0",
        LoraPair,
        (NumericalError,),
        set_start=point_alone,
    ),
    wrong(
        "inits: eva leaves the layout's factors",
        _CHANGES,
        "a start that is not written is no start",
        eva,
        write_factors=nothing_held,
    ),
    wrong(
        "inits: frames not orthogonal",
        _FRAMES,
        "unit columns are not enough",
        stiefel,
        _frames=frames_of_normal_numbers,
    ),
    wrong(
        "inits: frames without the seed",
        _FRAMES,
        "another seed is another start",
        stiefel,
        _frames=same_frames,
    ),
    wrong(
        "inits: letters of the paper crossed",
        _FRAMES,
        "its A is lora_B",
        stiefel,
        stiefel_a=stiefel.stiefel_b,
    ),
    wrong(
        "inits: stiefel_both of the size of orthonormal",
        _FRAMES,
        "both factors are orthonormal",
        stiefel,
        stiefel_both=stiefel.orthonormal,
    ),
    wrong(
        "inits: milora takes the largest triples",
        _PARTS,
        "that is pissa",
        spectral,
        milora=largest_triples,
    ),
    wrong(
        "inits: corda patches with channels last",
        _CORDA,
        "the kernel's columns are channels first",
        inputs,
        as_rows=columns_of_the_kernel_last,
    ),
    wrong(
        "inits: corda with unscaled inputs",
        _CORDA,
        "a bright batch would outweigh the others",
        corda,
        scaled_covariance=covariance_without_units,
    ),
    wrong(
        "inits: corda with central moments",
        _CORDA,
        "the mean is part of what the layer sees",
        corda,
        scaled_covariance=central_covariance,
    ),
    wrong(
        "inits: corda undamped", _CORDA, "7 rows span no 81 directions", corda, oriented=undamped
    ),
    wrong("inits: corda without inputs", _CORDA, "that is pissa", corda, oriented=weight_alone),
    wrong(
        "inits: corda in training mode",
        _CORDA,
        "dropout is not part of the inputs",
        start,
        undisturbed=modes_left,
    ),
    wrong(
        "inits: eva sees one patch of a picture",
        _EVA,
        "a convolution is applied to each",
        inputs,
        as_rows=middle_pixels,
    ),
    wrong(
        "inits: eva sees one batch", _EVA, "all batches count", eva, get_eva_state_dict=fewer_passes
    ),
    wrong(
        "inits: lora_ga of one batch",
        _GA,
        "the mean gradient is meant",
        lora_ga,
        mean_gradient=first_batch,
    ),
    wrong(
        "inits: lora_ga of twice the gradient",
        _GA,
        "the size is part of the start",
        lora_ga,
        _hand_over=twice_the_gradient,
    ),
    wrong(
        "inits: lora_ga with rows of another order",
        _GA,
        "dy and x change places",
        lora_ga,
        _hand_over=transposed_gradient,
    ),
]


def without(name: str, why: str, **attributes: Callable[..., Any]) -> Mutant:
    """The driver without one of its checks."""
    return wrong(name, _REFUSED, why, start, NO_ERROR, **attributes)


MUTANTS += [
    wrong(
        "inits: anchor added", _STEP, "the gradient is that of another function",
        start, builder=anchor_added, _check_change=nothing_held,
    ),
    without("inits: base not compared", "a start may have written it", digest=lambda tensor: ""),
    without("inits: change not measured", "the function may have moved", _check_change=nothing_held),
    without("inits: rank not looked at", "riemannion would stop later", _check_points=nothing_held),
    without(
        "inits: factors stay where a start failed", "the caller goes on with the model",
        _put_back_on_error=lambda pairs: contextlib.nullcontext(),
    ),
]  # fmt: skip
