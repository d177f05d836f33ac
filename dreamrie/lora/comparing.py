"""Spectra of low-rank changes, and distances and angles between them, from their factors alone.

A change is left @ right with thin factors; nothing here forms the (out, in) matrix. Factors of convolutions come as
PEFT stores them, left (out, k, 1, 1) and right (k, in, kh, kw), and stand for the matrix (out, in * kh * kw). All of
it is computed on the CPU in fp64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.fixed_rank import Point
from dreamrie.lora.arithmetic import LowRank, _exact, _thin_svd, combine, first_terms, kept_energy

# Directions below this fraction of the first are rounding of fp32 files, not directions of the change.
DUST = 1e-7


def as_matrix(change: LowRank) -> LowRank:
    """The factors as fp64 matrices on the CPU.

    Args:
        change: left (out, k, ...), right (k, in, ...).

    Returns:
        left (out, k), right (k, in * ...).

    Raises:
        ConfigError: the factors do not multiply.
        NumericalError: a value is not finite.
    """
    left, right = _exact(change.left).flatten(1), _exact(change.right).flatten(1)
    if left.shape[1] != right.shape[0]:
        raise ConfigError(f"factors {tuple(left.shape)} and {tuple(right.shape)} do not multiply.")
    if not (bool(left.isfinite().all()) and bool(right.isfinite().all())):
        raise NumericalError("a LoRA factor holds values that are not finite.")
    return LowRank(left, right)


def shaped_like(change: LowRank, sample: LowRank) -> LowRank:
    """Factors of a matrix in the shape of a layer's own.

    Args:
        change: left (out, k), right (k, in).
        sample: factors of the same layer, of any rank.

    Returns:
        The same numbers; 4-d if the sample's are.
    """
    rank = change.left.shape[1]
    left = change.left.reshape(-1, rank, *sample.left.shape[2:])
    return LowRank(left, change.right.reshape(rank, *sample.right.shape[1:]))


def decompose(change: LowRank) -> Point:
    """Thin SVD of a change.

    Args:
        change: see `as_matrix`.

    Returns:
        u (out, k), s (k,) descending, possibly with zeros at the end, v (in, k); k is at most the stored rank.

    Raises:
        ConfigError: the factors do not multiply.
        NumericalError: a value is not finite.
    """
    return _thin_svd(*as_matrix(change))


def truncate(change: LowRank, rank: int) -> LowRank:
    """The best approximation of at most a given rank.

    Args:
        change: see `as_matrix`.
        rank: at least 1.

    Returns:
        Balanced factors in fp64, of the rank asked for or of the stored one if that is lower.

    Raises:
        ConfigError: the rank is below 1, or the factors do not multiply.
        NumericalError: a value is not finite.
    """
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}.")
    return shaped_like(first_terms(decompose(change), rank), change)


def effective_rank(singular_values: Tensor) -> float:
    """exp(H) with the entropy H = -sum p ln p of p_i = s_i^2 / sum s^2 (Roy and Vetterli, of the energies).

    k equal singular values give k, one alone gives 1.

    Args:
        singular_values: (k,), not negative.

    Returns:
        Between 1 and k; 0 for the zero matrix.
    """
    squares = _exact(singular_values) ** 2
    total = float(squares.sum())
    if total <= 0.0:
        return 0.0
    shares = squares[squares > 0.0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def rank_for_energy(spectra: Iterable[Tensor], share: float) -> int:
    """The smallest uniform rank at which all layers together keep a share of their energy.

    Args:
        spectra: singular values of each layer, descending.
        share: of sum s^2 over all layers; in (0, 1].

    Returns:
        At least 1.

    Raises:
        ConfigError: the share is no share, or there is no layer.
    """
    values = [_exact(spectrum) ** 2 for spectrum in spectra]
    if not values or not 0.0 < share <= 1.0:
        raise ConfigError(f"energy must be above 0 and at most 1, got {share}.")
    longest = max(len(squares) for squares in values)
    by_rank = torch.zeros(longest, dtype=torch.float64)
    for squares in values:
        by_rank[: len(squares)] += squares
    roots = by_rank.sqrt()
    # Asked for everything, the sum of all but rounding is everything.
    wanted = min(share, 1.0 - 1e-14)
    return next(k for k in range(1, longest + 1) if kept_energy(roots, k) >= wanted)


def change_norm(change: LowRank) -> float:
    """Frobenius norm of a change.

    Args:
        change: see `as_matrix`.

    Returns:
        The norm, to fp64's rounding relative to the factors.
    """
    left, right = as_matrix(change)
    core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
    return float(torch.linalg.vector_norm(core))


def inner(first: LowRank, second: LowRank) -> float:
    """Frobenius inner product of two changes of one layer: trace(D1^T D2) = sum (L1^T L2) * (R1 R2^T).

    Args:
        first: see `as_matrix`.
        second: of the same matrix shape.

    Returns:
        The inner product.
    """
    a, b = as_matrix(first), as_matrix(second)
    return float(((a.left.T @ b.left) * (a.right @ b.right.T)).sum())


def distance(first: LowRank, second: LowRank) -> float:
    """Frobenius distance of two changes of one layer.

    It is the norm of the product [L1, -L2][R1; R2], not the root of a difference of squares, which would lose half
    of the digits of nearly equal changes.

    Args:
        first: see `as_matrix`.
        second: of the same matrix shape.

    Returns:
        The distance.
    """
    return change_norm(combine([as_matrix(first), as_matrix(second)], [1.0, -1.0]))


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between two subspaces, in degrees, ascending.

    Source: Bjorck and Golub 1973. Cosines are the singular values of U1^T U2, sines those of (I - U1 U1^T) U2; small
    angles have no digits in their cosine and large ones none in their sine, so both are used.

    Args:
        first: (n, p) orthonormal columns.
        second: (n, q) orthonormal columns.

    Returns:
        (min(p, q),) from 0 to 90.
    """
    if second.shape[1] > first.shape[1]:
        first, second = second, first
    inside = first.T @ second
    cosines = torch.linalg.svdvals(inside)
    # The projector removes what both share; of what is left, the smallest sine belongs to the largest cosine.
    sines = torch.linalg.svdvals(second - first @ inside).flip(0)
    return torch.rad2deg(torch.atan2(sines, cosines))


def frames(point: Point) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the column and the row space of a change.

    Args:
        point: see `decompose`.

    Returns:
        (out, r) and (in, r), where r counts the singular values above the rounding of fp32 files.
    """
    rank = int((point.s > DUST * point.s[0]).sum()) if len(point.s) else 0
    return point.u[:, :rank], point.v[:, :rank]
