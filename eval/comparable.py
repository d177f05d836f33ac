"""Which runs may share a table: all that decides pictures and numbers is equal, but for the adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamrie.errors import ConfigError
from eval.report.facts import find_score, flatten, metric_of
from eval.results import Result

# What is compared, or what is not in the text that is scored.
_OF_THE_RUN = frozenset({"adapter", "adapter_sha256", "token"})
# A run of the base model alone draws no drift.
_OPTIONAL = "drift_prompts"
# Other versions may round differently; that is worth a line, not a refusal.
_VERSIONS = "versions"
_CEILING_TOLERANCE = 1e-5
_LONGEST = 160


def check_comparable(runs: Mapping[str, Result], shown: Sequence[tuple[str, str]]) -> list[str]:
    """Refuse what would compare more than adapters.

    Args:
        runs: at least two, by name.
        shown: pairs (metric, encoder) that are compared.

    Returns:
        Remarks for the reader.

    Raises:
        ConfigError: protocol, real pictures, prompts, seeds, weights, preprocessing or metric versions differ; it names
            what does.
    """
    (first_name, first), *others = runs.items()
    notes = []
    for name, result in others:
        pair = (first_name, name)
        _check_reference(pair, first, result, shown)
        _check_protocol(pair, first.protocol, result.protocol)
        _check_pictures(pair, first, result)
        _check_scores(pair, first, result, shown)
        before, after = first.protocol.get(_VERSIONS), result.protocol.get(_VERSIONS)
        if before != after:
            notes.append(
                f"Other versions of libraries: {first_name} {_words(before)}, {name} {_words(after)}. They may draw "
                "slightly different pictures."
            )
    return notes


def _check_reference(
    names: tuple[str, str], first: Result, other: Result, shown: Sequence[tuple[str, str]]
) -> None:
    """By the real pictures' own scores, which a copied folder keeps; without those by the path."""
    same = Path(first.reference).resolve() == Path(other.reference).resolve()
    for _, encoder in shown:
        left, right = (find_score(result, "ceiling", encoder) for result in (first, other))
        if left and right and left.weights_sha256 == right.weights_sha256:
            same = left.values.keys() == right.values.keys() and all(
                abs(value - right.values[file]) <= _CEILING_TOLERANCE
                for file, value in left.values.items()
            )
            break
    if not same:
        raise ConfigError(
            f"the real pictures differ: {names[0]} was scored against {first.reference}, {names[1]} against "
            f"{other.reference}. Scores of different subjects, or of other pictures of one, are not comparable: "
            "compare run by run, those of each subject alone."
        )


def _check_protocol(
    names: tuple[str, str], first: Mapping[str, Any], other: Mapping[str, Any]
) -> None:
    skipped = {*_OF_THE_RUN, _VERSIONS}
    if first.get(_OPTIONAL) is None or other.get(_OPTIONAL) is None:
        skipped.add(_OPTIONAL)
    left, right = (
        flatten({key: value for key, value in protocol.items() if key not in skipped})
        for protocol in (first, other)
    )
    odd = [
        f"{key}: {names[0]} has {_words(left.get(key))}, {names[1]} has {_words(right.get(key))}"
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]
    if odd:
        raise ConfigError(
            f"the runs were not drawn alike: {'; '.join(odd)}. A difference of their scores could come from that. "
            "Draw one of them again like the other."
        )


def _check_pictures(names: tuple[str, str], first: Result, other: Result) -> None:
    """Every picture of the concept, and of drift where both have it, has its counterpart."""
    kinds = {p.kind for p in first.pictures} & {p.kind for p in other.pictures}
    left, right = (
        {p.file: (p.kind, p.text, p.seed) for p in result.pictures if p.kind in kinds}
        for result in (first, other)
    )
    for file in dict.fromkeys([*left, *right]):
        if left.get(file) != right.get(file):
            said = [
                "no such picture" if facts is None else f"{facts[0]}, {facts[1]!r}, seed {facts[2]}"
                for facts in (left.get(file), right.get(file))
            ]
            raise ConfigError(
                f"picture {file} has no counterpart: {names[0]} has {said[0]}; {names[1]} has {said[1]}. Prompts and "
                "seeds must be the same in both, in number too: draw one of them again like the other."
            )


def _check_scores(
    names: tuple[str, str], first: Result, other: Result, shown: Sequence[tuple[str, str]]
) -> None:
    drift = find_score(first, "prior_drift")
    # Copies and the ceiling go with image similarity.
    related = [(metric, encoder) for _, encoder in shown for metric in ("copy_score", "ceiling")]
    wanted = [*shown, *([("prior_drift", drift.encoder)] if drift else []), *related]
    for metric, encoder in dict.fromkeys(wanted):
        left, right = (find_score(result, metric, encoder) for result in (first, other))
        if left is None or right is None:
            if (metric, encoder) in shown:
                able = [s.encoder for s in other.scores if metric_of(s) == metric]
                raise ConfigError(
                    f"{names[1]} has no {metric} of {encoder}; it was scored with {', '.join(able) or 'none'}. Score "
                    "both with the same encoders, or choose others with --encoders."
                )
            continue
        for what in ("metric", "weights_sha256", "preprocessing"):
            a, b = getattr(left, what), getattr(right, what)
            if a != b:
                raise ConfigError(
                    f"{left.name}: the runs were scored differently, {what} is {_words(a)} in {names[0]} and "
                    f"{_words(b)} in {names[1]}. Score them again with the same version: python -m eval run, same "
                    "commands, other --output."
                )


def _words(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
