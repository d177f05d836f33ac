"""The command with --torch_compile and a real compiler: what stays as it is, and going on to the same bytes."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from safetensors import safe_open

import train_dreambooth
from dreamrie.diffusion.components import load_components
from dreamrie.lora.fingerprint import base_fingerprint
from tests.small_models import write_pictures
from tests.train_dreambooth.small_run import ADAPTER, Command, metrics

pytestmark = pytest.mark.end_to_end

COMPILED = "--torch_compile"


def header_and_names(folder: Path) -> tuple[dict[str, str], list[str]]:
    with safe_open(folder / ADAPTER, "pt") as file:
        return file.metadata(), sorted(file.keys())


def losses(folder: Path) -> list[float]:
    return [float(str(record["loss"])) for record in metrics(folder) if "loss" in record]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_run_goes_on_to_the_same_bytes(
    command: Command, tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two steps and two more are four; the file is that of a plain run but for rounding, with its names and hash."""
    caplog.set_level(logging.INFO, "dreamrie")
    before = base_fingerprint(load_components(model).unet)
    assert command(out="plain") == 0
    length = ("--lr_scheduler", "constant", "--checkpointing_steps", 2)
    assert command(*length, COMPILED, out="whole") == 0
    (said,) = [line for line in caplog.messages if line.startswith("torch.compile took")]
    assert re.search(r"passes of a step take [\d.]+ ms, without it [\d.]+ ms: ", said)
    assert command(*length, COMPILED, "--max_train_steps", 2, out="parts") == 0
    assert command(*length, "--resume_from_checkpoint", "latest", out="parts") == 2
    assert "torch_compile was True and is now False" in caplog.text
    assert command(*length, COMPILED, "--resume_from_checkpoint", "latest", out="parts") == 0
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    assert (whole / ADAPTER).read_bytes() == (parts / ADAPTER).read_bytes()
    assert losses(whole) == losses(parts)
    assert base_fingerprint(load_components(model).unet) == before
    assert command(*length, out="eager") == 0
    assert header_and_names(whole) == header_and_names(tmp_path / "eager")
    assert losses(whole) == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
    assert losses(whole) != losses(tmp_path / "plain")


@pytest.mark.slow
def test_pictures_of_several_sizes_need_three_programs(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for many rows, one for a single row, perhaps one for two; none is made while training."""
    from PIL import Image
    from torch._dynamo.utils import counters

    folder = tmp_path / "pictures"
    for number, size in enumerate([(64, 64), (100, 70), (70, 100), (130, 52)]):
        (square,) = write_pictures(folder / "square", 1, 140, seed=number)
        Image.open(square).resize(size).save(folder / f"{number}.png")
    compile_network, made = train_dreambooth.compile_network, []

    def traced(*arguments: object, **options: object) -> object:
        before = counters["stats"]["unique_graphs"]
        gain = compile_network(*arguments, backend="eager", **options)  # type: ignore[arg-type]
        made.append(counters["stats"]["unique_graphs"] - before)
        made.append(counters["stats"]["unique_graphs"])
        return gain

    monkeypatch.setattr(train_dreambooth, "compile_network", traced)
    flags = ("--instance_data_dir", folder, "--aspect_buckets", "--train_batch_size", 5)
    more = ("--max_train_steps", 12, "--validation_prompt", "a disc", "--validation_steps", 6)
    assert command(*flags, *more, "--gradient_checkpointing", COMPILED) == 0
    assert 2 <= made[0] <= 3
    assert counters["stats"]["unique_graphs"] == made[1]
    assert len(losses(tmp_path / "run")) == 12
