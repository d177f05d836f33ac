"""How a training looks while it runs and afterwards."""

from __future__ import annotations

from typing import Any

from app import cards
from app.training import TrainingState
from eval.report.live import loss_chart, scores_chart, spectrum_chart


def duration(seconds: float) -> str:
    """A time in words, such as "2 min 10 s".

    Args:
        seconds: not negative.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def row_of(state: TrainingState) -> dict[str, Any]:
    """A training in the list.

    Args:
        state: of it.

    Returns:
        See `app.cards.training_cards`.
    """
    left = "" if state.eta_s is None else f", about {duration(state.eta_s)} left"
    share: float | None = state.step / max(state.max_steps, 1)
    if state.status in {"waiting", "stopping"} or (state.status == "running" and not state.step):
        share = None
    return {
        "name": state.name,
        "title": state.title,
        "status": state.status,
        "doing": f"{state.doing}{left}",
        "share": share,
    }


def status_of(state: TrainingState) -> str:
    """What is known about a training, in words.

    Args:
        state: of it.
    """
    parts = []
    if state.error:
        parts.append(cards.line(state.error, "bad"))
    if state.message:
        parts.append(cards.line(state.message, "bad" if state.is_alarm else ""))
    rows: list[tuple[str, object]] = [("prompt", state.prompt)]
    if state.best_step is not None:
        rows += [("chosen", f"step {state.best_step}"), ("because", state.reason)]
    parts.append(cards.facts(rows))
    return "".join(parts)


def charts(state: TrainingState) -> str:
    """Scores, loss and spectrum.

    Args:
        state: of it.
    """
    parts = []
    if state.scorings:
        parts.append(scores_chart(state.scorings, state.best_step))
    if state.losses:
        parts.append(loss_chart(state.losses, state.max_steps))
    steps, values = state.spectrum
    if steps:
        parts.append(spectrum_chart(steps, values))
    return "".join(parts)


def sheets(state: TrainingState) -> str:
    """The same prompts and seeds at every scored step.

    Args:
        state: of it.
    """
    if not state.sheets:
        return ""
    figures = []
    for step, path in state.sheets:
        best = ' class="dr-best"' if step == state.best_step else ""
        words = f"step {step}" if step else "before training"
        figures.append(
            f"<figure{best}>{cards.picture(path, words)}<figcaption>{words}"
            f"{', chosen' if best else ''}</figcaption></figure>"
        )
    return f'<div class="dr-sheets">{"".join(figures)}</div>'
