"""Put given low-rank changes on models as plain PEFT layers: on all named layers, or on none."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dreamrie.errors import ConfigError
from dreamrie.lora.arithmetic import LowRank
from dreamrie.lora.injecting import (
    check_layer,
    inject,
    matrix_shape,
    put_back,
    seeded,
    trainable_flags,
)
from dreamrie.lora.pairs import LoraPair, lora_pairs


def adapted_layer(model: nn.Module) -> str | None:
    """Where a model carries an adapter already.

    Args:
        model: any module.

    Returns:
        Path of the first adapted layer, or of the whole model for a PEFT model; None for a model without adapter.
    """
    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        return type(model).__name__
    modules = model.named_modules()
    return next((name for name, module in modules if isinstance(module, BaseTunerLayer)), None)


def factor_shapes(
    model: nn.Module, name: str, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `lora_B` and `lora_A` for a layer.

    Args:
        model: the model that holds the layer.
        name: path of the layer.
        rank: of the change.

    Returns:
        (out, k) and (k, in); (out, k, 1, 1) and (k, in, kh, kw) for a convolution.

    Raises:
        ConfigError: the layer cannot carry a LoRA.
    """
    layer = model.get_submodule(name)
    check_layer(model, name, layer)
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, rank, 1, 1), (rank, layer.in_channels, *layer.kernel_size)
    if not isinstance(layer, nn.Linear):
        raise ConfigError(f"layer {name!r} has no matrix form; Linear or Conv2d is needed.")
    return (layer.out_features, rank), (rank, layer.in_features)


def largest_rank(model: nn.Module) -> int:
    """Largest rank that a change of any layer can have.

    Args:
        model: without adapter.

    Returns:
        The smaller side of the matrix of the layer where it is largest; 0 without Linear and Conv2d layers.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return max((min(matrix_shape(layer)) for layer in layers), default=0)


@dataclass(frozen=True)
class Placing:
    """Changes for one model.

    Attributes:
        model: carries no adapter.
        changes: path of each layer to its factors, of the shapes that `factor_shapes` says; none leaves the model as
            it is.
        scalings: for each layer, what its product counts; positive.
        magnitudes: of DoRA, (out,) for each layer; none for a plain LoRA.
    """

    model: nn.Module
    changes: Mapping[str, LowRank]
    scalings: Mapping[str, float]
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)


def place_lora(
    model: nn.Module,
    changes: Mapping[str, LowRank],
    scalings: Mapping[str, float],
    adapter_name: str,
) -> list[LoraPair]:
    """Add a plain LoRA with given factors to each named layer.

    As with `attach_lora`, afterwards only adapter parameters require gradients. The factors take the type and device
    of their layer. No random number of the caller is used up.

    Args:
        model: carries no adapter.
        changes: path of each layer to its factors, of the shapes that `factor_shapes` says.
        scalings: for each layer, what its product counts; positive.
        adapter_name: name of the adapter in PEFT.

    Returns:
        One pair for each layer, without anchor, in the order of `model.named_modules()`.

    Raises:
        ConfigError: PEFT adapted other layers than asked. The model is then as it was, and so it is when PEFT itself
            fails.
    """
    return place_together([Placing(model, changes, scalings)], adapter_name)[0]


def place_together(placings: Sequence[Placing], adapter_name: str) -> list[list[LoraPair]]:
    """Do `place_lora` on several models: on all of them, or on none.

    Args:
        placings: the models, all different, and what they get.
        adapter_name: name of the adapter in PEFT, in each of them.

    Returns:
        The pairs of each model.

    Raises:
        ConfigError: see `place_lora`. Every model is then as it was.
    """
    found = []
    with contextlib.ExitStack() as undo:
        for placing in placings:
            found.append(_placed(placing, adapter_name, undo) if placing.changes else [])
        undo.pop_all()
    return found


def _placed(placing: Placing, adapter_name: str, undo: contextlib.ExitStack) -> list[LoraPair]:
    """The pairs of one model; `undo` gets what puts it back."""
    model, changes, scalings = placing.model, placing.changes, placing.scalings
    layers = {name: model.get_submodule(name) for name in changes}
    ranks = {name: int(change.right.shape[0]) for name, change in changes.items()}
    config = LoraConfig(
        r=max(ranks.values()),
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items()},
        alpha_pattern={f"^{re.escape(n)}": rank * scalings[n] for n, rank in ranks.items()},
        target_modules="|".join(re.escape(name) for name in changes),
        use_dora=bool(placing.magnitudes),
    )
    undo.callback(put_back, model, layers, adapter_name, trainable_flags(model))
    with seeded(model, 0):
        inject(model, config, adapter_name)
    pairs = lora_pairs(model, adapter_name, use_dora=bool(placing.magnitudes))
    if sorted(pair.name for pair in pairs) != sorted(layers):
        raise ConfigError(f"PEFT adapted {len(pairs)} layers instead of the {len(layers)} named.")
    for pair in pairs:
        # PEFT builds its parts in train mode even inside a model in eval mode.
        pair.module.train(layers[pair.name].training)
        _write(pair.left, changes[pair.name].left)
        _write(pair.right, changes[pair.name].right)
        _set_scaling(pair, scalings[pair.name])
        if pair.magnitude is not None:
            _write(pair.magnitude, placing.magnitudes[pair.name])
    return pairs


def _write(parameter: nn.Parameter, value: Tensor) -> None:
    if parameter.shape != value.shape:
        raise ConfigError(f"a part has shape {tuple(value.shape)}, not {tuple(parameter.shape)}.")
    with torch.no_grad():
        parameter.copy_(value)


def _set_scaling(pair: LoraPair, scaling: float) -> None:
    """PEFT holds alpha and divides by the rank: put the very number back."""
    layer: Any = pair.module
    layer.scaling[pair.adapter_name] = scaling
    pair.scaling = scaling
