"""What the product of each layer counts in files of other programs: alphas among the tensors, or settings of PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import Tensor

from dreamrie.adapter_container import Container
from dreamrie.adapter_file import TEXT_ENCODER
from dreamrie.adapter_magnitudes import MAGNITUDE
from dreamrie.adapter_names import Places
from dreamrie.adapter_peft import PEFT_SETTINGS
from dreamrie.adapter_spelling import PREFIXES, TEXT_PREFIXES, parted
from dreamrie.errors import AdapterError
from dreamrie.lora.patterns import StatedStrength

# diffusers keeps PEFT's settings as JSON under this name in the header, PEFT itself in a file.
_SETTINGS = "lora_adapter_metadata"
NO_STRENGTH = "its strength (it states no alpha; alpha = rank was taken)"
# What makes an adapter more than a plain LoRA of some strength on each layer.
_SPECIAL = (
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
        AdapterError: an alpha is not one positive number, some layers have one and some have none, or the settings
            ask for more than a plain LoRA or contradict the tensors.
    """
    path = container.path
    ranks = {layer: container.entries[down].shape[0] for layer, (_, down) in places.factors.items()}
    given = [name for name in (_SETTINGS, PEFT_SETTINGS) if name in container.facts]
    if len(given) + bool(places.alphas) > 1:
        others = " and in ".join(["tensors"] * bool(places.alphas) + given)
        raise AdapterError(f"the adapter {path} states alpha in {others}; which one counts?")
    if given:
        return _settings_scalings(container, given[0], places, ranks)
    if not places.alphas:
        # dreamrie and diffusers fold the scaling in, so that alpha is the rank; PEFT keeps it in another file.
        return dict.fromkeys(ranks, 1.0), (NO_STRENGTH,)
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


def _settings_scalings(
    container: Container, place: str, places: Places, ranks: Mapping[str, int]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Scalings by the settings that diffusers writes into the header, or by those of PEFT."""
    stated = _stated(container, place)
    scalings: dict[str, float] = {}
    wrong: list[tuple[str, float, float]] = []
    unknown: tuple[str, ...] = ()
    for layer, (_, down) in places.factors.items():
        is_text = place == _SETTINGS and down.startswith(TEXT_PREFIXES)
        strength = stated.get(TEXT_ENCODER if is_text else "")
        if strength is None:  # diffusers takes alpha = rank for a model without settings
            scalings[layer], unknown = 1.0, (NO_STRENGTH,)
            continue
        try:
            rank, scalings[layer] = strength_of(strength, _path_in_settings(down, layer))
        except re.error as error:
            raise AdapterError(
                f"the adapter {container.path}: a pattern {_where(place)} is no regular expression ({error})."
            ) from error
        if rank != ranks[layer]:
            wrong.append((layer, rank, strength.alpha))
    if wrong:
        layer, rank, alpha = wrong[0]
        found = sorted({ranks[layer] for layer, _, _ in wrong})
        raise AdapterError(
            f"the adapter {container.path} states r = {rank!r} and lora_alpha = {alpha!r} {_where(place)} for "
            f"{len(wrong)} layers such as {layer}, and their tensors have rank {found}."
        )
    return scalings, unknown


def strength_of(stated: StatedStrength, path: str) -> tuple[float, float]:
    """Rank and scaling of one layer.

    Args:
        stated: what the settings say.
        path: of the layer, as the file has it.

    Returns:
        r, and what the product counts.
    """
    return stated.of(path)


def _stated(container: Container, place: str) -> dict[str, StatedStrength]:
    """What the settings say: diffusers' for each model, "" being the U-Net; PEFT's are of one model."""
    path = container.path
    try:
        settings: Any = json.loads(container.facts[place])
        plain = {key.removeprefix("unet."): value for key, value in dict(settings).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(
            f"the adapter {path}: {place} {_where(place)} is not JSON ({error})."
        ) from error
    parts: dict[str, dict[str, Any]] = {"": {}, TEXT_ENCODER: {}}
    for key, value in plain.items():
        part = TEXT_ENCODER if place == _SETTINGS and key.startswith(TEXT_ENCODER) else ""
        parts[part][key.removeprefix(part)] = value
    given = {part: found for part, found in parts.items() if found} or {"": {}}
    return {part: _strength(container, place, found) for part, found in given.items()}


def _strength(container: Container, place: str, settings: Mapping[str, Any]) -> StatedStrength:
    path, where = container.path, _where(place)
    is_dora = any(name.endswith(MAGNITUDE) for name in container.entries)
    if is_dora and settings.get("use_dora") is not True:
        raise AdapterError(
            f"the adapter {path} holds magnitudes of DoRA, and use_dora {where} is {settings.get('use_dora')!r}: PEFT "
            "would leave them out. Copy the file and its settings again."
        )
    asked = _more_than_plain(
        {key: v for key, v in settings.items() if key != "use_dora" or not is_dora}
    )
    if asked:
        raise AdapterError(
            f"the adapter {path} asks for {asked} {where}, which is more than a plain LoRA. Load it with "
            "PEFT; dreamrie.lora_pairs then finds the result."
        )
    rank: Any = settings.get("r")
    # PEFT's own default is a number that has nothing to do with r: its file must say.
    alpha: Any = settings.get("lora_alpha", rank if place == _SETTINGS else None)
    if not _is_positive(rank) or not _is_positive(alpha):
        raise AdapterError(
            f"the adapter {path} states r = {rank!r} and lora_alpha = {alpha!r} {where}; both must be positive numbers."
        )
    patterns: dict[str, dict[str, float]] = {}
    for name in ("rank_pattern", "alpha_pattern"):
        found: Any = settings.get(name) or {}
        if not isinstance(found, dict) or not all(_is_positive(v) for v in found.values()):
            raise AdapterError(
                f"the adapter {path}: {name} {where} must give layers positive numbers, got {str(found)[:100]}."
            )
        patterns[name] = found
    by_root = settings.get("use_rslora") or False
    if by_root not in (True, False):
        raise AdapterError(
            f"the adapter {path}: use_rslora {where} must be true or false, got {by_root!r}."
        )
    return StatedStrength(
        rank=rank,
        alpha=alpha,
        ranks=patterns["rank_pattern"],
        alphas=patterns["alpha_pattern"],
        by_root=bool(by_root),
    )


def _where(place: str) -> str:
    return "in its header" if place == _SETTINGS else f"in its {PEFT_SETTINGS}"


def _path_in_settings(name: str, layer: str) -> str:
    """Path that patterns are matched with: as the file spells it, where that is with dots."""
    stem, _ = parted(name) or (name, "")
    prefixes = (TEXT_ENCODER, *PREFIXES)
    path = stem.removeprefix(next(prefix for prefix in prefixes if stem.startswith(prefix)))
    return path if "." in path else layer.removeprefix(TEXT_ENCODER)


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
