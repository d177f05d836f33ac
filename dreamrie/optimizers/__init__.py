"""Optimizers by name, for both trainings: our own and those of torch and PEFT, over the same adapters.

`OPTIMIZERS` (dreamrie/optimizer_table.py) says what there is and what is to be known of each; this package builds them.
Nothing of PEFT is loaded before one of its optimizers is asked for.

    riemannian.py   riemannion, riemann_sgd, riemann_adam: the product moves on the manifold of rank-r matrices
    imuon.py, lora_muon.py, lora_rite.py   the factors move, but the product does not depend on which factors they are
    pair_optimizer.py, factors.py          what the latter share
    libraries.py    those of torch and PEFT; they know nothing of a frozen anchor
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from dreamrie.errors import ConfigError
from dreamrie.lora import LoraPair
from dreamrie.optimizer_table import OPTIMIZERS, Entry

__all__ = ["OPTIMIZERS", "Entry", "build_optimizer", "describe_optimizer", "trained_numbers"]

logger = logging.getLogger(__name__)


def describe_optimizer(name: str, pairs: Sequence[LoraPair]) -> str:
    """Name of the method as it belongs in a log or table.

    Args:
        name: key of `OPTIMIZERS`.
        pairs: adapted layers.

    Returns:
        The name; with "rank-2r baseline" where the frozen anchor would be trained too.
    """
    anchored = any(pair.anchor_rank for pair in pairs)
    trained = anchored and OPTIMIZERS[name].anchor == "trained"
    return f"{name} (rank-2r baseline)" if trained else name


def trained_numbers(name: str, pairs: Sequence[LoraPair]) -> int:
    """How many numbers an optimizer moves: of one factor or both, with anchor and magnitude or without them.

    Args:
        name: key of `OPTIMIZERS`.
        pairs: adapted layers.

    Returns:
        Entries of the trained parts of all factors, and of the magnitudes.
    """
    entry, total = OPTIMIZERS[name], 0
    for pair in pairs:
        columns = pair.rank + (pair.anchor_rank if entry.anchor == "trained" else 0)
        total += (pair.out + (pair.in_ if entry.trained_factors == 2 else 0)) * columns
        total += 0 if pair.magnitude is None else pair.out
    return total


def build_optimizer(
    name: str,
    pairs: Sequence[LoraPair],
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float | None = None,
    **options: Any,
) -> Optimizer:
    """Make an optimizer over the factors of adapted layers.

    Args:
        name: key of `OPTIMIZERS`.
        pairs: adapted layers.
        lr: peak learning rate; its unit depends on the method.
        weight_decay: decoupled, times lr.
        momentum: for those that have one; None is the method's own default.
        options: own switches of the method, see `Entry.options`; None is the default.

    Returns:
        The optimizer; every factor of every pair is in exactly one of its groups.

    Raises:
        ConfigError: the name is unknown, there is nothing to train, a setting does not apply, or the method cannot
            take these layers.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer {name!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
    if not pairs:
        raise ConfigError("there is no adapted layer to train; call attach_lora first")
    entry = OPTIMIZERS[name]
    given = {key: value for key, value in options.items() if value is not None}
    known = set(entry.options) | ({"momentum"} if entry.momentum is not None else set())
    for key in [*given, *(["momentum"] if momentum is not None else [])]:
        if key not in known:
            raise ConfigError(f"{key} is not a setting of {name}; {_who_has(key)}")
    if any(pair.anchor_rank for pair in pairs):
        _check_anchor(name, entry, pairs)
    # Whoever makes pairs of their own need not know of magnitudes.
    if entry.no_dora and any(getattr(pair, "magnitude", None) is not None for pair in pairs):
        able = ", ".join(key for key, other in OPTIMIZERS.items() if not other.no_dora)
        raise ConfigError(
            f"{name} cannot train the magnitudes of DoRA, because {entry.no_dora}\n"
            f"  where: --optimizer {name}\n"
            f"  what to do: leave --use_dora out, or use one of {able}"
        )
    settings = {**entry.options, **given}
    if entry.momentum is not None:
        settings["momentum"] = entry.momentum if momentum is None else momentum
    return _builder(name, entry)(pairs, lr=lr, weight_decay=weight_decay, **settings)


def _who_has(setting: str) -> str:
    """End of a message: which optimizers have a setting."""
    known = [
        name
        for name, entry in OPTIMIZERS.items()
        if setting in entry.options or (setting == "momentum" and entry.momentum is not None)
    ]
    return f"use one of {', '.join(known)}" if known else "no optimizer has it"


def _check_anchor(name: str, entry: Entry, pairs: Sequence[LoraPair]) -> None:
    """Refuse, or say, what becomes of the frozen half of anchored adapters."""
    if entry.anchor == "refused":
        raise ConfigError(
            f"{name} takes no anchored adapter: {entry.summary}, so its frozen half would be trained in part\n"
            f"  where: --optimizer {name}\n"
            "  what to do: use an init whose change starts at zero (default), or another optimizer"
        )
    if entry.anchor == "trained":
        logger.warning(
            "%s trains all 2r columns of an anchored adapter: %s",
            name,
            describe_optimizer(name, pairs),
        )


def _builder(name: str, entry: Entry) -> Callable[..., Optimizer]:
    """The function that an entry names."""
    module, _, function = entry.builder.partition(":")
    try:
        found: Callable[..., Optimizer] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optimizer {name!r}: its builder {entry.builder!r} cannot be loaded: {error}\n"
            "  where: OPTIMIZERS in dreamrie/optimizer_table.py\n"
            "  what to do: write it as 'module:function'"
        ) from error
    return found
