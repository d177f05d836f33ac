"""Which tensor of an adapter file belongs to which layer of a model; the spellings stand in `adapter_spelling`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from dreamrie.adapter_container import Container
from dreamrie.adapter_file import TEXT_ENCODER
from dreamrie.adapter_spelling import (
    SECOND_PREFIXES,
    TEXT_PREFIXES,
    parted,
    place_in_text_encoder,
    text_layer,
    unprefixed,
)
from dreamrie.adapter_universal import UNET_PREFIX
from dreamrie.errors import AdapterError, ConfigError


@dataclass(frozen=True)
class Places:
    """Names of tensors, by layer.

    Attributes:
        factors: layer to the names of (`lora_B`, `lora_A`).
        alphas: layer to the name of its alpha, for those that have one.
        magnitudes: layer to the name of its magnitude; of all layers for DoRA, else of none.
    """

    factors: dict[str, tuple[str, str]]
    alphas: dict[str, str]
    magnitudes: dict[str, str] = field(default_factory=dict)


def arrange(
    container: Container, model: nn.Module, text_encoder: nn.Module | None = None
) -> Places:
    """Find the layer of each tensor.

    Args:
        container: the file.
        model: whose layers it names; a text encoder of CLIP too.
        text_encoder: CLIP's of any version of transformers, whose layers it may name too.

    Returns:
        Both factors for each layer, and the alphas. Layers of `text_encoder` are its own paths behind "text_encoder.".

    Raises:
        AdapterError: a tensor has no place, a place has two tensors, or a factor lacks the other.
        ConfigError: the model has a child named text_encoder, and another text encoder is given.
    """
    layers = {name for name, _ in model.named_modules() if name}
    flat = _flat_names(layers)
    text = _layers_beside(layers, text_encoder)
    own_text = {layer for layer in layers if text_layer(layer)}

    places, strange = {}, []
    for name in container.entries:
        stem, part = parted(name) or ("", "")
        layer = _of_model(stem, layers, flat) or place_in_text_encoder(stem, own_text)
        if layer is None:
            found = place_in_text_encoder(stem, text)
            layer = None if found is None else TEXT_ENCODER + found
        if layer is None:
            strange.append(name)
        else:
            places[name] = layer, part
    _refuse_strange(container, model, sorted(strange), has_text=text_encoder is not None)
    return grouped(container, places)


def grouped(container: Container, places: Mapping[str, tuple[str, str]]) -> Places:
    """Bring the tensors of each layer together.

    Args:
        container: the file.
        places: name of each tensor to its layer and part.

    Returns:
        Both factors for each layer, the alphas and the magnitudes.

    Raises:
        AdapterError: a place has two tensors, a factor lacks the other, or only some layers have a magnitude.
    """
    path, total = container.path, len(container.entries)
    parts: dict[str, dict[str, str]] = {}
    for name, (layer, part) in places.items():
        other = parts.setdefault(layer, {}).setdefault(part, name)
        if other != name:
            raise AdapterError(
                f"the adapter {path} names one place twice: {other} and {name} are both {part} of layer {layer}."
            )
    missing = [
        f"the counterpart of {next(iter(found.values()))} ({'lora_A' if part == 'down' else 'lora_B'})"
        for _, found in sorted(parts.items())
        for part in ("down", "up")
        if part not in found
    ]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise AdapterError(
            f"the adapter {path} is incomplete: {len(missing)} tensors are missing beside the {total} that are there: "
            f"{', '.join(missing[:4])}{more}. Every layer needs lora_A and lora_B; copy the file again."
        )
    bare = [layer for layer, found in sorted(parts.items()) if "magnitude" not in found]
    if 0 < len(bare) < len(parts):
        raise AdapterError(
            f"the adapter {path} is incomplete: it is DoRA, and {len(bare)} of {len(parts)} layers have no magnitude, "
            f"such as {bare[0]}. Copy the file again."
        )
    ordered = sorted(parts.items())
    return Places(
        {layer: (found["up"], found["down"]) for layer, found in ordered},
        {layer: found["alpha"] for layer, found in ordered if "alpha" in found},
        {layer: found["magnitude"] for layer, found in ordered if "magnitude" in found},
    )


def _layers_beside(layers: set[str], text_encoder: nn.Module | None) -> set[str]:
    """Paths in the text encoder, whose names must not be those of the model too."""
    if text_encoder is None:
        return set()
    if any(layer.startswith(TEXT_ENCODER) for layer in layers):
        raise ConfigError("text_encoder is given, but the model has one itself. Leave one out.")
    return {name for name, _ in text_encoder.named_modules() if name}


def _of_model(stem: str, layers: set[str], flat: dict[str, str]) -> str | None:
    """The layer of the model that a stem stands for."""
    if stem.startswith(UNET_PREFIX):
        return flat.get(stem.removeprefix(UNET_PREFIX))
    # A model may itself have a child named unet: the whole name is tried first.
    return next((path for path in unprefixed(stem) if path in layers), None)


def _flat_names(layers: set[str]) -> dict[str, str]:
    """Kohya's spelling of each layer; those that two layers share are left out."""
    found: dict[str, str] = {}
    shared = set()
    for layer in layers:
        short = layer.replace(".", "_")
        if short in found:
            shared.add(short)
        found[short] = layer
    return {short: layer for short, layer in found.items() if short not in shared}


def _refuse_strange(
    container: Container, model: nn.Module, strange: list[str], *, has_text: bool
) -> None:
    if not strange:
        return
    path, total, kind = container.path, len(container.entries), type(model).__name__
    second = [name for name in strange if name.startswith(SECOND_PREFIXES)]
    if second:
        raise AdapterError(
            f"the adapter {path} is for a model of two text encoders, such as Stable Diffusion XL: {second[0]}. Models "
            "of one are read here."
        )
    text = [name for name in strange if name.startswith(TEXT_PREFIXES)]
    if text and not has_text:
        raise AdapterError(
            f"the adapter {path}: {len(text)} of {total} tensors are of a text encoder, the first is {text[0]}, and "
            f"the model {kind} is none. Give both: dreamrie.load_adapter(unet, file, text_encoder=pipe.text_encoder); "
            "or load the file with diffusers' load_lora_weights."
        )
    raise AdapterError(
        f"the adapter {path}: {len(strange)} of {total} tensors have no place in the model {kind}"
        f"{' and the text encoder' if has_text else ''}; the first is {strange[0]}. Expected are names such as "
        "unet.LAYER.lora_A.weight and unet.LAYER.lora_B.weight with a layer of this model: give the model that the "
        "adapter was trained on."
    )
