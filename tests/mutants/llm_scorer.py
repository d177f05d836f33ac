"""Faults of scoring a language model in training: another best step, an alarm at nothing, a past that is forgotten."""

from __future__ import annotations

import json
from typing import Any

from dreamrie.llm import scorer
from dreamrie.llm.evaluate import Accuracy
from tests.llm import test_scorer as laws
from tests.mutants import Mutant, replaced

_Scorer = scorer.AccuracyScorer
_BEST = laws.law_ll16_the_best_step_is_the_earliest_of_the_most_accurate
_ALARM = laws.law_ll17_an_alarm_is_more_than_luck
_GOES_ON = laws.law_ll18_scores_go_on_as_they_were


class CertainAccuracy(Accuracy):
    """No other questions would have other answers."""

    def interval(self) -> tuple[float, float]:
        return self.share, self.share


def certain(found: dict[str, Accuracy]) -> Accuracy:
    right = sum(accuracy.right for accuracy in found.values())
    return CertainAccuracy(right, sum(accuracy.total for accuracy in found.values()))


def by_questions(found: dict[str, Accuracy]) -> float:
    return scorer._pooled(found).share


class WithBase(_Scorer):
    """The model before training may be the best."""

    def __call__(self, step: int) -> Any:
        verdict = super().__call__(step)
        steps = {seen: scorer.mean_accuracy(found) for seen, found in self._seen}
        best = max(steps, key=lambda seen: steps[seen])
        return scorer.Verdict(verdict.scores, best, verdict.reason, verdict.message)


class Latest(_Scorer):
    """The last of several equally good ones."""

    def __call__(self, step: int) -> Any:
        verdict = super().__call__(step)
        steps = {seen: scorer.mean_accuracy(found) for seen, found in self._seen if seen}
        best = max(reversed(list(steps)), key=lambda seen: steps[seen], default=None)
        return scorer.Verdict(
            verdict.scores, best, verdict.reason, verdict.message, verdict.is_alarm
        )


class Forgetful(_Scorer):
    """Only the last scoring goes into a checkpoint."""

    def state(self) -> str:
        return json.dumps(json.loads(super().state())[-1:])


MUTANTS = [
    Mutant(
        name="llm scorer: the base can be the best",
        law=_BEST,
        broken=lambda: replaced(scorer, AccuracyScorer=WithBase),
        why="there is no adapter of step 0",
    ),
    Mutant(
        name="llm scorer: latest of equals",
        law=_BEST,
        broken=lambda: replaced(scorer, AccuracyScorer=Latest),
        why="the shorter training is as good",
    ),
    Mutant(
        name="llm scorer: mean over questions",
        law=_BEST,
        broken=lambda: replaced(scorer, mean_accuracy=by_questions),
        why="a task with many rows would decide alone",
    ),
    Mutant(
        name="llm scorer: alarm at any fall",
        law=_ALARM,
        broken=lambda: replaced(scorer, _pooled=certain),
        why="two answers of 130 are luck",
    ),
    Mutant(
        name="llm scorer: only the last scoring kept",
        law=_GOES_ON,
        broken=lambda: replaced(scorer, AccuracyScorer=Forgetful),
        why="a resumed run would choose another best step",
    ),
]
