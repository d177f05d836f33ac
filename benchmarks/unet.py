"""Training steps of the full-size U-Net of Stable Diffusion 2 with random weights: Riemannion beside fused AdamW.

    python -m benchmarks.unet --device cuda
    python -m benchmarks.unet --size small
    python -m benchmarks.unet --state

865 M parameters from the published settings, weights in bf16, adapters in fp32 under autocast, 64 x 64 latents (512
pixels), batch 4. Time does not depend on what the weights are. Printed for each rank: the optimizer step alone, the
whole training step in turns, pictures per second, peak memory, and the kernels of one optimizer step. --state prints
what the optimizers keep between steps instead, beside the memory of a whole training that was measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.contenders import SD2_SHAPES, Shape, make_pairs
from benchmarks.timing import interleaved, kernels, machine, table, wait_for
from dreamrie.diffusion.lean import copy_less
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS
from dreamrie.files import write_atomic
from dreamrie.lora import LoraPair, attach_lora
from dreamrie.optimizers import build_optimizer
from dreamrie.riemannion import Riemannion

RESULTS = Path(__file__).resolve().parent / "results"
SUMMARY, MEASURED = RESULTS / "unet.json", RESULTS / "throughput-h100.json"
PLAIN = "adamw, LoRA of rank r"


@dataclass(frozen=True)
class Size:
    """A U-Net, and what goes through it.

    Attributes:
        widths: channels of its four levels.
        heads: of each level.
        text: length of a text embedding.
        latents: width and height.
        batch: pictures.
        groups: of the group norms.
    """

    widths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    text: int
    latents: int
    batch: int
    groups: int = 32


SIZES = {
    "full": Size((320, 640, 1280, 1280), (5, 10, 20, 20), 1024, 64, 4),
    "small": Size((32, 64, 64, 64), (1, 2, 2, 2), 32, 8, 2, groups=8),
}


def make_unet(size: Size, device: torch.device) -> Any:
    """The U-Net of stable-diffusion-2-base, or a narrow one of equal depth, in bf16 and made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            unet = UNet2DConditionModel(
                sample_size=size.latents,
                block_out_channels=size.widths,
                cross_attention_dim=size.text,
                attention_head_dim=size.heads,
                norm_num_groups=size.groups,
                use_linear_projection=True,
            )
    finally:
        torch.set_default_dtype(before)
    return unet.requires_grad_(False).train()


USUAL = "usual autocast"
# Ways to run the U-Net; all leave names and values of its weights as they are. Without one it is as the trainer has it.
WAYS: dict[str, Callable[[Any], object]] = {
    USUAL: lambda unet: None,
    "channels last": lambda unet: unet.to(memory_format=torch.channels_last),
    "torch.compile": lambda unet: unet.compile(dynamic=False),
}


