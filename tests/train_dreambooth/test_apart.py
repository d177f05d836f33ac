"""`--orthogonal_to`: read before training, kept while training, the same bytes when it goes on."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreamrie.adapter_open import open_adapter
from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.lora import LowRank
from dreamrie.lora.apart import row_space
from dreamrie.trainer import loop
from tests.small_models import make_small_pipeline
from tests.train_dreambooth.killing import result_of
from tests.train_dreambooth.small_run import ADAPTER, Command

pytestmark = pytest.mark.end_to_end

FAST = ("--learning_rate", "1e-2", "--spectrum_steps", 2)


def along(run: Path, other: Path) -> list[float]:
    """|D V| / |D| of each layer."""
    mine, given = open_adapter(run).changes, open_adapter(other).changes
    found = []
    for layer, (left, right) in mine.items():
        dense = left.double() @ right.double()
        basis = row_space([LowRank(*given[layer])])
        found.append(float((dense @ basis).norm() / dense.norm()))
    return found


def check_apart(run: Path, other: Path) -> None:
    """Half of the layers to fp32's rounding (4e-7 measured), all of them to 1e-3 (8e-5 measured).

    A layer with a gradient of nearly lower rank takes unit steps along its weakest directions, which msign lifts
    together with their rounding.
    """
    found = sorted(along(run, other))
    assert found[len(found) // 2] < 2e-6
    assert found[-1] < 1e-3


@pytest.fixture
def other(command: Command, tmp_path: Path) -> Path:
    """A finished training of another seed."""
    assert command(*FAST, "--seed", 5, "--checkpointing_steps", 0, out="other") == 0
    return tmp_path / "other"


@pytest.mark.parametrize("estimator", ["mean_gradient", "sketch"])
def test_the_adapter_stays_orthogonal_to_the_given_one(
    command: Command,
    other: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    estimator: str,
) -> None:
    """Without the flag it is not; with it, no layer responds to the other's input directions."""
    caplog.set_level("INFO", "dreamrie")
    assert command(*FAST, out="free") == 0
    flags = ("--loi_estimator", estimator, "--orthogonal_to", other)
    assert command(*FAST, *flags) == 0
    assert "kept orthogonal to 1 given adapters: " in caplog.text
    assert min(along(tmp_path / "free", other)) > 0.05
    check_apart(tmp_path / "run", other)


def test_a_stopped_run_goes_on_to_the_same_bytes(
    command: Command, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook is put on again; the file may lie elsewhere then."""
    flags = (*FAST, "--max_train_steps", 5, "--checkpointing_steps", 100)
    given = (*flags, "--orthogonal_to", other)
    assert command(*given, out="straight") == 0
    real = loop._Loop.step

    def stopped(self: loop._Loop, step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, step)

    monkeypatch.setattr(loop._Loop, "step", stopped)
    assert command(*given) == 130
    monkeypatch.undo()
    moved = tmp_path / "moved.safetensors"
    shutil.copy(other / ADAPTER, moved)
    assert command(*flags, "--orthogonal_to", moved, "--resume_from_checkpoint", "latest") == 0
    assert result_of(tmp_path / "run") == result_of(tmp_path / "straight")
    check_apart(tmp_path / "run", other)


def test_another_adapter_or_none_is_refused_on_resume(
    command: Command, other: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it is orthogonal to is part of the run."""
    base = (*FAST, "--checkpointing_steps", 2)
    assert command(*base, "--orthogonal_to", other) == 0
    assert command(*FAST, "--seed", 6, "--checkpointing_steps", 0, out="third") == 0
    again = (*base, "--resume_from_checkpoint", "checkpoint-2")
    name = "the content of the adapters to be orthogonal to was 1 files, "
    for flags in (("--orthogonal_to", tmp_path / "third"), ()):
        caplog.clear()
        assert command(*again, *flags) == 1
        assert name in caplog.text
    assert command(*again, "--orthogonal_to", other) == 0


def test_what_cannot_be_avoided_is_refused_before_training(
    command: Command,
    other: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A missing file, a damaged one, one of another base, and too many for the narrowest layer."""
    monkeypatch.setattr(DreamBoothTask, "batch", None)
    changed = tmp_path / "changed.safetensors"
    data = bytearray((other / ADAPTER).read_bytes())
    data[-3] ^= 1
    changed.write_bytes(data)
    foreign = make_small_pipeline("tiny-vae", tmp_path / "another base", seed=3)
    for path, flags, said in (
        (tmp_path / "nothing", (), "there is no adapter"),
        (changed, (), "is damaged"),
        (other, ("--pretrained_model_name_or_path", foreign), "fingerprint differs"),
        (wide(other, tmp_path), (), "input directions"),
    ):
        caplog.clear()
        assert command(*FAST, *flags, "--orthogonal_to", path, out="refused") == 2
        assert said in caplog.text
        assert not (tmp_path / "refused").exists()


def wide(other: Path, folder: Path) -> Path:
    """A plain LoRA file whose layers respond to every input."""
    tensors = {}
    for name, tensor in load_file(other / ADAPTER).items():
        if name.endswith("lora_A.weight"):
            size = tensor.shape[1]
            up = name.replace("lora_A", "lora_B")
            rows = load_file(other / ADAPTER)[up].shape[0]
            generator = torch.Generator().manual_seed(len(tensors))
            tensors[name] = torch.randn(size, size, generator=generator)
            tensors[up] = torch.randn(rows, size, generator=generator)
    path = folder / "wide.safetensors"
    save_file(tensors, path)
    return path
