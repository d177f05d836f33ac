"""Examples that the laws run on: thin-SVD points, LoRA pairs, and gradients that need no model.

An `Example` is a few numbers from which everything else follows, so that Hypothesis can draw and shrink it, a failing
one can be written down, and the mutants can run on a fixed list (`POINTS`). Nothing here calls the library's own
geometry: a broken projection must not build its own test data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dreamrie.fixed_rank import Point, Tangent
from dreamrie.riemannion_step import FusedState

F64 = torch.float64
F32 = torch.float32
SPECTRA = ("spread", "equal", "repeated", "conditioned", "tiny")


def noise(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Standard normal numbers, the same for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def frame(seed: int, rows: int, rank: int) -> Tensor:
    return torch.linalg.qr(noise(seed, rows, rank)).Q


@dataclass(frozen=True)
class Example:
    """A point and its surroundings, in fp64."""

    out: int
    in_: int
    rank: int
    spectrum: str = "spread"
    condition: float = 1e3
    seed: int = 0

    @cached_property
    def s(self) -> Tensor:
        r = self.rank
        if self.spectrum == "equal":
            return torch.full((r,), 0.5, dtype=F64)
        if self.spectrum == "conditioned" and r > 1:
            return torch.logspace(0, -float(torch.tensor(self.condition).log10()), r, dtype=F64)
        values = torch.linspace(2, 1, r, dtype=F64) if r > 1 else torch.ones(1, dtype=F64)
        if self.spectrum == "repeated":
            values[: (r + 1) // 2] = 2.0
        if self.spectrum == "tiny" and r > 1:
            values[-1] = 1e-14
        return values

    @cached_property
    def point(self) -> Point:
        u, v = frame(self.seed, self.out, self.rank), frame(self.seed + 1, self.in_, self.rank)
        return Point(u, self.s, v)

    @cached_property
    def x(self) -> Tensor:
        return (self.point.u * self.s) @ self.point.v.mT

    def matrix(self, salt: int = 0) -> Tensor:
        """An ambient matrix of Frobenius norm 1."""
        z = noise(self.seed + 1000 + salt, self.out, self.in_)
        return z / z.norm()

    def normal_free(self, z: Tensor) -> Tensor:
        """Dense tangent projection."""
        u, _, v = self.point
        rest = z - u @ (u.mT @ z)
        return z - (rest - (rest @ v) @ v.mT)

    def tangent(self, salt: int = 0) -> Tangent:
        """A tangent vector of norm 1, made without the library's projection."""
        u, _, v = self.point
        z = self.normal_free(self.matrix(salt))
        z = z / z.norm()
        left = z @ v
        left = left - u @ (u.mT @ left)
        return Tangent(left - u @ (u.mT @ left), z.mT @ u)

    def ambient(self, tangent: Tangent) -> Tensor:
        """The (out, in) matrix of a tangent vector."""
        return tangent.d_left @ self.point.v.mT + self.point.u @ tangent.d_right.mT

    def state(self, momentum: Tangent | None = None) -> FusedState:
        """Optimizer state at the point, a batch of one."""
        u, s, v = self.point
        if momentum is None:
            momentum = Tangent(torch.zeros_like(u), torch.zeros_like(v))
        return FusedState(*(part.unsqueeze(0) for part in (u, s, v, *momentum)))


