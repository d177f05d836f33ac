"""Write a base model with an adapter's change in its weights: a folder that any program for diffusers loads.

Of the U-Net, W becomes W + scale * change in fp64, rounded once to the precision that is written; the change of DoRA is
that of its formula. Every other file is copied byte for byte. The base is only read, and the folder appears whole or
not at all.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import __version__ as diffusers_version
from safetensors import SafetensorError
from torch import Tensor, nn

from dreamrie.adapter_file import DIGEST_KEY
from dreamrie.adapter_reading import AdapterContents, read_adapter
from dreamrie.diffusion.components import Components
from dreamrie.diffusion.source import quiet_libraries
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.files import new_folder
from dreamrie.lora import LowRank
from dreamrie.lora.dora import dora_weight

_log = logging.getLogger(__name__)

INDEX, ORIGIN = "model_index.json", "dreamrie_merged.json"
_PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")
_PRECISIONS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Weights without a variant in their name, in one file or in several; other weights are of no use beside them.
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:-\d{5}-of-\d{5})?\.safetensors")
_WEIGHTS_INDEX = re.compile(r"(?:diffusion_pytorch_)?model\.safetensors\.index\.json")
_SETTINGS = (".json", ".txt")


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        folder: with the pipeline.
        layers: whose weights were changed.
        dtype: of the U-Net's weights.
        largest_rounding: share of a layer's change that rounding its weights lost at most.
        worst_layer: where.
    """

    folder: Path
    layers: int
    dtype: torch.dtype
    largest_rounding: float
    worst_layer: str


def merge_into_base(
    base: Components,
    file: Path,
    output: Path,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    other_base: bool = False,
) -> Merged:
    """Write the base with the change of an adapter in its weights.

    Args:
        base: loaded in fp32, which holds every half precision exactly, from a folder; carries no adapter. The weights
            of its U-Net in memory are changed, its files are not.
        file: see `dreamrie.adapter_reading.load_adapter`.
        output: folder that does not exist yet; the one above it does.
        scale: counts the change; not 0.
        dtype: of the U-Net that is written; None: that of the base's file.
        other_base: see `dreamrie.adapter_reading.load_adapter`.

    Returns:
        What was written.

    Raises:
        ConfigError: scale or output cannot be used.
        AdapterError: the file is refused, a weight overflows `dtype`, or the folder cannot be written.
    """
    check_merge(output, scale)
    if base.source.directory.resolve() in output.absolute().resolve().parents:
        raise ConfigError(f"--output {output} lies in the folder of the base, which is only read.")
    contents = read_adapter(base.unet, file, other_base=other_base, use_dora=True)
    kind = dtype or stored_dtype(base.source.directory)
    worst, layer = add_to_weights_(base.unet, contents, scale, kind)
    _check_space(base, kind, output)
    try:
        with new_folder(output) as folder:
            _write(base, folder, kind)
            origin = json.dumps(_origin(base, contents, scale, kind), indent=2, sort_keys=True)
            (folder / ORIGIN).write_text(origin + "\n", encoding="utf-8")
    # safetensors tells a full disk by an error of its own.
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{output} cannot be written: {error}. Nothing of it was left; free space or choose another --output."
        ) from error
    return Merged(output, len(contents.changes), kind, worst, layer)


def check_merge(output: Path, scale: float) -> None:
    """Find out before a model is loaded that its merge could not be written.

    Args:
        output: folder to be.
        scale: of the change.

    Raises:
        ConfigError: something is there, the folder above it is not, or the scale says nothing.
    """
    if not math.isfinite(scale) or scale == 0.0:
        raise ConfigError(f"--scale must be a finite number other than 0; got {scale}.")
    if output.exists() or output.is_symlink():
        raise ConfigError(f"--output {output} is there already. Choose another name.")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: the folder above it does not exist. Create it.")


def add_to_weights_(
    unet: Any, contents: AdapterContents, scale: float, dtype: torch.dtype
) -> tuple[float, str]:
    """W + scale * change on every layer, in fp64, rounded once; all other weights are cast.

    Args:
        unet: in fp32; its weights are replaced.
        contents: fits the U-Net.
        scale: counts the change.
        dtype: to round to.

    Returns:
        Largest share of a layer's change that the rounding lost, and the layer.

    Raises:
        AdapterError: a weight overflows `dtype`.
    """
    merged: dict[str, Tensor] = {}
    worst = (0.0, "")
    for layer, change in contents.changes.items():
        weight = unet.get_submodule(layer).weight
        before = weight.detach().cpu().double()
        delta = contents.scalings[layer] * dense(change).reshape(weight.shape)
        if contents.magnitudes:
            delta = dora_weight(before, delta, contents.magnitudes[layer]) - before
        delta = scale * delta
        exact = before + delta
        merged[layer] = exact.to(dtype)
        if not bool(merged[layer].isfinite().all()):
            raise AdapterError(
                f"layer {layer}: a merged weight overflows {str(dtype).removeprefix('torch.')}. Nothing was written; "
                "give --dtype fp32 or bf16, or a smaller --scale."
            )
        size = float(delta.norm())
        if size > 0.0:
            worst = max(worst, (float((merged[layer].double() - exact).norm()) / size, layer))
    # Diffusers' own `to` warns of a cast, in vain: no part of this model has to stay in fp32.
    nn.Module.to(unet, dtype=dtype)
    with torch.no_grad():
        for layer, weight in merged.items():
            unet.get_submodule(layer).weight.copy_(weight)
    return worst


