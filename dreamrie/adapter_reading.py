"""Load an adapter file onto a model completely, or refuse it with a reason and leave the model as it was.

Where a text encoder is given too, the same holds for both models together.

What is checked, in this order, before the model is touched:

1. the file accounts for each of its bytes (`dreamrie.adapter_container`);
2. the model carries no adapter yet;
3. every tensor has a place in the model and the shape for it, every layer has both factors, no layer is missing;
4. the digest: no value, name, type or fact was changed since dreamrie wrote the file;
5. every value is finite, also in the precision of the model;
6. the fingerprint: the model has the base weights that the file was trained on.

A file without digest is *foreign*. Points 1, 2, 3 and 5 hold for it all the same; what could not be checked is logged
as a warning and returned.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from dreamrie.adapter_container import (
    Container,
    check_digest,
    check_format,
    check_layers,
    open_container,
)
from dreamrie.adapter_file import BASE_KEY, TEXT_ENCODER
from dreamrie.adapter_magnitudes import check_shape, refuse_dora
from dreamrie.adapter_names import arrange
from dreamrie.adapter_scaling import foreign_scalings
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.lora import LoraPair, LowRank
from dreamrie.lora.fingerprint import EXACT, rounded_fingerprints
from dreamrie.lora.place import (
    Placing,
    adapted_layer,
    factor_shapes,
    largest_rank,
    place_together,
)

_log = logging.getLogger(__name__)
Found = TypeVar("Found")

# What PEFT and torch raise about a model that they cannot adapt.
_PLACE_ERRORS = (
    ConfigError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    NotImplementedError,
)


@dataclass(frozen=True)
class AdapterContents:
    """A file that fits a model.

    Attributes:
        path: the file.
        facts: text of its header.
        changes: path of each layer in the model to its factors, in the type of the file.
        scalings: what each product counts.
        unchecked: what the file gave no means to check, in words; empty for a file of dreamrie that names its base.
        text_changes: the same for the text encoder, by paths in it.
        text_scalings: what each of these counts.
        magnitudes: of DoRA, path of each layer in the model to (out,); empty for a plain LoRA.
        text_magnitudes: those of the text encoder.
    """

    path: Path
    facts: dict[str, str]
    changes: dict[str, LowRank]
    scalings: dict[str, float]
    unchecked: tuple[str, ...]
    text_changes: dict[str, LowRank] = field(default_factory=dict)
    text_scalings: dict[str, float] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    text_magnitudes: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on a model.

    Attributes:
        pairs: one for each layer, plain (without anchor), trainable; for an optimizer, or to save again.
        facts: text of the file's header, such as `base_model` and `instance_prompt`.
        unchecked: what the file gave no means to check, in words; empty for a file of dreamrie that names its base.
        text_pairs: those of the text encoder.
    """

    pairs: list[LoraPair]
    facts: dict[str, str]
    unchecked: tuple[str, ...]
    text_pairs: list[LoraPair] = field(default_factory=list)


def load_adapter(
    model: nn.Module,
    path: Path | str,
    *,
    adapter_name: str = "default",
    other_base: bool = False,
    text_encoder: nn.Module | None = None,
) -> LoadedAdapter:
    """Put the adapter of a file on a model: all of it, or nothing and an error.

    As after `attach_lora`, only adapter parameters require gradients then. A file of dreamrie holds the change
    X - X0 as one product of rank 2r, so the pairs are plain ones of rank 2r: training goes on from the same function,
    not from the same point and anchor (a checkpoint does that).

    Args:
        model: a diffusers U-Net, or any module whose layers the file names; carries no adapter.
        path: file of dreamrie (for diffusers, or universal), or a plain LoRA file of diffusers, PEFT or kohya; or the
            folder that holds `pytorch_lora_weights.safetensors` or PEFT's `adapter_model.safetensors`, whose settings
            are then read too.
        adapter_name: name of the adapter in PEFT.
        other_base: accept that the base weights are not those that the adapter was trained on; this is logged.
        text_encoder: CLIP's text encoder that belongs to the U-Net, of any version of transformers; carries no adapter.
            Layers of it in the file are put on it. Without it, a file that has such layers is refused.

    Returns:
        The pairs, what the file says about itself, and what could not be checked.

    Raises:
        AdapterError: the file is missing, damaged, changed, incomplete, not finite, made for another model or for
            other base weights, or a model carries an adapter. The models are as they were, to the bit.
        ConfigError: `adapter_name` cannot be a name, or `model` has a text encoder itself and another one is given.
    """
    if not adapter_name or "." in adapter_name:
        raise ConfigError(f"adapter_name must be a word without dots, got {adapter_name!r}.")
    contents = read_adapter(
        model, path, other_base=other_base, text_encoder=text_encoder, use_dora=True
    )
    placings = [Placing(model, contents.changes, contents.scalings, contents.magnitudes)]
    if text_encoder is not None:
        text = contents.text_changes, contents.text_scalings, contents.text_magnitudes
        placings.append(Placing(text_encoder, *text))
    try:
        pairs, *others = place_together(placings, adapter_name)
    except _PLACE_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise AdapterError(
            f"the adapter {contents.path} does not fit the model {type(model).__name__}: {reason}. The model is as it "
            "was; give the model that the adapter was trained on."
        ) from error
    return LoadedAdapter(pairs, contents.facts, contents.unchecked, *others)


def read_adapter(
    model: nn.Module,
    path: Path | str,
    *,
    other_base: bool = False,
    text_encoder: nn.Module | None = None,
    use_dora: bool = False,
) -> AdapterContents:
    """Read a file and check it against a model, which is not touched.

    Args:
        model: carries no adapter.
        path: see `load_adapter`.
        other_base: see `load_adapter`.
        text_encoder: see `load_adapter`; not touched either.
        use_dora: read a DoRA adapter too; the caller must not forget its magnitudes.

    Returns:
        Factors that fit the model.

    Raises:
        AdapterError: see `load_adapter`.
        ConfigError: `model` has a text encoder itself, and another one is given.
    """
    container = open_container(path)
    models = {"": model} | ({} if text_encoder is None else {TEXT_ENCODER: text_encoder})
    for part in models.values():
        _check_free(part, container.path)
    has_digest = check_format(container)
    places = arrange(container, model, text_encoder)
    if places.magnitudes and not use_dora:
        name = next(iter(places.magnitudes.values()))
        refuse_dora(container.path, name, "what reads it here takes low-rank changes only")
    if has_digest:
        check_layers(container, places.factors)
    factors = {prefix: _of_part(places.factors, prefix, models) for prefix in models}
    for prefix, part in models.items():
        _check_shapes(container, part, factors[prefix])
    for layer, name in places.magnitudes.items():
        left = container.entries[places.factors[layer][0]].shape
        check_shape(container.path, name, container.entries[name].shape, left)
    # The values come last: only now is it known that they belong to tensors of the right shapes.
    tensors = container.tensors()
    if has_digest:
        check_digest(container, tensors)
    changes = {
        prefix: {layer: LowRank(tensors[up], tensors[down]) for layer, (up, down) in found.items()}
        for prefix, found in factors.items()
    }
    for prefix, part in models.items():
        _check_finite(container.path, part, changes[prefix], factors[prefix])
    magnitudes = {layer: tensors[name] for layer, name in places.magnitudes.items()}
    for layer, magnitude in magnitudes.items():
        if not bool(magnitude.isfinite().all()):
            raise AdapterError(
                f"the adapter {container.path} holds values that are not finite (NaN or infinity): "
                f"{places.magnitudes[layer]}. It draws nothing but black; train again."
            )
    scalings, unknown = foreign_scalings(container, places, tensors)
    unchecked = _check_base(model, container, other_base)
    if changes.get(TEXT_ENCODER):
        unchecked += ("whether the text encoder is the one that it was trained on (it names none)",)
    if not has_digest:
        unchecked = (
            "whether the file is whole and unchanged (it has no digest of dreamrie)",
            *unchecked,
            *unknown,
        )
    if unchecked:
        _log.warning("%s: could not be checked: %s", container.path, "; ".join(unchecked))
    return AdapterContents(
        path=container.path,
        facts=container.facts,
        changes=changes[""],
        scalings=_of_part(scalings, "", models),
        unchecked=unchecked,
        text_changes=changes.get(TEXT_ENCODER, {}),
        text_scalings=_of_part(scalings, TEXT_ENCODER, models) if TEXT_ENCODER in models else {},
        magnitudes=_of_part(magnitudes, "", models),
        text_magnitudes=_of_part(magnitudes, TEXT_ENCODER, models)
        if TEXT_ENCODER in models
        else {},
    )


