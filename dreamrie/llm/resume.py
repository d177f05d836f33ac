"""What a checkpoint of a language model's training depends on."""

from __future__ import annotations

import hashlib
import json

from dreamrie.checkpoint import Checkpoint
from dreamrie.config import LlmConfig
from dreamrie.llm.task import CausalLmTask
from dreamrie.trainer import Checkpoints
from dreamrie.trainer.resuming import plan_checkpoints


def checkpoint_plan(
    config: LlmConfig, task: CausalLmTask, processes: int, resume: Checkpoint | None
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
    return plan_checkpoints(
        config,
        task.model,
        lambda: {"the content of the examples": examples_fingerprint(task)},
        device=task.device,
        processes=processes,
        libraries=("torch", "transformers", "peft"),
        resume=resume,
    )


def examples_fingerprint(task: CausalLmTask) -> str:
    """Digest of what is trained on, wherever it lies: the tokens of prompts and answers.

    Args:
        task: any.

    Returns:
        The number of examples and 16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for example in task.examples:
        digest.update(json.dumps([example.prompt, example.answer]).encode())
    return f"{len(task.examples)} rows, {digest.hexdigest()[:16]}"
