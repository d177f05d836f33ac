"""Wrong scores while training: unpaired noise, the highest number wins, alarms that never or always fire."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from eval import metrics
from eval.training import alarm, choice, curve
from tests.mutants import Mutant, replaced
from tests.properties import test_eval_training_laws as laws


@contextmanager
def with_wrong(module: Any, **wrong: Any) -> Iterator[Any]:
    """The implementation of the laws while a module or class is broken."""
    with replaced(module, **wrong):
        yield SimpleNamespace(
            Curve=curve.Curve,
            choose=choice.choose,
            judge=alarm.judge,
            follows_prompts=choice.follows_prompts,
        )


def unpaired(self: Any, later: Any, earlier: Any, of: Any) -> tuple[float, float, float]:
    shuffled = of(earlier)[1:][
        torch.randperm(curve.DRAWS, generator=torch.Generator().manual_seed(1))
    ]
    return float(of(later)[0] - of(earlier)[0]), *metrics.percentile_interval(
        of(later)[1:] - shuffled
    )


def single_pictures(prompts: Any, samples: int) -> Tensor:
    return metrics.bootstrap_weights([str(number) for number in range(len(prompts))], samples)


def highest_wins(scores: Any) -> Any:
    rows = [row for row in scores.trained if choice.follows_prompts(scores, row)]
    best = max(rows or scores.trained, key=lambda row: float(scores.likeness(row)[0]))
    return choice.Choice(best.step, best.step, bool(rows), "the highest")


def first_wins(scores: Any) -> Any:
    return choice.Choice(scores.trained[0].step, scores.trained[-1].step, True, "the first")


def last_wins(scores: Any) -> Any:
    return choice.Choice(scores.trained[-1].step, scores.trained[-1].step, True, "the last")


@contextmanager
def another_rule(rule: Any) -> Iterator[Any]:
    yield SimpleNamespace(Curve=curve.Curve, choose=rule, judge=alarm.judge)


@contextmanager
def blanks_take_part() -> Iterator[Any]:
    class Everything(curve.Curve):
        def __init__(self, yardstick: Any, rows: Any) -> None:
            super().__init__(yardstick, rows)
            self.rows, self.broken = list(rows), []

    yield SimpleNamespace(Curve=Everything, choose=choice.choose, judge=alarm.judge)


MUTANTS = [
    Mutant(
        "differences of independent draws",
        laws.law_differences_are_paired,
        lambda: with_wrong(curve.Curve, difference=unpaired),
        "hard prompts are hard at every step; drawn apart, they hide every rise",
    ),
    Mutant(
        "bootstrap over pictures",
        laws.law_pictures_of_a_prompt_are_drawn_together,
        lambda: with_wrong(curve, bootstrap_weights=single_pictures),
        "pictures of one prompt are not independent",
    ),
    Mutant(
        "the highest number is the best step",
        laws.law_the_earliest_among_equals_wins,
        lambda: another_rule(highest_wins),
        "on a plateau the maximum is luck",
    ),
    Mutant(
        "the first step is always the best",
        laws.law_a_better_step_beats_an_earlier_one,
        lambda: another_rule(first_wins),
        "nothing would ever be learned",
    ),
    Mutant(
        "the last step is the best",
        laws.law_the_earliest_among_equals_wins,
        lambda: another_rule(last_wins),
        "what everyone does without scores",
    ),
    Mutant(
        "text similarity without a floor",
        laws.law_a_step_that_forgot_its_prompts_is_not_chosen,
        lambda: with_wrong(choice, follows_prompts=lambda scores, row: True),
        "image similarity alone rewards copies of the photos",
    ),
    Mutant(
        "floor at half of the text similarity",
        laws.law_a_step_that_forgot_its_prompts_is_not_chosen,
        lambda: with_wrong(choice, PROMPT_FLOOR=0.5),
        "three quarters of the base model's is already a different picture",
    ),
    Mutant(
        "all forgot their prompts, so the floor is waived",
        laws.law_without_a_step_that_follows_prompts_the_least_damaged_is_kept,
        lambda: with_wrong(choice, follows_prompts=lambda scores, row: True),
        "the most damaged step would be kept",
    ),
    Mutant(
        "no ceiling",
        laws.law_beyond_the_ceiling_counts_as_the_ceiling,
        lambda: with_wrong(curve.Curve, likeness=curve.Curve.image),
        "nearer than the photos to each other is copying",
    ),
    Mutant(
        "steps with black pictures are scored",
        laws.law_a_blank_step_takes_part_in_nothing,
        blanks_take_part,
        "a missing picture must not make another mean",
    ),
    Mutant(
        "overfitting is never seen",
        laws.law_the_alarms_fire_on_what_they_are_for,
        lambda: with_wrong(alarm, overfitting_symptoms=lambda scores, chosen: []),
        "the alarm is what it is for",
    ),
    Mutant(
        "drift is not looked at",
        laws.law_the_alarms_fire_on_what_they_are_for,
        lambda: with_wrong(alarm, DRIFT_FACTOR=100.0),
        "unrelated prompts may go while the concept's stay",
    ),
    Mutant(
        "copies are not looked at",
        laws.law_the_alarms_fire_on_what_they_are_for,
        lambda: with_wrong(alarm, COPY_SHARE=2.0),
        "copies score best of all",
    ),
    Mutant(
        "any loss of text similarity is overfitting",
        laws.law_the_alarms_fire_on_what_they_are_for,
        lambda: with_wrong(alarm, PROMPT_LOSS=-1.0, percentile_interval=lambda values: (1.0, 1.0)),
        "a run that is well would be stopped",
    ),
    Mutant(
        "a share of a negative margin",
        laws.law_prompts_that_the_base_model_ignores_are_not_judged,
        lambda: with_wrong(curve.Curve, judges_prompts=True),
        "better than nothing became minus five times as good",
    ),
    Mutant(
        "not learning is said from the first scoring on",
        laws.law_a_young_run_may_still_begin,
        lambda: with_wrong(alarm, judge=lambda scores, chosen, steps: _judge(scores, chosen, 0)),
        "warm-up is not failure",
    ),
]

_judge = alarm.judge
