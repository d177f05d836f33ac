"""Faults of keeping orthogonal to given adapters: the wrong side, no basis, too late, not during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dreamrie.errors import NumericalError
from dreamrie.fixed_rank import Point
from dreamrie.loi import driver, estimators, points
from dreamrie.loi.complement import Complement
from dreamrie.lora import LowRank, apart
from dreamrie.lora.comparing import as_matrix
from tests.mutants import Law, Mutant, replaced
from tests.properties import test_loi_apart_laws as laws

CAUGHT = (AssertionError, NumericalError)


def faulty(name: str, law: Law, why: str, *broken: tuple[Any, dict[str, Any]]) -> Mutant:
    """A mutant of starting or staying apart."""

    @contextmanager
    def patched() -> Iterator[Any]:
        with ExitStack() as stack:
            for owner, wrong in broken:
                stack.enter_context(replaced(owner, **wrong))
            yield laws.real

    return Mutant(name=name, law=law, broken=patched, why=why, raises=CAUGHT)


def everywhere(pairs: Sequence[Any], avoid: Any) -> list[Complement]:
    """Nothing is left out."""
    return [Complement(pair.in_) for pair in pairs]


def unchecked(pair: Any, room: Any, svd: Any, alpha: float) -> driver.LayerReport:
    """The law must see it without the checks of LOI itself."""
    return driver.LayerReport(
        pair.name, pair.rank, alpha, 1.0, svd.optimum(pair.rank), math.nan, 1.0
    )


_mean_gradient, _split, _row_space, _without = (
    estimators.mean_gradient,
    points.split_point,
    apart.row_space,
    apart._without,
)


def left_side(*given: Any, avoid: Any = None) -> Any:
    """(I - V V^T) G where that has a meaning."""
    found, count = _mean_gradient(*given)
    changed = []
    for svd, basis in zip(found, avoid, strict=True):
        g = svd.matrix
        if basis is not None and basis.shape[0] == g.shape[0]:
            g = g - basis @ basis.T @ g
        changed.append(points.leading_svd(g, len(svd.values)))
    return changed, count


def free(*given: Any, avoid: Any = None) -> Any:
    """The gradient as it is; what is to be avoided is remembered for the start."""
    remembered[:] = avoid
    return _mean_gradient(*given)


remembered: list[Any] = []


def start_projected(svd: Any, rank: int, alpha: float) -> Point:
    """The best start of all, with the part along V taken out afterwards."""
    point = _split(svd, rank, alpha)
    basis = remembered.pop(0)
    if basis is None:
        return point
    return point._replace(v=torch.linalg.qr(point.v - basis @ basis.T @ point.v).Q)


def raw_rows(changes: Sequence[LowRank]) -> Tensor:
    """The rows of lora_A of unit length, which are no orthonormal basis."""
    rows = torch.cat([as_matrix(change).right for change in changes])
    return torch.nn.functional.normalize(rows).T


def first_only(changes: Sequence[LowRank]) -> Tensor:
    return _row_space(changes[:1])


def column_space(changes: Sequence[LowRank]) -> Tensor:
    return _row_space([LowRank(c.right.flatten(1).T, c.left.flatten(1).T) for c in changes])


def strongest_only(changes: Sequence[LowRank]) -> Tensor:
    return _row_space(changes)[:, :1]


def all_columns(changes: Sequence[LowRank]) -> Tensor:
    """Padding and shared directions counted as directions of their own."""
    return torch.cat([apart.decompose(change).v for change in changes], dim=1)


def no_hook(basis: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient


def one_row_only(basis: Tensor) -> Callable[[Tensor], Tensor]:
    """Only the first row of lora_A is kept apart: another row after a turn of the factors."""
    real = _without(basis)
    return lambda gradient: torch.cat([real(gradient)[:1], gradient[1:]])


def rescaled(basis: Tensor) -> Callable[[Tensor], Tensor]:
    """Each row of the projected gradient gets its old length back."""
    real = _without(basis)

    def project(gradient: Tensor) -> Tensor:
        found = real(gradient)
        rows = found.flatten(1)
        sizes = gradient.flatten(1).norm(dim=1) / rows.norm(dim=1).clamp_min(1e-300)
        return (rows * sizes[:, None]).reshape(gradient.shape)

    return project


def half(basis: Tensor) -> Callable[[Tensor], Tensor]:
    real = _without(basis)
    return lambda gradient: 0.5 * (gradient + real(gradient))


def inside_only(basis: Tensor) -> Callable[[Tensor], Tensor]:
    """P in place of I - P."""
    real = _without(basis)
    return lambda gradient: gradient - real(gradient)


START, ROWS = (
    laws.law_apart_start_is_the_best_orthogonal_one,
    laws.law_apart_row_space_is_whole_and_orthonormal,
)
STAYS, PATH, GAUGE = (
    laws.law_apart_training_stays_orthogonal,
    laws.law_apart_path_is_that_of_the_smaller_problem,
    laws.law_apart_gauge,
)
UNLIMITED = {"complements": everywhere, "_check_layer": unchecked}
MUTANTS = [
    faulty("apart: gradient projected on the output side", START, "X0 V is not zero",
           (driver, {"mean_gradient": left_side, **UNLIMITED})),
    faulty("apart: the start projected, not the gradient", START, "orthogonal, but not the best such start",
           (driver, {"mean_gradient": free, "split_point": start_projected, **UNLIMITED})),
    faulty("apart: ignored by the estimators", START, "the best start of all is not orthogonal",
           (driver, {"complements": everywhere}), (estimators, {"complements": everywhere})),
    faulty("apart: ignored on a net", laws.law_apart_start_on_a_net, "a free layer is no excuse for the others",
           (driver, {"complements": everywhere}), (estimators, {"complements": everywhere})),
    faulty("apart: basis not orthonormal", ROWS, "I - V V^T is no projection then", (apart, {"row_space": raw_rows})),
    faulty("apart: first adapter only", ROWS, "the second is not avoided", (apart, {"row_space": first_only})),
    faulty("apart: column space", ROWS, "the output side", (apart, {"row_space": column_space})),
    faulty("apart: strongest direction only", ROWS, "the rest still meets", (apart, {"row_space": strongest_only})),
    faulty("apart: padding counted", ROWS, "rank-deficient, and room is lost", (apart, {"row_space": all_columns})),
    faulty("apart: no hook", STAYS, "the subspace moves in training", (apart, {"_without": no_hook})),
    faulty("apart: hook with a basis that is not orthonormal", STAYS, "no projection",
           (apart, {"row_space": raw_rows})),
    faulty("apart: half of the part along V left", STAYS, "still moves there", (apart, {"_without": half})),
    faulty("apart: hook keeps the part along V", PATH, "P and I - P exchanged", (apart, {"_without": inside_only})),
    faulty("apart: projected rows rescaled", PATH, "another metric", (apart, {"_without": rescaled})),
    faulty("apart: one row of the factor only", GAUGE, "rows are no property of the product",
           (apart, {"_without": one_row_only})),
]  # fmt: skip
