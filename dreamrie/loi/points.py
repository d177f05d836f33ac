"""The pure part of LOI: from a gradient to the point whose tangent space holds most of it.

Theorem 5.1 (corrected in docs/method.md 5.1): over all X of rank r, the energy |P_X(G)|_F^2 of the
projected gradient is at most the sum of the first 2r squared singular values of G, and

    X0 = alpha U_1 V_2^T,    U_1 = left vectors 1..r,   V_2 = right vectors r+1..2r

reaches it: then d_left = U_2 Sigma_2 and d_right = V_1 Sigma_1. Equal indices (U_1 V_1^T) would hold
the same directions twice and reach the first r only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.fixed_rank import (
    Point,
    inner_product,
    project_dense,
    project_low_rank,
    thin_svd,
    working_dtype,
)

if TYPE_CHECKING:
    from jaxtyping import Float

# Up to this smaller side the full SVD costs less than a second; above, a randomized one.
FULL_SVD_SIZE = 512


class LeadingSvd(NamedTuple):
    """Leading singular triples of a gradient; `matrix` is the gradient itself where it was formed.

    left (out, k) and right (in, k) orthonormal, values (k,) descending, matrix (out, in) or None.
    """

    left: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "in_ k"]
    matrix: Float[Tensor, "out in_"] | None = None

    def energy(self, point: Point) -> float:
        """Energy of this gradient in the tangent space of `point`."""
        if self.matrix is not None:
            return captured_energy(point, self.matrix)
        tangent = project_low_rank(point, self.left * self.values, self.right)
        return float(inner_product(tangent, tangent))

    def optimum(self, rank: int) -> float:
        """Largest energy that any rank-r tangent space can hold: sum of sigma_1^2 .. sigma_2r^2."""
        return float((self.values[: 2 * rank] ** 2).sum())

    def gap(self, rank: int) -> float:
        """sigma_2r / sigma_2r+1; near 1 the start is one of many equally good ones."""
        if len(self.values) <= 2 * rank or float(self.values[2 * rank]) == 0.0:
            return math.inf
        return float(self.values[2 * rank - 1] / self.values[2 * rank])


def captured_energy(point: Point, gradient: Float[Tensor, "out in_"]) -> float:
    """|P_X(G)|_F^2 for an explicit gradient G.

    Args:
        point: X; u (out, r), s (r,), v (in, r).
        gradient: (out, in).
    """
    tangent = project_dense(point, gradient)
    return float(inner_product(tangent, tangent))


def optimal_point(
    gradient: Float[Tensor, "out in_"], rank: int, alpha: float
) -> tuple[Point, Float[Tensor, " k"]]:
    """The locally optimal start for an explicit gradient.

    Source: Theorem 5.1 as corrected; start alpha U_1 V_2^T.

    Args:
        gradient: G at the base weight, (out, in), finite.
        rank: r, at most min(out, in).
        alpha: signed size of the start; all singular values of the point are |alpha|.

    Returns:
        The point and all singular values of G, descending.

    Raises:
        ConfigError: rank or alpha is out of range.
        NumericalError: the gradient is not finite.
    """
    svd = leading_svd(gradient, min(gradient.shape))
    return split_point(svd, rank, alpha), svd.values


def split_point(svd: LeadingSvd, rank: int, alpha: float) -> Point:
    """X0 = alpha U_1 V_2^T from singular triples.

    If 2r exceeds the smaller side m there are no vectors r+1..2r; the last r of the m right vectors
    still complete the first r left ones to all of 1..m, so the whole gradient is captured.

    Args:
        svd: at least min(2r, m) triples.
        rank: r.
        alpha: signed size.

    Raises:
        ConfigError: rank or alpha is out of range.
    """
    smaller = min(svd.left.shape[0], svd.right.shape[0])
    last = min(2 * rank, smaller)
    if not 1 <= rank <= smaller or len(svd.values) < last:
        raise ConfigError(
            f"rank {rank} needs {last} singular triples of a gradient with smaller side {smaller}; "
            f"{len(svd.values)} are there and rank must lie in 1..{smaller}."
        )
    if not (math.isfinite(alpha) and alpha != 0.0):
        raise ConfigError(f"alpha must be finite and not zero, got {alpha}.")
    size = torch.full_like(svd.values[:rank], abs(alpha))
    left = math.copysign(1.0, alpha) * svd.left[:, :rank]
    return Point(left, size, svd.right[:, last - rank : last].clone())


def leading_svd(
    matrix: Float[Tensor, "out in_"], count: int, generator: torch.Generator | None = None
) -> LeadingSvd:
    """First singular triples of an explicit matrix, in fp32 at least.

    Exact for a smaller side up to FULL_SVD_SIZE or without a generator; else randomized with twice
    the width and 4 power iterations.

    Raises:
        NumericalError: the matrix is not finite.
    """
    matrix = matrix.to(working_dtype(matrix.dtype))
    if not bool(matrix.isfinite().all()):
        raise NumericalError("the gradient holds values that are not finite; look at the loss.")
    smaller = min(matrix.shape)
    if generator is None or smaller <= max(FULL_SVD_SIZE, 2 * count):
        left, values, right = thin_svd(matrix)
    else:
        basis = orthonormal(matrix @ gaussian(matrix, matrix.shape[1], 2 * count, generator))
        for _ in range(4):
            basis = orthonormal(matrix @ orthonormal(matrix.T @ basis))
        core, values, right = thin_svd(basis.T @ matrix)
        left = basis @ core
    keep = min(count, smaller)
    return LeadingSvd(left[:, :keep], values[:keep], right[:, :keep], matrix)


def sketch_svd(
    range_sketch: Float[Tensor, "out k"],
    test_left: Float[Tensor, "out l"],
    corange_sketch: Float[Tensor, "l in_"],
) -> LeadingSvd:
    """Singular triples of G from G Omega and Psi^T G, both linear in G.

    Source: docs/method.md 5.2 (b): Q = qr(G Omega), Y = lstsq(Psi^T Q, Psi^T G), G ~ Q Y. Exact when
    G has rank at most k.

    Args:
        range_sketch: G Omega, k columns.
        test_left: Psi, l >= k columns.
        corange_sketch: Psi^T G.

    Returns:
        min(k, out, in) triples, no matrix.

    Raises:
        NumericalError: a sketch is not finite.
    """
    if not (bool(range_sketch.isfinite().all()) and bool(corange_sketch.isfinite().all())):
        raise NumericalError("the gradient holds values that are not finite; look at the loss.")
    basis = orthonormal(range_sketch)
    solution = torch.linalg.lstsq(test_left.T @ basis, corange_sketch).solution
    core, values, right = thin_svd(solution)
    return LeadingSvd(basis @ core, values, right)


def orthonormal(matrix: Float[Tensor, "a k"]) -> Float[Tensor, "a q"]:
    """Orthonormal basis of the column space, q = min(a, k)."""
    return torch.linalg.qr(matrix).Q


def gaussian(
    like: Tensor, rows: int, columns: int, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """Standard normal matrix in the working dtype and on the device of `like`."""
    dtype = working_dtype(like.dtype)
    drawn = torch.randn(rows, columns, generator=generator, device=generator.device, dtype=dtype)
    return drawn.to(like.device)
