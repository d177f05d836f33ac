"""How a training goes, in plain words, from its scores; an alarm says what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from eval.metrics import percentile_interval
from eval.training.choice import PROMPT_FLOOR, Choice, follows_prompts
from eval.training.curve import Curve, StepScores

# Overfitting against the chosen step: prompt margin lost beyond noise, as a share of the base model's.
PROMPT_LOSS = 0.1
# Drift counts when it rose at each of the last scorings and is this many times that of the chosen step.
DRIFT_RISES, DRIFT_FACTOR = 3, 3.0
# Share of pictures that are nearer to a training picture than the training pictures are to each other.
COPY_SHARE = 0.25
# Drift of a model that has moved at all; below it a learning rate is too low.
MOVED = 0.02


@dataclass(frozen=True)
class Opinion:
    """How it goes.

    Attributes:
        kind: "start", "too early", "still improving", "settled", "best passed", "undecided", "not learning",
            "overfitting", "broken" or "unjudged".
        message: for people.
        is_alarm: something has to be done about it.
    """

    kind: str
    message: str
    is_alarm: bool = False


def judge(curve: Curve, choice: Choice | None, max_steps: int) -> Opinion:
    """Judge the latest scoring against those before it.

    Args:
        curve: of the run so far, with at least one scoring.
        choice: from `choose`.
        max_steps: length of the run; before its half, a run may still be about to start learning.

    Returns:
        The opinion.
    """
    newest_broken = max((row.step for row in curve.broken), default=-1)
    if not curve.rows or newest_broken > curve.rows[-1].step:
        return _broken(curve, choice)
    latest, base = curve.rows[-1], curve.base
    if latest.step == 0:
        return _start(curve, latest)
    if base is None or choice is None:
        said = f"{_scores(curve, latest)}; the base model could not be scored, so there is nothing to compare with"
        return Opinion("unjudged", said)
    symptoms = overfitting_symptoms(curve, choice)
    if symptoms:
        return _overfitting(symptoms, choice, latest)
    if all(curve.difference(row, base, curve.image)[1] <= 0 for row in curve.trained):
        return _no_gain(curve, latest, base, max_steps)
    return _progress(curve, choice, latest, max_steps)


def _start(curve: Curve, base: StepScores) -> Opinion:
    said = f"before training, {_scores(curve, base)}"
    if base.margin is not None and not curve.judges_prompts:
        said += "; the base model does not follow these prompts beyond noise, so that will not be judged"
    return Opinion("start", said)


def _progress(curve: Curve, choice: Choice, latest: StepScores, max_steps: int) -> Opinion:
    """What the latest scoring adds, in a run that has learned something."""
    best = _row(curve, choice.step)
    if curve.difference(latest, best, curve.image)[2] < 0:
        said = f"best passed at step {best.step}: {_scores(curve, latest)}, where it was {_scores(curve, best)}"
        return Opinion("best passed", f"{said}; longer training at this rate does not help")
    if latest.step == choice.step:
        said = f"still improving: {_scores(curve, latest)}"
        if latest.step >= max_steps:
            said += f"; a longer run may gain more (--max_train_steps {2 * max_steps})"
        return Opinion("still improving", said)
    said = f"no change beyond noise since step {best.step}: {_scores(curve, latest)}"
    return Opinion("settled", said)


def overfitting_symptoms(curve: Curve, choice: Choice) -> list[str]:
    """What the latest scoring lost against the chosen one, in words.

    Args:
        curve: of a run.
        choice: its best step.

    Returns:
        Nothing if all is well.
    """
    latest, best = curve.trained[-1], _row(curve, choice.step)
    found = []
    kept = curve.prompts_kept(latest)
    if not follows_prompts(curve, latest):
        found.append(
            f"prompts are followed {float(kept[0]):.0%} as well as by the base model; {PROMPT_FLOOR:.0%} is the least"
        )
    elif latest.step > best.step:
        loss = curve.prompts_kept(best) - kept
        flat = curve.difference(latest, best, curve.image)[1] <= 0
        if flat and float(loss[0]) > PROMPT_LOSS and percentile_interval(loss[1:])[0] > 0:
            found.append(
                f"prompts are followed less well than at step {best.step}, by {float(loss[0]):.0%} of the base model's "
                "margin, while image similarity did not rise"
            )
    if latest.step > best.step:
        found += _drifting(curve, best) + _copying(curve, best)
    return found


def _drifting(curve: Curve, best: StepScores) -> list[str]:
    """Whether unrelated prompts move on and on."""
    drifts = [float(row.drift.mean()) for row in curve.trained if row.drift is not None]
    if best.drift is None or len(drifts) <= DRIFT_RISES:
        return []
    last = drifts[-DRIFT_RISES - 1 :]
    rises = all(later > earlier for earlier, later in pairwise(last))
    if rises and last[-1] > DRIFT_FACTOR * float(best.drift.mean()):
        return [
            f"unrelated prompts drift: {last[-1]:.3f}, and {float(best.drift.mean()):.3f} at step {best.step}"
        ]
    return []


def _copying(curve: Curve, best: StepScores) -> list[str]:
    """Whether pictures became copies."""
    now, then = curve.copies(curve.trained[-1]), curve.copies(best)
    if now >= COPY_SHARE and now > then:
        return [
            f"{now:.0%} of the pictures are nearer to a training picture than those are to each other, {then:.0%} at "
            f"step {best.step}"
        ]
    return []


def _overfitting(symptoms: list[str], choice: Choice, latest: StepScores) -> Opinion:
    said = "overfitting: " + "; ".join(symptoms)
    if choice.follows_prompts and choice.step < latest.step:
        remedy = (
            f"best/ holds step {choice.step}; stop there, or try a third of the --learning_rate"
        )
    else:
        remedy = "no step so far follows prompts well: try a third of the --learning_rate"
    return Opinion("overfitting", f"{said}. What to do: {remedy}", is_alarm=True)


def _no_gain(curve: Curve, latest: StepScores, base: StepScores, max_steps: int) -> Opinion:
    """No step so far is nearer to the concept than the base model, beyond noise."""
    gained = curve.difference(latest, base, curve.image)
    said = f"image similarity differs from the base model's by {gained[0]:+.3f} ({gained[1]:+.3f} to {gained[2]:+.3f})"
    if 2 * latest.step < max_steps:
        return Opinion("too early", f"nothing learned yet: {said}")
    if gained[2] < 0:
        remedy = "it got worse, so the --learning_rate is too high: try a third"
    elif latest.drift is not None and float(latest.drift.mean()) >= MOVED:
        said += f", while the model moved (drift {float(latest.drift.mean()):.3f})"
        remedy = "train longer, or score more pictures (--score_images), which narrows the noise"
        return Opinion("undecided", f"nothing learned beyond noise: {said}. What to do: {remedy}")
    else:
        remedy = "the model hardly moved: try three times the --learning_rate"
    return Opinion("not learning", f"not learning: {said}. What to do: {remedy}", is_alarm=True)


def _broken(curve: Curve, choice: Choice | None) -> Opinion:
    row = max(curve.broken, key=lambda row: row.step)
    count = len(row.blank)
    said = f"broken: blank pictures at step {row.step}: {', '.join(row.blank[:3])}"
    if count > 3:
        said += f" and {count - 3} more"
    if row.step == 0:
        return Opinion("broken", f"{said}. The base model itself draws them.", is_alarm=True)
    back = "" if choice is None else f"best/ holds step {choice.step}; "
    remedy = f"{back}lower --learning_rate, or use bf16 or no for --mixed_precision"
    return Opinion("broken", f"{said}. What to do: {remedy}", is_alarm=True)


def _row(curve: Curve, step: int) -> StepScores:
    return next(row for row in curve.rows if row.step == step)


def _scores(curve: Curve, row: StepScores) -> str:
    """Image and text similarity with their intervals."""
    image = curve.image(row)
    said = f"image similarity {float(image[0]):.3f} [{_ends(percentile_interval(image[1:]))}]"
    if row.text is not None:
        text = curve.text(row)
        said += f", text similarity {float(text[0]):.3f} [{_ends(percentile_interval(text[1:]))}]"
    if row.step > 0 and curve.judges_prompts:
        said += f", prompts followed {float(curve.prompts_kept(row)[0]):.0%} as well as by the base model"
    return said


def _ends(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3f} {ends[1]:.3f}"
