"""Examples, errors and state of Tensorion; its laws are in properties/test_tensorion_laws.py."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.tensorion import Tensorion
from tests.strategies import F32, noise


def _kernel(seed: int = 1, *shape: int) -> nn.Parameter:
    return nn.Parameter(noise(seed, *(shape or (6, 4, 3, 3)), dtype=F32))


def _steps(optimizer: Tensorion, kernels: list[nn.Parameter], first: int, count: int) -> None:
    for step in range(first, first + count):
        for index, kernel in enumerate(kernels):
            kernel.grad = noise(100 + 10 * step + index, *kernel.shape, dtype=F32)
        optimizer.step()


@pytest.mark.parametrize("unfolding", ["square", "nuclear"])
def test_a_restored_optimizer_goes_on_to_the_bit(unfolding: Any) -> None:
    """State through torch.save, with nothing but tensors and plain values in it."""
    kernels = [_kernel(), _kernel(2, 5, 3)]
    optimizer = Tensorion(kernels, lr=0.02, unfolding=unfolding)
    _steps(optimizer, kernels, 0, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    copies = [nn.Parameter(kernel.detach().clone()) for kernel in kernels]
    restored = Tensorion(copies)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    _steps(optimizer, kernels, 2, 2)
    _steps(restored, copies, 2, 2)
    for kernel, copy in zip(kernels, copies, strict=True):
        assert torch.equal(kernel, copy)
    assert restored.param_groups[0]["unfolding"] == unfolding


def test_a_parameter_without_gradient_is_left_alone() -> None:
    """Neither it nor its momentum moves, and the other one moves as if it were alone."""
    kernels, alone = [_kernel(), _kernel(2)], _kernel(2)
    before = kernels[0].detach().clone()
    optimizer, other = Tensorion(kernels, lr=0.02), Tensorion([alone], lr=0.02)
    kernels[1].grad = noise(5, 6, 4, 3, 3, dtype=F32)
    alone.grad = kernels[1].grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(kernels[0], before)
    assert kernels[0] not in optimizer.state
    assert torch.equal(kernels[1], alone)


def test_a_gradient_that_is_not_finite_stops_everything() -> None:
    """No kernel is written, not even one before it."""
    kernels = [_kernel(), _kernel(2)]
    before = [kernel.detach().clone() for kernel in kernels]
    for kernel in kernels:
        kernel.grad = torch.ones_like(kernel)
    kernels[1].grad.view(-1)[3] = float("nan")
    optimizer = Tensorion(kernels, lr=0.02)
    with pytest.raises(NumericalError, match=r"parameter 1, group 0, shape \(6, 4, 3, 3\)"):
        optimizer.step()
    for kernel, old in zip(kernels, before, strict=True):
        assert torch.equal(kernel, old)


def test_an_update_has_the_size_of_an_adamw_update() -> None:
    """0.2 lr per entry in the root mean square, whatever the gradient. Measured: 0.177 and 0.172."""
    for shape in ((16, 8, 3, 3), (32, 16, 3, 3)):
        kernel = _kernel(1, *shape)
        before = kernel.detach().clone()
        kernel.grad = 1e-3 * noise(7, *shape, dtype=F32)
        Tensorion([kernel], lr=0.1).step()
        rms = float((kernel.detach() - before).square().mean().sqrt()) / 0.1
        assert 0.15 < rms < 0.24


def test_groups_closures_and_schedules_work_as_in_torch() -> None:
    """A group has its own lr; a closure's loss comes back; lr 0 moves nothing."""
    moving, still = _kernel(1), _kernel(2)
    before = still.detach().clone()
    optimizer = Tensorion([{"params": [moving]}, {"params": still, "lr": 0.0}], lr=0.02)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (moving.square().sum() + still.square().sum()) / 2
        loss.backward()
        return loss.item()

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert 0.9 * first < second < first
    assert torch.equal(still, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"unfolding": "cube"}, "unfolding 'cube' is unknown; use one of square, nuclear"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tensorion([_kernel()], **options)


def test_tensors_of_one_dimension_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parameter 1 of the group has shape \(4,\)"):
        Tensorion([_kernel(), nn.Parameter(torch.zeros(4))])
    with pytest.raises(ConfigError, match="no parameters were given"):
        Tensorion([])
