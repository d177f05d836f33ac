"""Linear layers that stand in for adapted ones, so that PEFT can compute a start on them.

PEFT's starts take plain Linear layers in half or single precision and may rewrite the base weight. A twin holds a copy
of the matrix of a layer, so convolutions and fp64 layers are treated like any other and no base weight is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dreamrie.fixed_rank import Point, point_from_factors
from dreamrie.lora.inits.request import base_matrix, dtype_of
from dreamrie.lora.injecting import seeded
from dreamrie.lora.pairs import LoraPair, lora_pairs


class Twins:
    """One twin for each pair, and PEFT's settings for them.

    Args:
        pairs: adapted layers.
        init: `init_lora_weights` of PEFT.
        seed: of what PEFT draws.
        weights: copy the base weights; else the twins have one output and no meaning but their inputs.
        options: further settings of `LoraConfig`.

    Attributes:
        pairs: as given.
        layers: the twins, in the order of the pairs.
        holder: the same as one module, for PEFT.
        config: for `holder`; scaling 1.
    """

    def __init__(
        self,
        pairs: Sequence[LoraPair],
        init: str | bool,
        seed: int,
        *,
        weights: bool = True,
        **options: Any,
    ) -> None:
        self.pairs = list(pairs)
        self._seed = seed
        self.layers: list[nn.Linear] = []
        for pair in self.pairs:
            with seeded(pair.module, seed):
                twin = nn.Linear(
                    pair.in_, pair.out if weights else 1, bias=False, device=pair.left.device
                )
            if weights and init not in (True, "gaussian", "orthogonal"):  # which are random
                twin.weight.data = base_matrix(pair, str(init)).float()
            twin.weight.requires_grad_(False)
            self.layers.append(twin)
        self.holder = nn.ModuleDict({f"layer{n}": layer for n, layer in enumerate(self.layers)})
        ranks = {f"layer{number}": pair.rank for number, pair in enumerate(self.pairs)}
        largest = max(ranks.values())
        uneven = {name: rank for name, rank in ranks.items() if rank != largest}
        self.config = LoraConfig(
            r=largest,
            lora_alpha=largest,
            rank_pattern=dict(uneven),
            alpha_pattern=dict(uneven),
            target_modules=list(ranks),
            init_lora_weights=init,
            **options,
        )

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Let PEFT make the start.

        Returns:
            (out, r) and (r, in) of each pair, in the precision that its start is computed in; scaling 1.
        """
        with seeded(self.pairs[0].module, self._seed):
            inject_adapter_in_model(self.config, self.holder)
        return [
            (
                made.left_matrix().detach().to(dtype_of(pair)),
                made.right_matrix().detach().to(dtype_of(pair)),
            )
            for pair, made in zip(self.pairs, lora_pairs(self.holder), strict=True)
        ]

    def points(self) -> list[Point]:
        """Let PEFT make a start of rank r.

        Returns:
            The product of the factors of each pair.
        """
        return [point_from_factors(left, right.T, 1.0) for left, right in self.factors()]


def alone(pair: LoraPair, init: str | bool, seed: int, **options: Any) -> Twins:
    """The twin of one pair: no more than one copy of a weight is held at a time."""
    return Twins([pair], init, seed, **options)
