"""Exact arithmetic of low-rank changes: balance, add, subtract, truncate (docs/method.md 9).

The two halves of an anchored pair nearly cancel, so casting them as they are to fp16 loses up to 7 %
of the change. Balanced factors of the difference lose 0.03 %: balance first, cast afterwards.

All of it is done on the CPU: some accelerators have no fp64, and the factors are thin.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.fixed_rank import Point
from dreamrie.lora.pairs import LoraPair

_log = logging.getLogger(__name__)


class LowRank(NamedTuple):
    """A matrix as a thin product left @ right, scaling 1; left (out, k), right (k, in)."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The matrix itself, (out, in)."""
        return self.left @ self.right


def balance(change: LowRank, *, rank: int | None = None, drop_below: float = 0.0) -> LowRank:
    """The same matrix with factors U sqrt(S) and sqrt(S) V^T, computed in fp64.

    Source: docs/method.md 9. Two thin QRs and the SVD of the small core; no (out, in) matrix.

    Args:
        change: left (out, k), right (k, in).
        rank: keep this many singular values; the lost energy is logged. None keeps all.
        drop_below: drop singular values that are at most this fraction of the first; 1e-7 removes
            rounding dust. At least one is kept.

    Returns:
        fp64 factors on the CPU; the number of columns is min(k, out, in), or fewer when truncated.

    Raises:
        ConfigError: shapes do not fit or rank is below 1.
        NumericalError: a factor is not finite.
    """
    left, right = _exact(change.left), _exact(change.right)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ConfigError(f"factors {tuple(left.shape)} and {tuple(right.shape)} do not multiply.")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}.")
    if not (bool(left.isfinite().all()) and bool(right.isfinite().all())):
        raise NumericalError("a LoRA factor holds values that are not finite; nothing to export.")
    point = _thin_svd(left, right)
    keep = len(point.s) if rank is None else min(rank, len(point.s))
    if drop_below > 0.0:
        keep = max(1, min(keep, int((point.s > drop_below * point.s[0]).sum())))
    if rank is not None and float(point.s[0]) > 0.0:
        _log.info("truncated to rank %d: %.4f of the energy kept", keep, kept_energy(point.s, keep))
    return first_terms(point, keep)


def _thin_svd(left: Tensor, right: Tensor) -> Point:
    """Thin SVD of left @ right from two thin QRs and the SVD of the small core."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return Point(q_left @ u, s, q_right @ vh.T)


def first_terms(point: Point, rank: int) -> LowRank:
    """The first terms of an SVD as balanced factors U sqrt(S) and sqrt(S) V^T.

    By Eckart and Young this is the best approximation of that rank in the Frobenius norm, which is the metric
    projection on the matrices of at most that rank.

    Args:
        point: u (out, k), s (k,) descending, v (in, k).
        rank: how many terms to keep; more than there are keeps all.

    Returns:
        left (out, rank) and right (rank, in).
    """
    root = point.s[:rank].sqrt()
    return LowRank(point.u[:, :rank] * root, root[:, None] * point.v[:, :rank].T)


def _exact(tensor: Tensor) -> Tensor:
    """The tensor on the CPU in fp64; moved first, as its own device may not have that precision."""
    return tensor.cpu().double()


def kept_energy(singular_values: Tensor, rank: int) -> float:
    """Share of sum s^2 that the first `rank` singular values hold; 1 for the zero matrix."""
    squares = _exact(singular_values) ** 2
    total = float(squares.sum())
    return float(squares[:rank].sum()) / total if total > 0.0 else 1.0


def combine(changes: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """Exact weighted sum of changes as one thin product; ranks add, nothing is lost.

    Args:
        changes: at least one, all of the same (out, in).
        weights: one number for each; default all 1. A difference has weights 1 and -1.

    Raises:
        ConfigError: nothing to add, unequal shapes, or a wrong number of weights.
    """
    factors = [1.0] * len(changes) if weights is None else list(weights)
    shapes = {(change.left.shape[0], change.right.shape[1]) for change in changes}
    if len(shapes) != 1 or len(factors) != len(changes):
        raise ConfigError(
            f"cannot add {len(changes)} changes of shapes {sorted(shapes)} with {len(factors)} weights."
        )
    left = torch.cat([weight * c.left for weight, c in zip(factors, changes, strict=True)], dim=1)
    return LowRank(left, torch.cat([c.right for c in changes], dim=0))


def change_of(pair: LoraPair) -> LowRank:
    """The change of a pair with its scaling folded in, anchor included; fp64 copies on the CPU."""
    left = pair.scaling * _exact(pair.left_matrix().detach())
    return LowRank(left, _exact(pair.right_matrix().detach()).clone())


def balanced_factors(
    pair: LoraPair, *, rank: int | None = None, drop_below: float = 0.0
) -> LowRank:
    """The exact change X - X0 of a layer as balanced factors of rank at most 2r, scaling 1.

    On the untouched base weight these factors reproduce the trained layer. Cast them afterwards.

    Args:
        pair: a LoRA pair, anchored or plain.
        rank: truncate to this rank, losing energy (logged); None keeps everything.
        drop_below: see `balance`.

    Returns:
        left (out, k) and right (k, in), fp64, on the CPU.

    Raises:
        NumericalError: a factor is not finite; the message names the layer.
    """
    try:
        return balance(change_of(pair), rank=rank, drop_below=drop_below)
    except NumericalError as error:
        raise NumericalError(f"layer {pair.name!r}: {error}") from error


def export_factors(
    pairs: Iterable[LoraPair], *, rank: int | None = None, drop_below: float = 0.0
) -> dict[str, LowRank]:
    """Balanced factors of every layer, shaped as PEFT stores them (4-d for convolutions).

    Returns:
        layer name -> left `lora_B` (out, k) or (out, k, 1, 1), right `lora_A` (k, in) or
        (k, in, kh, kw); fp64, on the CPU, scaling 1.

    Raises:
        ConfigError: there is no pair.
    """
    found: dict[str, LowRank] = {}
    for pair in pairs:
        left, right = balanced_factors(pair, rank=rank, drop_below=drop_below)
        left = left.reshape(pair.out, -1, *pair.left.shape[2:])
        found[pair.name] = LowRank(left, right.reshape(-1, *pair.right.shape[1:]))
    if not found:
        raise ConfigError("there is no LoRA pair to export.")
    return found
