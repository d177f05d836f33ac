"""Two models on the same questions: the difference of their accuracies, and whether it could be chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dreamrie.errors import ConfigError

Right = Mapping[str, Sequence[bool]]
"""Task to whether each of its questions was answered right, in one order for all models."""


def mcnemar(before: Right, after: Right) -> float:
    """Probability of so uneven a change, or a more uneven one, if either model were as likely to be the better one.

    McNemar's exact test, two-sided: only questions count that one of the two models answers right and the other wrong;
    their number in favour of one is then binomial with probability 1/2.

    Args:
        before: answers of a model.
        after: answers of another model to the same questions.

    Returns:
        From 0 to 1; 1 for models that are right about the same questions.

    Raises:
        ConfigError: the questions are not the same.
    """
    _check(before, after)
    changed = [
        now
        for task in before
        for was, now in zip(before[task], after[task], strict=True)
        if was != now
    ]
    total, fewer = len(changed), min(sum(changed), len(changed) - sum(changed))
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    # Whole numbers: 2^-1000 is no float, and the quotient is one.
    return min(1.0, 2 * tail / 2**total)


def difference(
    before: Sequence[Right], after: Sequence[Right], *, draws: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean accuracy of `after` minus that of `before`, with its 95 % interval for other questions of this kind.

    Paired bootstrap: questions are drawn with replacement within each task, the same ones for both, and each task
    counts once, as in Table 1. The trainings are kept as they are, so the interval says nothing of other seeds.

    Args:
        before: one or more trainings of a method, averaged; the raw model is one.
        after: the same of another method.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        The difference, and the lower and upper end of its interval; each from -1 to 1.

    Raises:
        ConfigError: the questions are not the same.
    """
    for one in (*before, *after):
        _check(before[0], one)
    generator = torch.Generator().manual_seed(seed)
    whole, drawn = 0.0, torch.zeros(draws, dtype=torch.float64)
    for task in before[0]:
        change = _mean(after, task) - _mean(before, task)
        count = len(change)
        picks = torch.randint(count, (draws, count), generator=generator)
        whole += float(change.mean()) / len(before[0])
        drawn += change[picks].mean(dim=1) / len(before[0])
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return whole, low, high


def _mean(models: Sequence[Right], task: str) -> Tensor:
    """Share of the models that answer each question of a task right."""
    return torch.tensor([model[task] for model in models], dtype=torch.float64).mean(dim=0)


def _check(first: Right, second: Right) -> None:
    """The same tasks with as many questions."""
    sizes = [{task: len(answers) for task, answers in right.items()} for right in (first, second)]
    if sizes[0] != sizes[1] or not all(sizes[0].values()):
        raise ConfigError(
            f"models can be compared on the same questions only; these have {sizes[0]} and {sizes[1]}"
        )
