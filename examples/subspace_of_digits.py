"""Intrinsic Muon on three manifolds: problems on real digits whose best answer is known.

    python -m examples.subspace_of_digits

Grassmann finds the plane of 8 dimensions with the largest share of the variance of 8 x 8 pictures of digits; Stiefel
finds the axes in it, in order; SPD finds the Gaussian that makes the pictures, shrunk to 4 x 4, most likely. The
answers are those of principal component analysis and the covariance matrix, so what is printed is the distance to
them. Every step has the length lr, which falls to zero along half a cosine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor, nn

from dreamrie.manifolds import IntrinsicMuon, random_frame

DIMS = 8
LR = 0.1


class Problem(NamedTuple):
    """`gap` is what the loss lacks to its best value, 0 at the optimum; its unit is in `unit`."""

    manifold: str
    start: Tensor
    gap: Callable[[Tensor], Tensor]
    unit: str


def load_pixels(side: int) -> Tensor:
    """Return the digits, (1797, side * side) in [0, 1], centered; side is 8 or 4."""
    pixels = torch.tensor(load_digits().images, dtype=torch.float64).unsqueeze(1) / 16
    pixels = nn.functional.avg_pool2d(pixels, 8 // side).flatten(1)
    return pixels - pixels.mean(dim=0)


def covariance(pixels: Tensor) -> Tensor:
    """Return the covariance of centered rows, divided by their number less one, as PCA does."""
    return pixels.mT @ pixels / (len(pixels) - 1)


def plane(seed: int) -> tuple[Problem, PCA]:
    """The subspace with the largest share of the variance; any basis of it will do."""
    pixels = load_pixels(8)
    c = covariance(pixels)
    pca = PCA(DIMS).fit(pixels.numpy())
    best = float(pca.explained_variance_.sum())

    def gap(y: Tensor) -> Tensor:
        captured = torch.trace(torch.linalg.solve(y.mT @ y, y.mT @ c @ y))
        return (best - captured) / torch.trace(c)

    generator = torch.Generator().manual_seed(seed)
    start = random_frame(len(c), DIMS, generator=generator, dtype=torch.float64)
    return Problem("grassmann", start, gap, "of the variance"), pca


def axes(seed: int) -> tuple[Problem, PCA]:
    """The principal axes themselves: variances along the columns, weighted 8, 7, ..., 1 (Brockett's cost)."""
    problem, pca = plane(seed)
    c = covariance(load_pixels(8))
    weights = torch.arange(DIMS, 0, -1, dtype=torch.float64)
    best = float((torch.tensor(pca.explained_variance_) * weights).sum())

    def gap(x: Tensor) -> Tensor:
        return (best - (x * (c @ x) * weights).sum()) / best

    return Problem("stiefel", problem.start, gap, "of the best value"), pca


def gaussian() -> Problem:
    """The covariance of the most likely Gaussian: that of the data, whatever the start."""
    s = covariance(load_pixels(4))

    def gap(x: Tensor) -> Tensor:
        """Divergence of the Gaussian of x from the best one, in nats."""
        ratio = torch.linalg.solve(x, s)
        return (torch.trace(ratio) - torch.logdet(ratio) - len(s)) / 2

    return Problem("spd", torch.eye(len(s), dtype=torch.float64), gap, "nats")


def solve(problem: Problem, steps: int) -> tuple[Tensor, list[float]]:
    """Return the answer after some steps, and the gap before each step and after the last."""
    parameter = nn.Parameter(problem.start.clone())
    optimizer = IntrinsicMuon([parameter], problem.manifold, lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    gaps = []
    for _ in range(steps):
        optimizer.zero_grad()
        gap = problem.gap(parameter)
        gap.backward()
        optimizer.step()
        schedule.step()
        gaps.append(gap.item())
    gaps.append(problem.gap(parameter.detach()).item())
    return parameter.detach(), gaps


def show(problem: Problem, gaps: list[float]) -> None:
    """Print the gap at the start, after a quarter, a half and all of the steps."""
    last = len(gaps) - 1
    shown = "  ".join(f"{step}: {gaps[step]:.1e}" for step in (0, last // 4, last // 2, last))
    print(f"{problem.manifold:<10} gap at step {shown}  ({problem.unit})")


def main(argv: Sequence[str] | None = None) -> None:
    """Solve the three problems and print how far from the known answers they end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random start on Grassmann, Stiefel"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.process_time()
    problem, pca = plane(options.seed)
    found, gaps = solve(problem, options.steps)
    show(problem, gaps)
    components = torch.tensor(pca.components_)
    cosine = torch.linalg.svdvals(components @ torch.linalg.qr(found).Q)[-1].clamp(max=1)
    print(
        f"           best {pca.explained_variance_ratio_.sum():.4f} of the variance by PCA; ",
        end="",
    )
    print(f"largest angle to its plane {cosine.acos().rad2deg():.2f} degrees")
    problem, _ = axes(options.seed)
    found, gaps = solve(problem, options.steps)
    show(problem, gaps)
    cosines = (components * found.mT).sum(dim=1).abs().clamp(max=1)
    print(
        f"           largest angle to an axis of PCA {cosines.min().acos().rad2deg():.2f} degrees"
    )
    problem = gaussian()
    found, gaps = solve(problem, options.steps)
    show(problem, gaps)
    best = covariance(load_pixels(4))
    ratio = torch.linalg.eigvals(torch.linalg.solve(best, found)).real
    print(f"           variances in every direction right within {(ratio - 1).abs().max():.1e}")
    print(f"{time.process_time() - started:.1f} s of processor time")


if __name__ == "__main__":
    main()
