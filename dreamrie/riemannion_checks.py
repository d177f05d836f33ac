"""What Riemannion and its like accept: pairs, options and saved states; each refusal names the culprit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dreamrie.core_maps import CORE_MAPS
from dreamrie.errors import ConfigError
from dreamrie.riemannion_layers import Factor, Layer, layers_of
from dreamrie.team import is_spread

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


def check_pair(pair: LoraPairLike, who: str = "Riemannion") -> None:
    """Raise ConfigError, naming the pair, when it cannot be a layer of the optimizer `who`."""
    left, right = pair.left, pair.right
    total = pair.rank + pair.anchor_rank
    if getattr(pair, "magnitude", None) is not None:
        raise ConfigError(
            f"{who}: {pair.name} has a magnitude (DoRA), which rescales the rows of the weight: its change is no "
            "longer the product of the factors, which this optimizer moves. Attach with use_dora=False, or use adamw."
        )
    if is_spread(left) or is_spread(right):
        raise ConfigError(
            f"{who}: {pair.name} has factors that are spread over processes, and a step needs all of both. Leave the "
            "adapters out of FSDP: fully_shard(..., ignored_params=...) with the factors of all pairs."
        )
    if (
        left.ndim < 2
        or right.ndim < 2
        or left.flatten(1).shape[1] != total
        or right.shape[0] != total
    ):
        raise ConfigError(
            f"{who}: {pair.name} has factors {tuple(left.shape)} and {tuple(right.shape)}; rank {pair.rank} and "
            f"anchor {pair.anchor_rank} need (out, {total}) and ({total}, in)."
        )
    smaller = min(left.shape[0], right.flatten(1).shape[1])
    if not 1 <= pair.rank <= smaller:
        raise ConfigError(
            f"{who}: {pair.name} has rank {pair.rank}, allowed is 1..{smaller} for a "
            f"{left.shape[0]} x {right.flatten(1).shape[1]} layer."
        )
    if not left.is_floating_point() or left.dtype != right.dtype or left.device != right.device:
        raise ConfigError(
            f"{who}: {pair.name} mixes {left.dtype} on {left.device} and {right.dtype} on {right.device}; one "
            "floating dtype and device is needed."
        )
    if not (0 < pair.scaling < float("inf")):
        raise ConfigError(f"{who}: {pair.name} has scaling {pair.scaling}; it must be positive.")
    if left.requires_grad != right.requires_grad:
        raise ConfigError(
            f"{who}: {pair.name} trains one factor of two. Train both (requires_grad) or leave the pair out."
        )
    if left.dtype == torch.float16:
        logger.warning(
            "%s: fp16 factor gradients underflow at small singular values; prefer fp32", pair.name
        )


def check_options(options: dict[str, Any], who: str = "Riemannion") -> None:
    """Raise ConfigError for the first option out of its range; options that `who` does not have are not looked for."""
    for name, low, high, allowed in (
        ("lr", 0.0, math.inf, "a number >= 0 or a one-element tensor"),
        ("momentum", 0.0, 1.0, "in [0, 1)"),
        ("weight_decay", 0.0, math.inf, "a number >= 0"),
        ("sigma_floor", 1e-30, math.inf, "a number >= 1e-30"),
        ("inner_iters", 1, math.inf, "an integer >= 1"),
        ("max_consecutive_skips", 1, math.inf, "an integer >= 1"),
    ):
        if name not in options:
            continue
        value = options[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "lr" and isinstance(value, Tensor):
            number = value.numel() == 1
        if allowed.startswith("an integer"):
            number = number and isinstance(value, int)
        if not number or not low <= float(value) < high:
            raise ConfigError(f"{who}: {name} must be {allowed}, got {value!r}.")
    for name, choices in (("decay_to", ("anchor", "zero")), ("core_map", tuple(CORE_MAPS))):
        if name in options and options[name] not in choices:
            words = " or ".join(map(repr, choices))
            raise ConfigError(f"{who}: {name} must be {words}, got {options[name]!r}.")
    for name in ("exact_norm", "bias_correction"):
        if name in options and not isinstance(options[name], bool):
            raise ConfigError(f"{who}: {name} must be a bool, got {options[name]!r}.")
    if options.get("inner_iters", 1) != 1 and options.get("core_map", "msign") != "msign":
        raise ConfigError(
            f"{who}: inner_iters {options['inner_iters']} repeats msign, core_map is {options['core_map']!r}. Leave "
            "one of them out."
        )


def point_shapes(layer: Layer, factor: Factor) -> Mapping[str, tuple[int, ...]]:
    """The state of a factor that Riemannion cannot do without."""
    return {name: (factor.rows, layer.rank) for name in ("basis", "momentum")}


def check_state(
    groups: list[dict[str, Any]],
    state_dict: dict[str, Any],
    who: str = "Riemannion",
    shapes: Callable[[Layer, Factor], Mapping[str, tuple[int, ...]]] = point_shapes,
    layers: Callable[[dict[str, Any]], list[Layer]] = layers_of,
) -> None:
    """Raise ConfigError unless the saved state is of the same layers and of the optimizer `who`.

    Args:
        groups: of the optimizer.
        state_dict: to be loaded.
        who: the optimizer, for messages.
        shapes: of the state of a factor by name.
        layers: lists the layers of a group.

    Raises:
        ConfigError: it is of other layers, ranks or shapes, or another optimizer's.
    """
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ConfigError(
            f"{who}: the state has {len(saved_groups)} parameter groups, the optimizer {len(groups)}."
        )
    for group, saved in zip(groups, saved_groups, strict=True):
        if saved.get("method") != group.get("method"):
            raise ConfigError(
                f"{who}: the state was saved by {saved.get('method', 'another optimizer')}. Load it into the optimizer "
                "that it came from."
            )
        for key in ("names", "rank", "anchor_rank"):
            if saved.get(key, group[key]) != group[key]:
                raise ConfigError(
                    f"{who}: the state was saved for {key} {saved[key]}, the optimizer has {group[key]}. Build "
                    "the model and the optimizer as in the saved run."
                )
        if len(saved["params"]) != len(group["params"]):
            raise ConfigError(
                f"{who}: the state has {len(saved['params'])} factors, the optimizer {len(group['params'])}."
            )
        for layer in layers(group):
            for factor in layer.factors:
                position = 2 * layer.index + int(factor.is_right)
                entry = state_dict["state"].get(saved["params"][position], {})
                for name, shape in shapes(layer, factor).items():
                    if entry and name not in entry:
                        raise ConfigError(
                            f"{who}: the saved state of {layer.name} has {sorted(entry)} and no {name!r}: it is "
                            f"another optimizer's. Load the state that {who}.state_dict() gave."
                        )
                    if name in entry and tuple(entry[name].shape) != shape:
                        raise ConfigError(
                            f"{who}: saved {name} of {layer.name} is {tuple(entry[name].shape)}, needed is {shape}."
                        )
