"""Write adapters for other programs: the file that plain diffusers loads onto the stock base."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from dreamrie.errors import AdapterError, NumericalError
from dreamrie.files import write_atomic
from dreamrie.lora import LoraPair, LowRank, export_factors

_log = logging.getLogger(__name__)

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


def save_diffusers_lora(
    directory: Path, pairs: Sequence[LoraPair], metadata: Mapping[str, str]
) -> Path:
    """Write the change of a U-Net as diffusers' `load_lora_weights(directory)` reads it.

    The file holds balanced factors of the exact change X - X0, so a stock base with this file is the trained model.
    There is no alpha in it: readers then take alpha = rank, that is scaling 1. All layers get one rank (zero columns
    are added, which changes nothing), because readers disagree about files with several.

    The file appears whole or not at all.

    Args:
        directory: made if missing.
        pairs: adapted layers, with names relative to the U-Net.
        metadata: inert facts for the header, such as the base model; text to text.

    Returns:
        Path of the file.

    Raises:
        AdapterError: there is nothing to save, a value is not finite, or the folder cannot be written. What lay there
            before is untouched.
    """
    tensors = diffusers_tensors(pairs)
    rank = max(int(tensor.shape[1]) for name, tensor in tensors.items() if "lora_B" in name)
    header = {
        "format": "pt",
        "rank_trained": str(max(pair.rank for pair in pairs)),
        "rank_exported": str(rank),
        **{str(key): str(value) for key, value in metadata.items()},
    }
    path = directory / DIFFUSERS_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(path, stable_bytes(tensors, header))
    except OSError as error:
        raise AdapterError(
            f"the adapter cannot be written to {path}: {error}. Free space or choose another --output_dir."
        ) from error
    _log.info("%s: %d layers, rank %d", path, len(tensors) // 2, rank)
    return path


def diffusers_tensors(pairs: Sequence[LoraPair]) -> dict[str, Tensor]:
    """The tensors of the file: fp32, of one rank, scaling 1, under diffusers' names.

    Args:
        pairs: adapted layers, with names relative to the U-Net.

    Returns:
        "unet.NAME.lora_A.weight" (k, in) and "unet.NAME.lora_B.weight" (out, k), sorted by name.

    Raises:
        AdapterError: there is no layer, a value is not finite, or the whole change is zero.
    """
    if not pairs:
        raise AdapterError("there is no adapted layer to save. Attach an adapter before saving.")
    try:
        factors = export_factors(pairs)
    except NumericalError as error:
        raise AdapterError(f"{error} Nothing was written.") from error
    rank = max(int(change.left.shape[1]) for change in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, change in sorted(factors.items()):
        short = rank - int(change.left.shape[1])
        left = torch.cat(
            [
                change.left,
                change.left.new_zeros(change.left.shape[0], short, *change.left.shape[2:]),
            ],
            1,
        )
        right = torch.cat([change.right, change.right.new_zeros(short, *change.right.shape[1:])], 0)
        tensors[f"unet.{name}.lora_A.weight"] = right.float().cpu().contiguous()
        tensors[f"unet.{name}.lora_B.weight"] = left.float().cpu().contiguous()
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise AdapterError(f"{broken[0]} overflows fp32. Nothing was written.")
    if all(_is_dust(pair, factors[pair.name]) for pair in pairs):
        raise AdapterError(
            "no layer has changed: the adapter would be empty. Nothing was written; train at least one step first."
        )
    return tensors


def _is_dust(pair: LoraPair, change: LowRank) -> bool:
    """Whether a change is zero but for the rounding of X - X0."""
    # Balanced factors: the squared norm of one is the sum of the singular values.
    size = float(change.left.square().sum())
    parts = pair.scaling * float(pair.left.detach().norm()) * float(pair.right.detach().norm())
    return size <= 1e-9 * abs(parts)


def stable_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """Serialize tensors so that equal contents are equal bytes.

    safetensors keeps the header's text in a hash map, whose order changes from call to call; here it is sorted.
    Format: 8 bytes of little-endian length, that many bytes of JSON padded with spaces to a multiple of 8, data.

    Args:
        tensors: contiguous, on the CPU.
        header: text to text.

    Returns:
        A whole safetensors file.
    """
    raw = save(dict(tensors), metadata=dict(header))
    end = 8 + int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:end])
    table["__metadata__"] = dict(sorted(table["__metadata__"].items()))
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[end:]
