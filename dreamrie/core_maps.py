"""Spectral maps of the momentum, all in one place, as functions of its 2r x 2r core.

The momentum is M = Q_left K Q_right^T with orthonormal frames and a small core K (docs/method.md 4.3). An odd function
f of singular values, U f(S) V^T, then satisfies f(M) = Q_left f(K) Q_right^T: whatever orthogonalizes, clips or scales
M is a function of K, costs nothing beside the QRs, and depends on the product of the factors alone. Each map here takes
the place of step 6, and the tangent projection of step 7 follows.

    name            f(sigma)                                      source
    msign           1, null directions masked                     arXiv:2507.12142 (12)
    newton_schulz   five steps of Muon's quintic, 0.68 to 1.21    K. Jordan et al., Muon
    polar_express   seven steps of the best quintics              arXiv:2505.16932
    soft_clip       x / sqrt(1 + x^2), x = sigma / rms(sigma)     arXiv:2603.14315 (SPECTRA)
    frobenius       sigma / |sigma|                               the limit of arXiv:2509.24320 (AuON)
    namo            1 times a noise-adaptive step size            arXiv:2602.17080
    alternating     msign and projection in turn, three times     arXiv:2609.02734

Maps of the entries, such as AuON's cosh or ROOT's threshold, are not of this form: they depend on the axes of the
factors and are not offered.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dreamrie.fixed_rank import masked_msign

if TYPE_CHECKING:
    from jaxtyping import Float

# Muon's coefficients: the slope at zero is as large as it can be while 1 stays in reach.
QUINTIC = (3.4445, -4.7750, 2.0315)
QUINTIC_STEPS = 5
# Below this share of |K| a direction is not brought to size one.
POLAR_LOWEST, POLAR_STEPS = 1e-3, 7
ALTERNATIONS = 3
NAMO_BETA2, NAMO_EPS = 0.99, 1e-8

CoreMap = Callable[["Float[Tensor, '*batch a b']", int], "Float[Tensor, '*batch a b']"]
"""From K and r to the core of the direction before the tangent projection; K = 0 gives 0."""


def msign(core: Tensor, rank: int) -> Tensor:
    """All singular values to one; see `masked_msign`."""
    return masked_msign(core)


def newton_schulz(core: Tensor, rank: int) -> Tensor:
    """Muon's quintic: singular values from 0.002 |K| upwards come to 0.68 to 1.21."""
    x = frobenius(core, rank)
    for _ in range(QUINTIC_STEPS):
        x = odd_quintic(x, QUINTIC)
    return x


def polar_express(core: Tensor, rank: int) -> Tensor:
    """Best odd quintics in a row: singular values from 1e-3 |K| upwards come to one, smaller ones grow 3,700-fold."""
    x = frobenius(core, rank)
    for coefficients in best_quintics(POLAR_LOWEST, POLAR_STEPS):
        x = odd_quintic(x, coefficients)
    return x


def soft_clip(core: Tensor, rank: int) -> Tensor:
    """Take sigma to sigma / sqrt(sigma^2 + tau^2), tau the root mean square of all 2r singular values.

    SPECTRA's tau is a setting and its sigma is not divided by it. Relative to the momentum's own size the scale of the
    loss does not matter: large directions come to one, small ones stay in proportion.
    """
    size = _size(core)
    count = min(core.shape[-2:])
    scaled = core / torch.where(size > 0, size, 1.0) * count**0.5
    left, values, right_t = torch.linalg.svd(scaled, full_matrices=False)
    return (left * (values * (1 + values.square()).rsqrt()).unsqueeze(-2)) @ right_t


def frobenius(core: Tensor, rank: int) -> Tensor:
    """K / |K|: proportions kept, Frobenius norm one."""
    size = _size(core)
    return core / torch.where(size > 0, size, 1.0)