class Training:
    """A U-Net with adapters, their optimizer, and a batch that never changes.

    Args:
        size: of the U-Net.
        rank: of the adapters.
        kind: "riemannion" or "adamw".
        anchored: adapters hold a frozen start beside the trained point, as Riemannion's do.
        device: of everything.
        way: key of `WAYS`.
    """

    def __init__(
        self, size: Size, rank: int, kind: str, anchored: bool, device: torch.device, way: str = ""
    ) -> None:
        self.device, self.before = device, _allocated(device)
        torch.manual_seed(0)
        self.unet = make_unet(size, device)
        start = "orthonormal" if anchored else "default"
        self.pairs = attach_lora(self.unet, rank, ATTENTION_TARGETS, init=start)
        self.factors = [factor for pair in self.pairs for factor in (pair.left, pair.right)]
        self.optimizer = _optimizer(kind, self.pairs, self.factors)
        if way != USUAL:
            copy_less(self.unet)
        if way:
            WAYS[way](self.unet)
        with device:
            shape = (size.batch, 4, size.latents, size.latents)
            self.latents, self.noise = torch.randn(shape), torch.randn(shape)
            self.times = torch.randint(0, 1000, (size.batch,))
            self.text = torch.randn(size.batch, 77, size.text)

    def gradients(self) -> None:
        """Loss and gradients."""
        with torch.autocast(self.device.type, torch.bfloat16):
            predicted = self.unet(self.latents, self.times, self.text).sample
            loss = nn.functional.mse_loss(predicted.float(), self.noise)
        loss.backward()

    def step(self) -> None:
        """What a step of the training loop does, without reading anything back."""
        self.gradients()
        if isinstance(self.optimizer, Riemannion):
            # Not clipped, by default.
            self.optimizer.tangent_grad_norm(for_step=True)
        else:
            norm = nn.utils.get_total_norm([f.grad for f in self.factors if f.grad is not None])
            nn.utils.clip_grads_with_norm_(self.factors, 1.0, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_bytes(self) -> int:
        """Peak of one step, without what the other trainings hold; 0 on the CPU."""
        if self.device.type != "cuda":
            return 0
        own = _allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        wait_for(self.device)
        return torch.cuda.max_memory_allocated(self.device) - own + self.held

    def warm_up(self) -> None:
        """Two steps, and note what this training holds between steps."""
        for _ in range(2):
            self.step()
        wait_for(self.device)
        self.held = _allocated(self.device) - self.before


def _optimizer(kind: str, pairs: list[LoraPair], factors: list[nn.Parameter]) -> Optimizer:
    """Fused AdamW, or Riemannion."""
    if kind == "adamw":
        return AdamW(factors, lr=1e-4, fused=True)
    return build_optimizer(kind, pairs, lr=1e-3)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def measure(
    size: Size, rank: int, device: torch.device, seconds: float, ways: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Time Riemannion and AdamW side by side at one rank, and print.

    Args:
        size: of the U-Net.
        rank: of the adapters; Riemannion's hold 2r columns.
        device: of everything.
        seconds: for each timing.
        ways: keys of `WAYS`; each adds a training by AdamW on a plain LoRA.

    Returns:
        Rows of the file.
    """
    kinds = {
        "riemannion": ("riemannion", True, ""),
        PLAIN: ("adamw", False, ""),
        "adamw, same adapters": ("adamw", True, ""),
    }
    kinds |= {f"{PLAIN}, {way}": ("adamw", False, way) for way in ways}
    trainings = {}
    for name, (kind, anchored, way) in kinds.items():
        trainings[name] = Training(size, rank, kind, anchored, device, way)
        # Before the next one is there: what this one holds is counted.
        trainings[name].warm_up()
    steps = {name: training.step for name, training in trainings.items()}
    whole = interleaved(steps, seconds, device, warmups=1)
    peaks = {name: training.peak_bytes() for name, training in trainings.items()}
    for training in trainings.values():
        training.gradients()
    alone = {name: training.optimizer.step for name, training in trainings.items()}
    optimizer = interleaved(alone, min(seconds, 0.5), device)
    layers = len(trainings["riemannion"].pairs)
    print(f"\nrank {rank}, {layers} layers: optimizer step")
    print(table(optimizer, PLAIN))
    print(f"\nrank {rank}: training step, batch {size.batch}")
    print(table(whole, PLAIN))
    rows = []
    for what, timings in (("optimizer step", optimizer), ("training step", whole)):
        rows += [{"what": what, "rank": rank, **timing.facts()} for timing in timings]
    for timing, row in zip(whole, rows[len(optimizer) :], strict=True):
        row["pictures_per_s"] = round(1e3 * size.batch / timing.median, 3)
        row["peak_bytes"] = peaks[timing.name]
        print(
            f"{timing.name:<34} {row['pictures_per_s']:8.2f} pictures/s {row['peak_bytes'] / 2**30:8.3f} GiB"
        )
    for row, name in zip(rows, trainings, strict=False):
        row["kernels"], text = kernels(alone[name], device)
        if name == "riemannion":
            print(f"\nrank {rank}: one optimizer step of {name}\n{text}", flush=True)
    return rows


def state_bytes(kind: str, rank: int, shapes: Sequence[Shape]) -> int:
    """Bytes that an optimizer keeps between steps, counted after one of them.

    Args:
        kind: "riemannion" or "adamw".
        rank: of the layers.
        shapes: of the layers.

    Returns:
        Of all tensors of its state.
    """
    pairs = make_pairs(shapes, rank, torch.device("cpu"))
    factors = [factor for pair in pairs for factor in (pair.left, pair.right)]
    optimizer = Riemannion(pairs, lr=1e-3) if kind == "riemannion" else AdamW(factors, fused=True)
    optimizer.step()
    kept = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    return sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))


def state_table(
    ranks: Sequence[int], measured: Path = MEASURED, shapes: Sequence[Shape] = SD2_SHAPES
) -> str:
    """What a state of 8 bits or bf16 could save at most.

    Args:
        ranks: of the layers.
        measured: file of `benchmarks.throughput` with the peak memory of whole trainings.
        shapes: of the layers.

    Returns:
        A line for each rank and optimizer.
    """
    found = json.loads(measured.read_text("utf-8"))
    peaks = {row["name"]: row["peak_gib"] * 2**30 for row in found["rows"]}
    layers = sum(count for *_, count in shapes)
    lines = [
        f"state of {layers} layers, beside the peak memory of a whole training of rank {found['rank']} "
        f"({found['device']}, batch {found['batch_size']}, {found['resolution']} px)",
        f"{'':<22} {'fp32 MiB':>9} {'of peak':>8} {'bf16 saves':>11} {'8 bits save':>12}",
    ]
    for rank in ranks:
        for kind, name in (("riemannion", "Riemannion + LOI"), ("adamw", "AdamW")):
            kept, peak = state_bytes(kind, rank, shapes), peaks[f"dreamrie, {name}"]
            share = kept / peak
            lines.append(
                f"{f'rank {rank}, {kind}':<22} {kept / 2**20:9.1f} {share:8.2%} {share / 2:11.2%} {share * 3 / 4:12.2%}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the numbers.

    Args:
        argv: see `--help`.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="of the U-Net")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64], help="of the adapters")
    parser.add_argument("--seconds", type=float, default=2.5, help="for each timing")
    parser.add_argument(
        "--ways", choices=list(WAYS), nargs="*", default=[], help="also run the U-Net in these ways"
    )
    parser.add_argument("--state", action="store_true", help="print the size of the state alone")
    parser.add_argument("--output", type=Path, default=SUMMARY, help="file for the numbers, JSON")
    options = parser.parse_args(argv)
    if options.state:
        print(state_table(options.ranks))
        return
    device, size = torch.device(options.device), SIZES[options.size]
    facts = machine(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    found: list[dict[str, Any]] = []
    for rank in options.ranks:
        found += measure(size, rank, device, options.seconds, options.ways)
        # The trainings refer to themselves; without this the next rank would not fit beside them.
        gc.collect()
    content = {**facts, "size": options.size, "batch": size.batch, "rows": found}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.output, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
