"""LoRA-GA: singular vectors of the gradient as factors, as point and frozen anchor."""

from __future__ import annotations

import functools

import torch
from peft import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from dreamrie.errors import ConfigError
from dreamrie.loi.estimators import mean_gradient
from dreamrie.lora.inits.request import Request, write_point
from dreamrie.lora.inits.twins import alone


def begin(request: Request) -> str:
    """Let PEFT compute the start from the mean gradient, with its own direction and scale.

    Args:
        request: what to start, with batches.

    Returns:
        How many batches were seen.

    Raises:
        ConfigError: no gradient reaches a layer.
    """
    data = request.given_data()
    found, count = mean_gradient(
        request.model,
        request.pairs,
        data.loss,
        data.team.share(data.batches),
        request.generator,
        team=data.team,
    )
    for number, (pair, svd) in enumerate(zip(request.pairs, found, strict=True)):
        # PEFT decomposes in fp32, where smaller ones are rounding errors.
        floor = float(svd.values[0]) * torch.finfo(torch.float32).eps
        if svd.matrix is None or not float(svd.values[2 * pair.rank - 1]) > floor:
            raise ConfigError(
                f"layer {pair.name!r}: its gradient has rank below {2 * pair.rank}, so lora_ga has no start of rank "
                f"{pair.rank} there. Give more batches, lower the rank, or use another start."
            )
        twins = alone(pair, "lora_ga", request.seed + number, lora_ga_config=LoraGAConfig())
        hand_over = functools.partial(_hand_over, twins.layers[0], svd.matrix)
        preprocess_loraga(twins.holder, twins.config, hand_over)
        (point,) = twins.points()
        write_point(pair, point)
    return f"{count} batches"


def _hand_over(twin: nn.Linear, gradient: Tensor) -> None:
    """One backward pass that gives the weight exactly this gradient: dy^T x with x = G and dy = 1."""
    # PEFT counts backward passes with a hook, which wants an input with a gradient.
    rows = gradient.to(twin.weight).detach().requires_grad_()
    twin(rows).backward(torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
