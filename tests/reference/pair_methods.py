"""Other optimizers of LoRA pairs as their papers write them: explicit matrices, symmetric roots and full SVDs in fp64.

Nothing is shared with the library. X = B A with the scaling inside the factors; G is the gradient of X.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.dense import msign, projection, svd_r, truncate


def power(S: Tensor, p: float) -> Tensor:
    """Power of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(S)
    return (vectors * values**p) @ vectors.mT


class LoraMuon:
    """arXiv:2606.12921 with split decay."""

    def __init__(self, B: Tensor, A: Tensor, lr: float, beta: float, decay: float) -> None:
        self.B, self.A, self.lr, self.beta = B, A, lr, beta
        self.sigma = math.sqrt(1 - lr * decay)
        self.mB, self.mA = torch.zeros_like(B), torch.zeros_like(A)

    @property
    def X(self) -> Tensor:
        return self.B @ self.A

    def halves(self, G: Tensor) -> tuple[Tensor, Tensor]:
        self.mB = self.beta * self.mB + G @ self.A.mT
        self.mA = self.beta * self.mA + self.B.mT @ G
        SA, SB = power(self.A @ self.A.mT, -0.5), power(self.B.mT @ self.B, -0.5)
        return msign(self.mB @ SA) @ SA / 2, SB @ msign(SB @ self.mA) / 2

    def step(self, G: Tensor) -> Tensor:
        dB, dA = self.halves(G)
        self.B = self.sigma * self.B - self.lr * dB / self.sigma
        self.A = self.sigma * self.A - self.lr * dA / self.sigma
        return self.X


class IMuon(LoraMuon):
    """arXiv:2605.09238: momenta of the quotient gradients, orthogonalized through the joint matrix."""

    def halves(self, G: Tensor) -> tuple[Tensor, Tensor]:
        self.mB = self.beta * self.mB + G @ self.A.mT @ power(self.A @ self.A.mT, -1)
        self.mA = self.beta * self.mA + power(self.B.mT @ self.B, -1) @ self.B.mT @ G
        M = self.mB @ self.A + self.B @ self.mA
        QA, RA = torch.linalg.qr(self.A.mT)
        QB, RB = torch.linalg.qr(self.B)
        return msign(M @ QA) @ torch.linalg.inv(RA).mT, torch.linalg.inv(RB) @ msign(QB.mT @ M)


class LoraRite(LoraMuon):
    """arXiv:2410.20625, with polar decompositions B = U R."""

    def __init__(self, *arguments: float | Tensor) -> None:
        super().__init__(*arguments)
        r = self.A.shape[0]
        zero = torch.zeros(r, r, dtype=self.A.dtype)
        self.V, self.rho = {"A": zero, "B": zero}, {"A": 0.0, "B": 0.0}
        self.M = {"A": torch.zeros_like(self.A), "B": torch.zeros_like(self.B.mT)}
        self.U: dict[str, Tensor] = {}

    def side(self, key: str, g: Tensor, other: Tensor) -> Tensor:
        """Step of the factor `key` (r, n) with gradient g, the other factor given as (m, r)."""
        R = power(other.mT @ other, 0.5)
        U = other @ torch.linalg.inv(R)
        h = torch.linalg.inv(R) @ g
        P = U.mT @ self.U.get(key, U)
        V = P @ self.V[key] @ P.mT
        change = torch.linalg.eigvalsh(self.V[key]) - torch.linalg.eigvalsh(V)
        self.rho[key] += float(change.abs().max())
        self.V[key], self.U[key] = V + h @ h.mT, U
        S = power(self.V[key] + self.rho[key] * torch.eye(len(V), dtype=V.dtype), -0.5) @ h
        self.M[key] = self.beta * P @ self.M[key] + (1 - self.beta) * S
        return torch.linalg.inv(R) @ self.M[key]

    def halves(self, G: Tensor) -> tuple[Tensor, Tensor]:
        dA = self.side("A", self.B.mT @ G, self.B)
        dB = self.side("B", self.A @ G.mT, self.A.mT).mT
        return dB, dA


class DenseRiemann:
    """RiemannSGD and RiemannAdam: Alg. 6 as corrected, decay towards `anchor` or zero."""

    def __init__(
        self,
        X: Tensor,
        r: int,
        lr: float,
        beta: float,
        decay: float,
        *,
        adam: bool,
        correct: bool = True,
        anchor: Tensor | None = None,
    ) -> None:
        self.X, self.r, self.lr, self.beta, self.decay = X, r, lr, beta, decay
        self.adam, self.correct, self.anchor = adam, correct, anchor
        self.M, self.SA, self.SB, self.t = torch.zeros_like(X), 0.0, 0.0, 0

    def step(self, G: Tensor) -> Tensor:
        self.t += 1
        U, _, V = svd_r(self.X, self.r)
        xi = projection(U, V, G)
        self.M = self.beta * projection(U, V, self.M) + (1 - self.beta) * xi
        left = torch.eye(len(U), dtype=U.dtype) - U @ U.mT
        wA = wB = 1.0
        if self.adam:
            self.SA = 0.999 * self.SA + 0.001 * float((left @ xi).norm() ** 2)
            self.SB = 0.999 * self.SB + 0.001 * float((U.mT @ xi).norm() ** 2)
            k1, k2 = (1 - self.beta**self.t, 1 - 0.999**self.t) if self.correct else (1, 1)
            wA, wB = (1 / (math.sqrt(S / k2) + 1e-8) / k1 for S in (self.SA, self.SB))
        D = wA * left @ self.M + wB * U @ (U.mT @ self.M)
        goal = torch.zeros_like(self.X) if self.anchor is None else self.anchor
        D = D + self.decay * projection(U, V, self.X - goal)
        self.X = truncate(self.X - self.lr * D, self.r)
        return self.X


class DenseMapped:
    """Riemannion with any spectral map of the full momentum, by its SVD; `factor` scales the step (NAMO)."""

    def __init__(self, X: Tensor, r: int, lr: float, beta: float, spectrum: Callable) -> None:
        self.X, self.r, self.lr, self.beta, self.spectrum = X, r, lr, beta, spectrum
        self.M, self.v, self.t = torch.zeros_like(X), 0.0, 0
        self.adaptive = False

    def direction(self, U: Tensor, V: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(self.M, full_matrices=False)
        count = min(2 * self.r, *self.M.shape)
        # The rest is the rounding error of a matrix of rank 2 r.
        mapped = torch.zeros_like(values)
        mapped[:count] = self.spectrum(values[:count])
        return projection(U, V, (left * mapped) @ right)

    def step(self, G: Tensor) -> Tensor:
        self.t += 1
        U, _, V = svd_r(self.X, self.r)
        xi = projection(U, V, G)
        self.M = self.beta * projection(U, V, self.M) + xi
        D = self.direction(U, V)
        if self.adaptive:
            self.v = 0.99 * self.v + 0.01 * float(xi.norm() ** 2)
            average = (1 - self.beta) * float(self.M.norm()) / (1 - self.beta**self.t)
            D = D * average / (math.sqrt(self.v) + 1e-8) * math.sqrt(1 - 0.99**self.t)
        self.X = truncate(self.X - self.lr * D, self.r)
        return self.X
