"""Tensorion against AdamW on a small convolutional net that reads digits, each at its own best learning rate.

    python -m examples.convolutions_with_tensorion

Both get the same grid of learning rates, starts, batches and number of steps; lr falls linearly to zero. The rate is
chosen by the accuracy on validation pictures; the test pictures are looked at once, with new seeds. Tensorion moves
the kernels of the convolutions, AdamW at the same lr the biases and the output layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from dreamrie.tensorion import Tensorion

METHODS = ("adamw", "tensorion")
LRS = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
BATCH = 64


class Pictures(NamedTuple):
    """Pictures (n, 1, 8, 8) in [0, 1] and their digits (n,)."""

    pixels: Tensor
    digits: Tensor


def load_parts() -> tuple[Pictures, Pictures, Pictures]:
    """Return 800 pictures to train on, 400 to choose the learning rate by and 597 to test with."""
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    digits = torch.tensor(data.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    first, second, third = (
        Pictures(pixels[part], digits[part]) for part in order.split([800, 400, 597])
    )
    return first, second, third


def build_net(seed: int) -> nn.Sequential:
    """Build a net of three convolutions, 15,338 numbers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(128, 10),
    )


def build_optimizers(method: str, net: nn.Sequential, lr: float) -> list[Optimizer]:
    """AdamW for everything, or Tensorion for the kernels and AdamW for the rest."""
    if method == "adamw":
        return [AdamW(net.parameters(), lr=lr, weight_decay=0.0)]
    kernels = [parameter for parameter in net.parameters() if parameter.ndim == 4]
    others = [parameter for parameter in net.parameters() if parameter.ndim != 4]
    return [Tensorion(kernels, lr=lr), AdamW(others, lr=lr, weight_decay=0.0)]


def train(method: str, lr: float, seed: int, steps: int, pictures: Pictures) -> nn.Sequential:
    """Train a net; equal seeds give equal starts and equal batches, whatever the method."""
    net = build_net(seed)
    optimizers = build_optimizers(method, net, lr)
    schedules = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(pictures.digits), (BATCH,), generator=generator)
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(pictures.pixels[rows]), pictures.digits[rows])
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    return net


@torch.no_grad()
def accuracy(net: nn.Sequential, pictures: Pictures) -> float:
    """Return the share of pictures read right, in percent."""
    right = net(pictures.pixels).argmax(dim=1) == pictures.digits
    return 100 * float(right.float().mean())


def choose(
    method: str, seeds: Sequence[int], steps: int, parts: Sequence[Pictures]
) -> tuple[float, list[str]]:
    """Return the best learning rate by validation accuracy, the lower of equals, and a cell for each."""
    scores, cells = {}, []
    for lr in LRS:
        found = [accuracy(train(method, lr, seed, steps, parts[0]), parts[1]) for seed in seeds]
        scores[lr] = mean(found)
        cells.append(f"{mean(found):6.2f} +- {stdev(found):5.2f}")
    return max(LRS, key=lambda lr: (scores[lr], -lr)), cells


def compare(steps: int, tuning: Sequence[int], testing: Sequence[int]) -> None:
    """Tune both methods, test both, and print means and standard deviations over seeds."""
    parts = load_parts()
    chosen, columns = {}, {}
    for method in METHODS:
        chosen[method], columns[method] = choose(method, tuning, steps, parts)
    print(f"{steps} steps of {BATCH} pictures; validation accuracy in %, {len(tuning)} seeds")
    print("lr         " + "".join(f"{method:<18}" for method in METHODS))
    for row, lr in enumerate(LRS):
        print(f"{lr:<8g}" + "".join(f"{columns[method][row]:<18}" for method in METHODS))
    tested = {
        method: [
            accuracy(train(method, chosen[method], seed, steps, parts[0]), parts[2])
            for seed in testing
        ]
        for method in METHODS
    }
    for method, found in tested.items():
        print(f"{method} at lr {chosen[method]:g}: test accuracy ", end="")
        print(f"{mean(found):.2f} +- {stdev(found):.2f} %, {len(found)} new seeds")
    pairs = zip(tested["tensorion"], tested["adamw"], strict=True)
    gains = [one - other for one, other in pairs]
    print(f"tensorion less adamw, seed by seed: {mean(gains):+.2f} +- {stdev(gains):.2f} points")


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the two and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the test; 3 others tune")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.process_time()
    compare(options.steps, range(3), range(100, 100 + options.seeds))
    print(f"{time.process_time() - started:.1f} s of processor time")


if __name__ == "__main__":
    main()
