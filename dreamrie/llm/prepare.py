"""From settings to a task that is ready to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dreamrie.config import LlmConfig, to_yaml
from dreamrie.llm.data import Example, read_examples
from dreamrie.llm.encoding import Encoder, context_length
from dreamrie.llm.evaluate import check_choices
from dreamrie.llm.models import LanguageModel, load_language_model
from dreamrie.llm.targets import target_modules
from dreamrie.llm.task import CausalLmTask
from dreamrie.llm.templates import Renderer
from dreamrie.lora import attach_lora
from dreamrie.optimizers import describe_optimizer, trained_numbers
from dreamrie.publishing.hub import check_hub
from dreamrie.run_folder import check_output_dir, folder_for_older_run
from dreamrie.runlog import check_records


@dataclass(frozen=True)
class Request:
    """What a command asks for, read and checked; nothing is changed yet.

    Attributes:
        config: settings, with those filled in that wait for the model.
        language: model and tokenizer.
        examples: to learn from.
        held_out: to be asked on the way.
        encoder: writes prompts.
    """

    config: LlmConfig
    language: LanguageModel
    examples: list[Example]
    held_out: list[Example]
    encoder: Encoder


def read_request(config: LlmConfig, device: torch.device) -> Request:
    """Read the rows, then load the model: a wrong column is found in a second.

    Args:
        config: resolved settings.
        device: where the model is to be.

    Returns:
        Everything that a task is built from.

    Raises:
        ConfigError: a row, the model, the template or the length cannot be used.
    """
    check_output_dir(config.output.output_dir)
    check_records(config.output.report_to == "tensorboard")
    check_hub(config.output)
    data, checks = config.data, config.validation
    examples = read_examples(
        data.data,
        "train",
        tasks=data.tasks,
        rows_per_task=data.rows_per_task,
        answers=data.answers,
    )
    held_out: list[Example] = []
    if checks.validation_data:
        held_out = read_examples(
            checks.validation_data,
            "test",
            flag="--validation_data",
            tasks=data.tasks,
            rows_per_task=checks.validation_rows,
            answers=data.answers,
        )
        check_choices(held_out)
    model = config.model
    language = load_language_model(
        model.model,
        revision=model.revision,
        precision=model.base_precision,
        quantization=model.quantization,
        device=device,
    )
    renderer = Renderer(language.tokenizer, data.template)
    length = context_length(language.model, data.max_length)
    known = config.with_model(renderer.template, length)
    return Request(known, language, examples, held_out, Encoder(renderer, length))


def build_task(request: Request, processes: int) -> CausalLmTask:
    """Put adapters on the model, and encode every example.

    Args:
        request: from `read_request`.
        processes: of this training.

    Returns:
        Ready to train.

    Raises:
        ConfigError: an answer is longer than the context, or no layer matches.
    """
    config, language = request.config, request.language
    data, adapter, seed = config.data, config.adapter, config.schedule.seed
    encoded = request.encoder.encode_all(request.examples)
    for example in request.held_out:
        request.encoder.encode(example)
    pairs = attach_lora(
        language.model,
        target_modules=target_modules(language.model, adapter.target_modules),
        dropout=adapter.dropout,
        generator=torch.Generator().manual_seed(seed),
        **adapter.layout,
    )
    return CausalLmTask(
        language.model,
        pairs,
        encoded,
        batch_size=data.train_batch_size,
        seed=seed,
        max_length=request.encoder.max_length,
        samples_per_step=config.samples_per_step(processes),
        packing=data.packing,
        pad=language.tokenizer.pad_token_id,
        gradient_checkpointing=config.schedule.gradient_checkpointing,
        facts={**base_model_facts(language), **config.file_facts()},
    )


def base_model_facts(language: LanguageModel) -> dict[str, str]:
    """What the header of an adapter says about its base.

    Args:
        language: as loaded.

    Returns:
        Name and commit.
    """
    return {"base_model": language.name, "base_model_commit": language.commit}


def run_facts(request: Request, task: CausalLmTask) -> dict[str, Any]:
    """What decides the result beside the settings: model, method, examples.

    Args:
        request: as read.
        task: ready to train.

    Returns:
        For `RunLog.manifest`.
    """
    return {
        "base_model": base_model_facts(request.language),
        "optimizer": describe_optimizer(request.config.optimizer.optimizer, task.pairs),
        "examples": _by_task(request.examples),
        "held_out": _by_task(request.held_out),
    }


def explain(request: Request, task: CausalLmTask) -> str:
    """Say what a run with these settings would do.

    Args:
        request: as read.
        task: made from it in a dry run.

    Returns:
        YAML that is itself a valid --config, with remarks.
    """
    config, rows = request.config, len(request.examples)
    name, folder = config.optimizer.optimizer, config.output.output_dir
    steps, samples = config.schedule.max_train_steps, config.samples_per_step()
    longest = max(len(example.tokens) for example in task.examples)
    lines = [f"  {pair.name} ({pair.out} x {pair.in_}), rank {pair.rank}" for pair in task.pairs]
    lines += [
        f"base model: {request.language.name}, {type(request.language.model).__name__}",
        f"adapters: {len(task.pairs)} layers, {trained_numbers(name, task.pairs):,} trainable parameters",
        f"optimizer: {describe_optimizer(name, task.pairs)}",
        f"examples: {_words(request.examples)}; the longest has {longest} tokens",
        f"held out: {_words(request.held_out)}",
        f"length: {steps} steps of {samples} examples = {steps * samples / rows:.1f} epochs",
    ]
    older = folder_for_older_run(folder)
    if config.run.resume_from_checkpoint:
        lines.append(f"goes on from {config.run.resume_from_checkpoint} in {folder}")
    elif older is not None:
        lines.append(f"{folder} holds an older run, which would be moved to {older}")
    return to_yaml(config) + "\n" + "\n".join(f"# {line}" for line in lines)


def _by_task(examples: Sequence[Example]) -> dict[str, int]:
    """How many rows each task has."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.task] = counts.get(example.task, 0) + 1
    return counts


def _words(examples: Sequence[Example]) -> str:
    """Tasks and rows in words."""
    return ", ".join(f"{count} {task}" for task, count in _by_task(examples).items()) or "none"
