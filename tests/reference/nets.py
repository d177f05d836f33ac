"""Small networks whose gradients at the base weight are known by other means."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dreamrie.lora import LoraPair, attach_lora, lora_pairs
from tests.strategies import F64, noise

TARGETS = ["conv", "first", "second"]


class Net(nn.Module):
    """A convolution, two linear layers of unequal sides, dropout, and a frozen head.

    (B, 3, 5, 5) -> (B, 5); conv (9, 27), first (21, 81), second (13, 21).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 3)
        self.first = nn.Linear(81, 21)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(21, 13)
        self.head = nn.Linear(13, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(pixels)).flatten(1)
        hidden = self.drop(torch.tanh(self.first(hidden)))
        return self.head(torch.tanh(self.second(hidden)))


class Prescribed(nn.Module):
    """One linear layer whose loss gradient is whatever matrix the batch holds: loss = <W, batch>."""

    def __init__(self, out: int, in_: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_, out, bias=False)
        self.register_buffer("unit", torch.eye(in_))

    def forward(self) -> Tensor:
        return self.layer(self.unit).T


def prescribed_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """loss = <W + change, batch>; its gradient at W is `batch`."""
    return (model() * batch).sum()


def net(seed: int = 0, dtype: torch.dtype = F64) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().to(dtype)


def prescribed(out: int, in_: int, seed: int = 0) -> Prescribed:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Prescribed(out, in_).to(F64)


def batches(count: int, seed: int = 0, dtype: torch.dtype = F64) -> list[tuple[Tensor, Tensor]]:
    """Pictures and targets; 7 of each, a size nothing else has."""
    return [
        (noise(seed + 2 * n, 7, 3, 5, 5, dtype=dtype), noise(seed + 2 * n + 1, 7, 5, dtype=dtype))
        for n in range(count)
    ]


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error, no randomness."""
    return (model(batch[0]) - batch[1]).square().mean()


def noisy_squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error on pictures with noise from torch's global stream, as a diffusion loss."""
    pixels = batch[0] + 0.3 * torch.randn(batch[0].shape, dtype=batch[0].dtype)
    return (model(pixels) - batch[1]).square().mean()


def noisy_squares_fixed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same with noise that depends on the batch alone: one fixed objective."""
    seed = int(batch[0].flatten()[0].abs() * 1e6)
    return squares(model, (batch[0] + 0.3 * noise(seed, *batch[0].shape), batch[1]))


def dense_gradients(model: nn.Module, loss: Any, data: list[Any]) -> dict[str, Tensor]:
    """Mean gradient of the adapted weights of a model without adapter, eval mode, as (out, in)."""
    plain = copy.deepcopy(model).eval()
    weights = {name: getattr(plain, name).weight for name in TARGETS}
    for weight in weights.values():
        weight.grad = None
    for batch in data:
        loss(plain, batch).backward()
    return {n: (w.grad / len(data)).flatten(1) for n, w in weights.items() if w.grad is not None}


def with_scaling(model: nn.Module, scaling: float, **options: Any) -> list[LoraPair]:
    """Anchored pairs whose PEFT scaling is not 1; the same start as with scaling 1."""
    starts = [pair.point() for pair in attach_lora(model, **options)]
    for pair in lora_pairs(model):
        layer: Any = pair.module
        layer.scaling[pair.adapter_name] = scaling
    pairs = lora_pairs(model)
    for pair, start in zip(pairs, starts, strict=True):
        pair.set_start(start, anchored=True)
    return pairs


def disturb(pairs: list[LoraPair], size: float = 0.05, seed: int = 5) -> None:
    """Move the trained halves away from the start, as training does."""
    with torch.no_grad():
        for n, pair in enumerate(pairs):
            left, right = pair.left_matrix(), pair.right_matrix()
            shift = noise(seed + 2 * n, pair.out, pair.rank, dtype=left.dtype)
            left[:, : pair.rank] += size * shift
            shift = noise(seed + 2 * n + 1, pair.rank, pair.in_, dtype=left.dtype)
            right[: pair.rank] += size * shift


def measured_change(layer: Any, in_: int, out: int) -> Tensor:
    """Change of the weight seen from outside: the layer on unit inputs, with minus without LoRA."""
    base = layer.get_base_layer()
    unit = torch.eye(in_, dtype=base.weight.dtype)
    if isinstance(base, nn.Conv2d):
        unit = unit.reshape(in_, *base.weight.shape[1:])
    with torch.no_grad():
        return (layer(unit) - base(unit)).reshape(in_, out).T


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm())
