"""SPD, Stiefel and Grassmann a second time: from their definitions, in fp64, with no function of the library.

Norms come from eigenvalues of X^{-1} xi and its like, never from matrix roots; tangent vectors from their defining
equation; signs from eigenvectors, exponentials from `matrix_exp`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.strategies import F64, frame, noise


def sign_of(matrix: Tensor) -> Tensor:
    """M (M^T M)^{-1/2} over the eigenvectors with eigenvalues above 1e-13 of the largest."""
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    keep = values > 1e-13 * values.amax().clamp(min=1e-300)
    weights = torch.where(keep, values.clamp(min=1e-300).rsqrt(), 0.0)
    return matrix @ (vectors * weights) @ vectors.mT


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.mT


@dataclass(frozen=True)
class Case:
    """One manifold at one size."""

    name: str
    n: int
    p: int
    seed: int = 0

    def point(self) -> Tensor:
        q = frame(self.seed, self.n, self.p)
        if self.name == "spd":
            scales = torch.logspace(1, -1, self.n, dtype=F64)
            return (q * scales) @ q.mT
        if self.name == "grassmann":
            scales = torch.logspace(0.5, -0.5, self.p, dtype=F64)
            return (q * scales) @ frame(self.seed + 7, self.p, self.p)
        return q

    def euclidean(self, salt: int = 0) -> Tensor:
        """A gradient with no symmetry at all."""
        return noise(self.seed + 100 + salt, self.n, self.p)

    def tangent(self, x: Tensor, salt: int = 0) -> Tensor:
        return self.made_tangent(x, noise(self.seed + 1000 + salt, self.n, self.p))

    def made_tangent(self, x: Tensor, z: Tensor) -> Tensor:
        if self.name == "spd":
            return (z + z.mT) / 2
        if self.name == "stiefel":
            inner = x.mT @ z
            return z - x @ (inner + inner.mT) / 2
        return z - x @ torch.linalg.solve(x.mT @ x, x.mT @ z)

    def defect(self, x: Tensor, xi: Tensor) -> Tensor:
        """How far xi is from the defining equation of tangency."""
        if self.name == "spd":
            return (xi - xi.mT).abs().amax()
        if self.name == "stiefel":
            return (x.mT @ xi + xi.mT @ x).abs().amax()
        return (x.mT @ xi).abs().amax()

    def point_defect(self, x: Tensor, start: Tensor) -> Tensor:
        """How far x is from the manifold; on Grassmann from the Gram matrix that it had."""
        if self.name == "spd":
            assert bool((torch.linalg.eigvals(x).real > 0).all())
            return (x - x.mT).abs().amax()
        gram = start.mT @ start if self.name == "grassmann" else torch.eye(self.p, dtype=F64)
        return (x.mT @ x - gram).abs().amax()

    def inner(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if self.name == "spd":
            inverse = torch.linalg.inv(x)
            return torch.trace(inverse @ a @ inverse @ b)
        if self.name == "stiefel":
            return torch.trace(a.mT @ b)
        return torch.trace(torch.linalg.inv(x.mT @ x) @ a.mT @ b)

    def singular_values(self, x: Tensor, xi: Tensor) -> Tensor:
        """Of G^{1/2} xi, through eigenvalues of products without a root; batched over xi.

        A square root turns the rounding of a zero eigenvalue into 1e-8, so the smallest are set to zero.
        """
        if self.name == "spd":
            return torch.linalg.eigvals(torch.linalg.inv(x) @ xi).abs()
        if self.name == "stiefel":
            turn = x.mT @ xi
            normal = xi - x @ turn
            grams = torch.cat([torch.linalg.eigvalsh(b.mT @ b) for b in (turn, normal)], dim=-1)
            return torch.where(grams > 1e-13, grams, 0.0).sqrt()
        return torch.linalg.eigvals(torch.linalg.inv(x.mT @ x) @ xi.mT @ xi).abs().sqrt()

    def size(self, x: Tensor, xi: Tensor) -> Tensor:
        """Intrinsic spectral norm, (*,)."""
        return self.singular_values(x, xi).amax(dim=-1)

    def direction(self, x: Tensor, m: Tensor) -> Tensor:
        """The closed forms, written out."""
        if self.name == "spd":
            root, inverse = power(x, 0.5), power(x, -0.5)
            return root @ sign_of(inverse @ m @ inverse) @ root
        if self.name == "stiefel":
            turn = x.mT @ m
            # A square point has no normal part, and rounding has no sign.
            normal = torch.zeros_like(m) if self.n == self.p else sign_of(m - x @ turn)
            return x @ sign_of(turn) + normal
        gram = x.mT @ x
        return sign_of(m @ power(gram, -0.5)) @ power(gram, 0.5)

    def gradient(self, x: Tensor, euclidean: Tensor) -> Tensor:
        if self.name == "spd":
            return x @ (euclidean + euclidean.mT) @ x / 2
        tangent = self.made_tangent(x, euclidean)
        return tangent if self.name == "stiefel" else tangent @ x.mT @ x

    def retract(self, x: Tensor, xi: Tensor) -> Tensor:
        if self.name == "spd":
            return x @ torch.matrix_exp(torch.linalg.inv(x) @ xi)
        moved = x + xi
        if self.name == "stiefel":
            return moved @ power(moved.mT @ moved, -0.5)
        root = power(x.mT @ x, 0.5)
        unit = moved @ torch.linalg.inv(root)
        return unit @ power(unit.mT @ unit, -0.5) @ root

    def transport(self, x: Tensor, xi: Tensor, y: Tensor) -> Tensor:
        if self.name == "spd":
            root, inverse = power(x, 0.5), power(x, -0.5)
            carrier = root @ power(inverse @ y @ inverse, 0.5) @ inverse
            return carrier @ xi @ carrier.mT
        return self.made_tangent(y, xi)


CASES = (
    Case("spd", 4, 4),
    Case("spd", 5, 5, seed=3),
    Case("stiefel", 6, 3, seed=1),
    Case("stiefel", 5, 4, seed=2),
    Case("stiefel", 4, 4, seed=4),
    Case("grassmann", 6, 3, seed=5),
    Case("grassmann", 7, 2, seed=6),
)
TINY = (
    Case("spd", 2, 2),
    Case("stiefel", 3, 2, seed=1),
    Case("stiefel", 3, 1, seed=2),
    Case("grassmann", 3, 1, seed=3),
    Case("grassmann", 3, 2, seed=4),
)


def loss_of(case: Case, matrix: Tensor) -> Tensor:
    """A smooth function with a meaning: Gaussian likelihood, Brockett's cost, share of a subspace."""
    c = torch.diag(torch.linspace(3, 1, case.n, dtype=F64))
    if case.name == "spd":
        return torch.logdet(matrix) + torch.trace(torch.linalg.solve(matrix, c))
    if case.name == "stiefel":
        weights = torch.linspace(2, 1, case.p, dtype=F64)
        return -(matrix * (c @ matrix) * weights).sum()
    return -torch.trace(torch.linalg.solve(matrix.mT @ matrix, matrix.mT @ c @ matrix))


def slope_of(case: Case, x: Tensor) -> Tensor:
    """Euclidean gradient of `loss_of`, by autograd."""
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(case, leaf), leaf)
    return gradient
