"""The scores of a run as its model card says them: with encoders, intervals and the step that `best/` holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAMES = (
    ("image", "image similarity"),
    ("text", "text similarity"),
    ("prompts_kept", "prompts followed, base model = 1"),
    ("drift", "drift on unrelated prompts"),
    ("copies", "share of copies of training pictures"),
)


@dataclass(frozen=True)
class Scores:
    """What a scored run has recorded.

    Attributes:
        rows: scores by step, as in `metrics.jsonl`.
        encoders: name and hash of the weights.
        prompts: how many pictures, one for each prompt.
        steps: denoising steps.
        best_step: step in `best/`; None if there is none.
        reason: why that one.
    """

    rows: Mapping[int, Mapping[str, Any]]
    encoders: tuple[tuple[str, str], ...]
    prompts: int
    steps: int
    best_step: int | None
    reason: str


def read_scores(folder: Path) -> Scores | None:
    """Read the scores of a run.

    Args:
        folder: output folder of the run.

    Returns:
        None if it was not scored. What a damaged record raises goes through.
    """
    place = folder / "scores.jsonl"
    if not place.is_file():
        return None
    with place.open(encoding="utf-8") as stream:
        facts = json.loads(stream.readline())
    with (folder / "metrics.jsonl").open(encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream if '"scores"' in line]
    best = folder / "best" / "best.json"
    chosen = json.loads(best.read_text("utf-8")) if best.is_file() else {}
    hashes = ((name, str(of["weights_sha256"])) for name, of in facts["encoders"].items())
    return Scores(
        rows={int(line["step"]): line["scores"] for line in lines if "image" in line["scores"]},
        encoders=tuple(hashes),
        prompts=len(facts["prompts"]),
        steps=int(facts["steps"]),
        best_step=chosen.get("step"),
        reason=str(chosen.get("reason", "")),
    )


def score_lines(scores: Scores | None) -> list[str]:
    """What was measured, or that nothing was.

    Args:
        scores: None if the run was not scored.

    Returns:
        Lines of Markdown.
    """
    if scores is None or not scores.rows:
        return ["This run was not scored; look at the samples."]
    columns = _columns(scores)
    heads = " | ".join(columns)
    lines = [f"| | {heads} |", "|---|" + "---|" * len(columns)]
    for key, name in _NAMES:
        cells = [_number(scores.rows[step].get(key)) for step in columns.values()]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    encoders = ", ".join(f"`{name}` (weights {digest[:12]})" for name, digest in scores.encoders)
    lines += [
        "",
        f"Means of {scores.prompts} pictures, one for each prompt, on fixed seeds with {scores.steps} denoising steps; "
        "in brackets 95 % intervals over the prompts, which say nothing about other trainings. Encoders: "
        f"{encoders}. Numbers of other encoders cannot be compared with these.",
    ]
    if scores.best_step is not None:
        lines += ["", f"`best/` holds step {scores.best_step}: {scores.reason}."]
    return lines


def _columns(scores: Scores) -> dict[str, int]:
    """Heads and steps: the base model, the best step and the last one."""
    last = max(scores.rows)
    found = {"base model": 0} if 0 in scores.rows else {}
    if scores.best_step in scores.rows and scores.best_step != last:
        found[f"step {scores.best_step}, in `best/`"] = scores.best_step or 0
    found[f"step {last}, the last" + (", in `best/`" if scores.best_step == last else "")] = last
    return found


def _number(value: float | Sequence[float] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int | float):
        return f"{value:.3f}"
    mean, low, high = value
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
