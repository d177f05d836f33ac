"""Several adapters on one model: each is put on beside the others, and rests until a caller activates it."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dreamrie.errors import ConfigError
from dreamrie.lora.arithmetic import LowRank
from dreamrie.lora.injecting import inject, seeded
from dreamrie.lora.pairs import lora_pairs


def stack_lora(
    model: nn.Module,
    changes: Mapping[str, LowRank],
    adapter_name: str,
    magnitudes: Mapping[str, Tensor] | None = None,
) -> None:
    """Put one more adapter on a model, completely or not at all; it rests, and so do all others.

    The factors take the type and device of their layer. No random number of the caller is used up, and no flag of
    another parameter is changed.

    Args:
        model: with or without other adapters.
        changes: path of each layer to its factors, shaped as PEFT stores them; scaling 1. Ranks may differ.
        adapter_name: in PEFT; no adapter of the model has it.
        magnitudes: of DoRA, (out,) for each layer; such an adapter must act alone.

    Raises:
        ConfigError: PEFT adapted other layers than asked, or a factor has another shape than its layer needs.
    """
    ranks = {name: int(change.right.shape[0]) for name, change in changes.items()}
    exact = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    largest = max(ranks.values())
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=dict(exact),
        alpha_pattern=dict(exact),
        target_modules="|".join(re.escape(name) for name in changes),
        use_dora=bool(magnitudes),
    )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with contextlib.ExitStack() as undo:
        undo.callback(unstack_lora, model, adapter_name)
        with seeded(model, 0), several_on_purpose():
            inject(model, config, adapter_name)
        found = lora_pairs(model, adapter_name, use_dora=bool(magnitudes))
        pairs = {pair.name: pair for pair in found}
        if set(pairs) != set(changes):
            raise ConfigError(f"PEFT adapted {len(pairs)} layers, not the {len(changes)} named.")
        for name, change in changes.items():
            values = (*change, magnitudes[name]) if magnitudes else change
            for parameter, value in zip(pairs[name].parameters, values, strict=True):
                if parameter.shape != value.shape:
                    raise ConfigError(
                        f"layer {name!r}: a factor has shape {tuple(value.shape)}, and the layer needs "
                        f"{tuple(parameter.shape)}."
                    )
                with torch.no_grad():
                    parameter.copy_(value)
        undo.pop_all()
    rest_lora(model)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


@contextlib.contextmanager
def several_on_purpose() -> Iterator[None]:
    """Inside, PEFT does not warn that a model gets a second adapter.

    Yields:
        Nothing.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
        yield


@contextlib.contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Inside, no adapter acts unless the caller puts one on; afterwards those act again that did before.

    What a caller has put on inside must be off again. Flags of all parameters and the streams of random numbers are
    then as they were; no parameter has been replaced.

    Args:
        model: with an adapter in training, say.

    Yields:
        Nothing.
    """
    acting = [(layer, list(layer.active_adapters)) for layer in _layers(model)]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        rest_lora(model)
        with seeded(model, 0):
            yield
    finally:
        for layer, names in acting:
            layer.set_adapter(names)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def rest_lora(model: nn.Module) -> None:
    """Let no adapter act: the model computes what its base does, to the bit.

    Args:
        model: with any number of adapters, none of them merged.
    """
    for layer in _layers(model):
        layer.set_adapter([], inference_mode=True)


def unstack_lora(model: nn.Module, adapter_name: str) -> None:
    """Take one adapter off; the others rest then.

    Args:
        model: with or without an adapter of that name.
        adapter_name: in PEFT.
    """
    # PEFT would activate another one in the place of one that acts, with a warning.
    rest_lora(model)
    for layer in _layers(model):
        layer.delete_adapter(adapter_name)
    books: Any = getattr(model, "peft_config", {})
    books.pop(adapter_name, None)


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
