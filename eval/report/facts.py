"""What a report and a comparison say about a result: numbers picked from it, never computed anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from dreamrie.errors import ConfigError
from eval.results import Picture, Result
from eval.scoring import Score

# What stands beside a generated picture in the file of scores is always called so by `score_folders`.
_REAL_TO_REAL = "real to real"


def metric_of(score: Score) -> str:
    """Name of a metric without its version: `image_similarity` of `image_similarity v1`."""
    return score.metric.split()[0]


def find_score(result: Result, metric: str, encoder: str | None = None) -> Score | None:
    """The first score of a metric.

    Args:
        result: scored run.
        metric: such as `image_similarity`.
        encoder: of this encoder alone; None: of any.

    Returns:
        The score, or None.
    """
    for score in result.scores:
        if metric_of(score) == metric and encoder in (None, score.encoder):
            return score
    return None


@dataclass(frozen=True)
class Copies:
    """How near the generated pictures come to single real ones.

    Attributes:
        nearest: cosine of each generated picture to the nearest real one, by file.
        bar: cosine of the two real pictures that are most alike.
        files: generated pictures above the bar, nearest first.
    """

    nearest: Mapping[str, float]
    bar: float
    files: tuple[str, ...]


def find_copies(result: Result, encoder: str) -> Copies | None:
    """Pictures nearer to a real one than any two real ones are to each other.

    Args:
        result: scored run.
        encoder: whose copy scores.

    Returns:
        The copies; None where the result has no copy scores of this encoder.
    """
    both = [s for s in result.scores if (metric_of(s), s.encoder) == ("copy_score", encoder)]
    ours = next((s for s in both if _REAL_TO_REAL not in s.name), None)
    real = next((s for s in both if _REAL_TO_REAL in s.name), None)
    if ours is None or real is None:
        return None
    bar = max(real.values.values())
    above = sorted(
        (file for file, value in ours.values.items() if value > bar),
        key=lambda file: (-ours.values[file], file),
    )
    return Copies(ours.values, bar, tuple(above))


def of_kind(result: Result, kind: str) -> list[Picture]:
    """Pictures of one kind, in the order of the run."""
    return [picture for picture in result.pictures if picture.kind == kind]


def by_prompt(pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    """Pictures under their prompts, both in the order of the run."""
    found: dict[str, list[Picture]] = {}
    for picture in pictures:
        found.setdefault(picture.prompt, []).append(picture)
    return found


def drift_pairs(result: Result) -> list[tuple[Picture, Picture]]:
    """Pictures of unrelated prompts without and with the adapter, matched by prompt and seed.

    Args:
        result: scored run.

    Returns:
        Pairs (base, adapted).

    Raises:
        ConfigError: a picture has no counterpart.
    """
    base = {(p.prompt, p.seed): p for p in of_kind(result, "drift-base")}
    adapted = {(p.prompt, p.seed): p for p in of_kind(result, "drift")}
    alone = sorted({*base} ^ {*adapted})
    if alone:
        raise ConfigError(
            f"{result.folder}: the picture of {alone[0][0]!r}, seed {alone[0][1]}, has no counterpart with or "
            "without the adapter. Run python -m eval run again."
        )
    return [(base[key], picture) for key, picture in adapted.items()]


def value_of(score: Score | None, *files: str) -> float | None:
    """The value that a score has under the first of these names; None where it has none."""
    if score is None:
        return None
    return next((score.values[file] for file in files if file in score.values), None)


def mean_of(score: Score | None, pictures: Sequence[Picture]) -> float | None:
    """Mean of a score over some pictures; None unless it has a value for each."""
    values = [value_of(score, picture.file) for picture in pictures]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: `adapter.sha256`.

    Args:
        content: mappings within mappings; whatever else is a value.
        prefix: of the names.

    Returns:
        Values by dotted name, in order.
    """
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def subject(result: Result) -> str:
    """What the run is about: the subject that its protocol names, else the folder of real pictures."""
    for key in ("subject", "concept"):
        if isinstance(result.protocol.get(key), str) and result.protocol[key]:
            return str(result.protocol[key])
    return PurePath(result.reference).name or "concept"


def adapter(result: Result) -> str:
    """Short name of the adapter: the folder of a file that bears the usual name, else its own name."""
    found = result.protocol.get("adapter")
    if isinstance(found, Mapping):
        found = next((found[key] for key in ("name", "path", "file") if found.get(key)), None)
    if not found:
        return "base model alone"
    path = PurePath(str(found))
    usual = path.name == "pytorch_lora_weights.safetensors" and path.parent.name
    return str(usual or path.name or found)


def digits(value: float) -> str:
    """Three significant places for a score between -1 and 1: 0.712, but 0.0123."""
    rounded = round(value, 4)
    # Adding 0 turns -0 into 0.
    return f"{rounded + 0.0:.4f}" if abs(rounded) < 0.1 else f"{value:.3f}"


def percent(value: float) -> str:
    """A share in words: 0.25 is `25 %`."""
    return f"{100 * value:.0f} %"
