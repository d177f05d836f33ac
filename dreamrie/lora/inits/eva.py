"""EVA: `lora_A` holds the principal components of the inputs of a layer, `lora_B` is zero."""

from __future__ import annotations

from typing import Any

import torch
from peft import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

from dreamrie.errors import ConfigError
from dreamrie.lora.inits.inputs import Inputs
from dreamrie.lora.inits.request import Request, write_factors
from dreamrie.lora.inits.twins import Twins

# PEFT goes round the batches until the components settle, however long that takes.
MOST_ROUNDS = 16


def begin(request: Request) -> str:
    """Let PEFT find the components, without its redistribution of ranks: every layer keeps its own.

    Args:
        request: what to start, with batches.

    Returns:
        How many forward passes it took.

    Raises:
        ConfigError: a layer sees too few different inputs for its rank.
    """
    for pair in request.pairs:
        if pair.in_ < 2 * pair.rank:
            raise ConfigError(
                f"layer {pair.name!r}: eva of rank {pair.rank} needs at least {2 * pair.rank} input directions, it has "
                f"{pair.in_}. Lower the rank, or use another start."
            )
    twins = Twins(request.pairs, "eva", request.seed, weights=False, eva_config=EvaConfig(rho=1.0))

    def see(number: int, rows: Tensor) -> None:
        twin = twins.layers[number]
        twin(rows.to(twin.weight))

    with Inputs(request, see, least=2 * max(pair.rank for pair in request.pairs)) as inputs:
        passes = _Passes(inputs)
        found: dict[str, Tensor] = get_eva_state_dict(
            twins.holder,
            [torch.tensor(number) for number in range(len(inputs.batches))],
            twins.config,
            forward_fn=passes,
            prepare_model_inputs_fn=_nothing,
            prepare_layer_inputs_fn=None,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    for number, pair in enumerate(request.pairs):
        right = found[f"layer{number}"]
        write_factors(pair, pair.left.new_zeros(pair.out, pair.rank), right)
    return f"{passes.count} forward passes"


class _Passes:
    """A forward pass as PEFT asks for it: by the number of the batch.

    Args:
        inputs: runs them.

    Attributes:
        count: how many there were.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, self.count = inputs, 0

    def __call__(self, model: nn.Module, number: Tensor) -> None:
        """Run one; PEFT itself would go on for ever."""
        limit = MOST_ROUNDS * max(len(self._inputs.batches), 4)
        if self.count == limit:
            raise ConfigError(
                f"eva: the components of some layer have not settled after {limit} forward passes, so it sees fewer "
                "independent inputs than its rank. Give more or larger batches, lower the rank, or use another start."
            )
        self.count += 1
        self._inputs.feed(int(number))


def _nothing(inputs: Any, config: Any) -> None:
    """PEFT asks which tokens count; `Inputs` has left the others out already."""
