"""What every test run shares: no network, one thread, named profiles, shapes checked."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import socket
import typing
from pathlib import Path
from typing import Any

# Before any Hugging Face library is imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    # Triton reads this when it is imported; its kernels then run without a GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import beartype as _beartype  # noqa: F401  loaded before the flag below goes up
import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

import dreamrie as _dreamrie  # noqa: F401  its own type-only imports must stay type-only
from tests.mutants.summary import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]

if importlib.util.find_spec("triton") is None:
    # It comes with torch, but not on every system.
    collect_ignore = ["test_riemannion_kernels.py"]

SHAPE_CHECKED = ("dreamrie.fixed_rank", "dreamrie.riemannion_step")
"""The pure functions of the method: torch alone, and annotations that carry shapes."""

_QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("desk", max_examples=25, deadline=None, suppress_health_check=_QUIET)
settings.register_profile(
    "ci",
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=_QUIET,
)
settings.register_profile("nightly", max_examples=2000, deadline=None, suppress_health_check=_QUIET)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "desk")
)

# Sums in a fixed order: small matrices are fastest, and repeatable to the bit, on one thread.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave what was imported out of later collections: accelerate collects the whole heap after every training."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What was left out can go now; some libraries count what is still there when the process ends."""
    gc.unfreeze()


def _load_with_shape_checks() -> None:
    """Import the torch-only modules with their shape annotations made real.

    The annotations are imported under `if TYPE_CHECKING:`, so users pay nothing. Here the flag is
    up while these modules load under jaxtyping's import hook: a tensor of the wrong shape then
    fails the test that passes it.
    """
    typing.TYPE_CHECKING = True
    try:
        with jaxtyping.install_import_hook(list(SHAPE_CHECKED), "beartype.beartype"):
            for name in SHAPE_CHECKED:
                importlib.import_module(name)
    finally:
        typing.TYPE_CHECKING = False


_load_with_shape_checks()

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_connect = socket.socket.connect
_connect_ex = socket.socket.connect_ex


class NetworkBlockedError(RuntimeError):
    """A test tried to reach another machine."""


def _check_address(family: int, address: Any) -> None:
    if family != socket.AF_UNIX and address[0] not in _LOOPBACK:
        raise NetworkBlockedError(f"a test tried to connect to {address!r}; only loopback is open")


def _guarded_connect(self: socket.socket, address: Any) -> None:
    _check_address(self.family, address)
    _connect(self, address)


def _guarded_connect_ex(self: socket.socket, address: Any) -> int:
    _check_address(self.family, address)
    return _connect_ex(self, address)


@pytest.fixture(autouse=True, scope="session")
def _only_loopback() -> typing.Iterator[None]:
    """No test may depend on a server or on downloaded weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _guarded_connect)
        patch.setattr(socket.socket, "connect_ex", _guarded_connect_ex)
        yield


@pytest.fixture
def disc_pictures(tmp_path: Path) -> Path:
    """A folder with two pictures of a red disc on grey."""
    folder = tmp_path / "concept"
    folder.mkdir()
    rows, columns = np.mgrid[:80, :80]
    for index, centre in enumerate((35, 45)):
        disc = (rows - centre) ** 2 + (columns - 40) ** 2 < 25**2
        pixels = np.where(disc[..., None], (200, 20, 20), (128, 128, 128)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder
