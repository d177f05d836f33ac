"""Put a saved adapter on a base model with diffusers' own loader, and make sure that all of it arrived."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor

from dreamrie.adapter_file import DIFFUSERS_FILE
from dreamrie.diffusion.components import Components
from dreamrie.diffusion.source import quiet_libraries
from dreamrie.errors import AdapterError, ConfigError

_log = logging.getLogger(__name__)

ADAPTER_NAME = "saved"
_UNET = "unet."
# A safetensors header: a JSON table of this many bytes at most, as safetensors itself demands.
_LARGEST_HEADER = 100_000_000
# What safetensors, diffusers and PEFT raise about a file that is damaged or of another model.
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError)


def find_adapter(directory_or_file: Path) -> Path:
    """The adapter file that a path stands for.

    Args:
        directory_or_file: folder of a training run, or the file itself.

    Returns:
        Path of a file that exists.

    Raises:
        AdapterError: there is none.
    """
    path = directory_or_file
    if path.is_dir():
        path /= DIFFUSERS_FILE
    if not path.is_file():
        raise AdapterError(
            f"there is no adapter {path}. Give the folder of a finished training, which holds {DIFFUSERS_FILE}, or "
            "the file itself."
        )
    return path


def read_metadata(directory_or_file: Path) -> dict[str, str]:
    """Read what an adapter file says about itself; no weights are loaded.

    Args:
        directory_or_file: see `find_adapter`.

    Returns:
        Facts of the header, such as `base_model`; none for files of other programs.

    Raises:
        AdapterError: there is no file, or it is not a whole safetensors file with tensors.
    """
    path = find_adapter(directory_or_file)
    try:
        table, space = _read_table(path)
        facts = table.pop("__metadata__", None) or {}
        ends = [int(entry["data_offsets"][1]) for entry in table.values()]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise AdapterError(_damaged(path, error)) from error
    if not ends:
        raise AdapterError(f"the adapter {path} is empty: it holds no tensor.")
    if max(ends) != space:
        raise AdapterError(
            f"the adapter {path} is damaged: {space} bytes of weights, {max(ends)} are announced. Copy it again."
        )
    return {str(key): str(value) for key, value in facts.items()}


def load_saved_adapter(components: Components, directory_or_file: Path) -> dict[str, str]:
    """Put a saved adapter on the U-Net, as any user of diffusers loads it.

    Args:
        components: a base model that carries no adapter.
        directory_or_file: see `find_adapter`.

    Returns:
        Facts of the file's header.

    Raises:
        AdapterError: the file is missing, damaged or empty; it holds something that the U-Net has no place for, or more
            than a U-Net's layers. The U-Net is then as it was.
        ConfigError: the file was made for another base model, and the model was not named by the user.
    """
    path = find_adapter(directory_or_file)
    facts = read_metadata(path)
    if getattr(components.unet, "peft_config", None):
        raise AdapterError(
            "the model carries an adapter already; remove it first (remove_adapter)."
        )
    _check_base(components, path, facts.get("base_model", ""))
    pipe = _pipeline(components)
    try:
        with quiet_libraries():
            wanted = _tensors_of(path)
            pipe.load_lora_weights(
                str(path.parent),
                weight_name=path.name,
                adapter_name=ADAPTER_NAME,
                local_files_only=True,
                use_safetensors=True,
            )
    except _LOAD_ERRORS as error:
        remove_adapter(components)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise AdapterError(
            f"the adapter {path} does not fit the model {components.source.resolved}: {reason}. Give the base model "
            "that it was trained on."
        ) from error
    lost = _not_attached(components.unet, wanted)
    if lost:
        remove_adapter(components)
        raise AdapterError(
            f"the adapter {path}: {len(lost)} of {len(wanted)} tensors have no place in the model "
            f"{components.source.resolved}; the first is {lost[0]}. Give the base model that it was trained on."
        )
    components.unet.requires_grad_(False)
    return facts


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


def _read_table(path: Path) -> tuple[dict[str, Any], int]:
    """The table of a safetensors file, and the bytes of data behind it; anything else is a `ValueError`."""
    with path.open("rb") as file:
        # 8 bytes of little-endian length, that many bytes of JSON, data.
        length = int.from_bytes(file.read(8), "little")
        behind = path.stat().st_size - 8 - length
        if not 0 < length <= _LARGEST_HEADER or behind < 0:
            raise ValueError("no safetensors header")
        return dict(json.loads(file.read(length))), behind


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"the adapter {path} cannot be read as safetensors ({error}). The file is damaged or something else; copy or "
        "train it again."
    )


def _check_base(components: Components, path: Path, trained_on: str) -> None:
    """An adapter on another base draws pictures that are nobody's."""
    source = components.source
    if not trained_on or trained_on == source.resolved:
        return
    text = f"the adapter {path} was trained on {trained_on}, and the model is {source.resolved}"
    if not source.requested:  # the embedded model, because no model was named
        raise ConfigError(f"{text}. Name the base model: {trained_on}.")
    _log.warning("%s, as was asked for", text)


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


def _tensors_of(path: Path) -> dict[str, Tensor]:
    """Tensors of the file under PEFT's names, "LAYER.lora_A.weight"."""
    state, _ = StableDiffusionPipeline.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True, use_safetensors=True
    )
    if not state:
        raise ValueError("it holds no LoRA layer")
    strange = [name for name in state if not name.startswith(_UNET)]
    if strange:
        raise ValueError(
            f"{len(strange)} of {len(state)} tensors are not of a U-Net, the first is {strange[0]}"
        )
    inside = {name.removeprefix(_UNET): tensor for name, tensor in state.items()}
    if not any("lora_A" in name for name in inside):
        inside = convert_unet_state_dict_to_peft(inside)
    return dict(inside)


def _not_attached(unet: Any, wanted: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that stand nowhere in the U-Net, or with another shape."""
    marks = (f".lora_A.{ADAPTER_NAME}.", f".lora_B.{ADAPTER_NAME}.")
    attached = {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter.shape
        for name, parameter in unet.named_parameters()
        if any(mark in name for mark in marks)
    }
    return sorted(name for name, tensor in wanted.items() if attached.get(name) != tensor.shape)
