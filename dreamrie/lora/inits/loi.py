"""Locally optimal initialization as one start among others."""

from __future__ import annotations

from dreamrie.loi import locally_optimal_init
from dreamrie.lora.inits.request import Request


def begin(request: Request) -> str:
    """Move the pairs to X0 = alpha U_1 V_2^T.

    Args:
        request: what to start, with batches and sizes.

    Returns:
        What was found.
    """
    data, loi = request.given_data(), request.loi
    return locally_optimal_init(
        request.model,
        request.pairs,
        data.loss,
        data.batches,
        alpha=loi.alpha,
        estimator=loi.estimator,
        lr=loi.lr,
        generator=request.generator,
        avoid=loi.avoid,
        team=data.team,
    ).summary()
