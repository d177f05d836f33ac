"""Compare runs of one subject, picture by picture, on the same prompts and seeds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamrie.errors import ConfigError
from dreamrie.files import write_atomic
from eval import metrics
from eval.comparable import check_comparable
from eval.report.facts import find_copies, find_score, metric_of, of_kind
from eval.results import Result, load_result
from eval.scoring import Score, provenance

HELP = "compare runs of one subject on the same prompts and seeds"
PLOT = "compare.png"
_PAIRED = (
    ("image_similarity", "image similarity"),
    ("text_similarity", "text similarity"),
    ("prior_drift", "drift"),
)
# Equal pictures embedded on two machines differ by this much at most.
_ROUNDING = 1e-6
_FOOT = (
    "Intervals: 95 %, drawn over prompts. One subject and one training a run: the difference is that of these runs, "
    "not yet that of two methods."
)


@dataclass(frozen=True)
class Difference:
    """How a run differs from the first one on the same pictures.

    Attributes:
        run: its name. score: what is compared. mean: of run minus first. interval: 95 %, None with a single prompt.
        verdict: in words.
    """

    run: str
    score: str
    mean: float
    interval: tuple[float, float] | None
    verdict: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of this command.
    """
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output folder of python -m eval run")
    add("--output", type=Path, metavar="DIR", help=f"folder of {PLOT}; default: that of the first")
    add("--json", type=Path, metavar="FILE", help="write the comparison, every number in full")
    add(
        "--encoders", metavar="NAME,NAME", help="encoders to show; default: the first of each score"
    )


def run(options: argparse.Namespace) -> str:
    """Compare.

    Args:
        options: parsed command line.

    Returns:
        A table, the paired differences, and where the plot lies.

    Raises:
        ConfigError: fewer than two runs, one twice, runs that must not be compared, or an unknown encoder.
    """
    runs = load_runs(options.runs)
    shown = shown_encoders(next(iter(runs.values())), options.encoders)
    notes = check_comparable(runs, shown)
    found = differences(runs, shown)
    scores = next(iter(runs.values())).scores
    kept = [
        score
        for score in scores
        if (metric_of(score), score.encoder) in _compared(next(iter(runs.values())), shown)
    ]
    lines = [
        *_table(runs, shown),
        "",
        *_sentences(runs, found),
        "",
        _FOOT,
        *provenance(kept),
        *notes,
    ]
    # The folder above the first run is where runs of one comparison mostly lie together.
    folder = options.output or options.runs[0].resolve().parent
    plot = _plot(runs, shown)
    lines.append(
        "There is no text similarity, hence no plot." if plot is None else f"plot: {folder / PLOT}"
    )
    if plot is not None:
        _write(folder / PLOT, plot, "--output")
    if options.json:
        content = _as_json(runs, shown, found, notes)
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        _write(options.json, text.encode(), "--json")
    return "\n".join(lines)


def load_runs(folders: Sequence[Path]) -> dict[str, Result]:
    """Read results under names that tell them apart.

    Args:
        folders: of runs.

    Returns:
        Results by name, in order.

    Raises:
        ConfigError: fewer than two, or one of them twice.
    """
    if len(folders) < 2:
        raise ConfigError(
            f"compare needs at least two runs, got {len(folders)}. The scores of one are in its report.html."
        )
    places = [folder.resolve() for folder in folders]
    for place, folder in zip(places, folders, strict=True):
        if places.count(place) > 1:
            raise ConfigError(
                f"{folder} is named twice. A run does not differ from itself; name it once."
            )
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    names = ["/".join(place.parts[-depth:]) for place in places]
    return dict(zip(names, map(load_result, folders), strict=True))


def shown_encoders(first: Result, wanted: str | None) -> list[tuple[str, str]]:
    """Which scores are compared.

    Args:
        first: the run that the others are compared with.
        wanted: names of encoders with commas between; None: the first encoder of each score.

    Returns:
        Pairs (metric, encoder): image similarities, then text similarities.

    Raises:
        ConfigError: an encoder that scored nothing, or no image similarity.
    """
    known = list(
        dict.fromkeys(
            (metric_of(score), score.encoder)
            for metric, _ in _PAIRED[:2]
            for score in first.scores
            if metric_of(score) == metric
        )
    )
    if not known:
        raise ConfigError(
            f"{first.folder} has no image similarity. Score it with python -m eval run."
        )
    if wanted is None:
        return list({metric: (metric, encoder) for metric, encoder in reversed(known)}.values())[
            ::-1
        ]
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    able = list(dict.fromkeys(encoder for _, encoder in known))
    unknown = [name for name in names if name not in able]
    if unknown or not names:
        raise ConfigError(
            f"--encoders {wanted!r}: {first.folder} was scored with {', '.join(able)}. Name some of these, or run "
            "python -m eval run again with other ones."
        )
    return [pair for pair in known if pair[1] in names]


def differences(runs: dict[str, Result], shown: Sequence[tuple[str, str]]) -> list[Difference]:
    """Every run against the first one, each picture against its counterpart.

    Args:
        runs: comparable runs.
        shown: see `shown_encoders`.

    Returns:
        Differences run by run; drift where both have it.
    """
    (_, first), *others = runs.items()
    found = []
    for name, result in others:
        for metric, encoder in _compared(first, shown):
            ours, base = find_score(result, metric, encoder), find_score(first, metric, encoder)
            if ours is not None and base is not None:
                found.append(_difference(name, first, ours, base))
    return found


