"""Pictures per second and peak memory of `train_dreambooth.py` beside another DreamBooth LoRA script.

    python -m benchmarks.throughput --script diffusers/examples/dreambooth/train_dreambooth_lora.py

The same model (SD2's shapes, random weights), pictures, resolution, batch, rank, precision and device; each training is
a process of its own, all timed by one hook after every optimizer step (`benchmarks.watched`), one after the other. The
other script runs with the settings of its README. Without --script only ours are timed.

    OMP_NUM_THREADS=1 python -m benchmarks.throughput --size embedded --mixed_precision no --parts

--parts also prints where the time of our steps goes: on a GPU each part then waits for its own work, without one it is
time that the processor has worked.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.sd2_folder import write_folder
from benchmarks.unet import SIZES
from benchmarks.watched import PARTS as STEP_PARTS
from benchmarks.watched import REST, WHOLE
from dreamrie.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "examples" / "concepts" / "pumpkin"
OURS = ROOT / "train_dreambooth.py"
# Steps that are not timed: the allocator and the kernels' choice settle in them.
WARM_UP = 5
GIB = 2**30
# The model that comes with dreamrie, at its own size; the others are SD2's classes with random weights.
EMBEDDED, EMBEDDED_PIXELS, USUAL_PIXELS = "embedded", 64, 128


@dataclass(frozen=True)
class Contender:
    """A training: its name in the table, its script and its own flags."""

    name: str
    script: Path
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """Median milliseconds of a step, pictures per second, and the largest memory in GiB until the last step.

    The fastest step says what a machine that others use too can do.
    With --parts also the milliseconds of each part of a step.
    """

    name: str
    step_ms: float
    pictures_per_s: float
    peak_gib: float
    fastest_ms: float
    parts: dict[str, float] = field(default_factory=dict)


def contenders(script: Path | None, rank: int, steps: int, precision: str) -> list[Contender]:
    """What is compared; the other script comes first, and is what the ratios refer to."""
    length = ("--max_train_steps", str(steps), "--rank", str(rank), "--lr_scheduler", "constant")
    kept = "fp32" if precision == "no" else precision
    mine = (*length, "--base_precision", kept, "--checkpointing_steps", "0")
    plain = (*mine, "--optimizer", "adamw", "--init", "default")
    riemannion = (*mine, "--loi_batches", "4")
    found = [
        Contender("dreamrie, AdamW", OURS, plain),
        Contender("dreamrie, Riemannion + LOI", OURS, riemannion),
    ]
    if script is not None:
        theirs = (*length, "--checkpointing_steps", "1000000", "--learning_rate", "1e-4")
        found.insert(0, Contender(script.stem, script, theirs))
    return found


def shared_flags(arguments: argparse.Namespace, model: Path | None, pictures: Path) -> list[str]:
    """What every contender is given."""
    named = [] if model is None else ["--pretrained_model_name_or_path", str(model)]
    return [
        *named, "--instance_data_dir", str(pictures),
        "--instance_prompt", "a photo of a sks pumpkin", "--resolution", str(arguments.resolution),
        "--center_crop", "--train_batch_size", str(arguments.batch_size),
        "--mixed_precision", arguments.mixed_precision, "--seed", "0",
    ]  # fmt: skip


def measure(
    contender: Contender, shared: Sequence[str], folder: Path, batch: int, parts: bool = False
) -> Result:
    """Run one training and read its times."""
    times, log = folder / "times.json", folder / "log"
    times.unlink(missing_ok=True)
    out = folder / "out"
    watched = ["benchmarks.watched", *(["--parts"] if parts and contender.script == OURS else [])]
    command = [sys.executable, "-m", *watched, str(times), str(contender.script)]
    command += [*shared, *contender.flags, "--output_dir", str(out)]
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    shutil.rmtree(out, ignore_errors=True)
    found = json.loads(times.read_text()) if times.is_file() else {"ends": []}
    ends = found["ends"]
    if len(ends) < WARM_UP + 2:
        raise SystemExit(
            f"{contender.name} ended with exit code {code} after {len(ends)} steps, {WARM_UP + 2} are needed:\n"
            + log.read_text()[-3000:]
        )
    gaps = [later - earlier for earlier, later in itertools.pairwise(ends)][WARM_UP:]
    middle = statistics.median(gaps)
    return Result(
        contender.name,
        1e3 * middle,
        batch / middle,
        found["peak_bytes"] / GIB,
        1e3 * min(gaps),
        fastest_parts(found["parts"][WARM_UP:]),
    )


def fastest_parts(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Milliseconds of each part of a step, as little as other work on the machine allows.

    Args:
        steps: seconds by part, from `benchmarks.watched.Parts`.

    Returns:
        The fastest over the steps, in the order in which the loop comes to the parts, and last their sum; a part that
        no step has is left out. What happens in some of the steps only is the mean over all.
    """
    last = STEP_PARTS[-1][0]
    found = {}
    for name in (*(name for name, *_ in STEP_PARTS), REST):
        spent = [1e3 * step.get(name, 0.0) for step in steps]
        if any(spent):
            found[name] = statistics.fmean(spent) if name == last else min(spent)
    return {**found, WHOLE: sum(found.values())} if found else {}


