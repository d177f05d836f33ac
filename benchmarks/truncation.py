"""What truncation after training costs: an adapter whole, cut to rank 4, and cut to 90 % of its energy.

    python -m benchmarks.truncation

Takes the adapter in `best/` of `runs/truncation/rank-4`, or of the folder given with `--run`; trains the demo's concept
there if it is missing, with any further flags of `train_dreambooth.py` (`--run runs/truncation/rank-8 --rank 8`). The
usual training has rank 4, and its file has rank 8: the change is the difference of two points of the manifold. Base
model and adapters draw the same prompts from the same fresh seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.concepts import DONE, ENCODERS, GAIN_PICTURES, is_done, train_one
from benchmarks.examiner import Examiner
from dreamrie import __main__ as command
from dreamrie.adapter_open import open_adapter
from dreamrie.config import TrainConfig, parse_config
from dreamrie.files import write_atomic
from dreamrie.trainer import BEST
from eval.encoders import Encoder, load_encoder
from eval.metrics import percentile_interval
from eval.training import Curve, StepScores, Yardstick

CONCEPT = "pumpkin"
SUMMARY = Path(__file__).resolve().parent / "results" / "truncation.json"


@dataclass(frozen=True)
class Row:
    """One model: rank, bytes and energy of its file, and scores; 95 % intervals are over prompts.

    `image` is the mean and its interval, `change` the paired difference of image similarity to the whole adapter.
    """

    name: str
    rank: int
    size: int
    energy: float
    image: tuple[float, float, float]
    text: float
    change: tuple[float, float, float]


def prepare(run: Path, extra: Sequence[str]) -> tuple[TrainConfig, str]:
    """The settings of the run, which is trained first if that is asked for or nothing is there."""
    job = (CONCEPT, 0, run, ["--score_steps", "200", *extra])
    if (run / BEST / DONE).is_file() and (not extra or is_done(job)):
        said = f"{run}: trained before"
    else:
        said = train_one(job)
    # The folder may have been moved since.
    return parse_config(["--config", str(run / "config.yaml"), "--output_dir", str(run)]), said


def truncated(whole: Path, words: Sequence[str], output: Path) -> float:
    """Write a truncated file with the command that users have; returns the share of the energy that it keeps."""
    losses = output.with_suffix(".json")
    flags = ["--output", str(output), "--json", str(losses), "--force"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = command.main(["truncate", str(whole), *words, *flags])
    if code:
        raise SystemExit(f"truncate {' '.join(words)} ended with {code}")
    return 1.0 - float(json.loads(losses.read_text("utf-8"))["energy_discarded"])


def rows_of(
    models: Sequence[tuple[str, Path | None, float]],
    scores: Sequence[StepScores],
    yardstick: Yardstick,
) -> list[Row]:
    """The table.

    Args:
        models: name, file and energy kept; the whole adapter is the second, after the base model.
        scores: one for each.
        yardstick: of the concept.

    Returns:
        One row for each model.
    """
    # All are of one step; a curve wants an order.
    ordered = [dataclasses.replace(row, step=place) for place, row in enumerate(scores)]
    curve, found = Curve(yardstick, ordered), []
    for (name, path, energy), row in zip(models, ordered, strict=True):
        image = curve.image(row)
        rank = 0 if path is None else open_adapter(path).rank_stored
        found.append(
            Row(
                name=name,
                rank=rank,
                size=0 if path is None else path.stat().st_size,
                energy=energy,
                image=(float(image[0]), *percentile_interval(image[1:])),
                text=float(curve.text(row)[0]),
                change=curve.difference(row, ordered[1], curve.image),
            )
        )
    return found


def report(rows: Sequence[Row], pictures: int) -> str:
    """The table as text."""
    lines = [f"{pictures} pictures of each model; 95 % intervals over prompts", ""]
    lines.append(
        f"{'adapter':<22} rank     kB  energy  {'image similarity':<22} text   paired difference to the whole"
    )
    for row in rows:
        image = "{:.3f} [{:.3f} {:.3f}]".format(*row.image)
        change = "{:+.3f} [{:+.3f} {:+.3f}]".format(*row.change)
        file = f"{row.rank:4d} {row.size / 1e3:6.0f}  {row.energy:6.1%}"
        lines.append(f"{row.name:<22} {file}  {image:<22} {row.text:.3f}  {change}")
    return "\n".join(lines)


def examine(
    config: TrainConfig, options: argparse.Namespace, encoders: tuple[Encoder, Encoder]
) -> list[Row]:
    """Truncate, draw and score."""
    whole, work = options.run / BEST / DONE, options.work / options.run.name
    work.mkdir(parents=True, exist_ok=True)
    asked = {
        f"rank {options.to_rank}": ["--rank", str(options.to_rank)],
        f"{options.energy * 100:g} % of the energy": ["--energy", str(options.energy)],
    }
    models: list[tuple[str, Path | None, float]] = [
        ("base model", None, 0.0),
        ("whole", whole, 1.0),
    ]
    for number, (name, words) in enumerate(asked.items()):
        path = work / f"cut-{number}.safetensors"
        models.append((name, path, truncated(whole, words, path)))
    sampling = (int(config.scores.score_inference_steps or 10), 4.0, 16)
    examiner = Examiner(encoders, sampling)
    scored = [
        examiner.scores(config, path, options.pictures, "truncation", work / f"sheet-{number}.png")
        for number, (_, path, _) in enumerate(models)
    ]
    return rows_of(models, [row for row, _ in scored], scored[0][1])


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, truncate, score, print and write the table.

    Args:
        argv: flags, and any flag of `train_dreambooth.py`.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/truncation/rank-4"), help="folder of a training"
    )
    parser.add_argument("--to_rank", type=int, default=4, help="rank of the first truncation")
    parser.add_argument("--energy", type=float, default=0.9, help="share kept by the second")
    parser.add_argument("--pictures", type=int, default=GAIN_PICTURES, help="of each model")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/truncation/cut"), help="folder for truncated files"
    )
    parser.add_argument("--output", type=Path, default=SUMMARY, help="file for the numbers, JSON")
    options, extra = parser.parse_known_args(argv)
    config, said = prepare(options.run, extra)
    print(said, flush=True)
    rows = examine(config, options, (load_encoder(ENCODERS[0]), load_encoder(ENCODERS[1])))
    print(report(rows, options.pictures))
    content = {
        "pictures": options.pictures,
        "encoders": list(ENCODERS),
        "rank_trained": config.adapter.rank,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.output, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
