"""Optimizers of torch and PEFT over the factors of adapted layers.

None of them knows of a frozen anchor: on an anchored layout they train all 2r columns, which is a legal but different
method and is named a rank-2r baseline. LoRA-FA refuses that layout, since it freezes lora_A.

DoRA's magnitudes are a group of their own with the plain learning rate: the ratio of LoRA+ and the preconditioner are
of the factors. They do not decay: a magnitude that goes to zero takes the base weight with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from dreamrie.errors import ConfigError
from dreamrie.lora import LoraPair

# Ratio of the two learning rates recommended by the LoRA+ paper.
LORAPLUS_RATIO = 16.0


class _Factors(nn.Module):
    """The two factors of one layer under the names that PEFT's builders look for, and nothing of its base."""

    def __init__(self, pair: LoraPair) -> None:
        super().__init__()
        layer: Any = pair.module
        name = pair.adapter_name
        self.lora_A = nn.ModuleDict({name: layer.lora_A[name]})
        self.lora_B = nn.ModuleDict({name: layer.lora_B[name]})
        self.scaling = {name: pair.scaling}


class _Adapter(nn.Module):
    """All factors, as the model that PEFT's builders search."""

    def __init__(self, pairs: Sequence[LoraPair]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Factors(pair) for pair in pairs])
        self.active_adapters: list[str] = []
        self.peft_config: dict[str, object] = {}


def _parameters(pairs: Sequence[LoraPair]) -> list[nn.Parameter]:
    """Both factors of every pair."""
    return [factor for pair in pairs for factor in (pair.left, pair.right)]


def _with_magnitudes(optimizer: Optimizer, pairs: Sequence[LoraPair], lr: float) -> Optimizer:
    """The same optimizer, which also trains the magnitudes, if there are any."""
    found = [getattr(pair, "magnitude", None) for pair in pairs]
    magnitudes = [magnitude for magnitude in found if magnitude is not None]
    if magnitudes:
        optimizer.add_param_group({"params": magnitudes, "lr": lr, "weight_decay": 0.0})
    return optimizer


def _require_matrices(name: str, pairs: Sequence[LoraPair]) -> None:
    """Raise ConfigError for a convolution, naming it."""
    for pair in pairs:
        if pair.left.ndim != 2 or pair.right.ndim != 2:
            raise ConfigError(
                f"{name} takes matrices only, {pair.name} is a convolution\n"
                f"  where: --optimizer {name}\n"
                "  what to do: use riemannion or adamw, or adapt linear layers only"
            )


def adamw(pairs: Sequence[LoraPair], lr: float, weight_decay: float) -> Optimizer:
    """Decoupled Adam on the factors."""
    optimizer = AdamW(_parameters(pairs), lr=lr, weight_decay=weight_decay)
    return _with_magnitudes(optimizer, pairs, lr)


def sgd(pairs: Sequence[LoraPair], lr: float, weight_decay: float, momentum: float) -> Optimizer:
    """Gradient descent with momentum; the decay is added to the gradient, as torch does it."""
    optimizer = SGD(_parameters(pairs), lr=lr, weight_decay=weight_decay, momentum=momentum)
    return _with_magnitudes(optimizer, pairs, lr)


def muon(pairs: Sequence[LoraPair], lr: float, weight_decay: float, momentum: float) -> Optimizer:
    """Muon on each factor by itself."""
    _require_matrices("muon", pairs)
    return Muon(_parameters(pairs), lr=lr, weight_decay=weight_decay, momentum=momentum)


def loraplus(pairs: Sequence[LoraPair], lr: float, weight_decay: float) -> Optimizer:
    """AdamW with a larger learning rate on the output side."""
    optimizer = create_loraplus_optimizer(
        _Adapter(pairs),
        AdamW,
        lr=lr,
        loraplus_lr_ratio=LORAPLUS_RATIO,
        loraplus_weight_decay=weight_decay,
    )
    return _with_magnitudes(optimizer, pairs, lr)


def lorafa(pairs: Sequence[LoraPair], lr: float, weight_decay: float) -> Optimizer:
    """AdamW on lora_B alone, its gradient multiplied by (A A^T)^-1; lora_A is frozen by this call.

    Every layer needs a gradient in every step: PEFT's implementation does not skip layers.
    """
    _require_matrices("lorafa", pairs)
    # PEFT reads the scaling of each layer from its module; r and lora_alpha serve an older form of its groups.
    return create_lorafa_optimizer(
        _Adapter(pairs), r=pairs[0].rank, lora_alpha=pairs[0].rank, lr=lr, weight_decay=weight_decay
    )


def rprec_adamw(pairs: Sequence[LoraPair], lr: float, weight_decay: float) -> Optimizer:
    """AdamW after preconditioning by the Gram matrix of the other factor; it writes into the gradients."""
    adapter = _Adapter(pairs)
    optimizer = create_riemannian_optimizer(adapter, AdamW, lr=lr, weight_decay=weight_decay)
    return _with_magnitudes(optimizer, pairs, lr)
