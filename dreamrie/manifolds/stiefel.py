"""Matrices with orthonormal columns, X^T X = I, with the metric of the surrounding space, tr(xi^T eta).

A tangent vector is xi = X S + N with S = X^T xi skew and X^T N = 0; its blocks are S and N.

    grad f = X skew(X^T df) + (I - X X^T) df
    xi = X msign(skew(X^T df)) + msign((I - X X^T) df)          X+ = polar(X - lr xi)

The intrinsic spectral norm is the larger of |S|_2 and |N|_2, and xi attains it in both. The rule taken literally, with
the (n, p) matrix grad f for H, leaves the tangent space: msign of a tangent matrix is in general not tangent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamrie.errors import NumericalError
from dreamrie.fixed_rank import remove_component
from dreamrie.manifolds.intrinsic import polar, require_matrix, skew

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Stiefel:
    """(*, n, p) matrices with orthonormal columns; see the module, and `Manifold` for the methods."""

    def check_point(self, point: Tensor, tolerance: float = 1e-4) -> None:
        """Check that columns are orthonormal.

        Args:
            point: (*, n, p).
            tolerance: largest entry of X^T X - I.

        Raises:
            NumericalError: they are not; the message says why.
        """
        require_matrix("Stiefel", point, square=False)
        gram = point.mT @ point
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        defect = float(gram.abs().max())
        if not defect <= tolerance:
            raise NumericalError(
                f"Stiefel: the columns are not orthonormal, defect {defect:.1e} > {tolerance:.1e}. Start from "
                "random_frame(n, p) or from the Q of torch.linalg.qr."
            )

    def project(self, point: Tensor, matrix: Tensor) -> Tensor:
        """Return X skew(X^T Z) + (I - X X^T) Z."""
        return point @ skew(point.mT @ matrix) + remove_component(point, matrix)

    def gradient(self, point: Tensor, euclidean: Tensor) -> Tensor:
        """Return the projection of the Euclidean gradient."""
        return self.project(point, euclidean)

    def inner(self, point: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return tr(a^T b), (*,)."""
        return (a * b).sum(dim=(-2, -1))

    def blocks(self, point: Tensor, tangent: Tensor) -> tuple[Tensor, ...]:
        """Return X^T xi, a skew (*, p, p) matrix, and (I - X X^T) xi, (*, n, p)."""
        return skew(point.mT @ tangent), remove_component(point, tangent)

    def from_blocks(self, point: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        """Return X S + N.

        The msign of a skew matrix is skew: its singular values come in pairs. Rounding can part a pair at the bar below
        which values count as zero, so S is made skew.
        """
        turn, normal = blocks
        return point @ skew(turn) + remove_component(point, normal)

    def retract(self, point: Tensor, tangent: Tensor, step: float = 1.0) -> Tensor:
        """Return polar(X + step xi), the nearest point; unique, as tangency gives |(X + t xi) w| >= |w|."""
        return polar(point + step * tangent)

    def transport(self, point: Tensor, tangent: Tensor, new_point: Tensor) -> Tensor:
        """Carry a tangent vector by projection; it never gets longer."""
        return self.project(new_point, tangent)
