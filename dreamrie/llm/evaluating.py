"""Adapters of one language model asked one after the other, and the table of their accuracies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from dreamrie.adapter_reading import load_adapter
from dreamrie.llm.borrowed import borrowed
from dreamrie.llm.commonsense import SHORT, mean_accuracy, measure
from dreamrie.llm.data import read_examples
from dreamrie.llm.encoding import Encoder, context_length
from dreamrie.llm.evaluate import Accuracy, Method, check_choices, over_seeds
from dreamrie.llm.models import load_language_model
from dreamrie.llm.templates import Answers, Renderer
from dreamrie.lora import LoraPair, base_fingerprint

RAW = "raw model"
Measured = Mapping[str, Mapping[str, Accuracy]]
"""Model (the path of its adapter, or `RAW`) to task to accuracy."""


@dataclass(frozen=True)
class Questions:
    """What is asked, and how.

    Attributes:
        data: files, or folders that hold TASK.test.jsonl.
        tasks: only these; none: all.
        rows_per_task: only the first so many rows of each task; None: all.
        answers: of commonsense rows, see `dreamrie.llm.templates.ask`.
        template: as in training; None: the model's own.
        max_length: tokens of a prompt with its answer; None: see `context_length`.
        by: how the model answers.
        batch_size: questions at a time.
    """

    data: Sequence[str]
    tasks: Sequence[str] = ()
    rows_per_task: int | None = None
    answers: Answers = "name"
    template: Literal["chat", "plain"] | None = None
    max_length: int | None = None
    by: Method = "likelihood"
    batch_size: int = 8


@dataclass(frozen=True)
class Base:
    """The model that adapters are put on.

    Attributes:
        name: as `load_language_model` takes it.
        revision: of the Hub.
        precision: of its weights in memory.
        quantization: as for `load_language_model`; an adapter belongs to the base that it was trained on.
    """

    name: str
    revision: str | None = None
    precision: str = "fp32"
    quantization: str | None = None


def evaluate(
    base: Base,
    adapters: Sequence[str | None],
    questions: Questions,
    *,
    device: torch.device | str = "cpu",
    record: Path | None = None,
) -> Measured:
    """Ask a model with each of several adapters.

    Args:
        base: loaded once.
        adapters: files or folders, each loaded strictly; None stands for the model without one.
        questions: for all of them.
        device: where the model is to be.
        record: JSON file that grows by a task at a time; what stands there is not measured again.

    Returns:
        In the order of `adapters`.

    Raises:
        ConfigError: rows, model or settings cannot be used.
        AdapterError: an adapter is damaged, or belongs to another model.
        CheckpointError: the record cannot be read or written.
    """
    examples = read_examples(
        questions.data,
        "test",
        tasks=questions.tasks,
        rows_per_task=questions.rows_per_task,
        answers=questions.answers,
    )
    check_choices(examples)
    language = load_language_model(
        base.name,
        revision=base.revision,
        precision=base.precision,
        quantization=base.quantization,
        device=device,
    )
    renderer = Renderer(language.tokenizer, questions.template)
    encoder = Encoder(renderer, context_length(language.model, questions.max_length))
    fingerprint, found = base_fingerprint(language.model), {}
    for adapter in adapters:
        with _carrying(language.model, adapter) as pairs:
            found[adapter or RAW] = measure(
                language.model,
                encoder,
                examples,
                method=questions.by,
                batch_size=questions.batch_size,
                record=record,
                model_digest=f"{adapter or RAW} {_digest(fingerprint, pairs)}",
            )
    return found


@contextmanager
def _carrying(model: nn.Module, adapter: str | None) -> Iterator[list[LoraPair]]:
    """Inside, the model has the adapter, if there is one."""
    with borrowed(model):
        pairs = [] if adapter is None else load_adapter(model, Path(adapter).expanduser()).pairs
        model.eval()
        yield pairs


def _digest(fingerprint: str, pairs: Sequence[LoraPair]) -> str:
    """Of base and adapter; 16 hexadecimal digits."""
    digest = hashlib.sha256(fingerprint.encode())
    for pair in pairs:
        digest.update(f"{pair.name} {pair.scaling}".encode())
        for parameter in pair.parameters:
            # numpy has no bf16, and fp32 holds it exactly.
            digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def table(found: Measured) -> str:
    """One line for each task and one for their mean, one column for each model, in percent.

    The interval behind a single model is for other questions of the kind (Wilson); that of several adapters together is
    over them (Student), as over the seeds of one method.

    Args:
        found: from `evaluate`; at least one model.

    Returns:
        Markdown.
    """
    tasks = list(next(iter(found.values())))
    trained = [measured for name, measured in found.items() if name != RAW]
    together = f"{len(trained)} adapters" if len(trained) > 1 else ""
    head = ["task", "questions", *found, *([together] if together else [])]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    for task in tasks:
        own = [measured[task] for measured in found.values()]
        cells = [SHORT.get(task, task), str(own[0].total)]
        cells += [_percent(accuracy.share, *accuracy.interval()) for accuracy in own]
        if together:
            cells.append(_percent(*over_seeds([measured[task].share for measured in trained])))
        lines.append("| " + " | ".join(cells) + " |")
    means = [f"{100 * mean_accuracy(measured):.1f}" for measured in found.values()]
    if together:
        means.append(_percent(*over_seeds([mean_accuracy(measured) for measured in trained])))
    lines.append("| " + " | ".join(["mean", "", *means]) + " |")
    return "\n".join(lines)


def _percent(share: float, low: float, high: float) -> str:
    """A share with its interval."""
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"
