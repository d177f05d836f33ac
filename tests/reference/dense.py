"""Riemannion on explicit (out, in) matrices with full SVDs in fp64: slow, short, and meant to be read.

Nothing is shared with the library. The letters are the paper's (arXiv:2507.12142): X the point, U and V its frames,
M the momentum, G the gradient, D the direction, P the tangent projection.
"""

from __future__ import annotations

import torch
from torch import Tensor


def svd_r(Z: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading r singular triples, Eq. (8)."""
    U, S, Vt = torch.linalg.svd(Z, full_matrices=False)
    return U[:, :r], S[:r], Vt[:r].mT


def truncate(Z: Tensor, r: int, floor: float = 0.0) -> Tensor:
    U, S, V = svd_r(Z, r)
    return (U * S.clamp_min(floor)) @ V.mT


def projection(U: Tensor, V: Tensor, Z: Tensor) -> Tensor:
    """Eq. (6): Z - (I - U U^T) Z (I - V V^T)."""
    left = torch.eye(U.shape[0], dtype=Z.dtype) - U @ U.mT
    right = torch.eye(V.shape[0], dtype=Z.dtype) - V @ V.mT
    return Z - left @ Z @ right


def msign(Z: Tensor, tol: float = 1e-10) -> Tensor:
    """Eq. (3) with null directions masked."""
    U, S, Vt = torch.linalg.svd(Z, full_matrices=False)
    return (U * (S > tol * S[0]).to(Z.dtype)) @ Vt


class DenseRiemannion:
    """One layer; `anchor` is X0 for decay towards it, None for decay towards zero."""

    def __init__(
        self,
        X: Tensor,
        r: int,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        anchor: Tensor | None = None,
        floor: float = 1e-8,
        inner_iters: int = 1,
        exact_norm: bool = False,
    ) -> None:
        self.X, self.r, self.lr, self.beta, self.wd = X.clone(), r, lr, momentum, weight_decay
        self.anchor, self.floor, self.inner, self.exact = anchor, floor, inner_iters, exact_norm
        self.M = torch.zeros_like(X)

    def direction(self, U: Tensor, V: Tensor) -> Tensor:
        """Eqs. (12), (13)."""
        D = self.M
        for _ in range(self.inner):
            if float(D.abs().max()) == 0:
                return D
            D = projection(U, V, msign(D))
        return D / torch.linalg.matrix_norm(D, 2) if self.exact else D

    def step(self, G: Tensor) -> Tensor:
        U, _, V = svd_r(self.X, self.r)
        self.M = self.beta * self.M + projection(U, V, G)
        D = self.direction(U, V)
        if self.anchor is None:
            moved = (1 - self.lr * self.wd) * self.X - self.lr * D
        else:
            pull = projection(U, V, self.X - self.anchor)
            moved = self.X - self.lr * (D + self.wd * pull)
        self.X = truncate(moved, self.r, self.floor)
        U, _, V = svd_r(self.X, self.r)
        self.M = projection(U, V, self.M)
        return self.X
