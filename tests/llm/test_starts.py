"""Starts from data in a language model: the command takes every name, and padding is not looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dreamrie.__main__ import main
from dreamrie.adapter_reading import load_adapter
from dreamrie.llm.encoding import Encoded
from dreamrie.llm.task import CausalLmTask
from dreamrie.lora import attach_lora
from tests.llm import small
from tests.llm.test_train_llm import world


def encoded(prompt: int, answer: int, seed: int) -> Encoded:
    """Random tokens."""
    words = torch.randint(3, 259, (prompt + answer,), generator=torch.Generator().manual_seed(seed))
    tokens = words.tolist()
    return Encoded(tuple(tokens[:prompt]), tuple(tokens[prompt:]), f"row {seed}")


@pytest.mark.parametrize("packing", [False, True])
def test_used_places_are_those_that_the_loss_depends_on(packing: bool) -> None:
    """Another token at a used place is another loss, at any other place the same one to the bit."""
    model = small.model()
    pairs = attach_lora(model, 2, ["q_proj"])
    examples = [encoded(5, 2, 1), encoded(9, 3, 2), encoded(4, 1, 3)]
    task = CausalLmTask(
        model, pairs, examples, batch_size=3, seed=0, max_length=20, packing=packing
    )
    batch = task.batch(1, 0)
    used, loss = task.used_places(batch), float(task.loss(batch).detach())
    assert used.shape == batch.tokens.shape
    assert 0 < int((~used).sum()) < used.numel()
    for row in range(len(used)):
        for place in range(used.shape[1]):
            old = int(batch.tokens[row, place])
            batch.tokens[row, place] = 7 if old != 7 else 8
            assert (float(task.loss(batch).detach()) == loss) != bool(used[row, place])
            batch.tokens[row, place] = old


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "init"), [("riemannion", "corda"), ("adamw", "eva")])
def test_the_command_takes_a_start(optimizer: str, init: str) -> None:
    with world() as values:
        folder = Path(values["output_dir"])
        words = ["--model", values["model"], "--data", *values["data"], "--output_dir", str(folder)]
        words += ["--rank", "2", "--max_train_steps", "2", "--target_modules", "q_proj", "o_proj"]
        words += ["--optimizer", optimizer, "--init", init, "--loi_batches", "2"]
        assert main(["train-llm", *words]) == 0
        facts = json.loads((folder / "run.json").read_text("utf-8"))
        assert facts["initialization"].startswith(init)
        loaded = load_adapter(small.model(), folder)
        assert all(float(pair.delta().abs().max()) > 1e-5 for pair in loaded.pairs)
        assert loaded.facts["init"] == f"{init} of 2 batches"


def test_the_task_saves_dora_as_it_was_trained(tmp_path: Path) -> None:
    """PEFT's folder on a fresh model has the loss of the model in training; without magnitudes it has another."""
    model = small.model()
    pairs = attach_lora(model, 2, ["q_proj", "down_proj"], init="default", use_dora=True)
    task = CausalLmTask(model, pairs, [encoded(5, 2, 1)], batch_size=1, seed=0, max_length=20)
    before = float(task.loss(task.batch(1, 0)).detach())
    with torch.no_grad():
        for pair in pairs:
            pair.left += 0.1
            pair.parameters[2][::2] *= 2
    wanted = float(task.loss(task.batch(1, 0)).detach())
    task.save(tmp_path, {})
    fresh = small.model()
    loaded = load_adapter(fresh, tmp_path)
    found = float(task.model_loss(fresh, task.batch(1, 0)).detach())
    assert abs(found - wanted) < 1e-5 < 1e-3 < abs(wanted - before)
    with torch.no_grad():
        for pair in loaded.pairs:
            pair.parameters[2][::2] /= 2
    assert abs(float(task.model_loss(fresh, task.batch(1, 0)).detach()) - wanted) > 1e-3


@pytest.mark.slow
def test_the_command_trains_dora() -> None:
    """The flag arrives in the adapter, the settings and the record of the start."""
    with world() as values:
        folder = Path(values["output_dir"])
        words = ["--model", values["model"], "--data", *values["data"], "--output_dir", str(folder)]
        words += ["--rank", "2", "--max_train_steps", "2", "--target_modules", "q_proj", "o_proj"]
        assert main(["train-llm", *words, "--optimizer", "adamw", "--use_dora"]) == 0
        loaded = load_adapter(small.model(), folder)
        assert all(pair.magnitude is not None for pair in loaded.pairs)
        assert loaded.facts["init"] == "default, DoRA"
        assert json.loads((folder / "adapter_config.json").read_text("utf-8"))["use_dora"] is True
