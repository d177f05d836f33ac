"""DoRA's magnitudes in adapter files: one vector beside the factors of each layer, as PEFT and diffusers write it.

    LAYER.lora_magnitude_vector       (out,), always fp32

The change of a DoRA layer has no low rank, so the product of the factors alone draws something else. A file has a
magnitude for every layer or for none, and who cannot hold magnitudes refuses such a file by `refuse_dora`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dreamrie.errors import AdapterError
from dreamrie.lora import LoraPair

MAGNITUDE = ".lora_magnitude_vector"
Magnitudes = Mapping[str, Tensor]


def magnitudes_of(pairs: Iterable[LoraPair]) -> dict[str, Tensor]:
    """The magnitudes of adapted layers.

    Args:
        pairs: any.

    Returns:
        Layer to m (out,), copies on the CPU; empty for a plain LoRA.
    """
    return {
        pair.name: pair.magnitude.detach().cpu().clone()
        for pair in pairs
        if pair.magnitude is not None
    }


def named_magnitudes(
    magnitudes: Magnitudes | None, layers: Iterable[str], place: Callable[[str], str]
) -> dict[str, Tensor]:
    """The tensors of a file that hold the magnitudes.

    They are never rounded to a half precision: that would round the whole weight of the base with them.

    Args:
        magnitudes: layer to m (out,); None or empty for a plain LoRA.
        layers: of the file.
        place: name of a layer in the file.

    Returns:
        fp32, by name.

    Raises:
        AdapterError: a layer has a magnitude and another has none, or a value is not finite.
    """
    if not magnitudes:
        return {}
    odd = sorted(set(layers) ^ set(magnitudes))
    if odd:
        raise AdapterError(
            f"an adapter file holds a magnitude for every layer or for none; {odd[0]} is another case. Nothing was "
            "written."
        )
    found = {}
    for layer, magnitude in sorted(magnitudes.items()):
        name = place(layer) + MAGNITUDE
        found[name] = magnitude.detach().to("cpu", torch.float32).contiguous()
        if not bool(found[name].isfinite().all()):
            raise AdapterError(f"{name} holds values that are not finite. Nothing was written.")
    return found


def check_shape(path: Path, name: str, shape: tuple[int, ...], left: tuple[int, ...]) -> None:
    """Refuse a magnitude that is not one number for each output of its layer.

    Args:
        path: of the file, for the message.
        name: of the tensor.
        shape: of it.
        left: shape of the layer's `lora_B`.

    Raises:
        AdapterError: it is another, or the layer is a convolution.
    """
    if shape != left[:1] or len(left) != 2:
        raise AdapterError(
            f"the adapter {path}: {name} has shape {shape}; needed is ({left[0]},), beside lora_B of shape {left}, and "
            "DoRA of a convolution cannot be read. Copy the file again, or load it with PEFT."
        )


def refuse_universal(magnitudes: Magnitudes | None) -> None:
    """Refuse DoRA where the universal file was asked for.

    Args:
        magnitudes: of the adapter.

    Raises:
        AdapterError: there are some.
    """
    if magnitudes:
        raise AdapterError(
            "a DoRA adapter cannot be a universal file, as its readers disagree about magnitudes: diffusers leaves "
            "those of kohya's names out, A1111 takes norms of columns, ComfyUI and Forge norms of the rows of the base "
            "alone. Each would draw something else. Write it --to diffusers or peft, or merge-into-base. Nothing was "
            "written."
        )


def refuse_dora(path: Path, name: str, who: str) -> None:
    """Raise the message of a reader that cannot hold magnitudes.

    Args:
        path: of the file.
        name: of a tensor in it.
        who: cannot, to follow "and".

    Raises:
        AdapterError: always.
    """
    raise AdapterError(
        f"the adapter {path} is not a plain LoRA but DoRA: it holds {name}. Its magnitudes rescale the rows of the "
        f"weights, so its change has no low rank, and {who}. The commands info, verify, convert (--to diffusers or "
        "peft), generate and merge-into-base take it."
    )
