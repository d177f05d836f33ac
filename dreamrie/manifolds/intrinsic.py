"""Muon on a manifold: the one rule that SPD, Stiefel and Grassmann share.

A manifold with metric <xi, eta>_x = <G_x xi, eta> measures a step by the *intrinsic spectral norm*, the largest
singular value of G_x^{1/2} xi. The longest way down per unit of that norm is

    H = G_x^{1/2} grad f,     xi = G_x^{-1/2} msign(H),     x+ = R_x(-lr xi).

This holds because msign(H) is again G_x^{1/2} of a tangent vector, and that needs the right coordinates: `blocks`
writes G_x^{1/2} xi as one or more matrices, and the msign of each must belong to a tangent vector. On Stiefel a
tangent vector as an (n, p) matrix fails this (docs/manifolds.md); its skew and its normal part, taken apart, do not.

Everything takes leading batch dimensions and computes in the dtype of its input, fp32 or fp64.

Source: arXiv:2605.09238; the formulas were derived and checked here, see tests/properties/test_manifolds_laws.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dreamrie.errors import NumericalError
from dreamrie.fixed_rank import random_point, thin_svd

if TYPE_CHECKING:
    from collections.abc import Sequence


class Manifold(Protocol):
    """What the rule and the optimizer ask of a manifold; points and tangent vectors are (*, n, p) tensors."""

    def check_point(self, point: Tensor, tolerance: float = 1e-4) -> None:
        """Raise NumericalError, saying why, when a tensor is not a point."""

    def project(self, point: Tensor, matrix: Tensor) -> Tensor:
        """Return the tangent vector nearest to an ambient matrix, in the Frobenius norm."""

    def gradient(self, point: Tensor, euclidean: Tensor) -> Tensor:
        """Return the Riemannian gradient from the Euclidean one: <gradient, xi>_x = <euclidean, xi>."""

    def inner(self, point: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return <a, b>_x, (*,)."""

    def blocks(self, point: Tensor, tangent: Tensor) -> tuple[Tensor, ...]:
        """Return G_x^{1/2} xi as matrices whose Frobenius products add up to the metric."""

    def from_blocks(self, point: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        """Return the tangent vector of `blocks`."""

    def retract(self, point: Tensor, tangent: Tensor, step: float = 1.0) -> Tensor:
        """Move along step * tangent and come back to the manifold."""

    def transport(self, point: Tensor, tangent: Tensor, new_point: Tensor) -> Tensor:
        """Carry a tangent vector from one point to another."""


def direction(manifold: Manifold, point: Tensor, tangent: Tensor) -> Tensor:
    """Return the tangent vector of intrinsic spectral norm 1 with the largest product with `tangent`.

    Singular values below 1e-6 (fp64: 1e-10) of the largest of all blocks count as zero: the sign of a rounding error
    is noise of size one. They are compared over all blocks, since a block may be nothing but rounding (the normal part
    of a square Stiefel matrix).

    Args:
        manifold: where.
        point: x, (*, n, p).
        tangent: gradient or momentum at x, (*, n, p).

    Returns:
        G_x^{-1/2} msign(G_x^{1/2} tangent), (*, n, p); zero for zero.

    Raises:
        NumericalError: a decomposition did not converge.
    """
    parts = [thin_svd(block) for block in manifold.blocks(point, tangent)]
    largest = torch.stack([values[..., 0] for _, values, _ in parts]).amax(dim=0)
    bar = (1e-10 if point.dtype == torch.float64 else 1e-6) * largest
    signs = []
    for left, values, right in parts:
        keep = (values > bar.unsqueeze(-1)).to(values.dtype)
        signs.append((left * keep.unsqueeze(-2)) @ right.mT)
    return manifold.from_blocks(point, signs)


def spectral_norm(manifold: Manifold, point: Tensor, tangent: Tensor) -> Tensor:
    """Return the intrinsic spectral norm of a tangent vector, (*,): the largest singular value of all blocks."""
    norms = [torch.linalg.matrix_norm(block, 2) for block in manifold.blocks(point, tangent)]
    return torch.stack(norms).amax(dim=0)


def nuclear_norm(manifold: Manifold, point: Tensor, tangent: Tensor) -> Tensor:
    """Return the dual norm, (*,): the sum of all singular values of all blocks, which `direction` attains."""
    norms = [torch.linalg.matrix_norm(block, "nuc") for block in manifold.blocks(point, tangent)]
    return torch.stack(norms).sum(dim=0)


def random_frame(
    rows: int,
    columns: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw orthonormal columns, Haar-distributed: a start on Stiefel or Grassmann.

    Args:
        rows: n.
        columns: p <= n.
        generator: source of randomness.
        dtype: fp32 or fp64.

    Returns:
        (n, p) with orthonormal columns.

    Raises:
        NumericalError: columns is not in 1..rows.
    """
    if not 1 <= columns <= rows:
        raise NumericalError(
            f"random_frame: {columns} orthonormal columns of {rows} rows; 1..{rows} columns are possible."
        )
    return random_point(rows, columns, columns, generator=generator, dtype=dtype).u


def symmetric(matrix: Tensor) -> Tensor:
    """Return (A + A^T) / 2."""
    return (matrix + matrix.mT) / 2


def skew(matrix: Tensor) -> Tensor:
    """Return (A - A^T) / 2."""
    return (matrix - matrix.mT) / 2


def polar(matrix: Tensor) -> Tensor:
    """Return the matrix with orthonormal columns nearest to an (*, n, p) matrix of rank p."""
    left, _, right = thin_svd(matrix)
    return left @ right.mT


def require_matrix(where: str, point: Tensor, *, square: bool) -> None:
    """Raise NumericalError unless a tensor is a finite, tall (or square) fp32 or fp64 matrix."""
    shape, needed = tuple(point.shape), "(*, n, n)" if square else "(*, n, p) with n >= p"
    fits = point.ndim >= 2 and (shape[-2] == shape[-1] if square else shape[-2] >= shape[-1])
    if not fits:
        raise NumericalError(f"{where}: the point has shape {shape}; {needed} is needed.")
    if point.dtype not in {torch.float32, torch.float64}:
        raise NumericalError(
            f"{where}: the point is {point.dtype}; float32 or float64 is needed, since fewer digits round a point off "
            "its manifold."
        )
    bad = int((~torch.isfinite(point)).sum())
    if bad:
        raise NumericalError(f"{where}: {bad} of {point.numel()} numbers are not finite.")
