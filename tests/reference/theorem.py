"""Theorem 5.1 written out densely: the whole set of locally optimal points, and the energy of any point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def matrix(point: Any) -> Tensor:
    return (point.u * point.s) @ point.v.T


def energy(x: Tensor, rank: int, gradient: Tensor) -> float:
    """|P_X(G)|_F^2 by explicit projectors on the column and row space of X."""
    u, _, vh = torch.linalg.svd(x)
    left, right = u[:, rank:], vh[rank:]
    normal = left @ (left.T @ gradient @ right.T) @ right
    return float((gradient - normal).square().sum())


def optimum(gradient: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(gradient)[: 2 * rank].square().sum())


def optimal_family(gradient: Tensor, rank: int, s: Tensor) -> Tensor:
    """Eq. (17) as corrected: [U1, U2 S2] [S11; S21] [C21 C22] [S1 V1^T; V2^T], C = S^-1, S in GL_2r."""
    u, sigma, vh = torch.linalg.svd(gradient, full_matrices=False)
    first, second = slice(0, rank), slice(rank, 2 * rank)
    c = torch.linalg.inv(s)
    left = torch.cat([u[:, first], u[:, second] * sigma[second]], dim=1) @ s[:, first]
    right = c[second] @ torch.cat([sigma[first, None] * vh[first], vh[second]])
    return left @ right