def dense(change: LowRank) -> Tensor:
    """The matrix of a change.

    Args:
        change: left (out, k, ...), right (k, in, ...).

    Returns:
        (out, in * ...), fp64, on the CPU.
    """
    left, right = change.left.detach().cpu().double(), change.right.detach().cpu().double()
    return left.flatten(1) @ right.flatten(1)


def stored_dtype(folder: Path) -> torch.dtype:
    """Precision of the U-Net's weights in the files of a base, the widest if there are several.

    Args:
        folder: of a pipeline.

    Returns:
        float32, float16 or bfloat16.

    Raises:
        ConfigError: another one, or a file cannot be read.
    """
    found: set[str] = set()
    for path in sorted((folder / "unet").iterdir()):
        if not _WEIGHTS.fullmatch(path.name):
            continue
        try:
            with path.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(size, path.stat().st_size)))
            found |= {entry["dtype"] for key, entry in header.items() if key != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--base: {path} cannot be read: {error}.") from error
    if not found or not found <= set(_PRECISIONS):
        raise ConfigError(
            f"--base: the weights of {folder / 'unet'} are {', '.join(sorted(found)) or 'missing'}; allowed are "
            f"{', '.join(_PRECISIONS)}. Give --dtype to write another precision."
        )
    return _PRECISIONS[found.pop()] if len(found) == 1 else torch.float32


def _write(base: Components, folder: Path, dtype: torch.dtype) -> None:
    """All files of the pipeline."""
    source = base.source.directory
    for part in _PARTS:
        (folder / part).mkdir()
        for path in sorted((source / part).iterdir()):
            if path.is_file() and _belongs(path.name):
                shutil.copyfile(path, folder / part / path.name)
    with quiet_libraries():
        base.unet.save_pretrained(folder / "unet", safe_serialization=True)
    # The settings as they are, not as this version of diffusers writes them.
    shutil.copyfile(source / "unet" / "config.json", folder / "unet" / "config.json")
    text = json.dumps(_index(base), indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _belongs(name: str) -> bool:
    """Settings, and weights without variant; pickles and other variants are not carried on."""
    if ".safetensors" in name:
        return bool(_WEIGHTS.fullmatch(name) or _WEIGHTS_INDEX.fullmatch(name))
    return name.endswith(_SETTINGS)


def _index(base: Components) -> dict[str, Any]:
    """What the parts are: as the base says it, without the filter for pictures, which is not copied."""
    path = base.source.directory / INDEX
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    scheduler = base.scheduler_config.get("_class_name", "PNDMScheduler")
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": known.get("_diffusers_version", diffusers_version),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": known.get("scheduler", ["diffusers", scheduler]),
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(base.vae).__name__],
    }


def _origin(
    base: Components, contents: AdapterContents, scale: float, dtype: torch.dtype
) -> dict[str, Any]:
    """Where the weights come from; no folder of this machine."""
    source, facts = base.source, contents.facts
    is_folder = source.resolved == str(source.directory.resolve())
    return {
        "made_by": "dreamrie merge-into-base",
        "base_model": "a local folder" if is_folder else source.resolved,
        "base_model_commit": source.commit,
        "adapter": contents.path.name,
        "adapter_digest": facts.get(DIGEST_KEY),
        "instance_prompt": facts.get("instance_prompt"),
        "layers": len(contents.changes),
        "scale": scale,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _check_space(base: Components, dtype: torch.dtype, output: Path) -> None:
    """A disk without room is told before gigabytes were written to it."""
    source = base.source.directory
    sizes = [
        path.stat().st_size
        for part in _PARTS
        for path in (source / part).iterdir()
        if path.is_file() and _belongs(path.name)
    ]
    need = sum(sizes) + sum(p.numel() for p in base.unet.parameters()) * dtype.itemsize
    free = shutil.disk_usage(output.absolute().parent).free
    if free < need:
        raise AdapterError(
            f"--output {output} needs {need:,} bytes, {free:,} are free. Nothing was written; free space or choose "
            "another --output."
        )
