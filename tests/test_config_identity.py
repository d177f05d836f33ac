"""What the header of an adapter says about the settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dreamrie.config import identity, parse_config
from tests.small_settings import NEEDED

REAL = SimpleNamespace(settings_hash=lambda groups: identity.settings_hash(groups))
DECIDE = (
    ["--rank", "5"],
    ["--seed", "1"],
    ["--learning_rate", "2e-3"],
    ["--max_train_steps", "401"],
    ["--optimizer", "adamw"],
    ["--init", "orthonormal"],
    ["--center_crop"],
    ["--train_batch_size", "5"],
    ["--instance_prompt", "a photo of a sks cat"],
    ["--pretrained_model_name_or_path", "sd2-base"],
)
LOOK = (
    ["--output_dir", "elsewhere"],
    ["--instance_data_dir", "moved"],
    ["--resolution", "64"],
    ["--validation_prompt", "a cat"],
    ["--score_steps", "100"],
    ["--checkpointing_steps", "7"],
    ["--torch_compile"],
    ["--dry_run"],
)


def hash_of(impl: Any, words: list[str]) -> str:
    found: str = impl.settings_hash(dict(parse_config([*NEEDED, *words])))
    return found


def law_the_hash_is_of_what_decides(impl: Any) -> None:
    """What a step depends on changes the hash, each to another; where things lie and who looks on does not."""
    plain = hash_of(impl, [])
    assert len({plain, *(hash_of(impl, words) for words in DECIDE)}) == len(DECIDE) + 1
    assert {hash_of(impl, words) for words in LOOK} == {plain}
    # A switch that came later is, when it is off, what was before it.
    words = ["--optimizer", "adamw"]
    groups: dict[str, Any] = dict(parse_config([*NEEDED, *words]))
    groups["adapter"] = [
        # Starts without batches had their number all the same.
        (name, 32 if name == "loi_batches" else value)
        for name, value in groups["adapter"]
        if name != "use_dora"
    ]
    assert impl.settings_hash(groups) == hash_of(impl, words)
    assert hash_of(impl, [*words, "--use_dora"]) != hash_of(impl, words)
    # A default that is given is the default.
    assert hash_of(impl, ["--rank", "4", "--learning_rate", "1e-3"]) == plain


def test_the_hash_is_of_what_decides() -> None:
    law_the_hash_is_of_what_decides(REAL)


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ([], "loi, mean_gradient of 8 batches, singular values 0.0001"),
        (["--init", "orthonormal", "--start_scale", "0.25"], "orthonormal, singular values 0.25"),
        (["--loi_batches", "7", "--start_scale", "-0.5"], "loi, mean_gradient of 7 batches, singular values -0.5"),
        (["--optimizer", "adamw"], "default"),
        (["--init", "pissa"], "pissa"),
        (["--optimizer", "adamw", "--use_dora"], "default, DoRA"),
    ],
)  # fmt: skip
def test_the_kind_of_start_in_words(words: list[str], start: str) -> None:
    config = parse_config([*NEEDED, *words])
    assert config.file_facts() == {"config_hash": hash_of(REAL, words), "init": start}
    assert config.task_values(1)["facts"] == config.file_facts()