def _compared(first: Result, shown: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    drift = find_score(first, "prior_drift")
    return [*shown, *([("prior_drift", drift.encoder)] if drift else [])]


def _difference(name: str, first: Result, ours: Score, base: Score) -> Difference:
    """Pictures are matched by file; `check_comparable` has seen that prompts and seeds agree."""
    if set(ours.values) != set(base.values):
        odd = sorted({*ours.values} ^ {*base.values})
        raise ConfigError(
            f"{name}: {ours.name} is not of the same pictures as in the first run, {odd[0]} is missing in one. "
            "Run python -m eval run again."
        )
    texts = {picture.file: picture.text for picture in first.pictures}
    files = sorted(base.values)
    values = torch.tensor(
        [ours.values[file] - base.values[file] for file in files], dtype=torch.float64
    )
    groups = [texts[file] for file in files]
    interval = None
    if len(set(groups)) > 1:
        interval = metrics.bootstrap_interval(values, groups)
    words = dict(_PAIRED)[metric_of(ours)]
    score = f"{words} ({ours.encoder})"
    return Difference(name, score, float(values.mean()), interval, verdict(interval))


def verdict(interval: tuple[float, float] | None) -> str:
    """What a difference means.

    Args:
        interval: 95 % of its mean.

    Returns:
        Words.
    """
    if interval is None:
        return "one prompt, so nothing can be said about noise"
    if interval[0] > _ROUNDING:
        return "higher"
    return "lower" if interval[1] < -_ROUNDING else "no difference beyond noise"


def _table(runs: dict[str, Result], shown: Sequence[tuple[str, str]]) -> list[str]:
    first = next(iter(runs.values()))
    heads = ["run", *(f"{dict(_PAIRED)[metric]} ({encoder})" for metric, encoder in shown)]
    rows = [[*heads, "drift", "copies"]]
    for name, result in runs.items():
        cells = [_cell(find_score(result, *pair)) for pair in shown]
        drift = find_score(result, "prior_drift", _drift_encoder(first))
        rows.append([name, *cells, _cell(drift), _copies(result, _image_encoder(shown))])
    ceiling = find_score(first, "ceiling", _image_encoder(shown))
    if ceiling is not None:
        cells = [f"{ceiling.mean:.4f}" if pair == shown[0] else "" for pair in shown]
        rows.append(["real against real", *cells, "", ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _image_encoder(shown: Sequence[tuple[str, str]]) -> str:
    """Of the first image similarity that is shown; ceiling and copies belong to it."""
    return next((encoder for metric, encoder in shown if metric == "image_similarity"), "")


def _drift_encoder(first: Result) -> str | None:
    drift = find_score(first, "prior_drift")
    return drift.encoder if drift else None


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    ends = "" if score.interval is None else "  [{:.4f} {:.4f}]".format(*score.interval)
    return f"{score.mean:.4f}{ends}"


def _copies(result: Result, encoder: str) -> str:
    copies = find_copies(result, encoder)
    return "-" if copies is None else f"{len(copies.files)} of {len(copies.nearest)}"


def _sentences(runs: dict[str, Result], found: Sequence[Difference]) -> list[str]:
    first = next(iter(runs))
    count = len(of_kind(runs[first], "concept"))
    lines = [f"Paired differences to {first}, the same {count} prompts and seeds:"]
    width = max((len(f"{row.run}  {row.score}") for row in found), default=0)
    for row in found:
        ends = " " * 18 if row.interval is None else "[{:+.4f} {:+.4f}]".format(*row.interval)
        lines.append(
            f"{f'{row.run}  {row.score}':<{width}}  {row.mean:+.4f}  {ends}  {row.verdict}"
        )
    return lines


def _plot(runs: dict[str, Result], shown: Sequence[tuple[str, str]]) -> bytes | None:
    """The picture of the comparison; None without text similarity."""
    # matplotlib is slow to import, and every command of python -m eval imports this module.
    from eval.report.plots import Point, plot_runs

    first = {metric: (metric, encoder) for metric, encoder in reversed(shown)}
    if len(first) < 2:
        return None
    points = []
    for name, result in runs.items():
        image, text = (find_score(result, *first[metric]) for metric, _ in _PAIRED[:2])
        if image is not None and text is not None:
            points.append(Point(name, text.mean, image.mean, text.interval, image.interval))
    encoders = (first["text_similarity"][1], first["image_similarity"][1])
    ceiling = find_score(next(iter(runs.values())), "ceiling", encoders[1])
    return plot_runs(points, ceiling.mean if ceiling else None, encoders)


def _as_json(
    runs: dict[str, Result],
    shown: Sequence[tuple[str, str]],
    found: Sequence[Difference],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Means, intervals and what they depend on; single values stay in each run's own file."""
    kept = {*shown, ("prior_drift", _drift_encoder(next(iter(runs.values()))))}
    rows = {}
    for name, result in runs.items():
        scores = [
            {key: value for key, value in dataclasses.asdict(score).items() if key != "values"}
            for score in result.scores
            if (metric_of(score), score.encoder) in kept
        ]
        copies = find_copies(result, _image_encoder(shown))
        rows[name] = {
            "folder": str(result.folder),
            "protocol": dict(result.protocol),
            "scores": scores,
            "copies": list(copies.files) if copies else None,
        }
    return {
        "runs": rows,
        "differences": [dataclasses.asdict(row) for row in found],
        "notes": list(notes),
    }


def _write(path: Path, content: bytes, flag: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise ConfigError(
            f"{flag}: {path} cannot be written ({error}). Choose another place."
        ) from error
