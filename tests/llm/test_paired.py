"""Two models on the same questions: McNemar's test, and the paired bootstrap."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from dreamrie.errors import ConfigError
from dreamrie.llm import paired as real


def answers(*texts: str) -> dict[str, list[bool]]:
    """A task for each text of 0 and 1."""
    return {f"task {n}": [digit == "1" for digit in text] for n, text in enumerate(texts)}


def chance(before: str, after: str) -> float:
    """Share of the ways to swap answers between the models that are at least as uneven, each question apart."""
    gains = [int(now) - int(was) for was, now in zip(before, after, strict=True)]
    seen, ways = abs(sum(gains)), list(itertools.product((1, -1), repeat=len(gains)))
    uneven = [abs(sum(s * g for s, g in zip(signs, gains, strict=True))) >= seen for signs in ways]
    return sum(uneven) / len(ways)


def law_lb1_mcnemar_counts_the_ways_to_swap(impl: Any) -> None:
    """The p value is the share of all swaps of the two models' answers that are as uneven as what was seen, or more."""
    cases = [("0000011111", "1111101111"), ("0101010111", "0101010111"), ("00000000", "11111111")]
    cases += [("0011001100", "1111011001"), ("1111111000", "0000110000")]
    values = []
    for before, after in cases:
        values.append(impl.mcnemar(answers(before[:4], before[4:]), answers(after[:4], after[4:])))
        assert values[-1] == pytest.approx(chance(before, after))
    assert len(set(values)) > 3


def test_lb1() -> None:
    law_lb1_mcnemar_counts_the_ways_to_swap(real)


def test_a_thousand_changes_are_no_overflow() -> None:
    assert 0 < real.mcnemar(answers("0" * 900 + "1" * 100), answers("1" * 900 + "0" * 100)) < 1e-150
    assert real.mcnemar(answers("0" * 3000), answers("1" * 3000)) == 0.0


def noisy(seed: int, sizes: tuple[int, ...], share: float) -> dict[str, list[bool]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"task {n}": (torch.rand(size, generator=generator) < share).tolist()
        for n, size in enumerate(sizes)
    }


def law_lb2_the_interval_of_a_difference_is_paired(impl: Any) -> None:
    """Each task counts once; the width is that of the mean of per-question changes, by the central limit theorem."""
    sizes = (900, 300)
    before = [noisy(1, sizes, 0.5)] * 2
    # Most answers stay; trainings differ in some.
    after = [
        {
            task: [now if change else was for was, now, change in zip(*rows, strict=True)]
            for task in before[0]
            for rows in [(before[0][task], noisy(seed, sizes, 0.8)[task], mask[task])]
        }
        for seed in (2, 3)
        for mask in [noisy(seed + 10, sizes, 0.3)]
    ]
    whole, variance = 0.0, 0.0
    for task in before[0]:
        change = torch.tensor([model[task] for model in after], dtype=torch.float64).mean(0)
        change -= torch.tensor(before[0][task], dtype=torch.float64)
        whole += float(change.mean()) / 2
        variance += float(change.var()) / len(change) / 4
    found, low, high = impl.difference(before, after)
    half = 1.96 * math.sqrt(variance)
    assert 0.05 < whole
    assert found == pytest.approx(whole)
    assert low == pytest.approx(whole - half, abs=0.1 * half)  # measured 0.03 half
    assert high == pytest.approx(whole + half, abs=0.1 * half)


def test_lb2() -> None:
    law_lb2_the_interval_of_a_difference_is_paired(real)


def test_equal_answers_differ_by_nothing() -> None:
    same = noisy(1, (50, 20), 0.5)
    assert real.difference([same], [same, same]) == (0.0, 0.0, 0.0)
    assert real.mcnemar(same, same) == 1.0


def test_other_questions_cannot_be_compared() -> None:
    for other in (answers("01", "1"), answers("01"), {}):
        with pytest.raises(ConfigError, match="on the same questions only"):
            real.mcnemar(answers("01", "11"), other)
        with pytest.raises(ConfigError, match="on the same questions only"):
            real.difference([answers("01", "11")], [other])
    with pytest.raises(ConfigError, match="on the same questions only"):
        real.mcnemar(answers(""), answers(""))
