"""Scores while training: fixed prompts and seeds, the best step with its reason, and alarms in plain words."""

from __future__ import annotations

from eval.training.alarm import Opinion, judge
from eval.training.choice import Choice, choose
from eval.training.curve import Curve, StepScores, Yardstick
from eval.training.scorer import ConceptScorer, Plan, read_curve
from eval.training.setup import encoder_pair, make_scorer

__all__ = [
    "Choice",
    "ConceptScorer",
    "Curve",
    "Opinion",
    "Plan",
    "StepScores",
    "Yardstick",
    "choose",
    "encoder_pair",
    "judge",
    "make_scorer",
    "read_curve",
]
