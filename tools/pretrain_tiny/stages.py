"""Shared by the stages of the recipe: the work folder, rendered pictures, atomic files, resumable training state."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tools.pretrain_tiny import world

log = logging.getLogger("pretrain_tiny")

# name -> variation, pictures, seed
WORLDS = {
    "wide": (world.WIDE, 20_000, 1),
    "steady": (world.STEADY, 100_000, 5),
}
HELD_OUT_COUNT = 512
HELD_OUT_SEED = 2


def save_atomic(path: Path, writer: Callable[[Path], None]) -> None:
    """Write through a temporary name, so that an interruption leaves the old file or none."""
    temporary = path.with_name(path.name + ".tmp")
    writer(temporary)
    os.replace(temporary, path)


def rendered(work: Path, raw: Path, name: str) -> tuple[np.ndarray, list[str]]:
    """Pictures of a world, uint8 (n, 64, 64, 3) memory-mapped, and captions; rendered once (about 1 ms each)."""
    pixels, captions = work / f"pixels-{name}.npy", work / f"captions-{name}.json"
    if not captions.exists():
        variation, count, seed = WORLDS[name]
        images, texts = world.render(world.make_world(raw, variation), count, seed)
        with pixels.open("wb") as handle:
            np.save(handle, images)
        save_atomic(captions, lambda p: p.write_text(json.dumps(texts), encoding="utf-8"))
        log.info("rendered %d pictures of the %s world", count, name)
    return np.load(pixels, mmap_mode="r"), json.loads(captions.read_text(encoding="utf-8"))


def held_out(raw: Path) -> tuple[torch.Tensor, list[str]]:
    """Pictures of the wide world that no stage trains on, in [-1, 1], (n, 3, 64, 64)."""
    pixels, captions = world.render(
        world.make_world(raw, world.WIDE), HELD_OUT_COUNT, HELD_OUT_SEED
    )
    return to_tensor(pixels), captions


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (n, h, w, 3) to fp32 (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Progress:
    """Saves and restores everything a stage needs to go on after an interruption."""

    def __init__(self, path: Path, **parts: torch.nn.Module | torch.optim.Optimizer) -> None:
        self._path = path
        self._parts = parts
        self.step = 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step = int(state["step"])
            log.info("%s: going on from step %d", path.stem, self.step)

    def save(self, step: int) -> None:
        """Write all parts and the number of finished steps."""
        self.step = step
        state = {name: part.state_dict() for name, part in self._parts.items()}
        save_atomic(self._path, lambda p: torch.save({**state, "step": step}, p))


def cosine(step: int, total: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    t = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * t))))


def trapezoid(step: int, total: int, peak: float, decay_steps: int, warmup: int = 200) -> float:
    """Linear warm-up, constant, then linear to 1 % over the last `decay_steps`: the length may be chosen late."""
    rise = min(1.0, (step + 1) / warmup)
    fall = min(1.0, max(0.01, (total - step) / decay_steps))
    return peak * min(rise, fall)
