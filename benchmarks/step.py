"""What a step costs: Riemannion beside fused AdamW, the paper's algorithm layer by layer, and Muon on each factor.

    python -m benchmarks.step

First the optimizer step over the 128 layers that are adapted in the U-Net of Stable Diffusion 2 (factors and
gradients only, no model), then the whole training step of the embedded model, pictures to new factors, with the
settings of `examples/demo.yaml`. Everything is timed in turns. A machine that does something else at the same time
makes all numbers worse, and batched ones most: with `--threads 1` they suffer least.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import train_dreambooth
from benchmarks.contenders import SD2_SHAPES, Shape, contenders
from benchmarks.timing import Timing, interleaved, kernels, machine, table
from dreamrie.config import parse_config
from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.files import write_atomic
from dreamrie.optimizers import build_optimizer
from dreamrie.riemannion import Riemannion

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = ROOT / "benchmarks" / "results" / "step-cpu.json"
NAMES = ("riemannion", "adamw", "literal", "muon")
QUICK_SHAPES: tuple[Shape, ...] = ((64, 64, 4), (64, 96, 2))


def training_step(task: DreamBoothTask, optimizer: Optimizer) -> Callable[[], None]:
    """A function that does what one step of the training loop does: batch, loss, gradients, norm, step."""
    factors = [factor for pair in task.pairs for factor in (pair.left, pair.right)]
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        task.loss(task.batch(done, 0)).backward()
        if isinstance(optimizer, Riemannion):
            norm = optimizer.tangent_grad_norm()
        else:
            norm = nn.utils.get_total_norm([f.grad for f in factors if f.grad is not None])
        nn.utils.clip_grads_with_norm_(factors, 1.0, norm.float())
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_steps(
    config: str, rank: int, device: torch.device, extra: Sequence[str]
) -> dict[str, Callable[[], None]]:
    """Training steps of the model of a settings file.

    Args:
        config: settings.
        rank: of the adapters.
        device: of the model.
        extra: further flags of `train_dreambooth.py`.

    Returns:
        By name: Riemannion (its adapters hold the frozen start too, so 2r columns), AdamW on a plain LoRA of rank r,
        and AdamW on the adapters of Riemannion, which shows the share of the layout.
    """
    found: dict[str, Callable[[], None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in (
            ("riemannion", ["--optimizer", "riemannion", "--init", "loi"]),
            ("adamw, LoRA of rank r", ["--optimizer", "adamw", "--init", "default"]),
            ("adamw, same adapters", ["--optimizer", "adamw", "--init", "loi"]),
        ):
            words = ["--config", config, *extra, *flags, "--rank", str(rank)]
            settings = parse_config([*words, "--output_dir", folder])
            task = train_dreambooth.build_task(settings, device, 1)
            kind = settings.optimizer.optimizer
            if kind == "adamw":
                factors = [factor for pair in task.pairs for factor in (pair.left, pair.right)]
                optimizer: Optimizer = torch.optim.AdamW(factors, lr=1e-4, fused=True)
            else:
                optimizer = build_optimizer(kind, task.pairs, lr=1e-3)
            found[name] = training_step(task, optimizer)
    return found


def rows(kind: str, rank: int, timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Lines of the file."""
    return [{"what": kind, "rank": rank, **timing.facts()} for timing in timings]


def run(options: argparse.Namespace, extra: Sequence[str]) -> list[dict[str, Any]]:
    """Measure and print.

    Args:
        options: of the command line.
        extra: flags of `train_dreambooth.py`.

    Returns:
        One row for each timing.
    """
    device = torch.device(options.device)
    shapes = QUICK_SHAPES if options.quick else SD2_SHAPES
    seconds = 0.05 if options.quick else options.seconds
    found: list[dict[str, Any]] = []
    layers = sum(count for *_, count in shapes)
    for rank in options.ranks:
        steps = contenders(NAMES, shapes, rank, device)
        timings = interleaved(steps, seconds, device)
        print(f"\noptimizer step, {layers} layers, rank {rank}")
        print(table(timings, "riemannion"), flush=True)
        found += rows("optimizer step", rank, timings)
        if options.profile:
            print(f"\none step of riemannion\n{kernels(steps['riemannion'], device)[1]}")
    for rank in options.training_ranks:
        trainings = training_steps(options.config, rank, device, extra)
        timings = interleaved(trainings, seconds, device)
        print(f"\ntraining step of {options.config}, rank {rank}")
        print(table(timings, "adamw, LoRA of rank r"), flush=True)
        found += rows("training step", rank, timings)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the numbers.

    Args:
        argv: see `--help`; any flag of `train_dreambooth.py` is for the training step.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 16, 64], help="of the layers")
    parser.add_argument(
        "--training_ranks", type=int, nargs="*", default=[4], help="of the training step"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each timing")
    parser.add_argument("--profile", action="store_true", help="list the operators of a step")
    parser.add_argument("--quick", action="store_true", help="few small layers, a try-out")
    parser.add_argument("--config", default="examples/demo.yaml", help="of the training step")
    parser.add_argument("--output", type=Path, default=SUMMARY, help="file for the numbers, JSON")
    options, extra = parser.parse_known_args(argv)
    torch.set_num_threads(options.threads)
    facts = machine(torch.device(options.device))
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    content = {**facts, "quick": options.quick, "rows": run(options, extra)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.output, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
