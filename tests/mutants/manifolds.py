"""Wrong intrinsic Muon: a root on the wrong side, a part forgotten, a way back that leaves the manifold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dreamrie import manifolds
from dreamrie.errors import NumericalError
from dreamrie.fixed_rank import masked_msign, remove_component
from dreamrie.manifolds import SPD, Grassmann, Stiefel, optimizer
from tests.mutants import Law, Mutant, replaced
from tests.properties import test_manifolds_laws as laws
from tests.reference.manifolds import power

_direction = manifolds.direction


@contextmanager
def broken(owner: Any, **attributes: Any) -> Iterator[Any]:
    """Yield the package while something in it is wrong."""
    with replaced(owner, **attributes):
        yield manifolds


@contextmanager
def wrong_direction(function: Any) -> Iterator[Any]:
    """Yield the package while the rule is wrong, in the optimizer too."""
    with replaced(optimizer, direction=function), replaced(manifolds, direction=function):
        yield manifolds


# ------------------------------------------------------------------------------------------------------------ the rule


def whole_matrix(manifold: Any, x: Tensor, xi: Tensor) -> Tensor:
    """The rule as printed, with the tangent vector itself for H."""
    return masked_msign(xi) if isinstance(manifold, Stiefel) else _direction(manifold, x, xi)


def whole_matrix_projected(manifold: Any, x: Tensor, xi: Tensor) -> Tensor:
    """The same, brought back to the tangent space: Alg. 4 of Riemannion on the wrong manifold."""
    return manifold.project(x, whole_matrix(manifold, x, xi))


def without_msign(manifold: Any, x: Tensor, xi: Tensor) -> Tensor:
    """Steepest descent in the metric, normalized."""
    return xi / manifolds.spectral_norm(manifold, x, xi)


def not_divided(manifold: Any, x: Tensor, xi: Tensor) -> Tensor:
    """msign(H) left as it is: no G^{-1/2} after it."""
    if isinstance(manifold, Stiefel):
        return _direction(manifold, x, xi)
    return masked_msign(manifold.blocks(x, xi)[0])


def not_multiplied(manifold: Any, x: Tensor, xi: Tensor) -> Tensor:
    """msign of the gradient itself: no G^{1/2} before it."""
    if isinstance(manifold, Stiefel):
        return _direction(manifold, x, xi)
    return manifold.from_blocks(x, [masked_msign(xi)])


def uphill(manifold: Any, x: Tensor, xi: Tensor) -> Tensor:
    return -_direction(manifold, x, xi)


def each_block_by_itself(manifold: Any, x: Tensor, xi: Tensor) -> Tensor:
    """Zero decided within a block, so that a block of rounding errors is orthogonalized."""
    parts = [torch.linalg.svd(b, full_matrices=False) for b in manifold.blocks(x, xi)]
    return manifold.from_blocks(x, [left @ right for left, _, right in parts])


# ------------------------------------------------------------------------------------------------------- the manifolds


def spd_gradient_without_sym(self: SPD, x: Tensor, euclidean: Tensor) -> Tensor:
    return x @ euclidean @ x


def spd_gradient_without_metric(self: SPD, x: Tensor, euclidean: Tensor) -> Tensor:
    return (euclidean + euclidean.mT) / 2


def spd_from_blocks_inverse(self: SPD, x: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    root = power(x, -0.5)
    return root @ blocks[0] @ root


def spd_from_blocks_one_side(self: SPD, x: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    return x @ blocks[0]


def spd_retract_straight(self: SPD, x: Tensor, xi: Tensor, step: float = 1.0) -> Tensor:
    return x + step * xi


def spd_retract_to_second_order(self: SPD, x: Tensor, xi: Tensor, step: float = 1.0) -> Tensor:
    return x + step * xi + step**2 / 2 * xi @ torch.linalg.solve(x, xi)


def spd_transport_by_projection(self: SPD, x: Tensor, xi: Tensor, y: Tensor) -> Tensor:
    return xi


def stiefel_project_without_skew(self: Stiefel, x: Tensor, z: Tensor) -> Tensor:
    return z


def stiefel_project_sym(self: Stiefel, x: Tensor, z: Tensor) -> Tensor:
    inner = x.mT @ z
    return x @ (inner + inner.mT) / 2 + remove_component(x, z)


def stiefel_project_normal_only(self: Stiefel, x: Tensor, z: Tensor) -> Tensor:
    return remove_component(x, z)


def stiefel_from_blocks_without_turn(self: Stiefel, x: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    return blocks[1]


def straight(self: Any, x: Tensor, xi: Tensor, step: float = 1.0) -> Tensor:
    """No orthonormalization."""
    return x + step * xi


def oriented_qr(self: Stiefel, x: Tensor, xi: Tensor, step: float = 1.0) -> Tensor:
    """Orthonormal, but by QR: the result depends on the order of the columns."""
    q, r = torch.linalg.qr(x + step * xi)
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def stays(self: Any, x: Tensor, xi: Tensor, y: Tensor) -> Tensor:
    return xi


def grassmann_gradient_without_metric(self: Grassmann, y: Tensor, euclidean: Tensor) -> Tensor:
    return self.project(y, euclidean)


def grassmann_project_as_if_orthonormal(self: Grassmann, y: Tensor, z: Tensor) -> Tensor:
    return z - y @ (y.mT @ z)


def grassmann_from_blocks_inverse(self: Grassmann, y: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] @ power(y.mT @ y, -0.5)


def grassmann_retract_to_a_frame(
    self: Grassmann, y: Tensor, xi: Tensor, step: float = 1.0
) -> Tensor:
    """The right span in other columns: the momentum that is carried no longer belongs to them."""
    return torch.linalg.qr(y + step * xi).Q


def inner_flat(self: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


# ------------------------------------------------------------------------------------------------------- the optimizer


class _Averaging(optimizer.IntrinsicMuon):
    """An average of gradients where a sum belongs."""

    def _moved(self, parameter: Tensor, gradient: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        return super()._moved(parameter, (1 - group["momentum"]) * gradient, group)


class _StoresTheSign(optimizer.IntrinsicMuon):
    """The momentum is replaced by its direction, so later gradients weigh by size and earlier ones do not."""

    def _moved(self, parameter: Tensor, gradient: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        point, momentum = super()._moved(parameter, gradient, group)
        return point, _direction(manifolds.MANIFOLDS[group["manifold"]], point, momentum)


class _Forgets(optimizer.IntrinsicMuon):
    """No momentum at all."""

    def _moved(self, parameter: Tensor, gradient: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        return super()._moved(parameter, gradient, group | {"momentum": 0.0})


TANGENT = laws.law_m1_gradients_and_directions_are_tangent
METRIC = laws.law_m2_the_gradient_represents_the_derivative
LONGEST = laws.law_m3_no_tangent_vector_of_norm_one_gains_more
TINY = laws.law_m4_a_tiny_ball_searched_completely_has_no_better_vector
RETRACTION = laws.law_m5_the_retraction_stays_on_the_manifold_and_is_first_order
SIZE = laws.law_m6_a_step_has_the_size_that_lr_names
SLOPE = laws.law_m7_the_slope_along_a_step_is_the_dual_norm
TRANSPORT = laws.law_m8_transport_arrives_in_the_tangent_space
COORDINATES = laws.law_m9_paths_follow_a_change_of_coordinates
MOMENTUM = laws.law_m10_the_momentum_is_a_raw_heavy_ball
ROUNDING = laws.law_m11_rounding_has_no_say


def _rule(law: Law, function: Any, why: str) -> Mutant:
    """A wrong rule, tried on one law."""
    name = f"manifolds: {function.__name__.replace('_', ' ')}, {law.__name__.split('_')[1]}"
    # A step that is too long or not tangent can end in a matrix whose logarithm or root does not exist.
    return Mutant(name, law, lambda: wrong_direction(function), why, (NumericalError,))


def _method(law: Law, owner: type, method: str, function: Any, why: str) -> Mutant:
    """One wrong method of one manifold."""
    kind, fault = owner.__name__, function.__name__.strip("_").replace("_", " ")
    name = f"manifolds: {kind}.{method}, {fault}, {law.__name__.split('_')[1]}"
    return Mutant(name, law, lambda: broken(owner, **{method: function}), why, (NumericalError,))


MUTANTS = [
    _rule(TANGENT, whole_matrix, "msign of a tangent matrix is not tangent on Stiefel"),
    _rule(LONGEST, whole_matrix_projected, "tangent, but not the maximizer"),
    _rule(TINY, whole_matrix_projected, "a complete search of the ball finds a better one"),
    _rule(LONGEST, without_msign, "of norm 1, but it follows the largest singular value"),
    _rule(TINY, without_msign, "the same in three dimensions"),
    _rule(LONGEST, not_divided, "a length in flat coordinates is none in the metric"),
    _rule(LONGEST, not_multiplied, "signs are taken in the wrong coordinates"),
    _rule(SIZE, not_divided, "lr no longer names the change of the logarithm"),
    _rule(SLOPE, uphill, "the sign of a step"),
    _rule(SLOPE, without_msign, "descends, but more slowly than the ball allows"),
    _rule(ROUNDING, each_block_by_itself, "noise of size one in the normal part"),
    _method(TANGENT, SPD, "gradient", spd_gradient_without_sym, "symmetric part missing"),
    _method(METRIC, SPD, "gradient", spd_gradient_without_metric, "the Euclidean gradient"),
    _method(METRIC, SPD, "inner", inner_flat, "the Euclidean metric"),
    _method(LONGEST, SPD, "from_blocks", spd_from_blocks_inverse, "root on the wrong side"),
    _method(TANGENT, SPD, "from_blocks", spd_from_blocks_one_side, "X S is not symmetric"),
    _method(RETRACTION, SPD, "retract", spd_retract_straight, "leaves the cone"),
    _method(RETRACTION, SPD, "retract", spd_retract_to_second_order, "no geodesic far away"),
    _method(SIZE, SPD, "retract", spd_retract_straight, "1 - lr is not exp(-lr)"),
    _method(TRANSPORT, SPD, "transport", spd_transport_by_projection, "lengths change"),
    _method(MOMENTUM, SPD, "transport", spd_transport_by_projection, "stale lengths in M"),
    _method(TANGENT, Stiefel, "project", stiefel_project_without_skew, "skew part missing"),
    _method(TANGENT, Stiefel, "project", stiefel_project_sym, "sym where skew belongs"),
    _method(METRIC, Stiefel, "project", stiefel_project_normal_only, "turns are lost"),
    _method(
        *(LONGEST, Stiefel, "from_blocks", stiefel_from_blocks_without_turn),
        "the step of Grassmann on Stiefel",
    ),
    _method(RETRACTION, Stiefel, "retract", straight, "no orthonormalization"),
    _method(COORDINATES, Stiefel, "retract", oriented_qr, "QR does not turn with its columns"),
    _method(TRANSPORT, Stiefel, "transport", stays, "not tangent where it arrives"),
    _method(MOMENTUM, Stiefel, "transport", stays, "the momentum is not carried"),
    _method(METRIC, Grassmann, "gradient", grassmann_gradient_without_metric, "Y^T Y missing"),
    _method(
        *(COORDINATES, Grassmann, "gradient", grassmann_gradient_without_metric),
        "depends on the columns, not on the span",
    ),
    _method(
        *(TANGENT, Grassmann, "project", grassmann_project_as_if_orthonormal),
        "horizontal for orthonormal Y alone",
    ),
    _method(METRIC, Grassmann, "inner", inner_flat, "the Euclidean metric"),
    _method(
        *(LONGEST, Grassmann, "from_blocks", grassmann_from_blocks_inverse),
        "root on the wrong side",
    ),
    _method(RETRACTION, Grassmann, "retract", straight, "Y grows without bound"),
    _method(
        *(COORDINATES, Grassmann, "retract", grassmann_retract_to_a_frame),
        "the momentum belongs to columns that are gone",
    ),
    _method(TRANSPORT, Grassmann, "transport", stays, "not horizontal where it arrives"),
    Mutant(
        name="manifolds: momentum averaged",
        law=MOMENTUM,
        broken=lambda: broken(manifolds, IntrinsicMuon=_Averaging),
        why="M is the sum of gradients, by a factor 1 / (1 - mu) larger",
    ),
    Mutant(
        name="manifolds: momentum of directions",
        law=MOMENTUM,
        broken=lambda: broken(manifolds, IntrinsicMuon=_StoresTheSign),
        why="M must keep the sizes of gradients",
    ),
    Mutant(
        name="manifolds: no momentum",
        law=MOMENTUM,
        broken=lambda: broken(manifolds, IntrinsicMuon=_Forgets),
        why="the second step differs",
    ),
]