def parts_table(result: Result) -> str:
    """Where the time of a step goes: milliseconds, and percent of the whole."""
    lines = [f"{result.name}: where a step's time goes, the fastest of each part"]
    lines += [
        f"  {name:<32} {spent:>9.2f} ms {spent / result.parts[WHOLE]:>7.1%}"
        for name, spent in result.parts.items()
    ]
    return "\n".join(lines)


def table(results: Sequence[Result]) -> str:
    """One row for each contender, with ratios to the first."""
    first = results[0]
    lines = [
        f"{'':<28} {'ms/step':>9} {'pictures/s':>11} {'x':>6} {'peak GiB':>9} {'x':>6} {'fastest ms':>11}"
    ]
    for row in results:
        speed, memory = row.pictures_per_s / first.pictures_per_s, row.peak_gib / first.peak_gib
        lines.append(
            f"{row.name:<28} {row.step_ms:>9.1f} {row.pictures_per_s:>11.2f} {speed:>6.2f} "
            f"{row.peak_gib:>9.2f} {memory:>6.2f} {row.fastest_ms:>11.1f}"
        )
    return "\n".join(lines)


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--script", type=Path, help="the other script")
    parser.add_argument("--size", choices=[*SIZES, EMBEDDED], default="small", help="of the model")
    parser.add_argument(
        "--resolution", type=int, help=f"default {USUAL_PIXELS}, embedded {EMBEDDED_PIXELS}"
    )
    parser.add_argument("--parts", action="store_true", help="print where a step's time goes")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument(
        "--folder", type=Path, help="where the model is kept; default: a temporary one"
    )
    parser.add_argument("--output", type=Path, help="JSON file with the results")
    arguments = parser.parse_args(argv)
    usual = EMBEDDED_PIXELS if arguments.size == EMBEDDED else USUAL_PIXELS
    arguments.resolution = arguments.resolution or usual
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Time every contender and print the table."""
    arguments = read_arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        kept = arguments.folder or work
        kept.mkdir(parents=True, exist_ok=True)
        model = None
        if arguments.size != EMBEDDED:
            folder = kept / f"sd2-{arguments.size}"
            model = write_folder(folder, arguments.size, device, torch.bfloat16)
        pictures = work / "pictures"
        pictures.mkdir()
        for path in sorted(
            PICTURES.glob("*.png")
        ):  # the other script opens every file as a picture
            shutil.copy(path, pictures)
        shared = shared_flags(arguments, model, pictures)
        results = []
        for contender in contenders(
            arguments.script, arguments.rank, arguments.steps, arguments.mixed_precision
        ):
            results.append(measure(contender, shared, work, arguments.batch_size, arguments.parts))
            print(f"{results[-1].name}: {results[-1].step_ms:.1f} ms", file=sys.stderr, flush=True)
    print(
        f"{arguments.size} model, {arguments.resolution} px, batch {arguments.batch_size}, rank {arguments.rank}, "
        f"{arguments.mixed_precision}, {named}, {arguments.steps} steps"
    )
    print(table(results))
    for result in results:
        if result.parts:
            print(f"\n{parts_table(result)}")
    if arguments.output:
        facts = {
            "device": named,
            "torch": torch.__version__,
            "rows": [asdict(row) for row in results],
        }
        facts |= {
            key: getattr(arguments, key)
            for key in ("size", "resolution", "batch_size", "rank", "steps")
        }
        write_atomic(arguments.output, json.dumps(facts, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
