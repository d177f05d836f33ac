"""The command end to end: an adapter that PEFT reads, resume to the bit, one message for what cannot work."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dreamrie.__main__ import main
from dreamrie.adapter_reading import load_adapter
from dreamrie.commands import train_llm
from dreamrie.config import LlmConfig, config_of, parse_yaml, to_yaml
from dreamrie.errors import CheckpointError, ConfigError
from dreamrie.llm import task as real
from tests.llm import small

pytestmark = pytest.mark.end_to_end

SHORT = [
    {
        "instruction": f"is {word} cold? Answer format: yes/no",
        "output": answer,
        "answer": answer,
    }
    for word, answer in (
        ("ice", "yes"),
        ("fire", "no"),
        ("snow", "yes"),
        ("tea", "no"),
        ("sun", "no"),
    )
]
"""Rows that take a tenth of the time of those of the eight tasks."""

SETTINGS: dict[str, Any] = {
    "rank": 3,
    "loi_batches": 2,
    "max_train_steps": 7,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.005,
    "dropout": 0.1,
    "packing": True,
    "max_length": 200,
    "score_steps": 3,
    "spectrum_steps": 2,
    "checkpointing_steps": 2,
}


class KilledError(BaseException):
    """The process is gone."""


@contextmanager
def world() -> Iterator[dict[str, Any]]:
    """A model, rows, and settings that name them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = str(small.write_rows(folder / "rows.jsonl", SHORT))
        model = str(small.save_model(folder / "model"))
        yield {
            **SETTINGS,
            "model": model,
            "data": [rows],
            "validation_data": [rows],
            "output_dir": str(folder / "run"),
        }


def leg(
    impl: Any, values: dict[str, Any], kill_in: int | None = None, **more: Any
) -> tuple[bytes, list[dict[str, Any]]]:
    """Train as a new process would, killed in the second micro-batch of a step; returns adapter and records."""
    batch = impl.CausalLmTask.batch

    def watched(self: Any, step: int, micro: int) -> Any:
        if step == kill_in and micro == 1:
            raise KilledError
        return batch(self, step, micro)

    torch.rand(17)  # whatever the process did before must not matter
    with mock.patch.object(impl.CausalLmTask, "batch", watched):
        assert train_llm.train_with(config_of(LlmConfig, {**values, **more}), [])
    folder = Path(values["output_dir"])
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [{k: v for k, v in json.loads(row).items() if k != "steps_per_s"} for row in lines]
    return (folder / "adapter_model.safetensors").read_bytes(), records


def law_ll13_resumed_equals_straight(impl: Any) -> None:
    """Killed in the middle of a step and gone on from the last checkpoint: file and records to the byte."""
    with world() as values:
        straight, records = leg(impl, values)
        assert [row["step"] for row in records if "scores" in row] == [0, 3, 6, 7]
        for killed in (3, 6):
            values["output_dir"] += "-again"
            with pytest.raises(KilledError):
                leg(impl, values, kill_in=killed)
            again, found = leg(impl, values, resume_from_checkpoint="latest")
            assert found == records
            assert again == straight


def test_ll13() -> None:
    law_ll13_resumed_equals_straight(real)


def test_the_optimizer_lowers_the_loss() -> None:
    """Five rows in 60 steps: far below a blind guess among 259 tokens, and the answers are right."""
    with world() as values:
        plan = {"max_train_steps": 60, "learning_rate": 0.05, "dropout": 0.0, "train_batch_size": 5}
        _, records = leg(real, values, **plan, gradient_accumulation_steps=1, score_steps=60)
    losses = [row["loss"] for row in records if "loss" in row]
    assert losses[0] > 0.95 * math.log(259)
    assert losses[-1] < 0.025 * math.log(259)  # measured 0.005
    assert [row["scores"]["accuracy"] for row in records if "scores" in row] == [0.6, 1.0]


