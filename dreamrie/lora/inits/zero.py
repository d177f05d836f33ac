"""PEFT's random starts whose product is zero."""

from __future__ import annotations

import torch

from dreamrie.errors import ConfigError
from dreamrie.lora.inits.request import Request, write_factors
from dreamrie.lora.inits.twins import alone


def from_peft(request: Request) -> str:
    """`default` and `gaussian`: a random `lora_A`, a zero `lora_B`.

    Args:
        request: what to start.

    Returns:
        Nothing to say.
    """
    name = True if request.name == "default" else request.name
    for number, pair in enumerate(request.pairs):
        ((left, right),) = alone(pair, name, request.seed + number).factors()
        write_factors(pair, left, right)
    return ""


def orthogonal(request: Request) -> str:
    """Two random factors that meet in orthogonal subspaces.

    Args:
        request: what to start.

    Returns:
        Nothing to say.

    Raises:
        ConfigError: the rank of a layer is odd.
    """
    for number, pair in enumerate(request.pairs):
        if pair.rank % 2:
            raise ConfigError(
                f"layer {pair.name!r}: init 'orthogonal' splits the rank in two halves; {pair.rank} is odd."
            )
        ((left, right),) = alone(pair, request.name, request.seed + number).factors()
        # PEFT draws in fp32, so the product vanishes to 1e-8 only; this makes it vanish in fp64 too.
        half = pair.rank // 2
        basis, values, rows = torch.linalg.svd(right, full_matrices=False)
        basis, values, rows = basis[:, :half], values[:half], rows[:half]
        write_factors(pair, left - (left @ basis) @ basis.T, (basis * values) @ rows)
    return ""
