"""Accuracy while training: held-out rows, the best step, and a warning when the model gets worse than its base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dreamrie.llm.commonsense import mean_accuracy, measure
from dreamrie.llm.data import Example
from dreamrie.llm.encoding import Encoder
from dreamrie.llm.evaluate import Accuracy
from dreamrie.trainer import Verdict


class AccuracyScorer:
    """Implements `dreamrie.trainer.Scorer` for a language model: it answers by likelihood, which draws nothing.

    The best step is the one with the highest mean over tasks, the earliest of several.

    Args:
        model: in training.
        encoder: writes the prompts.
        examples: held-out rows with choices.
    """

    def __init__(self, model: Any, encoder: Encoder, examples: Sequence[Example]) -> None:
        self._model, self._encoder, self._examples = model, encoder, list(examples)
        self._seen: list[tuple[int, dict[str, Accuracy]]] = []

    def __call__(self, step: int) -> Verdict:
        """Measure the model as it is now.

        Args:
            step: optimizer step; 0 before training.

        Returns:
            Accuracy of each task and their mean, and which step is the best so far.
        """
        self._model.eval()
        now = measure(self._model, self._encoder, self._examples)
        self._seen.append((step, now))
        means = {seen: mean_accuracy(found) for seen, found in self._seen}
        trained = [seen for seen in means if seen > 0]
        best = max(trained, key=lambda seen: means[seen], default=None)
        message, is_alarm = self._message(now)
        return Verdict(
            {
                **{f"accuracy/{task}": accuracy.share for task, accuracy in now.items()},
                "accuracy": means[step],
            },
            best,
            ""
            if best is None
            else f"accuracy {means[best]:.1%}, the highest of {len(trained)} measured",
            message,
            is_alarm,
        )

    def state(self) -> str:
        """All scorings so far."""
        counts = [
            (step, {task: (found.right, found.total) for task, found in seen.items()})
            for step, seen in self._seen
        ]
        return json.dumps(counts)

    def restore(self, state: str) -> None:
        """Go on as after the scorings of `state`.

        Args:
            state: from `state`, of the same rows.
        """
        self._seen = [
            (int(step), {task: Accuracy(*counts) for task, counts in seen.items()})
            for step, seen in json.loads(state)
        ]

    def _message(self, now: dict[str, Accuracy]) -> tuple[str, bool]:
        """How it goes, in words; an alarm if even luck would not make it as good as the first scoring."""
        first_step, first = self._seen[0]
        all_now, all_first = _pooled(now), _pooled(first)
        said = f"accuracy {mean_accuracy(now):.1%} on {all_now.total} held-out rows"
        if len(self._seen) == 1:
            return said, False
        before = "before training" if first_step == 0 else f"at step {first_step}"
        said += f", {mean_accuracy(first):.1%} {before}"
        if all_now.interval()[1] >= all_first.share:
            return said, False
        return f"{said}: it gets worse; lower --learning_rate, or stop here and use best/", True


def _pooled(found: dict[str, Accuracy]) -> Accuracy:
    """All rows as one task."""
    right = sum(accuracy.right for accuracy in found.values())
    return Accuracy(right, sum(accuracy.total for accuracy in found.values()))
