"""A state as a checkpoint holds it, and equality to the bit."""

from __future__ import annotations

from typing import Any

import torch


def state_of(step: int) -> dict[str, Any]:
    """A state with every kind of value; tensors of several types, one of them empty."""
    generator = torch.Generator().manual_seed(step)
    factor = torch.randn(7, 4, generator=generator)
    return {
        "counts": {"step": step, "loss": 0.1 + step, "none": None, "flag": True, "text": "ümläut"},
        "state": {0: {"a": factor, "b": factor.T.double()}, 1: {"step": torch.tensor(3.0)}},
        "groups": [{"betas": (0.9, 0.999), "params": [0, 1], "name": ["x"]}],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": {"list": [], "tensor": torch.zeros(0, 2)},
    }


def same(first: Any, second: Any) -> bool:
    """Equal types, keys, values and bytes."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        keys = list(first) == list(second)
        return keys and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)