def alternating(core: Tensor, rank: int) -> Tensor:
    """Tangent matrix of spectral norm one from msign and projection in turn (Eq. (13)): the best of three for <K, .>.

    The iterates are compared, and returned, at norm one: before the division the first is always the largest, since
    <K, P(O)> = <K, O> <= |K|_* for every contraction O.
    """
    current, best, score = core, torch.zeros_like(core), torch.zeros_like(_size(core))
    for _ in range(ALTERNATIONS):
        current = masked_msign(current)
        current = torch.cat(
            [
                current[..., :rank, :],
                torch.cat(
                    [current[..., rank:, :rank], torch.zeros_like(current[..., rank:, rank:])], -1
                ),
            ],
            dim=-2,
        )
        norm = torch.linalg.matrix_norm(current, 2)[..., None, None]
        unit = current / torch.where(norm > 0, norm, 1.0)
        value = (core * unit).sum(dim=(-2, -1), keepdim=True)
        best, score = torch.where(value > score, unit, best), torch.maximum(value, score)
    return best


CORE_MAPS: dict[str, CoreMap] = {
    "msign": msign,
    "newton_schulz": newton_schulz,
    "polar_express": polar_express,
    "soft_clip": soft_clip,
    "frobenius": frobenius,
    "namo": msign,
    "alternating": alternating,
}


def _size(core: Tensor) -> Tensor:
    """Frobenius norm, (*, 1, 1)."""
    return torch.linalg.vector_norm(core, dim=(-2, -1), keepdim=True)


def odd_quintic(x: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """Return a x + b x x^T x + c x x^T x x^T x: the polynomial on the singular values."""
    a, b, c = coefficients
    gram = x.mT @ x
    return a * x + x @ (b * gram + c * gram @ gram)


@functools.cache
def best_quintics(lowest: float, steps: int) -> tuple[tuple[float, float, float], ...]:
    """Odd quintics whose composition brings [lowest, 1] closest to one, each the best for where the last one ends.

    The best p on [l, u] meets 1 - e, 1 + e, 1 - e, 1 + e in turn at l, its two extrema and u; the extrema are found by
    Remez exchange. It maps the interval to [1 - e, 1 + e].

    Args:
        lowest: smallest singular value to care for.
        steps: number of polynomials.

    Returns:
        Coefficients (a, b, c) of a x + b x^3 + c x^5 for each step.
    """
    low, high, found = lowest, 1.0, []
    for _ in range(steps):
        first, second = low + (high - low) / 3, low + 2 * (high - low) / 3
        for _ in range(100):
            points = torch.tensor([low, first, second, high], dtype=torch.float64)
            signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
            system = torch.stack([points, points**3, points**5, signs], dim=1)
            a, b, c, error = torch.linalg.solve(system, torch.ones_like(points)).tolist()
            # Where the derivative a + 3 b x^2 + 5 c x^4 vanishes.
            root = math.sqrt(9 * b * b - 20 * a * c)
            before = (first, second)
            first, second = (math.sqrt((sign * root - 3 * b) / (10 * c)) for sign in (-1, 1))
            if abs(first - before[0]) + abs(second - before[1]) < 1e-14 * high:
                break
        found.append((a, b, c))
        low, high = 1 - error, 1 + error
        if error < 1e-7:
            break
    return tuple(found)


def noise_adaptive(
    momentum_norm: Tensor, second_moment: Tensor, steps: Tensor, momentum: float
) -> Tensor:
    """NAMO's factor of the step: how long the averaged gradient is beside the root of the averaged squares.

    Args:
        momentum_norm: norm of the heavy-ball momentum sum of beta^k g, (*,); 1 - beta makes it an average.
        second_moment: average of |g|^2 with weight NAMO_BETA2 on the old value, (*,).
        steps: steps in that average, (*,).
        momentum: beta.

    Returns:
        sqrt(1 - beta2^t) / (1 - beta^t) |average| / (sqrt(second_moment) + eps), (*,); one for equal gradients.
    """
    corrected = (1 - NAMO_BETA2**steps).sqrt() / (1 - momentum**steps)
    return corrected * (1 - momentum) * momentum_norm / (second_moment.sqrt() + NAMO_EPS)
