"""What a checkpoint of a language model's training depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from dreamrie.checkpoint import Checkpoint
from dreamrie.config import LlmConfig
from dreamrie.llm.data import Example
from dreamrie.llm.task import CausalLmTask
from dreamrie.trainer import Checkpoints
from dreamrie.trainer.resuming import plan_checkpoints


def checkpoint_plan(
    config: LlmConfig,
    task: CausalLmTask,
    processes: int,
    resume: Checkpoint | None,
    held_out: Sequence[Example] = (),
) -> Checkpoints:
    """When to write checkpoints, and what they depend on.

    Args:
        config: resolved settings.
        task: ready to train.
        processes: of this training.
        resume: from `dreamrie.trainer.resuming.find_resume`.
        held_out: rows that the scores are of; scores of other rows could not be compared.

    Returns:
        For `dreamrie.trainer.train`.
    """
    return plan_checkpoints(
        config,
        task.model,
        lambda: {
            "the content of the examples": examples_fingerprint(task),
            "the content of the held-out rows": rows_fingerprint(held_out),
        },
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
    return _fingerprint([example.prompt, example.answer] for example in task.examples)


def rows_fingerprint(rows: Sequence[Example]) -> str:
    """Digest of rows, wherever they lie.

    Args:
        rows: any.

    Returns:
        Their number and 16 hexadecimal digits.
    """
    return _fingerprint([row.task, row.turns, row.answer, row.choices] for row in rows)


def _fingerprint(contents: Iterable[Any]) -> str:
    digest, count = hashlib.sha256(), 0
    for content in contents:
        digest.update(json.dumps(content).encode())
        count += 1
    return f"{count} rows, {digest.hexdigest()[:16]}"
