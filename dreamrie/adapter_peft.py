"""Write a PEFT folder: `adapter_model.safetensors` and `adapter_config.json`.

The digest in the first file covers the second, so that neither can change unseen.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dreamrie.adapter_file import (
    SETTINGS_KEY,
    TEXT_ENCODER,
    balanced_changes,
    carried,
    one_rank,
    rounded,
    sealed,
    stable_bytes,
    write_file,
)
from dreamrie.adapter_magnitudes import Magnitudes, named_magnitudes
from dreamrie.errors import AdapterError
from dreamrie.lora import LowRank

_log = logging.getLogger(__name__)

PEFT_FILE = "adapter_model.safetensors"
PEFT_SETTINGS = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def save_peft(
    folder: Path,
    changes: Mapping[str, LowRank],
    facts: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float32,
    magnitudes: Magnitudes | None = None,
) -> Path:
    """Write changes as a folder that PEFT's `from_pretrained` and `load_adapter` read.

    All layers have one rank and lora_alpha = r, so the settings hold no pattern and no scaling. Each of the two files
    appears whole or not at all; old and new ones cannot be mixed unseen.

    Args:
        folder: made if missing; other files in it are left alone.
        changes: path of each layer in the model to its change, scaling 1.
        facts: as `dreamrie.adapter_reading.read_adapter` or `read_metadata` return them; text to text.
        dtype: float32, float16 or bfloat16; of the factors.
        magnitudes: of DoRA, by layer.

    Returns:
        Path of the folder.

    Raises:
        AdapterError: nothing to save, a layer of a text encoder (a PEFT folder is of one model), a value is not finite
            or overflows `dtype`, or a file cannot be written; both are then as they were.
    """
    strange = [name for name in changes if name.startswith(TEXT_ENCODER)]
    if strange:
        raise AdapterError(
            f"{strange[0]} is not of the U-Net, and a PEFT folder holds the adapter of one model. Save the text "
            "encoder's layers to a folder of their own, without that prefix."
        )
    tensors = {}
    even = one_rank(balanced_changes(changes))
    for name, change in even.items():
        for part, tensor in (("A", change.right), ("B", change.left)):
            key = f"{PEFT_PREFIX}{name}.lora_{part}.weight"
            tensors[key] = rounded(key, tensor, dtype)
    tensors |= named_magnitudes(magnitudes, even, PEFT_PREFIX.__add__)
    rank = max(int(change.left.shape[1]) for change in even.values())
    settings = peft_settings(even, rank, facts) | {"use_dora": bool(magnitudes)}
    known = {**carried(facts), "rank_exported": str(rank), SETTINGS_KEY: PEFT_SETTINGS}
    header = sealed(tensors, {**known, PEFT_SETTINGS: settled(settings)}, even)
    del header[PEFT_SETTINGS]  # it lies beside the file
    content = stable_bytes(tensors, header)
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    _write_both(folder, text.encode(), content)
    _log.info("%s: %d layers, rank %d", folder, len(even), rank)
    return folder


def peft_settings(layers: Iterable[str], rank: int, facts: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings for plain LoRA on exactly these layers.

    Args:
        layers: paths in the model.
        rank: of all of them; alpha too.
        facts: `base_model` and `base_model_commit` are named, if known.

    Returns:
        What `adapter_config.json` says. PEFT has defaults for the rest, all of them neutral.
    """
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": facts.get("base_model") or None,
        "revision": facts.get("base_model_commit") or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # A list would also match layers whose path ends like this one's.
        "target_modules": "|".join(re.escape(layer) for layer in sorted(layers)),
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def _write_both(folder: Path, settings: bytes, weights: bytes) -> None:
    """The settings first: they say no strength, so that a crash between the two leaves what PEFT can still read."""
    place = folder / PEFT_SETTINGS
    before = None
    with contextlib.suppress(OSError):
        before = place.read_bytes()
    write_file(place, settings)
    try:
        write_file(folder / PEFT_FILE, weights)
    except AdapterError:
        with contextlib.suppress(OSError, AdapterError):
            if before is None:
                place.unlink()
            else:
                write_file(place, before)
        raise


def settled(settings: Mapping[str, Any]) -> str:
    """Settings as the digest covers them, however the file is laid out.

    Args:
        settings: from JSON.

    Returns:
        JSON with sorted names; patterns keep their order, as the first that fits a layer counts.
    """
    return json.dumps(dict(sorted(settings.items())))
