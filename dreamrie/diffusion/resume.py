"""What a checkpoint of a DreamBooth training depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dreamrie.checkpoint import Checkpoint
from dreamrie.config import TrainConfig
from dreamrie.diffusion.apart import others_fingerprint
from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.trainer import Checkpoints
from dreamrie.trainer.resuming import plan_checkpoints


def checkpoint_plan(
    config: TrainConfig, task: DreamBoothTask, processes: int, resume: Checkpoint | None
) -> Checkpoints:
    """When to write checkpoints, and what they depend on.

    Args:
        config: resolved settings.
        task: ready to train.
        processes: of this training.
        resume: from `dreamrie.trainer.resuming.find_resume`.

    Returns:
        For `dreamrie.trainer.train`.
    """

    def contents() -> dict[str, str]:
        found = picture_fingerprints(task)
        if config.adapter.orthogonal_to:
            name = "the content of the adapters to be orthogonal to"
            found[name] = others_fingerprint(config.adapter.other_adapters)
        return found

    return plan_checkpoints(
        config,
        task.model,
        contents,
        device=task.components.device,
        processes=processes,
        libraries=("torch", "diffusers", "peft"),
        resume=resume,
    )


def picture_fingerprints(task: DreamBoothTask) -> dict[str, str]:
    """Digests of what is trained on, wherever it lies: names and bytes of the files, and their prompts.

    Args:
        task: any.

    Returns:
        The number of pictures and 16 hexadecimal digits, for the concept and, if there is one, its class.
    """
    found = {}
    for kind, pictures in zip(("concept", "class"), task.concept.sets, strict=False):
        files = zip(pictures.paths, pictures.prompts, strict=True)
        rows = [(path.name, _sha256(path), prompt) for path, prompt in files]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        found[f"the content of the pictures of the {kind}"] = f"{len(rows)} files, {digest}"
    return found


def _sha256(path: Path) -> str:
    """Digest of a file, a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
