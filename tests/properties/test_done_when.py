"""Riemannion on real PEFT layers: the dense reference to 1e-9, and one path for every pair of factors (O1, O5).

A stack of linear layers of several shapes, trained through autograd on a batch that changes with every step. The
reference knows no factors: it takes the gradient of the dense weights and steps on explicit matrices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

import dreamrie
from tests.margins import within
from tests.reference.dense import DenseRiemannion
from tests.strategies import F64, frame, noise

WIDTHS = (7, 12, 9, 9, 5)  # out != in both ways, one square, 2r > min in the last for r = 3
STEPS = 20


class Stack(nn.Module):
    """Linear layers with tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        sizes = itertools.pairwise(WIDTHS)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False, dtype=F64) for a, b in sizes)
        for i, layer in enumerate(self.layers):
            layer.weight.data = noise(10 + i, *layer.weight.shape) / layer.in_features**0.5

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def batch(t: int) -> tuple[Tensor, Tensor]:
    return noise(100 + t, 16, WIDTHS[0]), noise(500 + t % 3, 16, WIDTHS[-1])


def loss_of(forward: Callable[[Tensor], Tensor], t: int) -> Tensor:
    x, y = batch(t)
    return ((forward(x) - y) ** 2).sum()


def plain_model(gauge: float | None = None) -> tuple[Stack, list[dreamrie.LoraPair]]:
    """PEFT's own injection, rank 3, scaling 1.5, factors that are not zero; turned by C of condition `gauge`."""
    model = Stack()
    config = peft.LoraConfig(r=3, lora_alpha=4.5, target_modules=[f"layers.{i}" for i in range(4)])
    peft.inject_adapter_in_model(config, model)
    pairs = dreamrie.lora_pairs(model)
    for i, pair in enumerate(pairs):
        left, right = noise(20 + i, *pair.left.shape), noise(40 + i, *pair.right.shape)
        if gauge is not None:
            scales = torch.logspace(0, -float(torch.tensor(gauge).log10()), 3, dtype=F64)
            first, second = frame(60 + i, 3, 3), frame(80 + i, 3, 3)
            left, right = left @ (first * scales) @ second.mT, second / scales @ first.mT @ right
        pair.left.data, pair.right.data = 0.5 * left.to(F64), right.to(F64)
    return model, pairs


def anchored_model() -> tuple[Stack, list[dreamrie.LoraPair]]:
    """dreamrie's layout: rank 2r with a frozen half, zero change at the start."""
    model = Stack()
    pairs = dreamrie.attach_lora(model, 2, [f"layers.{i}" for i in range(4)], alpha=0.4)
    for pair in pairs:
        pair.left.data, pair.right.data = pair.left.data.to(F64), pair.right.data.to(F64)
    return model, pairs


def train(
    model: nn.Module, pairs: list[dreamrie.LoraPair], optimizer: torch.optim.Optimizer
) -> list[list[Tensor]]:
    path = []
    for t in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()
        path.append([pair.delta() for pair in pairs])
    return path


def difference(path: list[list[Tensor]], other: list[list[Tensor]]) -> float:
    return max(
        float((a - b).norm() / b.norm())
        for first, second in zip(path, other, strict=True)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("kind", ["plain", "anchored"])
def test_twenty_steps_equal_the_dense_reference(kind: str) -> None:
    """20 steps with momentum and decay on a stack of PEFT linears equal explicit matrices to 1e-9."""
    model, pairs = plain_model() if kind == "plain" else anchored_model()
    starts = [pair.delta() for pair in pairs]
    weights = [pair.base_weight.detach().clone() for pair in pairs]
    points = [p.point() for p in pairs]
    xs = [(p.u * p.s) @ p.v.mT for p in points]
    anchors = [x - start for x, start in zip(xs, starts, strict=True)]
    slow = [
        DenseRiemannion(x, pair.rank, 0.05, 0.9, 0.1, anchor if pair.anchor_rank else None)
        for x, pair, anchor in zip(xs, pairs, anchors, strict=True)
    ]
    wanted = []
    for t in range(STEPS):
        dense = [
            (w + one.X - x0).requires_grad_()
            for w, one, x0 in zip(weights, slow, anchors, strict=True)
        ]

        def forward(x: Tensor, dense: list[Tensor] = dense) -> Tensor:
            for weight in dense:
                x = torch.tanh(x @ weight.mT)
            return x

        gradients = torch.autograd.grad(loss_of(forward, t), dense)
        for one, gradient in zip(slow, gradients, strict=True):
            one.step(gradient)
        wanted.append([one.X - x0 for one, x0 in zip(slow, anchors, strict=True)])
    path = train(model, pairs, dreamrie.Riemannion(pairs, 0.05, 0.9, 0.1))
    assert {pair.scaling for pair in pairs} == ({1.5} if kind == "plain" else {1.0})
    assert all(
        float((end - start).norm()) > 0.1 for end, start in zip(path[-1], starts, strict=True)
    )
    within(f"done when: dense, {kind}", difference(path, wanted), 1e-9)
    for pair, weight in zip(pairs, weights, strict=True):
        assert torch.equal(pair.base_weight, weight)


def test_the_path_depends_on_the_product_alone() -> None:
    """(B C, C^-1 A) before construction leaves the path unchanged to 1e-10; AdamW's changes by more than 10 %."""
    paths, controls = [], []
    for gauge in (None, 100.0):
        model, pairs = plain_model(gauge)
        paths.append(train(model, pairs, dreamrie.Riemannion(pairs, 0.05, 0.9, 0.1)))
        model, pairs = plain_model(gauge)
        parameters = [p for pair in pairs for p in (pair.left, pair.right)]
        controls.append(train(model, pairs, torch.optim.AdamW(parameters, lr=0.05)))
    within("done when: gauge", difference(paths[1], paths[0]), 1e-10)
    assert difference(controls[1], controls[0]) > 0.1
