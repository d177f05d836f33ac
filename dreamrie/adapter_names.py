"""Which tensor of an adapter file belongs to which layer, in the spellings of diffusers, PEFT and kohya.

unet.LAYER.lora_A.weight, .lora_B.weight                  diffusers and dreamrie
base_model.model.LAYER.lora_A.weight, .lora_B.weight      PEFT
unet.LAYER.lora.down.weight, .lora.up.weight              older diffusers
unet.PLACE.processor.to_q_lora.down.weight, .up.weight    oldest diffusers
lora_unet_LAYER_WITH_UNDERSCORES.lora_down.weight, .lora_up.weight, .alpha      kohya, and dreamrie's universal file
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn

from dreamrie.adapter_container import Container
from dreamrie.adapter_peft import PEFT_PREFIX, PEFT_SETTINGS
from dreamrie.adapter_universal import UNET_PREFIX
from dreamrie.errors import AdapterError

_PREFIXES = ("unet.", PEFT_PREFIX, "")
_TEXT_PREFIXES = ("text_encoder", "lora_te")
_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
# diffusers keeps PEFT's settings as JSON under this name in the header, PEFT itself in a file.
_SETTINGS = "lora_adapter_metadata"
# What makes an adapter more than a plain LoRA of one strength.
_SPECIAL = (
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
# Starts that change the base weights when PEFT loads the adapter.
_MOVING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Places:
    """Names of tensors, by layer of the model.

    Attributes:
        factors: layer to the names of (`lora_B`, `lora_A`).
        alphas: layer to the name of its alpha, for those that have one.
    """

    factors: dict[str, tuple[str, str]]
    alphas: dict[str, str]


def arrange(container: Container, model: nn.Module) -> Places:
    """Find the layer of each tensor.

    Args:
        container: the file.
        model: whose layers it names.

    Returns:
        Both factors for each layer, and the alphas.

    Raises:
        AdapterError: a tensor has no place, a place has two tensors, or a factor lacks the other.
    """
    path, total = container.path, len(container.entries)
    layers = {name for name, _ in model.named_modules() if name}
    flat = _flat_names(layers)
    parts: dict[str, dict[str, str]] = {}
    strange = []
    for name in container.entries:
        layer, part = _place(name, layers, flat)
        if layer is None:
            strange.append(name)
            continue
        other = parts.setdefault(layer, {}).setdefault(part, name)
        if other != name:
            raise AdapterError(
                f"the adapter {path} names one place twice: {other} and {name} are both {part} of layer {layer}."
            )
    _refuse_strange(container, model, sorted(strange))
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
    return Places(
        {layer: (found["up"], found["down"]) for layer, found in sorted(parts.items())},
        {layer: found["alpha"] for layer, found in sorted(parts.items()) if "alpha" in found},
    )


def foreign_scalings(
    container: Container, places: Places, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """What the product of each layer counts: alpha / rank.

    Args:
        container: the file.
        places: see `arrange`.
        tensors: of the file.

    Returns:
        The scalings, and what could not be known about them, in words.

    Raises:
        AdapterError: an alpha is not one positive number, some layers have one and some have none, or the settings in
            the header ask for more than a plain LoRA.
    """
    path = container.path
    ranks = {layer: container.entries[down].shape[0] for layer, (_, down) in places.factors.items()}
    given = [name for name in (_SETTINGS, PEFT_SETTINGS) if name in container.facts]
    if len(given) + bool(places.alphas) > 1:
        others = " and in ".join(["tensors"] * bool(places.alphas) + given)
        raise AdapterError(f"the adapter {path} states alpha in {others}; which one counts?")
    if given:
        stated = _settings_alpha(container, given[0], set(ranks.values()))
        return {layer: stated for layer in ranks}, ()
    if not places.alphas:
        # dreamrie and diffusers fold the scaling in, so that alpha is the rank; PEFT keeps it in another file.
        return dict.fromkeys(ranks, 1.0), (
            "its strength (it states no alpha; alpha = rank was taken)",
        )
    bare = sorted(set(ranks) - set(places.alphas))
    if bare:
        raise AdapterError(
            f"the adapter {path} is incomplete: {len(bare)} of {len(ranks)} layers have no alpha, such as {bare[0]}."
        )
    scalings = {}
    for layer, name in places.alphas.items():
        values = tensors[name].flatten().tolist()
        if len(values) != 1 or not _is_positive(values[0]):
            raise AdapterError(
                f"the adapter {path}: {name} must be one positive number, got {values[:3]}."
            )
        scalings[layer] = values[0] / ranks[layer]
    return scalings, ()


def _place(name: str, layers: set[str], flat: Mapping[str, str]) -> tuple[str | None, str]:
    """Layer of the model and part ("down", "up" or "alpha") of a name; no layer if it has no place."""
    old = _PROCESSOR.search(name)
    if old:
        layer = f"{name[: old.start()]}.{'to_out.0' if old[1] == 'to_out' else old[1]}"
        part = old[2]
    else:
        ending = next((end for end in _ENDINGS if name.endswith(end)), None)
        if ending is None:
            return None, ""
        layer, part = name.removesuffix(ending), _ENDINGS[ending]
    if layer.startswith(UNET_PREFIX):
        return flat.get(layer.removeprefix(UNET_PREFIX)), part
    # A model may itself have a child named unet: the whole name is tried first.
    candidates = [layer, *(layer.removeprefix(prefix) for prefix in _PREFIXES if prefix)]
    return next((candidate for candidate in candidates if candidate in layers), None), part


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


def _refuse_strange(container: Container, model: nn.Module, strange: list[str]) -> None:
    if not strange:
        return
    path, total = container.path, len(container.entries)
    text = [name for name in strange if name.startswith(_TEXT_PREFIXES)]
    if text:
        raise AdapterError(
            f"the adapter {path}: {len(text)} of {total} tensors are not of a U-Net, the first is {text[0]}. Adapters "
            "of text encoders are not loaded here; load the file with diffusers' load_lora_weights."
        )
    kind = type(model).__name__
    raise AdapterError(
        f"the adapter {path}: {len(strange)} of {total} tensors have no place in the model {kind}; the first is "
        f"{strange[0]}. Expected are names such as unet.LAYER.lora_A.weight and unet.LAYER.lora_B.weight with a layer "
        "of this model: give the model that the adapter was trained on."
    )


def _settings_alpha(container: Container, place: str, found: set[int]) -> float:
    """lora_alpha / r of the settings that diffusers writes into the header, or of those of PEFT."""
    path = container.path
    where = "in its header" if place == _SETTINGS else f"in its {PEFT_SETTINGS}"
    try:
        settings: Any = json.loads(container.facts[place])
        plain = {key.removeprefix("unet."): value for key, value in dict(settings).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"the adapter {path}: {place} {where} is not JSON ({error}).") from error
    asked = _more_than_plain(plain)
    if asked:
        raise AdapterError(
            f"the adapter {path} asks for {asked} {where}, which is more than a plain LoRA. Load it with "
            "PEFT; dreamrie.lora_pairs then finds the result."
        )
    rank: Any
    alpha: Any
    rank = plain.get("r")
    # PEFT's own default is a number that has nothing to do with r: its file must say.
    alpha = plain.get("lora_alpha", rank if place == _SETTINGS else None)
    if not _is_positive(rank) or found != {rank} or not _is_positive(alpha):
        raise AdapterError(
            f"the adapter {path} states r = {rank!r} and lora_alpha = {alpha!r} {where}, and its tensors have "
            f"rank {sorted(found)}."
        )
    return float(alpha) / float(rank)


def _more_than_plain(settings: Mapping[str, Any]) -> str | None:
    """The first setting by which the product of the factors is not all that the adapter does."""
    if settings.get("peft_type") not in (None, "LORA"):
        return f"peft_type = {settings['peft_type']!r}"
    if settings.get("bias", "none") != "none":
        return "bias"
    if str(settings.get("init_lora_weights", True)).lower().startswith(_MOVING_STARTS):
        return f"init_lora_weights = {settings['init_lora_weights']!r}"
    return next((key for key in _SPECIAL if settings.get(key)), None)


def _is_positive(value: object) -> TypeGuard[float]:
    # 10 ** 9 bounds whole numbers too, some of which no float holds.
    return isinstance(value, int | float) and 0 < value < 10**9
