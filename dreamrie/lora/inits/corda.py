"""CorDA: leading triples of the base weight times the covariance of its inputs, as point and frozen anchor.

With C the covariance of the inputs, X0 = U_r S_r V_r^T C^-1 from the SVD W C = U S V^T, so that X0 C is the best
approximation of W C of rank r. PEFT computes the same in fp32 (`preprocess_corda`, mode ipm) with the help of a
package that it does not ask for; here fp64 spares the search for a damping that fp32 can invert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dreamrie.errors import ConfigError
from dreamrie.fixed_rank import Point, point_from_factors
from dreamrie.lora.inits.inputs import Inputs
from dreamrie.lora.inits.request import Request, base_matrix, dtype_of, write_point

if TYPE_CHECKING:
    from jaxtyping import Float

# Share of its mean diagonal that is added to the covariance, as in PEFT.
DAMPING = 0.01


def begin(request: Request) -> str:
    """Collect the covariance of the inputs of each layer, and decompose.

    Args:
        request: what to start, with batches.

    Returns:
        How many batches were seen.

    Raises:
        ConfigError: the inputs of a layer are all zero or not finite.
    """
    sums: dict[int, Tensor] = {}
    calls = [0] * len(request.pairs)

    def see(number: int, rows: Tensor) -> None:
        covariance = scaled_covariance(rows)
        calls[number] += 1
        sums[number] = sums[number] + covariance if number in sums else covariance

    with Inputs(request, see, least=1) as inputs:
        for number in range(len(inputs.batches)):
            inputs.feed(number)
    for number, pair in enumerate(request.pairs):
        covariance = sums.pop(number) / calls[number]
        if not (bool(covariance.isfinite().all()) and float(covariance.trace()) > 0.0):
            raise ConfigError(
                f"layer {pair.name!r}: its inputs in these batches are zero or not finite, so corda has no covariance. "
                "Give other batches, or use another start."
            )
        weight = base_matrix(pair, request.name).to(covariance)
        start = oriented(weight, covariance, pair.rank)
        write_point(pair, Point(*(part.to(dtype_of(pair)) for part in start)))
    return f"{len(inputs.batches)} batches"


def scaled_covariance(rows: Float[Tensor, "n in_"]) -> Float[Tensor, "in_ in_"]:
    """Second moments of the inputs of one call, in units of its largest entry: each call counts about the same.

    Args:
        rows: (n, in).

    Returns:
        (in, in), fp64, not divided by n, as in PEFT.
    """
    wide = rows.double()
    wide = wide / wide.max().abs()
    return wide.T @ wide


def oriented(
    weight: Float[Tensor, "out in_"], covariance: Float[Tensor, "in_ in_"], rank: int
) -> Point:
    """The start of one layer.

    Args:
        weight: W, fp64.
        covariance: C without damping, fp64.
        rank: r.

    Returns:
        X0 = U_r S_r V_r^T C^-1 with C damped.
    """
    damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(
        len(covariance), dtype=covariance.dtype, device=covariance.device
    )
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    right = torch.linalg.solve(damped, vh[:rank].T)
    return point_from_factors(u[:, :rank] * s[:rank], right, 1.0)
