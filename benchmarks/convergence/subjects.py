"""What all trainings of a concept share: rows to train on, prompts, starts; made once, kept on a shelf."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.convergence.plan import Budget
from benchmarks.convergence.stacked import twin
from dreamrie.diffusion.components import Components
from dreamrie.diffusion.data import ConceptSet
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS, encode_prompts
from dreamrie.diffusion.task import DreamBoothTask, denoising_target
from dreamrie.init_table import INITS
from dreamrie.lora import LoraPair, attach_lora, start_pairs
from dreamrie.lora.inits import Data, Loi

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURES = ROOT / "examples" / "concepts"
# 32 batches are more than the default, 8; the sweep says that it makes no difference.
TOKEN, LOI_BATCHES = "sks", 32
# Batches, and the seed of their noise, that only the held-out loss sees.
HELD_BATCHES, HELD_SEED = 16, 10_000
# Another worker that makes the same thing is waited for this long.
PATIENCE_S = 60.0


class Shelf:
    """Tensors by name in a folder that all workers share; each is made by the first who needs it.

    Args:
        folder: exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """What lies there under a name; made first if nothing does."""
        path = self._folder / f"{name}.pt"
        if not path.is_file() and not self._is_mine(name):
            until = time.monotonic() + PATIENCE_S
            while not path.is_file() and time.monotonic() < until:
                time.sleep(0.05)
        if not path.is_file():
            draft = self._folder / f"{name}.{os.getpid()}"
            torch.save(make(), draft)
            draft.replace(path)
        return torch.load(path, weights_only=True)

    def _is_mine(self, name: str) -> bool:
        """Claim a name; False if another worker has."""
        try:
            (self._folder / f"{name}.claim").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@dataclass(frozen=True)
class Rows:
    """Everything that a training on a concept with a seed sees, step by step.

    Attributes:
        noisy, target: (steps, batch, channels, height, width), input of the U-Net and what it has to predict.
        timesteps: (steps, batch). prompts: (steps, batch), row of `text`.
        text: (prompts, tokens, width), embeddings.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    prompts: Tensor
    text: Tensor


def words_of(concept: str) -> str:
    """A concept as it stands in prompts."""
    return concept.replace("_", " ")


class Subjects:
    """Rows and starts of every concept.

    Args:
        components: the model, on the device of the trainings.
        shelf: see there.
        budget: of every training.
    """

    def __init__(self, components: Components, shelf: Shelf, budget: Budget) -> None:
        self.components, self._shelf, self._budget = components, shelf, budget
        self._device = components.device

    def task(self, unet: Any, pairs: list[LoraPair], concept: str, seed: int) -> DreamBoothTask:
        """The library's task for a concept, with the settings of the demo."""
        source = self.components
        held = Components(**{**vars(source), "unet": unet})
        pictures = ConceptSet(
            PICTURES / concept,
            f"a {TOKEN} {words_of(concept)}",
            resolution=source.resolution,
            center_crop=True,
        )
        task = DreamBoothTask(held, pairs, pictures, batch_size=self._budget.batch, seed=seed)
        # A task moves them off the accelerator; here they are needed all the time.
        for part in (source.text_encoder, source.vae):
            part.to(self._device)
        return task

    def rows(self, concept: str, seed: int) -> Rows:
        """Rows of a training, on the processor."""
        steps = self._budget.steps
        name = f"rows-{concept}-{seed}"
        return Rows(**self._shelf.get(name, lambda: self._make_rows(concept, seed, steps)))

    def held(self, concept: str) -> Rows:
        """Rows of the held-out loss: the same pictures under noise and timesteps that no training sees."""
        found = self._shelf.get(
            f"held-{concept}", lambda: self._make_rows(concept, HELD_SEED, HELD_BATCHES)
        )
        return Rows(**found)

    def _make_rows(self, concept: str, seed: int, steps: int) -> dict[str, Tensor]:
        task = self.task(self.components.unet, [], concept, seed)
        texts = list(dict.fromkeys(task.concept.instance.prompts))
        embedded = encode_prompts(self.components, texts).float()
        parts: dict[str, list[Tensor]] = {
            key: [] for key in ("noisy", "target", "timesteps", "prompts")
        }
        for step in range(1, steps + 1):
            batch = task.batch(step, 0)
            if any(mask is not None for mask in batch.masks):
                raise SystemExit(f"{concept}: a stack has no masks, and a picture is transparent")
            latents, noise = torch.stack(batch.latents), torch.stack(batch.noise)
            scheduler = self.components.noise_scheduler
            parts["noisy"].append(scheduler.add_noise(latents, noise, batch.timesteps))
            parts["target"].append(
                denoising_target(self.components, latents, noise, batch.timesteps)
            )
            parts["timesteps"].append(batch.timesteps)
            distance = (batch.text.float()[:, None] - embedded[None]).flatten(2).abs().amax(2)
            parts["prompts"].append(distance.argmin(1))
        return {
            "text": embedded.cpu(),
            **{key: torch.stack(part).cpu() for key, part in parts.items()},
        }

    def start(
        self, concept: str, seed: int, rank: int, init: str, batches: int = LOI_BATCHES
    ) -> list[Tensor]:
        """A start that looks at batches: its factors (out, R) and (R, in) of every layer in turn."""
        name = f"{init}-{concept}-{seed}-{rank}-{batches}"
        return self._shelf.get(name, lambda: self._make_start(concept, seed, rank, init, batches))

    def _make_start(
        self, concept: str, seed: int, rank: int, init: str, batches: int
    ) -> list[Tensor]:
        unet = twin(self.components.unet)
        layout = INITS[init].layout
        pairs = attach_lora(
            unet, rank, ATTENTION_TARGETS, init=layout, generator=generator_of(seed)
        )
        task = self.task(unet, pairs, concept, seed)
        data = Data(task.model_loss, task.loi_batches(batches), task.used_places)
        start_pairs(init, unet, pairs, data, loi=Loi(alpha=1.0), generator=generator_of(seed))
        factors = [factor for pair in pairs for factor in (pair.left, pair.right)]
        return [factor.detach().clone().cpu() for factor in factors]

    def pairs(
        self,
        concept: str,
        seed: int,
        rank: int,
        init: str,
        alpha: float,
        batches: int = LOI_BATCHES,
        layer: str = "",
    ) -> list[LoraPair]:
        """Adapters at their start, on a U-Net of their own over the shared weights.

        Args:
            concept: folder of pictures.
            seed: of the start.
            rank: r.
            init: of `dreamrie.init_table.INITS`.
            alpha: singular value of a start called loi or orthonormal; others have their own.
            batches: of a start that looks at any.
            layer: see `methods.Method`.
        """
        looks = INITS[init].needs == "batches"
        pairs = attach_lora(
            twin(self.components.unet),
            rank,
            ATTENTION_TARGETS,
            init=INITS[init].layout if looks else init,
            generator=generator_of(seed),
            alpha=alpha if init == "orthonormal" else None,
            use_dora=layer == "dora",
            use_rslora=layer == "rslora",
        )
        if looks:
            # That of loi was written at size 1; each factor has the root of it.
            size = alpha**0.5 if init == "loi" else 1.0
            factors = self.start(concept, seed, rank, init, batches)
            with torch.no_grad():
                for pair, left, right in zip(pairs, factors[::2], factors[1::2], strict=True):
                    pair.left.copy_(size * left)
                    pair.right.copy_(size * right)
        return pairs


def generator_of(seed: int) -> torch.Generator:
    """Random stream of a start, as the training script makes it."""
    return torch.Generator().manual_seed(seed)
