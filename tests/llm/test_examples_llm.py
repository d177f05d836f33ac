"""The ready settings under examples/llm: they parse, and say what the paper's tables say."""

from __future__ import annotations

from typing import Any

import pytest

from dreamrie.__main__ import make_parser
from dreamrie.commands import train_llm
from dreamrie.config import LlmConfig, read_config
from tests.contracts.sources import ROOT

FOLDER = ROOT / "examples" / "llm"
PAPER: dict[str, dict[str, Any]] = {
    "llama-3-8b-riemannion": {
        "optimizer": "riemannion",
        "learning_rate": 1e-4,
        "weight_decay": 0.00316,
        "momentum": 0.9,
        "init": "loi",
    },
    "llama-3-8b-adamw": {
        "optimizer": "adamw",
        "learning_rate": 2e-4,
        "weight_decay": 0.01,
        "init": "default",
    },
    "llama-3.2-1b-riemann-sgd": {"optimizer": "riemann_sgd", "learning_rate": 0.07, "init": "loi"},
    "llama-3.2-1b-sgd": {"optimizer": "sgd", "learning_rate": 0.1, "init": "default"},
}
"""Tables 4 and 5."""


def settings(name: str, *words: str) -> LlmConfig:
    """Resolved, as the command in the head of the file reads them."""
    command = ["train-llm", "--config", str(FOLDER / f"{name}.yaml"), "--data", "rows", *words]
    options = make_parser(["train-llm"]).parse_args(command)
    given = {name: value for name, value in vars(options).items() if name not in {"command", "run"}}
    assert options.run is train_llm.run
    return read_config(LlmConfig, given)


def test_each_file_is_looked_at() -> None:
    assert {path.stem for path in FOLDER.glob("*")} == {*PAPER, "smollm2"}


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_papers_settings(name: str) -> None:
    """Table 6 for all; the start has the paper's size -0.01 / sqrt(r) and power iteration."""
    config = settings(name)
    values = {key: value for group in dict(config).values() for key, value in dict(group).items()}
    assert {key: values[key] for key in PAPER[name]} == PAPER[name]
    assert (values["rank"], values["dropout"], config.samples_per_step()) == (16, 0.05, 64)
    assert (values["lr_scheduler"], values["target_modules"]) == ("linear", ["attention", "mlp"])
    steps = 170_000 * 2 // 64
    assert (values["max_train_steps"], values["lr_warmup_steps"]) == (steps, steps // 10)
    assert values["answers"] == "name"
    if values["init"] == "loi":
        assert values["start_scale"] == pytest.approx(-0.01 / 16**0.5)
        assert values["loi_estimator"] == "backprop_rsvd"


def test_the_quick_start_measures_before_and_after() -> None:
    config = settings("smollm2", "--validation_data", "rows")
    assert config.model.model == "smollm2-135m"
    assert config.loop_values()["score_steps"] == config.schedule.max_train_steps
    assert config.optimizer.optimizer == "riemannion"


def test_the_head_of_a_file_names_the_file() -> None:
    for path in FOLDER.glob("*"):
        assert f"--config examples/llm/{path.name} " in path.read_text("utf-8")
