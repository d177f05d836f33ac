"""The eight commonsense tasks together: measured one after the other, resumable, and one table of several methods."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamrie.errors import CheckpointError
from dreamrie.files import write_atomic
from dreamrie.llm.data import Example
from dreamrie.llm.encoding import Encoder
from dreamrie.llm.evaluate import Accuracy, Method, accuracies, choose, over_seeds

_log = logging.getLogger(__name__)

TASKS = (
    *("boolq", "piqa", "siqa", "hellaswag"),
    *("winogrande", "arc_easy", "arc_challenge", "obqa"),
)
"""In the order of Table 1."""
SHORT = {"arc_easy": "ARC-E", "arc_challenge": "ARC-C", "boolq": "BoolQ"}


def measure(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    *,
    method: Method = "likelihood",
    batch_size: int = 8,
    record: Path | None = None,
    model_digest: str = "",
) -> dict[str, Accuracy]:
    """Accuracy of each task; with a record, tasks that were measured before are not measured again.

    Args:
        model: in eval mode.
        encoder: writes the prompts.
        examples: of any tasks.
        method: how the model answers.
        batch_size: questions at a time.
        record: JSON file that grows by a task at a time.
        model_digest: tells adapters and models apart in the record; equal text means equal weights.

    Returns:
        Task to accuracy, tasks of Table 1 first and in its order.

    Raises:
        CheckpointError: the record cannot be read or written.
    """
    known = _read(record)
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    order = [task for task in TASKS if task in by_task]
    order += [task for task in by_task if task not in TASKS]
    found: dict[str, Accuracy] = {}
    for task in order:
        own = by_task[task]
        key = _key(encoder, own, method, model_digest)
        if record is None or key not in known:
            answers = choose(model, encoder, own, method=method, batch_size=batch_size)
            accuracy = accuracies(own, answers)[task]
            known[key] = {"task": task, "right": accuracy.right, "total": accuracy.total}
            if record is not None:
                _write(record, known)
            _log.debug("%s: %d of %d", task, accuracy.right, accuracy.total)
        found[task] = Accuracy(int(known[key]["right"]), int(known[key]["total"]))
    return found


def mean_accuracy(found: Mapping[str, Accuracy]) -> float:
    """Mean over tasks, each counted once however many questions it has, as in Table 1.

    Args:
        found: at least one task.

    Returns:
        From 0 to 1.
    """
    return sum(accuracy.share for accuracy in found.values()) / len(found)


def table(methods: Mapping[str, Sequence[Mapping[str, Accuracy]]]) -> str:
    """One line for each method: accuracy of each task and of all, in percent.

    Args:
        methods: name to what was measured, one mapping for each seed; all have the same tasks.

    Returns:
        Markdown. The interval behind the mean is over seeds; for a single training it is left out.
    """
    tasks = list(next(iter(methods.values()))[0])
    lines = [
        "| method | " + " | ".join(SHORT.get(task, task) for task in tasks) + " | mean |",
        "| --- |" + " --- |" * (len(tasks) + 1),
    ]
    for name, seeds in methods.items():
        cells = [over_seeds([seed[task].share for seed in seeds])[0] for task in tasks]
        mean, low, high = over_seeds([mean_accuracy(seed) for seed in seeds])
        whole = f"{100 * mean:.1f}"
        if not math.isnan(low):
            whole += f" ({100 * low:.1f} to {100 * high:.1f})"
        lines.append(f"| {name} | " + " | ".join(f"{100 * c:.1f}" for c in cells) + f" | {whole} |")
    return "\n".join(lines)


def _key(encoder: Encoder, examples: Sequence[Example], method: str, model_digest: str) -> str:
    """Everything that an accuracy depends on."""
    renderer = encoder.renderer
    asked = [
        (renderer.prompt(example.turns), example.choices, example.answer) for example in examples
    ]
    text = json.dumps([method, encoder.max_length, model_digest, asked])
    return hashlib.sha256(text.encode()).hexdigest()


def _read(record: Path | None) -> dict[str, dict[str, Any]]:
    """What was measured before."""
    if record is None or not record.exists():
        return {}
    try:
        known = json.loads(record.read_text("utf-8"))
        return {str(key): {**entry, "right": int(entry["right"])} for key, entry in known.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"the record of earlier measurements cannot be read: {error}\n"
            f"  where: {record}\n"
            "  what to do: remove it, or name another file"
        ) from error


def _write(record: Path, known: Mapping[str, Any]) -> None:
    """All measurements, old and new."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(record, (json.dumps(known, indent=1, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise CheckpointError(
            f"the record of measurements cannot be written: {error}\n"
            f"  where: {record}\n"
            "  what to do: check free space and permissions"
        ) from error
