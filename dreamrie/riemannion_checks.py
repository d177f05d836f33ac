"""What Riemannion accepts: pairs, options and saved states, each refused with a message that names the culprit."""

from __future__ import annotations

import logging
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dreamrie.errors import ConfigError
from dreamrie.riemannion_layers import layers_of

logger = logging.getLogger(__name__)


class LoraPairLike(Protocol):
    """What the optimizer needs to know of one LoRA layer."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def left(self) -> nn.Parameter:
        """(out, R) or a convolution weight (out, R, 1, 1), R = rank + anchor_rank."""

    @property
    def right(self) -> nn.Parameter:
        """(R, in) or a convolution weight (R, in, kh, kw)."""

    @property
    def scaling(self) -> float:
        """The factor c in front of left @ right."""

    @property
    def rank(self) -> int:
        """Trained columns of left, r."""

    @property
    def anchor_rank(self) -> int:
        """Frozen trailing columns of left, 0 without an anchor."""


def check_pair(pair: LoraPairLike) -> None:
    """Raise ConfigError, naming the pair, when it cannot be a layer of Riemannion."""
    left, right = pair.left, pair.right
    total = pair.rank + pair.anchor_rank
    if (
        left.ndim < 2
        or right.ndim < 2
        or left.flatten(1).shape[1] != total
        or right.shape[0] != total
    ):
        raise ConfigError(
            f"Riemannion: {pair.name} has factors {tuple(left.shape)} and {tuple(right.shape)}; rank {pair.rank} and "
            f"anchor {pair.anchor_rank} need (out, {total}) and ({total}, in)."
        )
    smaller = min(left.shape[0], right.flatten(1).shape[1])
    if not 1 <= pair.rank <= smaller:
        raise ConfigError(
            f"Riemannion: {pair.name} has rank {pair.rank}, allowed is 1..{smaller} for a "
            f"{left.shape[0]} x {right.flatten(1).shape[1]} layer."
        )
    if not left.is_floating_point() or left.dtype != right.dtype or left.device != right.device:
        raise ConfigError(
            f"Riemannion: {pair.name} mixes {left.dtype} on {left.device} and {right.dtype} on {right.device}; one "
            "floating dtype and device is needed."
        )
    if not (0 < pair.scaling < float("inf")):
        raise ConfigError(
            f"Riemannion: {pair.name} has scaling {pair.scaling}; it must be positive."
        )
    if left.requires_grad != right.requires_grad:
        raise ConfigError(
            f"Riemannion: {pair.name} trains one factor of two. Train both (requires_grad) or leave the pair out."
        )
    if left.dtype == torch.float16:
        logger.warning(
            "%s: fp16 factor gradients underflow at small singular values; prefer fp32", pair.name
        )


def check_options(options: dict[str, Any]) -> None:
    """Raise ConfigError for the first option out of its range."""
    for name, low, high, allowed in (
        ("lr", 0.0, math.inf, "a number >= 0 or a one-element tensor"),
        ("momentum", 0.0, 1.0, "in [0, 1)"),
        ("weight_decay", 0.0, math.inf, "a number >= 0"),
        ("sigma_floor", 1e-30, math.inf, "a number >= 1e-30"),
        ("inner_iters", 1, math.inf, "an integer >= 1"),
        ("max_consecutive_skips", 1, math.inf, "an integer >= 1"),
    ):
        value = options[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "lr" and isinstance(value, Tensor):
            number = value.numel() == 1
        if allowed.startswith("an integer"):
            number = number and isinstance(value, int)
        if not number or not low <= float(value) < high:
            raise ConfigError(f"Riemannion: {name} must be {allowed}, got {value!r}.")
    if options["decay_to"] not in ("anchor", "zero"):
        raise ConfigError(
            f"Riemannion: decay_to must be 'anchor' or 'zero', got {options['decay_to']!r}."
        )
    if not isinstance(options["exact_norm"], bool):
        raise ConfigError(f"Riemannion: exact_norm must be a bool, got {options['exact_norm']!r}.")


def check_state(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raise ConfigError unless the saved state is of the same layers."""
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ConfigError(
            f"Riemannion: the state has {len(saved_groups)} parameter groups, the optimizer {len(groups)}."
        )
    for group, saved in zip(groups, saved_groups, strict=True):
        for key in ("names", "rank", "anchor_rank"):
            if saved.get(key, group[key]) != group[key]:
                raise ConfigError(
                    f"Riemannion: the state was saved for {key} {saved[key]}, the optimizer has {group[key]}. Build "
                    "the model and the optimizer as in the saved run."
                )
        if len(saved["params"]) != len(group["params"]):
            raise ConfigError(
                f"Riemannion: the state has {len(saved['params'])} factors, the optimizer {len(group['params'])}."
            )
        for layer in layers_of(group):
            for factor in layer.factors:
                position = 2 * layer.index + int(factor.is_right)
                entry = state_dict["state"].get(saved["params"][position], {})
                for name in ("basis", "momentum"):
                    if entry and name not in entry:
                        raise ConfigError(
                            f"Riemannion: the saved state of {layer.name} has {sorted(entry)} and no {name!r}: it is "
                            "another optimizer's. Load the state that Riemannion.state_dict() gave."
                        )
                    if name in entry and tuple(entry[name].shape) != (factor.rows, layer.rank):
                        raise ConfigError(
                            f"Riemannion: saved {name} of {layer.name} is {tuple(entry[name].shape)}, needed is "
                            f"{(factor.rows, layer.rank)}."
                        )
