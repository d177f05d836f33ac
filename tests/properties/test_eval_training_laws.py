"""Laws of the scores while training: pairing, the choice of the best step, the alarms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval.metrics import percentile_interval
from eval.training import alarm, choice, curve
from tests.eval.small_curves import small_curve

IMPLEMENTATION = SimpleNamespace(
    Curve=curve.Curve,
    choose=choice.choose,
    judge=alarm.judge,
    follows_prompts=choice.follows_prompts,
)


def law_differences_are_paired(impl: Any) -> None:
    """A rise of 0.01 in every picture is seen although the pictures differ by ten times as much (E5)."""
    found = small_curve({0: 0.40, 10: 0.41}, own_noise=0.0)
    scores = impl.Curve(found.yardstick, found.rows)
    mean, low, high = scores.difference(scores.rows[1], scores.rows[0], scores.image)
    assert mean == pytest.approx(0.01, abs=1e-12)
    assert low == pytest.approx(0.01, abs=1e-12)
    assert high == pytest.approx(0.01, abs=1e-12)
    ends = percentile_interval(scores.image(scores.rows[0])[1:])
    assert ends[1] - ends[0] > 0.05, "the precondition: alone, a step is known to within 0.05"


def law_pictures_of_a_prompt_are_drawn_together(impl: Any) -> None:
    """Two pictures that cancel inside each prompt leave no spread of the mean; drawn singly they would."""
    yardstick = curve.Yardstick(("a", "a", "b", "b"), 0.8, torch.tensor([0.5, 0.5]))
    values = torch.tensor([0.1, 0.9, 0.3, 0.7], dtype=torch.float64)
    row = curve.StepScores(0, values, None, None, values)
    draws = impl.Curve(yardstick, [row]).image(row)
    assert float(draws[1:].std()) == pytest.approx(0, abs=1e-12)
    assert float(draws[0]) == pytest.approx(0.5)


def law_the_earliest_among_equals_wins(impl: Any) -> None:
    """On a plateau whose differences are noise the first step is kept, whichever is the highest by chance."""
    text = dict.fromkeys((0, 100, 200, 300, 400), 0.4)
    found = impl.choose(
        small_curve({0: 0.3, 100: 0.45, 200: 0.5999, 300: 0.5995, 400: 0.6}, text, own_noise=0.01)
    )
    assert found is not None
    assert (found.step, found.peak) == (200, 400)


def law_a_better_step_beats_an_earlier_one(impl: Any) -> None:
    """A rise beyond the noise moves the choice."""
    text = dict.fromkeys((0, 100, 200, 300), 0.4)
    found = impl.choose(small_curve({0: 0.3, 100: 0.5, 200: 0.55, 300: 0.6}, text))
    assert found is not None
    assert found.step == 300


def law_a_step_that_forgot_its_prompts_is_not_chosen(impl: Any) -> None:
    """Image similarity alone would choose 300, which follows prompts 70 % as well."""
    text = {0: 0.4, 100: 0.4, 200: 0.39, 300: 0.28}
    found = impl.choose(small_curve({0: 0.3, 100: 0.45, 200: 0.55, 300: 0.7}, text))
    assert found is not None
    assert found.step == 200
    assert found.follows_prompts
    assert "300" in found.reason


def law_without_a_step_that_follows_prompts_the_least_damaged_is_kept(impl: Any) -> None:
    """Every step lost a quarter or more: the one that kept most, and it is said."""
    text = {0: 0.4, 100: 0.3, 200: 0.25, 300: 0.2}
    found = impl.choose(small_curve({0: 0.3, 100: 0.45, 200: 0.55, 300: 0.7}, text))
    assert found is not None
    assert found.step == 100
    assert not found.follows_prompts
    assert "no step follows prompts 80% as well" in found.reason


def law_beyond_the_ceiling_counts_as_the_ceiling(impl: Any) -> None:
    """A step at the ceiling is not beaten by a later one above it: those are copies."""
    text = dict.fromkeys((0, 100, 200), 0.4)
    found = impl.choose(small_curve({0: 0.3, 100: 1.1, 200: 1.3}, text))
    assert found is not None
    assert found.step == 100


def law_a_blank_step_takes_part_in_nothing(impl: Any) -> None:
    """Step 200 would be the best; one of its pictures is black."""
    text = dict.fromkeys((0, 100, 200), 0.4)
    scores = small_curve({0: 0.3, 100: 0.5, 200: 0.7}, text, blank=(200,))
    found = impl.choose(impl.Curve(scores.yardstick, [*scores.rows, *scores.broken]))
    assert found is not None
    assert found.step == 100


def kind_of(impl: Any, scores: curve.Curve, max_steps: int = 400) -> str:
    """What is said of the latest scoring."""
    return str(impl.judge(scores, choice.choose(scores), max_steps).kind)


def law_the_alarms_fire_on_what_they_are_for(impl: Any) -> None:
    """One curve for each thing that can be said."""
    flat = dict.fromkeys((0, 100, 200, 300, 400), 0.4)
    rising = {0: 0.3, 100: 0.4, 200: 0.5, 300: 0.6, 400: 0.7}
    level = {0: 0.3, 100: 0.4, 200: 0.5, 300: 0.5, 400: 0.5}
    lost = {**flat, 400: 0.34}
    forgotten = {**flat, 400: 0.24}
    moving = {100: 0.05, 200: 0.06, 300: 0.09, 400: 0.2}
    copied = {100: 0.6, 200: 0.7, 300: 0.8, 400: 0.9}
    assert kind_of(impl, small_curve({0: 0.3}, {0: 0.4})) == "start"
    assert kind_of(impl, small_curve(rising, flat)) == "still improving"
    assert kind_of(impl, small_curve(level, flat)) == "settled"
    assert kind_of(impl, small_curve({**level, 400: 0.45}, flat)) == "best passed"
    still = dict.fromkeys(flat, 0.004)
    assert kind_of(impl, small_curve({**level, 400: 0.2}, flat)) == "best passed"
    assert kind_of(impl, small_curve(dict.fromkeys(flat, 0.3), flat)) == "undecided"
    assert kind_of(impl, small_curve(dict.fromkeys(flat, 0.3), flat, drift=still)) == "not learning"
    falling = {0: 0.3, 100: 0.28, 200: 0.25, 300: 0.2, 400: 0.2}
    assert kind_of(impl, small_curve(falling, flat)) == "not learning"
    assert kind_of(impl, small_curve(level, flat, blank=(0,))) == "unjudged"
    assert kind_of(impl, small_curve(level, lost)) == "overfitting"
    assert kind_of(impl, small_curve(rising, lost)) == "still improving"
    assert kind_of(impl, small_curve(rising, forgotten)) == "overfitting"
    assert kind_of(impl, small_curve(level, flat, drift=moving)) == "overfitting"
    assert kind_of(impl, small_curve(level, flat, nearest=copied)) == "overfitting"
    assert kind_of(impl, small_curve(rising, flat, blank=(400,))) == "broken"


def law_a_young_run_may_still_begin(impl: Any) -> None:
    """Before half of the run nothing is said against a run that has not started to learn."""
    scores = small_curve({0: 0.3, 100: 0.3}, {0: 0.4, 100: 0.4}, drift={100: 0.004})
    assert kind_of(impl, scores, max_steps=400) == "too early"
    assert kind_of(impl, scores, max_steps=200) == "not learning"


def law_prompts_that_the_base_model_ignores_are_not_judged(impl: Any) -> None:
    """A share of a margin that is zero or negative would turn a better step into overfitting."""
    text = {0: -0.04, 100: 0.2, 200: 0.2}
    scores = small_curve({0: 0.3, 100: 0.4, 200: 0.5}, text)
    assert not scores.judges_prompts
    assert kind_of(impl, scores, max_steps=200) == "still improving"
    assert "will not be judged" in impl.judge(small_curve({0: 0.3}, {0: -0.04}), None, 200).message


LAWS = (
    law_differences_are_paired,
    law_pictures_of_a_prompt_are_drawn_together,
    law_the_earliest_among_equals_wins,
    law_a_better_step_beats_an_earlier_one,
    law_a_step_that_forgot_its_prompts_is_not_chosen,
    law_without_a_step_that_follows_prompts_the_least_damaged_is_kept,
    law_beyond_the_ceiling_counts_as_the_ceiling,
    law_a_blank_step_takes_part_in_nothing,
    law_the_alarms_fire_on_what_they_are_for,
    law_a_young_run_may_still_begin,
    law_prompts_that_the_base_model_ignores_are_not_judged,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_scores_while_training_keep_the_law(law: Any) -> None:
    law(IMPLEMENTATION)
