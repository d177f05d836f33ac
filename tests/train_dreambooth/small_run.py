"""A small run of the command: its prompt, its adapter file, and how to read what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

PROMPT = "a photo of a sks disc"
ADAPTER = "pytorch_lora_weights.safetensors"
Command = Callable[..., int]


def metrics(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def moved(folder: Path) -> float:
    """Size of the largest change in an adapter file."""
    with safe_open(folder / ADAPTER, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    downs = [name for name in tensors if "lora_A" in name]
    return max(
        float((tensors[name.replace("lora_A", "lora_B")] @ tensors[name]).norm()) for name in downs
    )