@st.composite
def examples(
    draw: st.DrawFn, spectra: Sequence[str] = SPECTRA, max_size: int = 48, full_rank: bool = True
) -> Example:
    """Draw points; edge shapes are drawn on purpose, not left to luck."""
    shape = draw(st.sampled_from(("any", "rank one", "full", "over half", "square")))
    out = draw(st.integers(1 if full_rank else 2, max_size))
    in_ = out if shape == "square" else draw(st.integers(1 if full_rank else 2, max_size))
    smaller = min(out, in_) if full_rank else min(out, in_) - 1
    low, high = {
        "rank one": (1, 1),
        "full": (smaller, smaller),
        "over half": (smaller // 2 + 1, smaller),
    }.get(shape, (1, smaller))
    rank = draw(st.integers(min(low, smaller), high))
    condition = 10.0 ** draw(st.integers(0, 8))
    return Example(
        out, in_, rank, draw(st.sampled_from(spectra)), condition, draw(st.integers(0, 10**6))
    )


# Fixed points for the mutants: out != in both ways, rank one, square, 2r > min, r = min, and hard spectra.
POINTS = (
    Example(13, 9, 3, "spread", seed=1),
    Example(9, 14, 4, "conditioned", 1e8, seed=2),
    Example(7, 7, 2, "repeated", seed=3),
    Example(11, 6, 4, "spread", seed=4),
    Example(6, 8, 6, "spread", seed=5),
    Example(5, 12, 1, "equal", seed=6),
    Example(8, 10, 3, "tiny", seed=7),
)
TAME = tuple(point for point in POINTS if point.spectrum not in ("conditioned", "tiny"))


# ------------------------------------------------------------------------------------------------- LoRA pairs


@dataclass(eq=False)
class Pair:
    """The smallest thing that Riemannion accepts as a LoRA layer."""

    name: str
    left: nn.Parameter
    right: nn.Parameter
    scaling: float
    rank: int
    anchor_rank: int = 0

    @property
    def x(self) -> Tensor:
        """The trained point c * left[:, :r] @ right[:r]."""
        left, right = self.left.detach().flatten(1), self.right.detach().flatten(1)
        return self.scaling * left[:, : self.rank] @ right[: self.rank]

    @property
    def change(self) -> Tensor:
        """What the layer adds to the base, anchor included."""
        return self.scaling * self.left.detach().flatten(1) @ self.right.detach().flatten(1)

    def set_gradient(self, gradient: Tensor) -> None:
        """Write what autograd would: the gradients of both factors for the gradient of the change."""
        left, right = self.left.detach().flatten(1), self.right.detach().flatten(1)
        gradient = gradient.to(left.dtype)
        self.left.grad = (self.scaling * gradient @ right.mT).reshape(self.left.shape)
        self.right.grad = (self.scaling * left.mT @ gradient).reshape(self.right.shape)


@dataclass(frozen=True)
class Layer:
    """Shape of one layer of a test model."""

    out: int
    in_: int
    rank: int
    scaling: float = 1.0
    anchored: bool = False


# out != in, both orientations in one batch (10, 6) and (6, 10), r not 1, scaling != 1, 2r > min.
LAYERS = (
    Layer(10, 6, 2, 0.625),
    Layer(6, 10, 2, 2.5),
    Layer(9, 9, 3, 7 / 8**0.5),
    Layer(5, 7, 4, 0.5),
)
ANCHORED = tuple(Layer(a.out, a.in_, a.rank, a.scaling, anchored=True) for a in LAYERS[:3])


def make_pair(layer: Layer, seed: int, dtype: torch.dtype = F64, size: float = 1.0) -> Pair:
    """A pair in the balanced gauge, singular values in size * [1, 2]; anchored ones start at the anchor."""
    u, v = frame(seed, layer.out, layer.rank), frame(seed + 1, layer.in_, layer.rank)
    s = size * torch.linspace(2, 1, layer.rank, dtype=F64) / layer.scaling
    left, right = u * s.sqrt(), v * s.sqrt()
    if layer.anchored:
        left, right = torch.cat([left, -left], dim=1), torch.cat([right, right], dim=1)
    return Pair(
        f"layer{seed}",
        nn.Parameter(left.to(dtype)),
        nn.Parameter(right.mT.contiguous().to(dtype)),
        layer.scaling,
        layer.rank,
        layer.rank if layer.anchored else 0,
    )


def make_pairs(
    layers: Sequence[Layer] = LAYERS, seed: int = 0, dtype: torch.dtype = F64, size: float = 1.0
) -> list[Pair]:
    return [make_pair(layer, seed + 10 * i, dtype, size) for i, layer in enumerate(layers)]


def regauge(pair: Pair, condition: float, seed: int = 0) -> None:
    """Replace (B, A) by (B C, C^-1 A); computed in fp64 and rounded once."""
    left_frame, right_frame = (
        frame(seed, pair.rank, pair.rank),
        frame(seed + 1, pair.rank, pair.rank),
    )
    exponents = (
        torch.linspace(0, 1, pair.rank, dtype=F64) if pair.rank > 1 else torch.ones(1, dtype=F64)
    )
    scales = condition ** (0.5 - exponents)
    mix, inverse = (left_frame * scales) @ right_frame.mT, (right_frame / scales) @ left_frame.mT
    with torch.no_grad():
        pair.left[:, : pair.rank] = (pair.left[:, : pair.rank].to(F64) @ mix).to(pair.left.dtype)
        pair.right[: pair.rank] = (inverse @ pair.right[: pair.rank].to(F64)).to(pair.right.dtype)


@dataclass
class Quadratic:
    """Loss 1/2 |change - T|^2 with gradient noise: a model without a network.

    With `frames` (P, Q) per layer the same problem is posed for P change Q^T, with `transposed` for change^T: the
    right path is then the turned one.
    """

    pairs: Sequence[Pair]
    seed: int = 0
    jitter: float = 0.3
    loss_scale: float = 1.0
    frames: Sequence[tuple[Tensor, Tensor]] | None = None
    transposed: bool = False

    def gradient(self, index: int, change: Tensor, t: int) -> Tensor:
        change = change.to(F64)
        if self.transposed:
            change = change.mT
        if self.frames is not None:
            left, right = self.frames[index]
            change = left.mT @ change @ right
        target = noise(self.seed + 7000 + index, *change.shape)
        extra = self.jitter * noise(self.seed + 90000 + 100 * t + index, *change.shape)
        gradient = self.loss_scale * (change - target + extra)
        if self.frames is not None:
            gradient = left @ gradient @ right.mT
        return gradient.mT if self.transposed else gradient

    def backward(self, t: int) -> None:
        for index, pair in enumerate(self.pairs):
            pair.set_gradient(self.gradient(index, pair.change, t))


def run(
    optimizer: torch.optim.Optimizer, problem: Quadratic, steps: int, start: int = 0
) -> list[list[Tensor]]:
    """Step and return the points after every step."""
    path = []
    for t in range(start, start + steps):
        problem.backward(t)
        optimizer.step()
        path.append([pair.x for pair in problem.pairs])
    return path


def distance(path: list[list[Tensor]], other: list[list[Tensor]]) -> float:
    """Largest relative difference of two paths, over steps and layers."""
    return max(
        float((a.to(F64) - b.to(F64)).norm() / b.to(F64).norm())
        for first, second in zip(path, other, strict=True)
        for a, b in zip(first, second, strict=True)
    )


def moved(path: list[list[torch.Tensor]]) -> float:
    """How far the last point of a path is from the first, relative: the trivial case must be excluded."""
    return distance(path[:1], path[-1:])
