"""RiemannAdam (Alg. 6 with simulate_Adam) as corrected, in factors and on dense matrices.

The letters are the paper's: A_L, G, B_R the frames and the core of the point, Ȧ and Ḃ (here dA, dB) the tangent parts,
A_HB and B_HB the momentum, S_A and S_B the second moments. Corrections against the print (docs/method.md 4.1):
second moments of the raw gradient with weight gamma on the old value, division by their root, minus signs in line 14,
the un-normalized average stored, alpha in the start, and the gradient taken at W' + X with W' = W - X_0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.dense import projection, svd_r, truncate


def start(G: Tensor, r: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Theorem 5.1: alpha U_1 V_2^T from the singular triples 1:r and r+1:2r of the gradient."""
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    sign = 1.0 if alpha > 0 else -1.0
    return sign * U[:, :r], torch.full((r,), abs(alpha), dtype=G.dtype), Vt[r : 2 * r].mT


class RiemannAdam:
    """Factored form, two QRs per step; `gradient` of the loss at a full weight matrix."""

    def __init__(
        self,
        W: Tensor,
        r: int,
        gradient,
        lr: float,
        *,
        alpha: float = 0.1,
        bias_correction: bool = True,
    ) -> None:
        self.W, self.r, self.gradient, self.lr, self.correct = W, r, gradient, lr, bias_correction
        self.beta, self.gamma, self.eps, self.t = 0.9, 0.99, 1e-8, 0
        self.A_L, self.S, self.B_R = self.first_point(gradient(W), alpha)
        self.X0 = self.X
        self.A_HB, self.B_HB = torch.zeros_like(self.A_L), torch.zeros_like(self.B_R)
        self.S_A = self.S_B = torch.zeros((), dtype=W.dtype)

    def first_point(self, G: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
        return start(G, self.r, alpha)

    @property
    def X(self) -> Tensor:
        return (self.A_L * self.S) @ self.B_R.mT

    def weights(self) -> Tensor:
        """W' + X with W' = W - X_0 (lines 7, 8 as corrected): step 0 keeps the function."""
        return self.W - self.X0 + self.X

    def tangent(self) -> tuple[Tensor, Tensor]:
        G = self.gradient(self.weights())
        dA = G @ self.B_R
        return dA - self.A_L @ (self.A_L.mT @ dA), G.mT @ self.A_L

    def second_moment(self, old: Tensor, block: Tensor) -> Tensor:
        """Line 12 as corrected."""
        return self.gamma * old + (1 - self.gamma) * block.norm() ** 2

    def factors(self, dA: Tensor, dB: Tensor) -> tuple[Tensor, Tensor]:
        """Line 14 as corrected: minus signs."""
        B = self.B_R * self.S
        return torch.cat([-self.lr * dA, self.A_L], dim=1), torch.cat(
            [self.B_R, B - self.lr * dB], dim=1
        )

    def step(self) -> Tensor:
        self.t += 1
        dA, dB = self.tangent()
        self.A_HB = self.beta * self.A_HB + (1 - self.beta) * dA
        self.B_HB = self.beta * self.B_HB + (1 - self.beta) * dB
        self.S_A, self.S_B = self.second_moment(self.S_A, dA), self.second_moment(self.S_B, dB)
        k1, k2 = (1 - self.beta**self.t, 1 - self.gamma**self.t) if self.correct else (1.0, 1.0)
        scaled = [
            H / k1 / ((S / k2).sqrt() + self.eps)
            for H, S in ((self.A_HB, self.S_A), (self.B_HB, self.S_B))
        ]
        L, R = self.factors(*scaled)
        (Q1, T1), (Q2, T2) = torch.linalg.qr(L), torch.linalg.qr(R)
        U, S, V = svd_r(T1 @ T2.mT, self.r)
        old = torch.cat([self.A_HB, self.A_L], dim=1), torch.cat([self.B_R, self.B_HB], dim=1)
        self.A_L, self.S, self.B_R = Q1 @ U, S, Q2 @ V
        dA = old[0] @ (old[1].mT @ self.B_R)
        self.A_HB = dA - self.A_L @ (self.A_L.mT @ dA)
        self.B_HB = old[1] @ (old[0].mT @ self.A_L)
        return self.X


class DenseRiemannAdam:
    """The same on explicit matrices; the blocks of the tangent space are told apart by their frames."""

    def __init__(
        self, W: Tensor, r: int, gradient, lr: float, alpha: float, bias_correction: bool
    ) -> None:
        U, S, V = start(gradient(W), r, alpha)
        self.X = (U * S) @ V.mT
        self.W, self.r, self.gradient, self.lr, self.correct = (
            W - self.X,
            r,
            gradient,
            lr,
            bias_correction,
        )
        self.M, self.S_A, self.S_B, self.t = torch.zeros_like(W), 0.0, 0.0, 0

    def step(self) -> Tensor:
        self.t += 1
        U, _, V = svd_r(self.X, self.r)
        xi = projection(U, V, self.gradient(self.W + self.X))
        self.M = 0.9 * projection(U, V, self.M) + 0.1 * xi
        left = torch.eye(U.shape[0], dtype=xi.dtype) - U @ U.mT
        self.S_A = 0.99 * self.S_A + 0.01 * float((left @ xi).norm() ** 2)
        self.S_B = 0.99 * self.S_B + 0.01 * float((U.mT @ xi).norm() ** 2)
        k1, k2 = (1 - 0.9**self.t, 1 - 0.99**self.t) if self.correct else (1.0, 1.0)
        D = left @ self.M / ((self.S_A / k2) ** 0.5 + 1e-8) + U @ (U.mT @ self.M) / (
            (self.S_B / k2) ** 0.5 + 1e-8
        )
        self.X = truncate(self.X - self.lr * D / k1, self.r)
        return self.X
