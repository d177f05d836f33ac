"""Settings: precedence, defaults that follow other settings, and what is recorded of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from dreamrie.config import make_config, parse_config, parse_yaml, to_yaml
from dreamrie.config.resume import check_same_settings
from dreamrie.errors import ConfigError
from dreamrie.lora import attach_lora
from dreamrie.optimizer_table import OPTIMIZERS
from tests.small_settings import NEEDED, NEEDED_VALUES, settings_file


def test_flag_beats_file_beats_default(tmp_path: Path) -> None:
    file = settings_file(tmp_path, "rank: 8\nmax_train_steps: 77\n")
    config = parse_config([*NEEDED, *file, "--rank", "16"])
    assert config.adapter.rank == 16
    assert config.schedule.max_train_steps == 77
    assert config.data.train_batch_size == 4


def test_a_switch_in_a_file_can_be_overruled(tmp_path: Path) -> None:
    file = settings_file(tmp_path, "center_crop: true\nrandom_flip: true\n")
    config = parse_config([*NEEDED, *file, "--no_center_crop"])
    assert (config.data.center_crop, config.data.random_flip) == (False, True)


def test_a_negative_number_is_a_value_not_a_flag() -> None:
    assert parse_config([*NEEDED, "--start_scale", "-5e-2"]).adapter.start_scale == -0.05


def test_prompts_may_follow_one_flag_or_several() -> None:
    for words in (["--validation_prompt", "a", "b"], ["--validation_prompt", "a"] * 2):
        words[-1] = "b"
        assert parse_config([*NEEDED, *words]).validation.validation_prompt == ["a", "b"]


def test_a_long_value_is_shown_shortly() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(NEEDED_VALUES | {"rank": ["x" * 10_000] * 1000})
    assert len(str(caught.value)) < 400


def test_dashes_and_underscores_are_the_same_flag() -> None:
    config = parse_config([*NEEDED, "--dry-run", "--max-train-steps=7"])
    assert config.run.dry_run
    assert config.schedule.max_train_steps == 7


def test_resolved_settings_are_filled_in_and_read_back_equal(tmp_path: Path) -> None:
    config = parse_config([*NEEDED, "--rank", "9", "--validation_prompt", "a: b", "no", "1e-4"])
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.momentum == 0.5
    assert config.optimizer.max_grad_norm == 0.0
    assert config.adapter.start_scale == pytest.approx(1e-4)
    assert config.schedule.lr_warmup_steps == 20
    assert config.adapter.init == "loi"
    text = to_yaml(config)
    assert parse_config(settings_file(tmp_path, text)) == config
    # Any other reader of YAML sees the same texts.
    assert yaml.safe_load(text)["validation_prompt"] == ["a: b", "no", "1e-4"]


def test_resolved_settings_of_adamw_read_back_equal(tmp_path: Path) -> None:
    config = parse_config([*NEEDED, "--optimizer", "adamw"])
    assert config.adapter.init == "default"
    assert (config.optimizer.learning_rate, config.optimizer.max_grad_norm) == (1e-4, 1.0)
    assert (config.optimizer.momentum, config.adapter.start_scale) == (None, None)
    assert parse_config(settings_file(tmp_path, to_yaml(config))) == config


def test_the_resolution_waits_for_the_model(tmp_path: Path) -> None:
    config = parse_config(NEEDED)
    assert config.data.resolution is None
    known = config.with_resolution(96)
    assert parse_config(settings_file(tmp_path, to_yaml(known))) == known
    assert known.data.resolution == 96


def test_settings_of_the_pictures_are_passed_on_and_read_back_equal(tmp_path: Path) -> None:
    usual = {"center_crop": False, "random_flip": False, "bucket_unit": None, "mask": False}
    assert parse_config(NEEDED).picture_values(16) == {**usual, "background": (255, 255, 255)}
    flags = ["--aspect_buckets", "--alpha", "mask", "--background_color", "#0AbcFF"]
    config = parse_config([*NEEDED, *flags])
    assert config.picture_values(16) == {
        **usual,
        "bucket_unit": 16,
        "mask": True,
        "background": (10, 188, 255),
    }
    assert parse_config(settings_file(tmp_path, to_yaml(config))) == config
    assert yaml.safe_load(to_yaml(config))["background_color"] == "#0AbcFF"


@pytest.mark.parametrize("optimizer", ["adamw", "loraplus", "rprec_adamw", "muon", "lora_rite"])
def test_without_an_init_factor_wise_optimizers_train_the_usual_lora(optimizer: str) -> None:
    config = parse_config([*NEEDED, "--optimizer", optimizer])
    assert (config.adapter.init, config.adapter.attach_init) == ("default", "default")
    named = parse_config([*NEEDED, "--optimizer", optimizer, "--init", "loi"])
    assert (named.adapter.init, named.adapter.attach_init) == ("loi", "orthonormal")


def test_the_size_of_an_orthonormal_start_reaches_the_adapter() -> None:
    """And an older run, whose settings do not hold it, had the size that was the only one."""
    config = parse_config([*NEEDED, "--init", "orthonormal", "--start_scale", "0.25"])
    assert config.adapter.layout["alpha"] == 0.25
    pairs = attach_lora(
        torch.nn.Sequential(torch.nn.Linear(9, 8)), target_modules=["0"], **config.adapter.layout
    )
    assert pairs[0].point().s.tolist() == pytest.approx([0.25] * 4)
    assert parse_config(NEEDED).adapter.layout["alpha"] is None
    now = parse_config([*NEEDED, "--init", "orthonormal"])
    saved = "".join(line for line in to_yaml(now).splitlines(True) if "start_scale" not in line)
    with pytest.raises(ConfigError, match=r"start_scale was 0\.05 and is now 0\.0001"):
        check_same_settings(saved, now, "config.yaml")
    check_same_settings(
        saved,
        parse_config([*NEEDED, "--init", "orthonormal", "--start_scale", "0.05"]),
        "config.yaml",
    )


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_defaults_follow_the_table_of_optimizers(name: str, tmp_path: Path) -> None:
    """And what is passed to the builder is what the table knows of."""
    entry = OPTIMIZERS[name]
    config = parse_config([*NEEDED, "--optimizer", name])
    settings = config.optimizer
    assert settings.values == {
        "lr": entry.learning_rate,
        "weight_decay": 0.0,
        "momentum": entry.momentum,
        "core_map": None,
        "bias_correction": None,
    }
    assert settings.max_grad_norm == entry.max_grad_norm
    assert settings.step_of_factors == (
        entry.learning_rate if name in {"imuon", "lora_muon", "lora_rite"} else None
    )
    assert config.adapter.init == ("loi" if entry.needs_rank else "default")
    assert parse_config(settings_file(tmp_path, to_yaml(config))) == config


def test_switches_of_an_optimizer_reach_it() -> None:
    flags = ["--optimizer", "riemann_adam", "--no_bias_correction"]
    assert parse_config([*NEEDED, *flags]).optimizer.values["bias_correction"] is False
    assert parse_config([*NEEDED, "--core_map", "namo"]).optimizer.values["core_map"] == "namo"


def test_guidance_follows_the_model_unless_it_is_given() -> None:
    for flags, scale in (
        ([], 4.0),
        (["--pretrained_model_name_or_path", "sd2-base"], 7.5),
        (["--guidance_scale", "3"], 3.0),
        (["--pretrained_model_name_or_path", "sd2-base", "--guidance_scale", "0"], 0.0),
    ):
        assert parse_config([*NEEDED, *flags]).validation.guidance_scale == scale


def test_a_start_small_beside_a_step_is_refused_and_never_a_default() -> None:
    added = [*NEEDED, "--optimizer", "lora_muon"]
    for flags, numbers in (
        (["--learning_rate", "0.06", "--start_scale", "0.05"], ["0.05", "0.06", "lora_muon"]),
        (["--start_scale", "-0.0009"], ["-0.0009", "0.001"]),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config([*added, *flags])
        for word in ("--start_scale", "--learning_rate", *numbers):
            assert word in str(caught.value)
        assert len(str(caught.value).splitlines()) == 3
    for flags in (
        ["--learning_rate", "0.05", "--start_scale", "1e-6"],
        ["--learning_rate", "0.06", "--start_scale", "0.06", "--optimizer", "lora_muon"],
        ["--learning_rate", "0.05", "--optimizer", "adamw", "--init", "loi"],
        ["--learning_rate", "0.05", "--init", "orthonormal"],
    ):
        assert parse_config([*NEEDED, *flags])
    for flags, scale in (
        (["--learning_rate", "0.006"], 0.0006),
        (["--learning_rate", "0.006", "--optimizer", "riemann_adam"], 0.006),
        (["--learning_rate", "0.006", "--optimizer", "imuon"], 0.006),
        (["--optimizer", "riemann_sgd", "--rank", "16"], 0.025),
        (["--learning_rate", "0.05", "--optimizer", "adamw", "--init", "loi"], 0.05),
    ):
        found = parse_config([*NEEDED, *flags]).adapter.start_scale
        assert found == pytest.approx(scale)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--logging_dir", "x"], ["--logging_dir", "--report_to tensorboard"]),
        (["--validation_steps", "50"], ["--validation_steps", "--validation_prompt"]),
        (["--score_images", "8"], ["--score_images", "--score_steps"]),
        (["--score_images", "8", "--score_steps", "9"], []),
        (["--logging_dir", "x", "--report_to", "tensorboard"], []),
        (["--validation_steps", "50", "--validation_prompt", "a dog"], []),
        (["--preview_from_export", "--validation_prompt", "a dog"], []),
        (["--preview_from_export", "--score_steps", "9"], []),
    ],
)
def test_a_setting_that_does_nothing_is_warned_about(
    flags: list[str], words: list[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    config = parse_config([*NEEDED, *flags])
    assert [record.levelname for record in caplog.records] == ["WARNING"] * bool(words)
    assert all(word in caplog.text for word in words)
    assert parse_config(settings_file(tmp_path, to_yaml(config))) == config


def test_a_recorded_configuration_is_read_without_a_warning(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    recorded = to_yaml(parse_config([*NEEDED, "--init", "pissa"]))
    assert not {"loi_batches", "class_prompt", "validation_steps"} & set(parse_yaml(recorded))
    parse_config(settings_file(tmp_path, recorded))
    assert not caplog.records


def test_scores_follow_the_model_and_the_instance_prompt(tmp_path: Path) -> None:
    """Token and class are read off the prompt; encoders and prompts fit the model."""
    words = ["--instance_data_dir", "x", "--instance_prompt", "a photo of a sks red dog"]
    config = parse_config([*words, "--score_steps", "50"])
    assert (config.scores.token, config.scores.subject_class) == ("sks", "red dog")
    assert config.scores.score_encoders == ["effnet-lite2-64-160", "tiny-clip"]
    assert (config.scores.score_prompts, config.scores.score_inference_steps) == ("embedded", 10)
    assert config.loop_values()["score_steps"] == 50
    assert parse_config(settings_file(tmp_path, to_yaml(config))) == config
    real = parse_config([*words, "--score_steps", "50", "--pretrained_model_name_or_path", "sd2"])
    assert real.scores.score_encoders == ["dino", "clip"]
    assert (real.scores.score_prompts, real.scores.score_inference_steps) == ("objects", 25)
    named = ["--token", "photo", "--subject_class", "dog", "--score_steps", "5"]
    assert parse_config([*words, *named]).scores.subject_class == "dog"
    off = parse_config(words)
    assert (off.scores.token, off.loop_values()["score_steps"]) == (None, None)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (50, 5), (200, 20), (9999, 20)])
def test_warm_up_is_at_most_a_tenth_of_the_run(steps: int, warmup: int) -> None:
    config = parse_config([*NEEDED, "--max_train_steps", str(steps)])
    assert config.schedule.lr_warmup_steps == warmup


def test_the_dry_run_is_not_part_of_the_recorded_settings() -> None:
    recorded = parse_yaml(to_yaml(parse_config([*NEEDED, "--dry_run", "-v"])))
    assert not {"dry_run", "verbose"} & set(recorded)
