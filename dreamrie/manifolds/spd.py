"""Symmetric positive definite matrices with the affine-invariant metric tr(X^{-1} xi X^{-1} eta).

    G^{1/2} xi = X^{-1/2} xi X^{-1/2}      grad f = X sym(df) X      H = X^{1/2} sym(df) X^{1/2}
    xi = X^{1/2} msign(H) X^{1/2}          X+ = X^{1/2} exp(-lr msign(H)) X^{1/2}

Every eigenvalue of X^{-1} X+ is exp(+-lr): lr is the change of the logarithm. The step commutes with X -> A X A^T for
every invertible A, so the units of the coordinates do not matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dreamrie.errors import NumericalError
from dreamrie.manifolds.intrinsic import require_matrix, symmetric

if TYPE_CHECKING:
    from collections.abc import Sequence


class SPD:
    """Symmetric positive definite (*, n, n) matrices; see the module, and `Manifold` for the methods."""

    def check_point(self, point: Tensor, tolerance: float = 1e-4) -> None:
        """Check that a matrix is symmetric and positive definite.

        Args:
            point: (*, n, n).
            tolerance: largest |X - X^T|, as a share of the largest entry.

        Raises:
            NumericalError: it is not; the message says why.
        """
        require_matrix("SPD", point, square=True)
        defect = float((point - point.mT).abs().max() / point.abs().max())
        if not defect <= tolerance:
            raise NumericalError(
                f"SPD: the matrix is not symmetric, defect {defect:.1e} > {tolerance:.1e} of its largest entry. Start "
                "from a covariance matrix or from torch.eye(n)."
            )
        _decompose(point)

    def project(self, point: Tensor, matrix: Tensor) -> Tensor:
        """Return sym(matrix): every symmetric matrix is tangent."""
        return symmetric(matrix)

    def gradient(self, point: Tensor, euclidean: Tensor) -> Tensor:
        """Return X sym(euclidean) X."""
        return point @ symmetric(euclidean) @ point

    def inner(self, point: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return tr(X^{-1} a X^{-1} b), (*,)."""
        solved_a, solved_b = torch.linalg.solve(point, a), torch.linalg.solve(point, b)
        return (solved_a.mT * solved_b).sum(dim=(-2, -1))

    def blocks(self, point: Tensor, tangent: Tensor) -> tuple[Tensor, ...]:
        """Return X^{-1/2} xi X^{-1/2}, one symmetric matrix."""
        _, inverse = _roots(point)
        return (symmetric(inverse @ tangent @ inverse),)

    def from_blocks(self, point: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        """Return X^{1/2} S X^{1/2}; the msign of a symmetric S is symmetric up to rounding, and so made."""
        root, _ = _roots(point)
        return root @ symmetric(blocks[0]) @ root

    def retract(self, point: Tensor, tangent: Tensor, step: float = 1.0) -> Tensor:
        """Follow the geodesic: X^{1/2} exp(step X^{-1/2} xi X^{-1/2}) X^{1/2}.

        Args:
            point: X, (*, n, n).
            tangent: xi, symmetric.
            step: dimensionless; may be negative.

        Returns:
            The new point, (*, n, n).

        Raises:
            NumericalError: the result is not finite or has lost an eigenvalue to rounding.
        """
        root, inverse = _roots(point)
        values, vectors = torch.linalg.eigh(symmetric(inverse @ (step * tangent) @ inverse))
        stretched = (vectors * values.exp().unsqueeze(-2)) @ vectors.mT
        result = symmetric(root @ stretched @ root)
        require_matrix("SPD, after a step", result, square=True)
        _decompose(result)
        return result

    def transport(self, point: Tensor, tangent: Tensor, new_point: Tensor) -> Tensor:
        """Carry xi along the geodesic from X to Y, parallel: E xi E^T with E = (Y X^{-1})^{1/2}.

        Projection would leave xi as it is, and its length would change with the metric: a momentum from where X was a
        hundred times larger would drown every later gradient.
        """
        root, inverse = _roots(point)
        between, _ = _roots(symmetric(inverse @ new_point @ inverse))
        carrier = root @ between @ inverse
        return symmetric(carrier @ tangent @ carrier.mT)


def _decompose(point: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (ascending) and eigenvectors; raise NumericalError unless all are well above rounding."""
    values, vectors = torch.linalg.eigh(point)
    smallest, largest = values[..., 0], values[..., -1]
    if not bool((smallest > torch.finfo(values.dtype).eps * largest).all()):
        raise NumericalError(
            f"SPD: the matrix is not positive definite in {values.dtype}: its smallest eigenvalue is "
            f"{float(smallest.min()):.1e} beside a largest of {float(largest.max()):.1e}. Add a multiple of the "
            "identity, use float64, or take shorter steps."
        )
    return values, vectors


def _roots(point: Tensor) -> tuple[Tensor, Tensor]:
    """Return X^{1/2} and X^{-1/2}."""
    values, vectors = _decompose(point)
    root = values.sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
