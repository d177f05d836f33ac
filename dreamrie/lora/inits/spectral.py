"""Starts from a decomposition of the base weight: point and frozen anchor, the weight itself stays as it is."""

from __future__ import annotations

import torch

from dreamrie.errors import ConfigError
from dreamrie.fixed_rank import Point
from dreamrie.lora.inits.request import Request, base_matrix, write_point
from dreamrie.lora.inits.twins import alone


def from_peft(request: Request) -> str:
    """What PEFT computes on a copy of the weight, and would subtract from it (`pissa`, `olora`).

    Args:
        request: what to start.

    Returns:
        Nothing to say.
    """
    for number, pair in enumerate(request.pairs):
        (point,) = alone(pair, request.name, request.seed + number).points()
        write_point(pair, point)
    return ""


def milora(request: Request) -> str:
    """The r smallest of all min(out, in) singular triples.

    Args:
        request: what to start.

    Returns:
        Nothing to say.

    Raises:
        ConfigError: the weight has not full rank, so that they are no point of rank r.
    """
    for pair in request.pairs:
        weight = base_matrix(pair, request.name)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        # Below this the triples are rounding errors.
        floor = float(s[0]) * max(weight.shape) * torch.finfo(s.dtype).eps
        if not float(s[-1]) > floor:
            raise ConfigError(
                f"layer {pair.name!r}: the smallest singular value of its weight is {float(s[-1]):.1e} beside "
                f"{float(s[0]):.1e}, so its last {pair.rank} triples are no point of that rank. Use another start, "
                "or leave the layer out of target_modules."
            )
        r = pair.rank
        write_point(pair, Point(u[:, -r:], s[-r:], vh[-r:].T))
    return ""
