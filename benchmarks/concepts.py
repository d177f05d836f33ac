"""Every example concept on the embedded model, several seeds: does image similarity rise, and is `best/` the best?

    python -m benchmarks.concepts

Trains each concept with `examples/demo.yaml`, scored every 100 steps. Then base model and adapter of `best/` draw every
prompt of the embedded set from fresh seeds. The first seed of each concept is also searched by brute force: each scored
adapter draws ten times the pictures of a scoring, and the same rule chooses again. Finished runs in the output folder
are not trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import train_dreambooth
from benchmarks.examiner import Examiner
from dreamrie.config import parse_config
from dreamrie.diffusion.adapters import read_metadata
from dreamrie.files import write_atomic
from dreamrie.trainer import BEST, SCORED
from eval import metrics
from eval.encoders import Encoder, load_encoder
from eval.metrics import percentile_interval
from eval.training import Curve, StepScores, Yardstick, choose
from eval.training.choice import follows_prompts

ROOT = Path(__file__).resolve().parent.parent
CONCEPTS = ROOT / "examples" / "concepts"
# Pictures of a gain: three for each prompt of the embedded set.
GAIN_PICTURES = 66
BRUTE_FACTOR = 10
ENCODERS = ("effnet-lite2-64-160", "tiny-clip")
DONE = "pytorch_lora_weights.safetensors"
Job = tuple[str, int, Path, list[str]]


@dataclass(frozen=True)
class Gain:
    """A concept and seed: base model, adapter of `best/`, paired difference with its 95 % interval over prompts.

    `changes` is the change of image similarity for each prompt.
    """

    concept: str
    seed: int
    step: int
    image: tuple[float, float, float, float, float]
    text: tuple[float, float, float, float, float]
    changes: tuple[float, ...]

    @property
    def rises(self) -> bool:
        """Whether image similarity rose beyond noise."""
        return self.image[3] > 0


def over_seeds(gains: Sequence[Gain]) -> dict[str, tuple[float, float, float]]:
    """Rise of image similarity of each concept, averaged over its seeds, with a 95 % interval over prompts.

    Args:
        gains: every run has drawn the same prompts.

    Returns:
        Mean, lower and upper end, by concept.
    """
    found = {}
    for concept in sorted({row.concept for row in gains}):
        rows = [row.changes for row in gains if row.concept == concept]
        mean = torch.tensor(rows, dtype=torch.float64).mean(0)
        draws = metrics.bootstrap_weights([str(number) for number in range(len(mean))]) @ mean
        found[concept] = (float(mean.mean()), *percentile_interval(draws))
    return found


@dataclass(frozen=True)
class Search:
    """`best/` against a search with ten times the pictures; similarities are those of the search."""

    concept: str
    step: int
    found: int
    image: float
    found_image: float
    interval: tuple[float, float]
    paired: tuple[float, float]
    allowed: bool

    @property
    def agrees(self) -> bool:
        """The same step, or one that follows prompts, with an image similarity in the interval of the found step."""
        inside = self.interval[0] <= self.image <= self.interval[1]
        return self.step == self.found or (self.allowed and inside)

    @property
    def is_tie(self) -> bool:
        """The same step, or one that follows prompts and whose paired difference is within noise: a harder demand."""
        return self.step == self.found or (self.allowed and self.paired[1] >= 0)


def flags_of(concept: str, seed: int, folder: Path, extra: Sequence[str]) -> list[str]:
    """Command line of one training; demo.yaml names another concept."""
    words = concept.replace("_", " ")
    flags = ["--config", str(ROOT / "examples" / "demo.yaml"), "--seed", str(seed)]
    flags += ["--instance_data_dir", str(CONCEPTS / concept)]
    flags += ["--instance_prompt", f"a sks {words}", "--output_dir", str(folder)]
    flags += ["--validation_prompt", f"a sks {words}", "--validation_steps", "1000000"]
    return [*flags, *extra]


def is_done(job: Job) -> bool:
    """Whether the folder of a run holds its last step, trained with the same settings."""
    concept, seed, folder, extra = job
    if not (folder / DONE).is_file():
        return False
    # The folder may have been moved since.
    recorded = parse_config(["--config", str(folder / "config.yaml"), "--output_dir", str(folder)])
    wanted = parse_config(flags_of(concept, seed, folder, extra))
    if recorded != wanted.with_resolution(recorded.data.resolution or 0):
        return False
    return int(read_metadata(folder)["steps"]) == wanted.schedule.max_train_steps


def train_one(job: Job) -> str:
    """Train unless it is done with these settings; returns a line about it."""
    concept, seed, folder, extra = job
    if is_done(job):
        return f"{folder.name}: trained before"
    folder.mkdir(parents=True, exist_ok=True)
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        code = train_dreambooth.main(flags_of(concept, seed, folder, extra))
    if code:
        raise SystemExit(f"{folder.name}: training ended with {code}: {heard.getvalue()[-500:]}")
    return f"{folder.name}: trained"


def gain(concept: str, seed: int, base: StepScores, row: StepScores, yardstick: Yardstick) -> Gain:
    """Paired difference of an adapter to the base model."""
    curve = Curve(yardstick, [base, row])
    values = []
    for of in (curve.image, curve.text):
        values.append((float(of(base)[0]), float(of(row)[0]), *curve.difference(row, base, of)))
    changes = [
        float(
            (row.image - base.image)[torch.tensor([p == prompt for p in yardstick.prompts])].mean()
        )
        for prompt in dict.fromkeys(yardstick.prompts)
    ]
    return Gain(concept, seed, row.step, values[0], values[1], tuple(changes))


def search(concept: str, kept: int, rows: Sequence[StepScores], yardstick: Yardstick) -> Search:
    """Choose again from many pictures.

    Args:
        concept: name.
        kept: step in `best/`.
        rows: base model first, then every scored step.
        yardstick: of the concept.

    Returns:
        How the step in `best/` compares.
    """
    curve = Curve(yardstick, rows)
    choice = choose(curve)
    if choice is None:
        raise SystemExit(f"{concept}: no step could be scored")
    by_step = {row.step: row for row in rows}
    mine, found = curve.likeness(by_step[kept]), curve.likeness(by_step[choice.step])
    return Search(
        concept,
        kept,
        choice.step,
        float(mine[0]),
        float(found[0]),
        percentile_interval(found[1:]),
        percentile_interval((mine - found)[1:]),
        follows_prompts(curve, by_step[kept]) or not choice.follows_prompts,
    )


def report(gains: Sequence[Gain], searches: Sequence[Search]) -> str:
    """Both tables."""
    lines = ["base model -> adapter of best/, paired difference [95 % interval over prompts]", ""]
    lines.append(
        f"{'concept':<15} seed  step  {'image similarity':<44} {'text similarity':<44} rises"
    )
    for row in gains:
        cells = [
            "{:.3f} -> {:.3f}  {:+.3f} [{:+.3f} {:+.3f}]".format(*part)
            for part in (row.image, row.text)
        ]
        said = "yes" if row.rises else "NO"
        lines.append(
            f"{row.concept:<15} {row.seed:4d}  {row.step:4d}  {cells[0]:<44} {cells[1]:<44} {said}"
        )
    changes = torch.tensor([row.image[2] for row in gains])
    spread = float(changes.std()) if len(changes) > 1 else 0.0
    rising = sum(row.rises for row in gains)
    lines.append(
        f"image similarity rises beyond noise in {rising} of {len(gains)} runs; by {float(changes.mean()):+.3f} on "
        f"average, standard deviation {spread:.3f} over runs"
    )
    lines += [
        "",
        "image similarity of a concept, mean over its seeds [95 % interval over prompts]",
        "",
    ]
    pooled = over_seeds(gains)
    for concept, (mean, low, high) in pooled.items():
        runs = [row.image[2] for row in gains if row.concept == concept]
        said = "yes" if low > 0 else "NO"
        lines.append(
            f"{concept:<15} {mean:+.3f} [{low:+.3f} {high:+.3f}]  seeds {min(runs):+.3f} to {max(runs):+.3f}  {said}"
        )
    sure = sum(low > 0 for _, low, _ in pooled.values())
    lines.append(f"image similarity rises beyond noise in {sure} of {len(pooled)} concepts")
    lines += ["", f"best/ against a search with {BRUTE_FACTOR} times the pictures", ""]
    lines.append(
        f"{'concept':<15} best/  search  image of best/, of search [95 %]     paired difference  agrees"
    )
    for found in searches:
        lines.append(
            f"{found.concept:<15} {found.step:5d}  {found.found:6d}  {found.image:.4f}, {found.found_image:.4f} "
            "[{:.4f} {:.4f}]  ".format(*found.interval)
            + "[{:+.4f} {:+.4f}]  ".format(*found.paired)
            + ("yes" if found.agrees else "NO")
        )
    agree = sum(found.agrees for found in searches)
    same = sum(found.step == found.found for found in searches)
    ties = sum(found.is_tie for found in searches)
    lines.append(
        f"best/ is the step of the search, or within its interval, in {agree} of {len(searches)} runs; the same step "
        f"in {same}, not worse beyond noise when paired in {ties}"
    )
    return "\n".join(lines)


def examine(job: Job, encoders: tuple[Encoder, Encoder]) -> tuple[Gain, Search | None]:
    """Score a trained run; the first seed of a concept is also searched by brute force."""
    concept, seed, folder, extra = job
    config = parse_config(flags_of(concept, seed, folder, extra))
    sampling = (int(config.scores.score_inference_steps or 10), 4.0, 16)
    examiner, best, sheets = Examiner(encoders, sampling), folder / BEST, folder / "examined"
    base, yardstick = examiner.scores(config, None, GAIN_PICTURES, "gain", sheets / "base.png")
    row, _ = examiner.scores(config, best, GAIN_PICTURES, "gain", sheets / "best.png")
    rise = gain(concept, seed, base, row, yardstick)
    if seed > 0:
        return rise, None
    count = BRUTE_FACTOR * config.scores.score_images
    adapters = [None, *sorted(path.parent for path in (folder / SCORED).glob(f"*/{DONE}"))]
    found = [
        examiner.scores(config, path, count, "search", sheets / f"search-{number}.png")
        for number, path in enumerate(adapters)
    ]
    kept = json.loads((best / "best.json").read_text("utf-8"))["step"]
    return rise, search(concept, kept, [row for row, _ in found], found[0][1])


def work(job: Job) -> tuple[str, Gain, Search | None]:
    """All that is done for one run, in a process of its own with one thread."""
    # Two runs side by side must not fight for threads.
    torch.set_num_threads(1)
    said = train_one(job)
    kept = job[2] / "examined.json"
    if said.endswith("before") and kept.is_file():
        content = json.loads(kept.read_text("utf-8"))
        found = content["search"]
        return said, Gain(**content["gain"]), Search(**found) if found else None
    encoders = load_encoder(ENCODERS[0]), load_encoder(ENCODERS[1])
    rise, found = examine(job, encoders)
    content = {"gain": dataclasses.asdict(rise), "search": found and dataclasses.asdict(found)}
    write_atomic(kept, json.dumps(content).encode())
    return said, rise, found


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, examine everything, print and write the tables.

    Args:
        argv: `--output DIR`, `--seeds N`, `--jobs N`, `--concepts NAME,NAME`, and any flag of `train_dreambooth.py`.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--output", type=Path, default=Path("runs/concepts"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    names = ",".join(sorted(path.name for path in CONCEPTS.iterdir()))
    parser.add_argument("--concepts", default=names)
    options, extra = parser.parse_known_args(argv)
    extra = ["--score_steps", "100", *extra]
    runs = [
        (concept, seed, options.output / f"{concept}-{seed}")
        for seed in range(options.seeds)
        for concept in options.concepts.split(",")
    ]
    jobs = [(*run, extra) for run in runs]
    gains, searches = [], []
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for said, rise, found in pool.map(work, jobs):
            print(
                f"{said}; best/ holds step {rise.step}, image similarity {rise.image[2]:+.3f}",
                flush=True,
            )
            gains.append(rise)
            searches += [found] if found else []
    gains.sort(key=lambda row: (row.concept, row.seed))
    print(report(gains, searches))
    for name in ENCODERS:
        encoder = load_encoder(name)
        print(f"{name}: weights {encoder.weights_sha256[:16]}, {encoder.preprocessing}")
    names = ("image_similarity", "text_similarity", "prompt_margin")
    print(", ".join(f"{name} v{metrics.VERSIONS[name]}" for name in names))
    content = {
        "gains": [dataclasses.asdict(row) for row in gains],
        "searches": [dataclasses.asdict(row) for row in searches],
    }
    path = options.output / "concepts.json"
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
