"""Factorizations of many small matrices, by what is fast on their device (docs/performance.md).

On a GPU the kernels of `riemannion_kernels.py` where Triton is there and the matrices are small; what cuSOLVER does
instead waits for the host, and goes through `asking_the_host`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# Largest matrices that the kernels for GPUs hold.
_LARGEST_SVD, _LARGEST_CHOLESKY = 128, 64


@functools.cache
def _load_kernels() -> ModuleType | None:
    """Return the kernels for GPUs, if Triton is there."""
    try:
        from dreamrie import riemannion_kernels
    except ImportError:
        return None
    return riemannion_kernels


def kernels_for(matrix: Tensor, largest: int) -> ModuleType | None:
    """Return the kernels that take matrices up to some size without asking the host; None if there are none."""
    if matrix.device.type != "cuda" or matrix.shape[-1] > largest:
        return None
    return _load_kernels()


HostCall = Callable[[Tensor], tuple[Tensor, ...]]


def _at_once(call: HostCall, matrix: Tensor) -> tuple[Tensor, ...]:
    return call(matrix)


asking_the_host = _at_once
"""How a function is called that waits for the GPU; whoever records a graph puts another way here."""


def triangles(gram: Float[Tensor, "batch r r"]) -> tuple[Tensor, Tensor, Bool[Tensor, " batch"]]:
    """Cholesky factors.

    Args:
        gram: symmetric, fp64.

    Returns:
        L with L L^T = gram, the inverse of L^T, and where there is no L; nothing is of use there.
    """
    kernels = kernels_for(gram, _LARGEST_CHOLESKY)
    if kernels is not None:
        lower, inverse, failed = kernels.cholesky_and_inverse(gram)
        return lower, inverse.mT, failed
    lower, inverse, failed = asking_the_host(_cholesky, gram)
    return lower, inverse, failed != 0


def _cholesky(gram: Tensor) -> tuple[Tensor, ...]:
    lower, failed = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower.mT, identity.expand_as(lower), upper=True)
    return lower, inverse, failed


def decompose(matrix: Float[Tensor, "batch k k"]) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of square matrices in fp64 as exact as fp32 data need it: left, values (descending), right.

    From the eigenvectors of matrix^T matrix, or by the kernels for GPUs; a left vector is zero where the value is below
    1e-9 of the largest.
    """
    kernels = kernels_for(matrix, _LARGEST_SVD)
    if kernels is not None:
        values, right_t = kernels.values_and_right(matrix)
        right = right_t.mT
    else:
        values, right = asking_the_host(_eigenvectors, matrix)
    some = values > 1e-9 * values[..., :1]
    left = matrix @ right / torch.where(some, values, 1.0).unsqueeze(-2)
    return left * some.to(left.dtype).unsqueeze(-2), values, right


def _eigenvectors(matrix: Tensor) -> tuple[Tensor, ...]:
    """Not cuSOLVER's gesvda, which is faster on a GPU and gives up where singular values are equal or zero."""
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    return squares.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)
