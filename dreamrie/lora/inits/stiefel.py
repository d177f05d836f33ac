"""Random starts with orthonormal columns: points of two Stiefel manifolds, or of one.

The letters of the paper's Table 7 are crossed with PEFT's: its A is `lora_B`, its B is `lora_A` transposed.
"""

from __future__ import annotations

import math

import torch

from dreamrie.fixed_rank import Point, random_point
from dreamrie.lora.inits.request import Request, dtype_of, write_factors, write_point
from dreamrie.lora.pairs import LoraPair


def orthonormal(request: Request) -> str:
    """Singular values |alpha|, by default 0.1 / sqrt(r).

    Args:
        request: what to start.

    Returns:
        Nothing to say.
    """
    for pair in request.pairs:
        alpha = request.loi.alpha
        size = 0.1 / math.sqrt(pair.rank) if alpha is None else abs(alpha)
        write_point(pair, _frames(request, pair, size))
    return ""


def stiefel_both(request: Request) -> str:
    """Both factors orthonormal: singular values 1.

    Args:
        request: what to start.

    Returns:
        Nothing to say.
    """
    for pair in request.pairs:
        write_point(pair, _frames(request, pair, 1.0))
    return ""


def stiefel_a(request: Request) -> str:
    """Orthonormal columns of `lora_B`, zero `lora_A`.

    Args:
        request: what to start.

    Returns:
        Nothing to say.
    """
    for pair in request.pairs:
        right = pair.right.new_zeros(pair.rank, pair.in_)
        write_factors(pair, _frames(request, pair, 1.0).u, right)
    return ""


def stiefel_b(request: Request) -> str:
    """Orthonormal rows of `lora_A`, zero `lora_B`.

    Args:
        request: what to start.

    Returns:
        Nothing to say.
    """
    for pair in request.pairs:
        left = pair.left.new_zeros(pair.out, pair.rank)
        write_factors(pair, left, _frames(request, pair, 1.0).v.T)
    return ""


def _frames(request: Request, pair: LoraPair, size: float) -> Point:
    """A random point with equal singular values."""
    drawn = random_point(
        pair.out, pair.in_, pair.rank, generator=request.generator, dtype=dtype_of(pair)
    )
    return Point(drawn.u, torch.full_like(drawn.s, size), drawn.v)
