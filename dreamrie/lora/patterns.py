"""PEFT's settings by which layers differ: rank_pattern, alpha_pattern and the strength that follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from peft.utils.other import get_pattern_key


@dataclass(frozen=True)
class StatedStrength:
    """What PEFT's settings say about rank and strength.

    Attributes:
        rank: r of the layers that no pattern names.
        alpha: lora_alpha of those.
        ranks: rank_pattern, name or regular expression to r.
        alphas: alpha_pattern, the same to lora_alpha.
        by_root: alpha is divided by the root of r (use_rslora).
    """

    rank: float
    alpha: float
    ranks: Mapping[str, float] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False

    def of(self, layer: str) -> tuple[float, float]:
        """Rank and scaling of a layer, which patterns are matched with as PEFT does it.

        Args:
            layer: its path in the model that the settings were written for.

        Returns:
            r, and alpha / r or alpha / sqrt(r).
        """
        rank = self.ranks.get(_key(self.ranks, layer), self.rank)
        alpha = self.alphas.get(_key(self.alphas, layer), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.by_root else rank)


def _key(patterns: Iterable[str], layer: str) -> str:
    found: str = get_pattern_key(list(patterns), layer)
    return found
