"""PEFT's injection as this house uses it: which layers can carry a LoRA, one seeded injection, and its undoing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dreamrie.errors import ConfigError
from dreamrie.lora.pairs import candidate_names


def check_layer(model: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse a layer that cannot carry a new LoRA.

    Args:
        model: that holds it, for the message.
        name: path of the layer.
        module: the layer.

    Raises:
        ConfigError: it carries an adapter already, or is no Linear and no plain Conv2d.
    """
    if isinstance(module, BaseTunerLayer):
        raise ConfigError(
            f"layer {name!r} already carries an adapter ({type(module).__name__}, active "
            f"{list(module.active_adapters)}). Remove it first, read it with dreamrie.lora_pairs, "
            f"or choose among: {candidate_names(model)}."
        )
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        raise ConfigError(
            f"layer {name!r} is a {type(module).__name__}; LoRA here needs Linear or Conv2d. "
            f"Layers that can be adapted: {candidate_names(model)}."
        )
    if getattr(module, "groups", 1) != 1:
        raise ConfigError(f"layer {name!r} is a grouped convolution, which is several matrices.")


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Sides of a layer's matrix.

    Args:
        module: Linear or Conv2d.

    Returns:
        (out, in); for a convolution in counts channels times kernel.

    Raises:
        ConfigError: another kind of layer.
    """
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        return module.out_channels, module.in_channels * height * width
    if not isinstance(module, nn.Linear):
        raise ConfigError(
            f"{type(module).__name__} has no matrix form; Linear or Conv2d is needed."
        )
    return module.out_features, module.in_features


def inject(model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    """PEFT's injection; through the model's own method where diffusers or transformers keep books.

    Args:
        model: without an adapter of this name.
        config: which layers, and how.
        adapter_name: in PEFT.
    """
    add_adapter: Any = getattr(model, "add_adapter", None)
    if hasattr(model, "_hf_peft_config_loaded") and add_adapter is not None:
        add_adapter(config, adapter_name)
    else:
        inject_adapter_in_model(config, model, adapter_name)


def trainable_flags(model: nn.Module) -> dict[str, bool]:
    """Whether each parameter requires a gradient.

    Args:
        model: any.

    Returns:
        By name of the parameter.
    """
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def put_back(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    adapter_name: str,
    trainable: Mapping[str, bool],
) -> None:
    """Undo an injection: a model is adapted completely or not at all.

    Args:
        model: adapted in part or wholly.
        layers: those that were to be adapted, as they were before, by path.
        adapter_name: in PEFT.
        trainable: flags before the injection.
    """
    for name, module in layers.items():
        model.set_submodule(name, module)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))
    books: Any = model
    if adapter_name in getattr(model, "peft_config", {}):
        del books.peft_config[adapter_name]
        if not books.peft_config:
            del books.peft_config
    if hasattr(model, "_hf_peft_config_loaded") and not hasattr(model, "peft_config"):
        books._hf_peft_config_loaded = False


@contextlib.contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """PEFT draws from torch's global stream: give it a seeded one and put the caller's back.

    Args:
        model: whose devices' streams are meant.
        seed: of the stream inside.

    Yields:
        Nothing.
    """
    devices = {parameter.device for parameter in model.parameters()}
    cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
