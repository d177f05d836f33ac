"""Put a saved adapter on a base model with diffusers' own loader, and make sure that all of it arrived.

The file is read and checked by `dreamrie.adapter_reading` first; what diffusers then put on the U-Net is compared with
what was read, value by value. Diffusers does not read PEFT's folders, so `dreamrie.load_adapter` puts those on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from dreamrie.adapter_container import find_adapter, read_metadata
from dreamrie.adapter_peft import PEFT_FILE
from dreamrie.adapter_reading import AdapterContents, load_adapter, read_adapter
from dreamrie.diffusion.components import Components
from dreamrie.diffusion.source import quiet_libraries
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.lora import lora_pairs

_log = logging.getLogger(__name__)

__all__ = [
    "ADAPTER_NAME",
    "LOAD_ERRORS",
    "adapter_off",
    "find_adapter",
    "load_saved_adapter",
    "load_with_diffusers",
    "read_metadata",
    "remove_adapter",
]

ADAPTER_NAME = "saved"
# What safetensors, diffusers and PEFT raise about a file that is damaged or of another model.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError)


def load_saved_adapter(
    components: Components, directory_or_file: Path, *, other_base: bool = False
) -> dict[str, str]:
    """Put a saved adapter on the U-Net, as any user of diffusers loads it.

    Args:
        components: a base model that carries no adapter.
        directory_or_file: see `find_adapter`.
        other_base: accept other base weights than those that it was trained on. A user who named a model of another
            name than the file does has said so already. Both are logged.

    Returns:
        Facts of the file's header.

    Raises:
        AdapterError: the file is missing, damaged, changed since it was written, or empty; it holds something that the
            U-Net has no place for, or more than a U-Net's layers; the base weights are others. The U-Net is then as it
            was.
        ConfigError: the file was made for another base model, and the model was not named by the user.
    """
    path = find_adapter(directory_or_file)
    facts = read_metadata(path)
    unet = components.unet
    asked_for = _check_base(components, path, facts.get("base_model", ""))
    if path.name == PEFT_FILE:
        load_adapter(unet, path, adapter_name=ADAPTER_NAME, other_base=other_base or asked_for)
        unet.requires_grad_(False)
        return facts
    contents = read_adapter(unet, path, other_base=other_base or asked_for, use_dora=True)
    before = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    try:
        load_with_diffusers(components, path, ADAPTER_NAME)
        lost = _not_attached(unet, contents)
    except LOAD_ERRORS as error:
        _undo(components, before)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise AdapterError(
            f"the adapter {path} does not fit the model {components.source.resolved}: {reason}. Give the base model "
            "that it was trained on."
        ) from error
    if lost:
        _undo(components, before)
        raise AdapterError(
            f"the adapter {path}: {len(lost)} of {len(contents.changes)} layers did not arrive in the model "
            f"{components.source.resolved} as they stand in the file; the first is {lost[0]}. Load it with "
            "dreamrie.load_adapter instead."
        )
    unet.requires_grad_(False)
    return facts


def load_with_diffusers(components: Components, path: Path, adapter_name: str) -> None:
    """Diffusers' own loader, quietly; what it raises goes through (`LOAD_ERRORS`).

    Args:
        components: the model; may carry adapters of other names.
        path: a file that diffusers reads; it is not checked.
        adapter_name: in PEFT.
    """
    with quiet_libraries():
        _pipeline(components).load_lora_weights(
            str(path.parent),
            weight_name=path.name,
            adapter_name=adapter_name,
            local_files_only=True,
            use_safetensors=True,
        )


def remove_adapter(components: Components) -> None:
    """Take the adapter off again: the base weights were never touched.

    Args:
        components: the model, with or without adapter.
    """
    if getattr(components.unet, "peft_config", None) is not None:
        components.unet.unload_lora()


@contextmanager
def adapter_off(components: Components) -> Iterator[None]:
    """Inside, the model is its base; a model without adapter is that anyway.

    Args:
        components: the model.

    Yields:
        Nothing.
    """
    unet = components.unet
    if not getattr(unet, "peft_config", None):
        yield
        return
    trainable = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()
        # PEFT makes adapters trainable whenever it switches them on, and frozen when off.
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _undo(components: Components, before: list[tuple[Any, bool]]) -> None:
    """The U-Net as it was: without adapter, and with the flags that PEFT has changed."""
    remove_adapter(components)
    components.unet._hf_peft_config_loaded = False
    for parameter, flag in before:
        parameter.requires_grad_(flag)


def _check_base(components: Components, path: Path, trained_on: str) -> bool:
    """An adapter on another base draws pictures that are nobody's; returns whether the user named another one."""
    source = components.source
    if not trained_on or trained_on == source.resolved:
        return False
    text = f"the adapter {path} was trained on {trained_on}, and the model is {source.resolved}"
    if not source.requested:  # the embedded model, because no model was named
        raise ConfigError(f"{text}. Name the base model: {trained_on}.")
    _log.warning("%s, as was asked for", text)
    return True


def _pipeline(components: Components) -> Any:
    """A pipeline over the same parts, for its loader alone."""
    return StableDiffusionPipeline(
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        unet=components.unet,
        scheduler=DDIMScheduler.from_config(components.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _not_attached(unet: Any, contents: AdapterContents) -> list[str]:
    """Layers on which another change lies than the file says, or none."""
    found = lora_pairs(unet, ADAPTER_NAME, use_dora=bool(contents.magnitudes))
    pairs = {pair.name: pair for pair in found}
    lost = set(pairs) ^ set(contents.changes)
    for name in set(pairs) & set(contents.changes):
        pair, values = pairs[name], [*contents.changes[name]]
        values += [contents.magnitudes[name]] if contents.magnitudes else []
        same = all(
            parameter.shape == value.shape
            and torch.equal(parameter.detach(), value.to(parameter.device, parameter.dtype))
            for parameter, value in zip(pair.parameters, values, strict=True)
        )
        # Alpha over rank is divided in other orders elsewhere.
        if not same or not math.isclose(pair.scaling, contents.scalings[name], rel_tol=1e-6):
            lost.add(name)
    return sorted(lost)
