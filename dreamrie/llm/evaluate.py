"""Answers of a model to questions with choices: by likelihood and by generation, and how sure an accuracy is.

likelihood   the choice whose whole answer has the largest probability; one forward pass for each choice
generation   greedy text; the first name of a choice in it is the answer, and none at all is a wrong answer
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from dreamrie.errors import ConfigError
from dreamrie.llm.data import Example
from dreamrie.llm.encoding import Encoded, Encoder
from dreamrie.llm.task import collate, token_losses

Method = Literal["likelihood", "generation"]

_Z = 1.959963984540054  # 97.5 % of the normal distribution
# 97.5 % of Student's distribution for 1, 2, ... 9 degrees of freedom.
_T = (12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216)


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
        right: how many.
        total: of how many, at least 1.
    """

    right: int
    total: int

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.right / self.total

    def interval(self) -> tuple[float, float]:
        """95 % interval of the share for other questions of this kind (Wilson's score interval)."""
        n, p, z2 = self.total, self.share, _Z * _Z
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        # Rounding must not leave the share itself outside.
        return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over trainings with different seeds, and its 95 % interval by Student's distribution.

    Args:
        values: one for each seed.

    Returns:
        Mean, lower and upper end; an interval without ends (NaN) for a single seed.

    Raises:
        ConfigError: there is no value.
    """
    if not values:
        raise ConfigError("there is no value to average")
    count, mean = len(values), sum(values) / len(values)
    if count == 1:
        return mean, math.nan, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = _student(count - 1) * math.sqrt(variance / count)
    return mean, mean - half, mean + half


def _student(freedom: int) -> float:
    """97.5 % quantile; by Hill's expansion where the table ends, right to four digits there."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z, d = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * d)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
    )


def check_choices(examples: Sequence[Example]) -> None:
    """Refuse rows that no accuracy can be measured on.

    Args:
        examples: any.

    Raises:
        ConfigError: one has no choices.
    """
    for example in examples:
        if not example.choices:
            raise ConfigError(
                "accuracy needs choices, and this row has none\n"
                f"  where: {example.where}\n"
                "  what to do: give rows with task, choices and answer, or LLM-Adapters' rows whose instruction ends "
                "with an answer format"
            )


@torch.no_grad()
def choose(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    *,
    method: Method = "likelihood",
    batch_size: int = 8,
) -> list[int | None]:
    """Let a model answer.

    Args:
        model: in eval mode, with or without an adapter.
        encoder: writes the prompts, as in training.
        examples: each with choices.
        method: see the head of this file.
        batch_size: questions at a time.

    Returns:
        Place of the choice for each example; None for an answer that names none.

    Raises:
        ConfigError: an example has no choices, or does not fit into the context.
    """
    check_choices(examples)
    # Questions of like length together: less of a batch is padding, and the answers do not depend on it.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].turns[-1][1]))
    answers: list[int | None] = [None] * len(examples)
    answer = _by_likelihood if method == "likelihood" else _by_generation
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        for place, chosen in zip(
            part, answer(model, encoder, [examples[i] for i in part]), strict=True
        ):
            answers[place] = chosen
    return answers


def accuracies(examples: Sequence[Example], answers: Sequence[int | None]) -> dict[str, Accuracy]:
    """Count right answers.

    Args:
        examples: the questions.
        answers: from `choose`.

    Returns:
        Task to accuracy, in the order in which tasks appear.
    """
    counts: dict[str, list[bool]] = {}
    for example, answer in zip(examples, answers, strict=True):
        counts.setdefault(example.task, []).append(answer == example.correct)
    return {task: Accuracy(sum(hits), len(hits)) for task, hits in counts.items()}


def _device(model: Any) -> torch.device:
    return next(iter(model.parameters())).device


def _by_likelihood(model: Any, encoder: Encoder, examples: Sequence[Example]) -> list[int | None]:
    """Log-probability of every choice's whole answer."""
    values = log_probabilities(model, [encode_choices(encoder, example) for example in examples])
    return [each.index(max(each)) for each in values]


def encode_choices(encoder: Encoder, example: Example) -> list[Encoded]:
    """A question with each of its choices as the answer.

    Args:
        encoder: writes the prompt.
        example: with choices.

    Returns:
        One for each choice. Errors are those of `Encoder.encode_choice`.
    """
    return [encoder.encode_choice(example, choice) for choice in example.choices]


@torch.no_grad()
def log_probabilities(
    model: Any, questions: Sequence[Sequence[Encoded]], *, batch_size: int | None = None
) -> list[list[float]]:
    """Log-probability of the whole answer behind the prompt, for every choice of every question.

    Args:
        model: in eval mode.
        questions: from `encode_choices`.
        batch_size: questions at a time; None: all. Questions of like length share a batch, and what shares one changes
            nothing but the last bits.

    Returns:
        Natural logarithms, in the order of the questions and of their choices.
    """
    order = sorted(range(len(questions)), key=lambda i: max(len(e.tokens) for e in questions[i]))
    size, values = batch_size or len(order), [list[float]() for _ in questions]
    for start in range(0, len(order), size):
        part = order[start : start + size]
        batch = collate([one for i in part for one in questions[i]], device=_device(model))
        sums = torch.zeros(len(batch.names), dtype=torch.float64)
        sums.index_add_(0, batch.rows.cpu(), -token_losses(model, batch).double().cpu())
        for i, own in zip(part, sums.split([len(questions[i]) for i in part]), strict=True):
            values[i] = own.tolist()
    return values


def _by_generation(model: Any, encoder: Encoder, examples: Sequence[Example]) -> list[int | None]:
    """Greedy continuation of the prompts."""
    tokenizer = encoder.renderer.tokenizer
    choices = [[encoder.encode_choice(e, choice) for choice in e.choices] for e in examples]
    longest = max(len(one.answer) for every in choices for one in every)
    prompts = [every[0].prompt for every in choices]
    width, device = max(map(len, prompts)), _device(model)
    tokens = torch.full((len(prompts), width), tokenizer.pad_token_id)
    seen = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        seen[row, width - len(prompt) :] = 1
    settings = GenerationConfig(
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    written: Tensor = model.generate(
        input_ids=tokens.to(device), attention_mask=seen.to(device), generation_config=settings
    )
    texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    return [named(text, example.choices) for text, example in zip(texts, examples, strict=True)]


def named(text: str, choices: Sequence[str]) -> int | None:
    """The choice that a text names first.

    Args:
        text: what a model wrote.
        choices: answers such as "The correct answer is Solution1"; what they all begin with is not needed in the text.

    Returns:
        Place of the choice; None if none is named, upper and lower case apart.
    """
    words = [choice.split(" ") for choice in choices]
    shared = 0
    while shared < min(map(len, words)) - 1 and len({each[shared] for each in words}) == 1:
        shared += 1
    found = []
    for place, each in enumerate(words):
        label = re.escape(" ".join(each[shared:]))
        match = re.search(rf"(?<!\w){label}(?!\w)", text, re.IGNORECASE)
        if match:
            found.append((match.start(), -len(label), place))
    return min(found)[2] if found else None
