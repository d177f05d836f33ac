"""Factorizations of many small matrices, by what is fast on their device (docs/performance.md).

On a GPU the kernels of `riemannion_kernels.py` where Triton is there and the matrices are small; what cuSOLVER does
instead waits for the host, and goes through `asking_the_host`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

logger = logging.getLogger(__name__)

# Largest matrices that the kernels for GPUs hold.
_LARGEST_SVD, _LARGEST_CHOLESKY = 128, 64


@functools.cache
def _load_kernels(device: torch.device) -> ModuleType | None:
    """Return the kernels for GPUs, if they are there and can be compiled for this one."""
    try:
        from dreamrie import riemannion_kernels
    except ImportError:
        return None
    try:
        # Triton needs a compiler at the first launch, and a GPU that it knows.
        matrix = torch.eye(2, dtype=torch.float64, device=device).unsqueeze(0)
        riemannion_kernels.values_and_right(matrix)
        riemannion_kernels.cholesky_and_inverse(matrix)
    except riemannion_kernels.FAILURES as error:
        logger.warning("Triton cannot be used on %s, steps are slower: %s", device, error)
        return None
    return riemannion_kernels


def kernels_for(matrix: Tensor, largest: int) -> ModuleType | None:
    """Return the kernels that take matrices up to some size without asking the host; None if there are none."""
    if matrix.device.type != "cuda" or matrix.shape[-1] > largest:
        return None
    return _load_kernels(matrix.device)


HostCall = Callable[[Tensor], tuple[Tensor, ...]]
CallWay = Callable[[HostCall, Tensor], tuple[Tensor, ...]]

way_to_call: ContextVar[CallWay | None] = ContextVar("way_to_call", default=None)
"""How a function is called that waits for the GPU; whoever records a graph puts its own way here, for its thread."""


def asking_the_host(call: HostCall, matrix: Tensor) -> tuple[Tensor, ...]:
    """Call a function that waits for the GPU.

    Args:
        call: takes the matrix.
        matrix: of any device.

    Returns:
        What it returns.
    """
    way = way_to_call.get()
    return call(matrix) if way is None else way(call, matrix)


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
