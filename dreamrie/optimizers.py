"""Optimizers by name. Riemannion is ours; the rest is torch's and PEFT's, over the same adapters.

    name         moves                 source
    riemannion   the product           dreamrie.riemannion
    adamw        each factor           torch.optim.AdamW
    muon         each factor           torch.optim.Muon
    loraplus     each factor, two lrs  peft.optimizers, arXiv:2402.12354
    scaledgd     each factor, r x r    peft.optimizers, arXiv:2402.02347
                 preconditioned        (called "Riemannian" there; no retraction, no transport)

All but riemannion know nothing of a frozen anchor: on an anchored layout they train all 2r columns. That is a legal but
different method, and `describe_optimizer` names it a rank-2r baseline.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from dreamrie.errors import ConfigError
from dreamrie.lora import LoraPair
from dreamrie.riemannion import Riemannion

logger = logging.getLogger(__name__)

# Ratio of the two learning rates recommended by the LoRA+ paper.
LORAPLUS_RATIO = 16.0

Builder = Callable[[Sequence[LoraPair], float, float, float | None], Optimizer]


def _factors(pairs: Sequence[LoraPair]) -> list[nn.Parameter]:
    """Both factors of every pair."""
    return [factor for pair in pairs for factor in (pair.left, pair.right)]


def _layers(pairs: Sequence[LoraPair]) -> nn.Module:
    """Only the adapted layers, in the form PEFT's builders search."""
    return nn.ModuleList([pair.module for pair in pairs])


def _riemannion(
    pairs: Sequence[LoraPair], lr: float, weight_decay: float, momentum: float | None
) -> Optimizer:
    """Muon on the fixed-rank manifold."""
    beta = 0.9 if momentum is None else momentum
    return Riemannion(pairs, lr=lr, momentum=beta, weight_decay=weight_decay)


def _adamw(
    pairs: Sequence[LoraPair], lr: float, weight_decay: float, momentum: float | None
) -> Optimizer:
    """Decoupled Adam on the factors."""
    return AdamW(_factors(pairs), lr=lr, weight_decay=weight_decay)


def _muon(
    pairs: Sequence[LoraPair], lr: float, weight_decay: float, momentum: float | None
) -> Optimizer:
    """Muon on each factor by itself."""
    for pair in pairs:
        if pair.left.ndim != 2 or pair.right.ndim != 2:
            raise ConfigError(
                f"muon takes matrices only, {pair.name} is a convolution\n"
                "  where: --optimizer muon\n"
                "  what to do: use riemannion or adamw, or adapt linear layers only"
            )
    beta = 0.95 if momentum is None else momentum
    return Muon(_factors(pairs), lr=lr, weight_decay=weight_decay, momentum=beta)


def _loraplus(
    pairs: Sequence[LoraPair], lr: float, weight_decay: float, momentum: float | None
) -> Optimizer:
    """AdamW with a larger learning rate on the output side."""
    return create_loraplus_optimizer(
        _layers(pairs),
        AdamW,
        lr=lr,
        loraplus_lr_ratio=LORAPLUS_RATIO,
        loraplus_weight_decay=weight_decay,
    )


def _scaledgd(
    pairs: Sequence[LoraPair], lr: float, weight_decay: float, momentum: float | None
) -> Optimizer:
    """AdamW after preconditioning by the Gram matrix of the other factor."""
    return create_riemannian_optimizer(_layers(pairs), AdamW, lr=lr, weight_decay=weight_decay)


OPTIMIZERS: dict[str, Builder] = {
    "riemannion": _riemannion,
    "adamw": _adamw,
    "muon": _muon,
    "loraplus": _loraplus,
    "scaledgd": _scaledgd,
}


def describe_optimizer(name: str, pairs: Sequence[LoraPair]) -> str:
    """Name of the method as it belongs in a log or table.

    Args:
        name: key of `OPTIMIZERS`.
        pairs: adapted layers.

    Returns:
        The name; with "rank-2r baseline" where the frozen anchor would be trained too.
    """
    anchored = any(pair.anchor_rank for pair in pairs)
    return f"{name} (rank-2r baseline)" if anchored and name != "riemannion" else name


def trained_numbers(name: str, pairs: Sequence[LoraPair]) -> int:
    """How many numbers an optimizer moves: r columns a factor for riemannion, all for the others.

    Args:
        name: key of `OPTIMIZERS`.
        pairs: adapted layers.

    Returns:
        Entries of the trained parts of all factors.
    """
    frozen = 0
    if name == "riemannion":
        frozen = sum((pair.out + pair.in_) * pair.anchor_rank for pair in pairs)
    return sum(factor.numel() for factor in _factors(pairs)) - frozen


def build_optimizer(
    name: str,
    pairs: Sequence[LoraPair],
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float | None = None,
) -> Optimizer:
    """Make an optimizer over the factors of adapted layers.

    Args:
        name: key of `OPTIMIZERS`.
        pairs: adapted layers.
        lr: peak learning rate; its unit depends on the method.
        weight_decay: decoupled, times lr.
        momentum: for riemannion and muon; None is the method's own default.

    Returns:
        The optimizer; every factor of every pair is in exactly one of its groups.

    Raises:
        ConfigError: the name is unknown, there is nothing to train, momentum does not apply, or the
            method cannot take these layers.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer {name!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
    if not pairs:
        raise ConfigError("there is no adapted layer to train; call attach_lora first")
    if momentum is not None and name not in ("riemannion", "muon"):
        raise ConfigError(f"momentum is not a setting of {name}; use riemannion or muon")
    if any(pair.anchor_rank for pair in pairs) and name != "riemannion":
        logger.warning(
            "%s trains all 2r columns of an anchored adapter: %s",
            name,
            describe_optimizer(name, pairs),
        )
    return OPTIMIZERS[name](pairs, lr, weight_decay, momentum)
