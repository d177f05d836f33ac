"""Which of the scored steps is the best one, and why.

The rule: among the steps that still follow prompts, the earliest whose image similarity is within noise of the highest.
"""

from __future__ import annotations

from dataclasses import dataclass

from eval.metrics import percentile_interval
from eval.training.curve import Curve, StepScores

# A step follows prompts unless its prompt margin is below this share of the base model's, beyond noise. Text similarity
# itself also falls because the concept does not look like its class, which is no fault.
PROMPT_FLOOR = 0.8


@dataclass(frozen=True)
class Choice:
    """The step whose adapter is kept.

    Attributes:
        step: of the chosen scoring.
        peak: step of the highest image similarity among those that follow prompts.
        follows_prompts: whether any step does; if none, the chosen one follows them best.
        reason: one sentence.
    """

    step: int
    peak: int
    follows_prompts: bool
    reason: str


def follows_prompts(curve: Curve, row: StepScores) -> bool:
    """Whether the 95 % interval of the prompt margin that is left reaches the floor.

    Args:
        curve: of a run.
        row: one of its scorings.

    Returns:
        True also without an encoder that reads texts.
    """
    return percentile_interval(curve.prompts_kept(row)[1:])[1] >= PROMPT_FLOOR


def choose(curve: Curve) -> Choice | None:
    """The earliest step within one standard error of the highest image similarity that still follow prompts.

    The standard error is that of the paired difference to the highest, over draws of prompts (the one-standard-error
    rule of Breiman et al., Classification and Regression Trees, 1984). Among equals the earliest has moved least from
    the base model. Image similarity above the ceiling counts as the ceiling.

    Args:
        curve: of a run.

    Returns:
        The choice; None while no step after the start has been scored, or all of them drew blank pictures.
    """
    if not curve.trained:
        return None
    rows = [row for row in curve.trained if follows_prompts(curve, row)]
    if not rows:
        row = max(curve.trained, key=lambda row: float(curve.prompts_kept(row)[0]))
        kept = 100 * float(curve.prompts_kept(row)[0])
        floor = f"no step follows prompts {PROMPT_FLOOR:.0%} as well as the base model"
        reason = f"{floor}; step {row.step} does best, {kept:.0f}%"
        return Choice(row.step, row.step, False, reason)
    peak = max(rows, key=lambda row: float(curve.likeness(row)[0]))
    row = next(row for row in rows if _gap(curve, peak, row)[0] <= _gap(curve, peak, row)[1])
    return Choice(row.step, peak.step, True, _reason(curve, row, peak))


def _gap(curve: Curve, peak: StepScores, row: StepScores) -> tuple[float, float]:
    """Difference of image similarity, and its standard error; (0, 0) for the peak itself."""
    gap = curve.likeness(peak) - curve.likeness(row)
    return float(gap[0]), float(gap[1:].std())


def _reason(curve: Curve, row: StepScores, peak: StepScores) -> str:
    """The choice in words."""
    image, ceiling = float(curve.image(row)[0]), curve.yardstick.ceiling
    start = f"image similarity {image:.3f} (real pictures to each other: {ceiling:.3f})"
    if row.text is not None and curve.base is not None and curve.base.text is not None:
        before, now = float(curve.text(curve.base)[0]), float(curve.text(row)[0])
        start += f", text similarity {now:.3f} (base model: {before:.3f})"
    left_out = [str(r.step) for r in curve.trained if not follows_prompts(curve, r)]
    if curve.judges_prompts:
        start += f", prompts followed {float(curve.prompts_kept(row)[0]):.0%} as well as by the base model"
    else:
        start += ", prompts not judged"
    end = ""
    if left_out:
        end = f"; left out because they no longer follow prompts: {', '.join(left_out)}"
    if row is peak:
        return f"{start}; no other step is higher, and no earlier one within its noise{end}"
    gap, noise = _gap(curve, peak, row)
    return (
        f"{start}; the highest, at step {peak.step}, is {gap:.3f} more, within the noise of {noise:.3f}, and the "
        f"earlier step wins{end}"
    )