def _of_part(found: Mapping[str, Found], prefix: str, models: Collection[str]) -> dict[str, Found]:
    """What belongs to one of the models, by paths in it; only with a text encoder beside it are there two."""
    others = [other for other in models if other and other != prefix]
    return {
        layer.removeprefix(prefix): value
        for layer, value in found.items()
        if layer.startswith(prefix) and not (others and layer.startswith(tuple(others)))
    }


def _check_free(model: nn.Module, path: Path) -> None:
    place = adapted_layer(model)
    if place is not None:
        raise AdapterError(
            f"the adapter {path} is not loaded: the model carries an adapter already (at {place}); remove it first, "
            "or load onto a fresh copy of the base model."
        )


def _check_shapes(
    container: Container, model: nn.Module, factors: Mapping[str, tuple[str, str]]
) -> None:
    for layer, (up, down) in factors.items():
        found = container.entries[up].shape, container.entries[down].shape
        rank = found[1][0] if found[1] else 0
        try:
            wanted = factor_shapes(model, layer, rank)
        except ConfigError as error:
            raise AdapterError(
                f"the adapter {container.path} does not fit the model: {error}"
            ) from error
        for name, shape, right in zip((down, up), found[::-1], wanted[::-1], strict=True):
            if shape != right:
                raise AdapterError(
                    f"the adapter {container.path} does not fit the model {type(model).__name__}: size mismatch: "
                    f"{name} has shape {shape}, layer {layer} needs {right} for rank {rank}. Give the base model that "
                    "it was trained on."
                )
    _check_rank(
        container,
        model,
        {layer: container.entries[down].shape[0] for layer, (_, down) in factors.items()},
    )


def _check_rank(container: Container, model: nn.Module, ranks: Mapping[str, int]) -> None:
    """A file may pad its narrow layers to the rank of the others; more than that only costs memory."""
    if not ranks:
        return
    layer, largest = max(ranks, key=lambda name: ranks[name]), largest_rank(model)
    if ranks[layer] > largest:
        raise AdapterError(
            f"the adapter {container.path} does not fit the model {type(model).__name__}: layer {layer} has rank "
            f"{ranks[layer]}; allowed is 1 to {largest}, what the largest layer of the model can have. Give the base "
            "model that it was trained on."
        )


def _check_finite(
    path: Path,
    model: nn.Module,
    changes: Mapping[str, LowRank],
    names: Mapping[str, tuple[str, str]],
) -> None:
    for layer, change in changes.items():
        base: Any = model.get_submodule(layer)
        precision = base.weight.dtype
        for name, tensor in zip(names[layer], change, strict=True):
            if not bool(tensor.isfinite().all()):
                raise AdapterError(
                    f"the adapter {path} holds values that are not finite (NaN or infinity): {name}. It draws nothing "
                    "but black; train again."
                )
            if not bool(tensor.to(precision).isfinite().all()):
                raise AdapterError(
                    f"the adapter {path}: {name} overflows {precision}, the precision of layer {layer}. Load the "
                    "model in fp32 or bf16."
                )


def _check_base(model: nn.Module, container: Container, other_base: bool) -> tuple[str, ...]:
    """Compare fingerprints of the base weights; returns what could not be compared."""
    facts = container.facts
    wanted = {k.removeprefix(BASE_KEY): v for k, v in facts.items() if k.startswith(BASE_KEY)}
    if not wanted:
        return ("whether the model has the base weights that it was trained on (it names none)",)
    found = rounded_fingerprints(model)
    common = sorted(set(wanted) & set(found))
    if any(wanted[kind] == found[kind] for kind in common):
        return ()
    trained_on = facts.get("base_model") or "another base model"
    if common:
        text = (
            f"its base weights ({trained_on}) are not those of the model: the fingerprint differs"
        )
    else:
        text = (
            f"its base weights ({trained_on}) were {_kept_as(wanted)}, the model's {_kept_as(found)}, so fingerprints "
            f"cannot be compared{'' if EXACT in (*wanted, *found) else ' (a model loaded in float32 can be)'}"
        )
    if other_base:
        _log.warning("%s: %s; loaded because other_base=True", container.path, text)
        return (f"whether it draws what it was trained to: {text}",)
    raise AdapterError(
        f"the adapter {container.path} is not loaded: {text}. Load the base model that it was trained on, or pass "
        "other_base=True if another base is what you want."
    )


def _kept_as(kinds: Iterable[str]) -> str:
    """What can be compared of some weights, in words."""
    if EXACT in kinds:
        return "quantized or of mixed precision"
    return f"rounded to {' or '.join(kinds)}"
