"""What optimizers of LoRA pairs share of torch's contract: parameter groups, saved states, counted skips."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.riemannion_checks import LoraPairLike, check_pair
from dreamrie.riemannion_layers import Layer, State, by_shape, read_all, with_gradients
from dreamrie.riemannion_reading import norm_of

logger = logging.getLogger(__name__)

# One entry per layer: the first describe the model at hand, the second count.
DESCRIPTION = ("names", "scaling", "rank", "anchor_rank")
COUNTERS = ("skipped", "skipped_in_a_row", "floor_hits")


def group_of_pairs(
    who: str, given: dict[str, Any], defaults: dict[str, Any], taken: Iterable[Tensor]
) -> dict[str, Any]:
    """Turn {"pairs": [...], option: value, ...} into a parameter group.

    Args:
        who: the optimizer, for messages.
        given: "pairs" and any options.
        defaults: of the options that were not given.
        taken: parameters of the other groups.

    Returns:
        The group: the factors as "params", left before right, one entry per layer of the names in DESCRIPTION and
        COUNTERS, and all options.

    Raises:
        ConfigError: "pairs" is missing or empty, or a pair cannot be trained.
    """
    group = dict(given)
    pairs: list[LoraPairLike] = list(group.pop("pairs", ()))
    if not pairs or "params" in group:
        raise ConfigError(
            f"{who}: a parameter group needs a non-empty 'pairs' and no 'params', got keys {sorted(given)}. Two "
            "factors of one layer belong together: pass LoRA pairs."
        )
    for key, value in defaults.items():
        group.setdefault(key, value)
    seen = {id(parameter) for parameter in taken}
    for pair in pairs:
        check_pair(pair, who)
        for parameter in (pair.left, pair.right):
            if id(parameter) in seen:
                raise ConfigError(
                    f"{who}: a factor of {pair.name} is given twice. Pass each LoRA layer once; tied layers are not "
                    "supported."
                )
            seen.add(id(parameter))
    group["params"] = [p for pair in pairs for p in (pair.left, pair.right)]
    group["names"] = [str(pair.name) for pair in pairs]
    group["scaling"] = [float(pair.scaling) for pair in pairs]
    group["rank"] = [int(pair.rank) for pair in pairs]
    group["anchor_rank"] = [int(pair.anchor_rank) for pair in pairs]
    for key in COUNTERS:
        group[key] = [0] * len(pairs)
    return group


def load_exactly(
    optimizer: Optimizer,
    load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    check: Callable[[dict[str, Any]], None],
) -> None:
    """Load a saved state in its own dtype; torch would round it to that of the parameters.

    The state is copied: the argument and other optimizers that loaded it stay independent. What describes the model at
    hand, its layer names and scalings, is kept.

    Args:
        optimizer: to be changed.
        load: `load_state_dict` of its base class, bound to it.
        state_dict: what `state_dict` of an equally built optimizer returned.
        check: raises when the state does not fit; nothing has been changed then.
    """
    own = [{key: group[key] for key in DESCRIPTION} for group in optimizer.param_groups]
    checked: dict[str, Any] = {}

    def before(_: Optimizer, given: dict[str, Any]) -> None:
        check(given)
        checked.update(given)

    def after(_: Optimizer) -> None:
        for group, description, saved in zip(
            optimizer.param_groups, own, checked["param_groups"], strict=True
        ):
            group.update(description)
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                if key in checked["state"]:
                    optimizer.state[parameter] = {
                        name: value.detach().to(parameter.device, copy=True)
                        for name, value in checked["state"][key].items()
                    }

    # Last before and first after, so that hooks of others may change the input and see the final state.
    hooks = (
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after, prepend=True),
    )
    try:
        load(state_dict)
    finally:
        for hook in hooks:
            hook.remove()


def count_skips(who: str, layers: list[Layer]) -> None:
    """Count skipped layers.

    Args:
        who: the optimizer, for messages.
        layers: left as they were in this step.

    Raises:
        NumericalError: one was skipped `max_consecutive_skips` times in a row.
    """
    if not layers:
        return
    logger.warning("gradient not finite, left as they are: %s", [layer.name for layer in layers])
    stuck = []
    for layer in layers:
        layer.group["skipped"][layer.index] += 1
        layer.group["skipped_in_a_row"][layer.index] += 1
        if layer.group["skipped_in_a_row"][layer.index] >= layer.group["max_consecutive_skips"]:
            stuck.append(layer.name)
    if stuck:
        raise NumericalError(
            f"{who}: max_consecutive_skips reached, the gradients of {stuck} were not finite in so many steps in a "
            "row. Lower the learning rate, train in fp32 or bf16, or look at the data of these steps."
        )


def tangent_norm(layers: list[Layer], state: State) -> Tensor:
    """Return the norm of the Riemannian gradient over layers, a scalar; it depends on their products alone.

    Args:
        layers: of any shapes; those without gradients do not count.
        state: of the optimizer; not written.

    Returns:
        sqrt(sum of |g_left|^2 + |g_right|^2); NaN or Inf when a gradient is not finite. Errors are those of `read`.
    """
    return norm_of(read_all(by_shape(with_gradients(layers)), state))


def store_(entry: dict[str, Any], key: str, value: Tensor) -> None:
    """Copy a row of a batch into the state, without keeping the batch alive."""
    if key in entry:
        entry[key].copy_(value)
    else:
        entry[key] = value.clone()


def learning_rate(group: dict[str, Any]) -> float | Tensor:
    """Rate of a group; a tensor of one element loses its dimension, with which it would have to lie on the device."""
    lr: float | Tensor = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr
