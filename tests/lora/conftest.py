"""What every test of dreamrie.lora shares: models with the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_weights() -> Any:
    """Random models draw from the global stream; give each test the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
