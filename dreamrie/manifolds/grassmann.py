"""Subspaces: the span of an (n, p) matrix Y of rank p, with the metric tr((Y^T Y)^{-1} xi^T eta).

Y stands for its span, as Y M does for every invertible M; so df^T Y = 0 for a function of the span. Tangent vectors
are horizontal, Y^T xi = 0. With S = (Y^T Y)^{1/2}:

    G^{1/2} xi = xi S^{-1}      grad f = df S^2      H = (I - Y (Y^T Y)^{-1} Y^T) df S      xi = msign(H) S
    Y+ = polar((Y - lr xi) S^{-1}) S

Every principal angle between the spans of Y and Y+ is arctan(lr) where H has full rank: lr is a slope. The step
commutes with Y -> Y M, momentum included, and leaves Y^T Y as it is: orthonormal columns stay orthonormal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dreamrie.errors import NumericalError
from dreamrie.fixed_rank import remove_component
from dreamrie.manifolds.intrinsic import polar, require_matrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Grassmann:
    """Spans of (*, n, p) matrices of rank p; see the module, and `Manifold` for the methods."""

    def check_point(self, point: Tensor, tolerance: float = 1e-4) -> None:
        """Check that the columns span p dimensions.

        Args:
            point: (*, n, p).
            tolerance: smallest singular value allowed, as a share of the largest.

        Raises:
            NumericalError: they do not; the message says why.
        """
        require_matrix("Grassmann", point, square=False)
        values = torch.linalg.svdvals(point)
        share = float((values[..., -1] / values[..., 0]).min())
        if not share > tolerance:
            raise NumericalError(
                f"Grassmann: the columns are (nearly) dependent, the smallest singular value is {share:.1e} of the "
                f"largest; more than {tolerance:.1e} is needed. Start from random_frame(n, p), or pass the Q of "
                "torch.linalg.qr: it has the same span."
            )

    def project(self, point: Tensor, matrix: Tensor) -> Tensor:
        """Return the horizontal part (I - Y (Y^T Y)^{-1} Y^T) Z."""
        frame, _, _ = _polar_parts(point)
        return remove_component(frame, matrix)

    def gradient(self, point: Tensor, euclidean: Tensor) -> Tensor:
        """Return the horizontal part of df, times Y^T Y."""
        return self.project(point, euclidean) @ (point.mT @ point)

    def inner(self, point: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return tr((Y^T Y)^{-1} a^T b), (*,)."""
        solved = torch.linalg.solve(point.mT @ point, a.mT @ b)
        return solved.diagonal(dim1=-2, dim2=-1).sum(dim=-1)

    def blocks(self, point: Tensor, tangent: Tensor) -> tuple[Tensor, ...]:
        """Return the horizontal part of xi (Y^T Y)^{-1/2}, one (*, n, p) matrix."""
        frame, _, inverse = _polar_parts(point)
        return (remove_component(frame, tangent @ inverse),)

    def from_blocks(self, point: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        """Return the horizontal part of the block, times (Y^T Y)^{1/2}."""
        frame, root, _ = _polar_parts(point)
        return remove_component(frame, blocks[0]) @ root

    def retract(self, point: Tensor, tangent: Tensor, step: float = 1.0) -> Tensor:
        """Return polar((Y + step xi) S^{-1}) S: the span of Y + step xi, with the Gram matrix of Y."""
        frame, root, inverse = _polar_parts(point)
        return polar(frame + step * (tangent @ inverse)) @ root

    def transport(self, point: Tensor, tangent: Tensor, new_point: Tensor) -> Tensor:
        """Carry a horizontal vector by projection; it never gets longer, as `retract` keeps Y^T Y."""
        return self.project(new_point, tangent)


def _polar_parts(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Y S^{-1}, S and S^{-1} for S = (Y^T Y)^{1/2}; from the SVD of Y, which does not square its condition."""
    left, values, right_t = torch.linalg.svd(point, full_matrices=False)
    right, scale = right_t.mT, values.unsqueeze(-2)
    return left @ right_t, (right * scale) @ right_t, (right / scale) @ right_t