@pytest.mark.parametrize("optimizer", ["riemannion", "adamw"])
def test_the_command_writes_a_run(optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From flags and a file: exit code 0, the adapter fits its base, the settings read back."""
    with world() as values:
        folder = Path(values["output_dir"])
        file = folder.parent / "settings.yaml"
        file.write_text("rank: 2\nmax_train_steps: 3\nloi_batches: 2\n", "utf-8")
        words = ["--model", values["model"], "--data", *values["data"], "--output_dir", str(folder)]
        if optimizer == "adamw":
            file.write_text("rank: 2\nmax_train_steps: 3\n", "utf-8")
        words += ["--config", str(file), "--optimizer", optimizer, "--target_modules", "attention"]
        assert main(["train-llm", *words]) == 0
        assert "3 steps in" in capsys.readouterr().out
        facts = json.loads((folder / "run.json").read_text("utf-8"))
        assert facts["examples"] == {"rows": 5}
        assert facts["initialization"].startswith(
            "LOI (sketch" if optimizer == "riemannion" else "default"
        )
        config = config_of(LlmConfig, parse_yaml((folder / "config.yaml").read_text("utf-8")))
        assert (config.adapter.rank, config.data.template, config.data.max_length) == (
            2,
            "chat",
            768,
        )
        adapter = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        assert adapter["base_model_name_or_path"] == values["model"]
        loaded = load_adapter(small.model(), folder)
        assert len(loaded.pairs) == 8
        assert loaded.facts["steps"] == "3"


def test_a_second_run_moves_the_first_aside() -> None:
    with world() as values:
        first, _ = leg(real, values, max_train_steps=2)
        second, _ = leg(real, values, max_train_steps=2, seed=1)
        folder = Path(values["output_dir"])
        assert first != second
        assert (folder / "previous-1" / "adapter_model.safetensors").read_bytes() == first
        assert (folder / "previous-1" / "adapter_config.json").is_file()


def test_a_dry_run_says_what_would_happen(capsys: pytest.CaptureFixture[str]) -> None:
    with world() as values:
        words = ["--model", values["model"], "--data", *values["data"]]
        words += ["--output_dir", values["output_dir"], "--max-train-steps", "5", "--dry-run"]
        assert main(["train-llm", *words]) == 0
        text = capsys.readouterr().out
        assert not Path(values["output_dir"]).exists()
        assert "# adapters: 14 layers, " in text
        assert "# examples: 5 rows; the longest has " in text
        assert "# length: 5 steps of 4 examples = 4.0 epochs" in text
        config = config_of(LlmConfig, parse_yaml(text))
        assert to_yaml(config) in text


def test_bf16_trains_with_an_fp32_adapter() -> None:
    """Forward in bf16 over a base in bf16; factors and file stay fp32."""
    with world() as values:
        values = {
            **values,
            "max_train_steps": 2,
            "base_precision": "bf16",
            "mixed_precision": "bf16",
        }
        request = train_llm.read_request(config_of(LlmConfig, values), torch.device("cpu"))
        task = train_llm.build_task(request, 1)
        assert {pair.left.dtype for pair in task.pairs} == {torch.float32}
        assert {pair.base_weight.dtype for pair in task.pairs} == {torch.bfloat16}
        leg(real, values)


def test_resume_refuses_another_training() -> None:
    """Other settings, other rows; a longer run with the same decay per step is another one too."""
    with world() as values:
        leg(real, values, max_train_steps=2)
        values = {**values, "max_train_steps": 2, "resume_from_checkpoint": "latest"}
        with pytest.raises(ConfigError, match="packing was True and is now False"):
            leg(real, values, packing=False)
        small.write_rows(Path(values["data"][0]), SHORT[:4])
        with pytest.raises(CheckpointError, match="the content of the examples was 5 rows"):
            leg(real, values)


def refused(words: list[str], caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    assert main(["train-llm", *words]) == 2
    return caplog.text


def test_bad_input_is_one_message(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Missing data, wrong columns, no matching layer, an answer longer than the context."""
    with world() as values:
        start = ["--model", values["model"], "--output_dir", values["output_dir"]]
        good = [*start, "--data", *values["data"]]
        assert "there is no such file" in refused([*start, "--data", "nowhere.jsonl"], caplog)
        wrong = small.write_rows(tmp_path / "wrong.jsonl", [{"text": "a"}])
        assert "the columns are text" in refused([*start, "--data", str(wrong)], caplog)
        assert "no layer is named 'qkv'" in refused([*good, "--target_modules", "qkv"], caplog)
        long = {"instruction": "a", "output": "b" * 800}
        rows = small.write_rows(tmp_path / "long.jsonl", [long])
        assert "does not fit into 768 tokens" in refused([*start, "--data", str(rows)], caplog)
        assert "--model is missing" in refused(["--data", "x.jsonl"], caplog)
        assert "does nothing here; add --init loi" in refused(
            [*good, "--optimizer", "adamw", "--loi_batches", "3"], caplog
        )
        assert not Path(values["output_dir"]).exists()


def test_nothing_but_the_task_knows_language_models() -> None:
    """The trainer has no `if llm`: none of its files names the word. Nor does the loop say what its examples are."""
    folder = Path(train_llm.__file__).parents[1] / "trainer"
    for path in sorted(folder.glob("*.py")):
        text = path.read_text("utf-8").lower()
        assert "llm" not in text
        assert "causal" not in text
        if path.stem in {"loop", "resuming", "saving", "scoring", "task"}:
            assert "picture" not in text
