"""Settings: precedence, strict numbers, YAML traps, messages that name the nearest setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from dreamrie.config import (
    GROUPS,
    TrainConfig,
    build_parser,
    make_config,
    parse_config,
    parse_yaml,
    to_yaml,
)
from dreamrie.errors import ConfigError

NEEDED = ["--instance_data_dir", "pictures", "--instance_prompt", "a photo of a sks dog"]
NEEDED_VALUES = {"instance_data_dir": "pictures", "instance_prompt": "a photo of a sks dog"}


def settings_file(folder: Path, text: str) -> list[str]:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


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
    assert config.optimizer.momentum == 0.9
    assert config.optimizer.max_grad_norm == 0.0
    assert config.adapter.start_scale == pytest.approx(0.1 / 3)
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


@pytest.mark.parametrize("optimizer", ["adamw", "loraplus", "scaledgd", "muon"])
def test_without_an_init_factor_wise_optimizers_train_the_usual_lora(optimizer: str) -> None:
    config = parse_config([*NEEDED, "--optimizer", optimizer])
    assert (config.adapter.init, config.adapter.attach_init) == ("default", "default")
    named = parse_config([*NEEDED, "--optimizer", optimizer, "--init", "loi"])
    assert (named.adapter.init, named.adapter.attach_init) == ("loi", "orthonormal")


def test_guidance_follows_the_model_unless_it_is_given() -> None:
    for flags, scale in (
        ([], 4.0),
        (["--pretrained_model_name_or_path", "sd2-base"], 7.5),
        (["--guidance_scale", "3"], 3.0),
        (["--pretrained_model_name_or_path", "sd2-base", "--guidance_scale", "0"], 0.0),
    ):
        assert parse_config([*NEEDED, *flags]).validation.guidance_scale == scale


def test_a_start_small_beside_a_step_is_refused_and_never_a_default() -> None:
    for flags, numbers in (
        (["--learning_rate", "0.006", "--start_scale", "0.05"], ["0.05", "0.006", "0.06", "0.005"]),
        (["--start_scale", "-0.009"], ["-0.009", "0.001", "0.01", "0.0009"]),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config([*NEEDED, *flags])
        for word in ("--start_scale", "--learning_rate", *numbers):
            assert word in str(caught.value)
        assert len(str(caught.value).splitlines()) == 3
    for flags in (
        ["--learning_rate", "0.005"],
        ["--learning_rate", "0.006", "--start_scale", "0.06"],
        ["--learning_rate", "0.05", "--optimizer", "adamw", "--init", "loi"],
        ["--learning_rate", "0.05", "--init", "orthonormal"],
    ):
        assert parse_config([*NEEDED, *flags])
    for flags, scale in (
        (["--learning_rate", "0.006"], 0.06),
        (["--rank", "10000"], 0.01),
        (["--rank", "16"], 0.025),
        (["--learning_rate", "0.05", "--optimizer", "adamw", "--init", "loi"], 0.05),
    ):
        found = parse_config([*NEEDED, *flags]).adapter.start_scale
        assert found == pytest.approx(scale)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--logging_dir", "x"], ["--logging_dir", "--report_to tensorboard"]),
        (["--validation_steps", "50"], ["--validation_steps", "--validation_prompt"]),
        (["--logging_dir", "x", "--report_to", "tensorboard"], []),
        (["--validation_steps", "50", "--validation_prompt", "a dog"], []),
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


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (50, 5), (200, 20), (9999, 20)])
def test_warm_up_is_at_most_a_tenth_of_the_run(steps: int, warmup: int) -> None:
    config = parse_config([*NEEDED, "--max_train_steps", str(steps)])
    assert config.schedule.lr_warmup_steps == warmup


def test_the_dry_run_is_not_part_of_the_recorded_settings() -> None:
    recorded = parse_yaml(to_yaml(parse_config([*NEEDED, "--dry_run", "-v"])))
    assert not {"dry_run", "verbose"} & set(recorded)


# ------------------------------------------------------------------------------- YAML scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1e3),
        (".5", 0.5),
        ("3.", 3.0),
        ("7", 7),
        ("-2", -2),
        ("010", "010"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("'7'", "7"),
    ],
)
def test_yaml_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    """PyYAML's own rules read 1e-4 as text, no as False, 010 as 8 and 1:30 as 90."""
    got = parse_yaml(f"key: {text}")["key"]
    assert got == value
    assert type(got) is type(value)


def test_learning_rate_of_a_file_may_be_written_1e_4(tmp_path: Path) -> None:
    file = settings_file(tmp_path, "learning_rate: 1e-4\n")
    assert parse_config([*NEEDED, *file]).optimizer.learning_rate == 1e-4


def prompt_line(text: str) -> str:
    """The prompt, unless the case is about it or is no mapping: one fault in each case."""
    return "" if "instance_prompt" in text or text[0] in "-j" else "instance_prompt: a dog\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank: 4\nseed: 1\nrank: 8\n", ["rank", "twice", "line 4"]),
        ("rnak: 4\n", ["rnak", "did you mean rank?", "settings.yaml"]),
        ("rank: [4\n", ["YAML"]),
        ("- rank\n", ["name: value"]),
        ("just words\n", ["name: value"]),
        ("7: 4\n", ["7", "name of a setting"]),
        ("? [rank]\n: 4\n", ["name of a setting"]),
        ("rank: !!python/object/apply:os.system ['true']\n", ["YAML"]),
        ("rank: 4\n---\nrank: 5\n", ["YAML"]),
        ("a: &x [*x]\n", ["YAML", "aliases"]),
        ("rank: " + "[" * 5000, ["YAML"]),
        ("rank:\n  deep: 1\n", ["rank", "integer"]),
        ("instance_prompt: 1234\n", ["instance_prompt", "string"]),
        ("instance_prompt: true\n", ["instance_prompt", "string"]),
        ("rank: '4'\n", ["rank", "integer"]),
        ("output_dir: 3\n", ["output_dir"]),
        ("validation_prompt: [1]\n", ["validation_prompt"]),
        ("center_crop: 1\n", ["center_crop"]),
        ("rank: \x00\n", ["YAML"]),
    ],
)
def test_bad_settings_files(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config([*NEEDED[:2], *settings_file(tmp_path, prompt_line(text) + text)])
    for word in words:
        assert word in str(caught.value)


def test_a_settings_file_must_exist_be_small_and_be_utf8(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        parse_config([*NEEDED, "--config", str(tmp_path / "absent.yaml")])
    with pytest.raises(ConfigError, match="cannot be opened"):
        parse_config([*NEEDED, "--config", str(tmp_path)])
    (tmp_path / "latin.yaml").write_bytes("instance_prompt: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        parse_config([*NEEDED, "--config", str(tmp_path / "latin.yaml")])
    (tmp_path / "big.yaml").write_text("#" * 1_000_001)
    with pytest.raises(ConfigError, match="larger than"):
        parse_config([*NEEDED, "--config", str(tmp_path / "big.yaml")])


# ------------------------------------------------------------------------------ bad flags


BAD_FLAGS = [
    (["--learning_rat", "1"], ["--learning_rat", "did you mean learning_rate?"]),
    (["--learning_rate", "nan"], ["learning_rate", "nan", "finite", "--learning_rate"]),
    (["--learning_rate", "inf"], ["finite"]),
    (["--learning_rate", "0"], ["greater than 0"]),
    (["--learning_rate", "-1e-3"], ["greater than 0"]),
    (["--learning_rate", "fast"], ["'fast'", "number"]),
    (["--rank", "2.5"], ["rank", "integer"]),
    (["--rank", "0"], ["greater than or equal to 1"]),
    (["--rank"], ["--rank", "expected one argument"]),
    (["--optimizer", "riemanion"], ["did you mean riemannion?"]),
    (["--init", "looi"], ["did you mean loi?"]),
    (["--momentum", "1"], ["less than 1"]),
    (["--instance_prompt", "  "], ["instance_prompt", "must not be empty"]),
    (["--instance_prompt", "a\0b"], ["NUL"]),
    (["--instance_prompt", "\ud800"], ["surrogate"]),
    (["--instance_data_dir", ""], ["instance_data_dir", "must not be empty"]),
    (["--validation_prompt", "a dog", ""], ["validation_prompt", "must not be empty"]),
    (["extra"], ["'extra'", "quotes"]),
    (["--init", "default"], ["'default'", "rank 0", "--init loi", "--optimizer adamw"]),
    (["--init", "gaussian"], ["'gaussian'", "rank 0"]),
    (["--start_scale", "0"], ["start_scale", "not be 0"]),
    (["--start_scale", "0.1", "--init", "pissa"], ["start_scale", "loi"]),
    (["--start_scale", "0.1", "--optimizer", "adamw"], ["start_scale", "--init loi"]),
    (["--momentum", "0.9", "--optimizer", "adamw"], ["momentum", "adamw"]),
    (["--class_prompt", "a dog"], ["--class_prompt", "--with_prior_preservation"]),
    (["--class_data_dir", "c"], ["--class_data_dir", "--with_prior_preservation"]),
    (["--num_class_images", "100"], ["--num_class_images", "--with_prior_preservation"]),
    (["--prior_loss_weight", "1"], ["--prior_loss_weight", "--with_prior_preservation"]),
    (["--loi_batches", "8", "--init", "pissa"], ["--loi_batches", "--init loi"]),
    (["--loi_batches", "8", "--optimizer", "adamw"], ["--loi_batches", "--init loi"]),
    (["--loi_estimator", "sketch", "--init", "olora"], ["--loi_estimator", "--init loi"]),
    (["--lr_warmup_steps", "401"], ["lr_warmup_steps", "400"]),
    (["--with_prior_preservation"], ["class_data_dir", "with_prior_preservation"]),
    (["--with_prior_preservation", "--class_data_dir", "c"], ["class_prompt"]),
    (["--seed", "-1"], ["seed"]),
    (["--rank", "0", "--seed", "-1"], ["rank", "also wrong: seed"]),
]


@pytest.mark.parametrize(("flags", "words"), BAD_FLAGS)
def test_bad_flags(flags: list[str], words: list[str]) -> None:
    parse_config(NEEDED)  # the rest of the line is fine
    with pytest.raises(ConfigError) as caught:
        parse_config([*NEEDED, *flags])
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_what_must_be_given() -> None:
    with pytest.raises(ConfigError, match="--instance_data_dir is missing"):
        parse_config(["--instance_prompt", "a dog"])
    with pytest.raises(ConfigError, match="--instance_prompt is missing"):
        parse_config(["--instance_data_dir", "pictures"])


WRONG: dict[str, Any] = {"int": True, "float": "1e-3", "bool": 1, "text": 7}


def wrong_value(name: str, annotation: object) -> object:
    """A value of a type that this setting must refuse."""
    words = repr(annotation)
    for kind in ("float", "int", "bool"):
        if kind in words:
            return WRONG[kind]
    return WRONG["text"]


SETTINGS = [(name, f) for model in GROUPS.values() for name, f in model.model_fields.items()]


@pytest.mark.parametrize(("name", "field"), SETTINGS, ids=[name for name, _ in SETTINGS])
def test_every_setting_is_described_and_refuses_a_wrong_type(name: str, field: Any) -> None:
    assert field.description
    assert len(field.description) >= 10
    values = NEEDED_VALUES | {name: wrong_value(name, field.annotation)}
    with pytest.raises(ConfigError) as caught:
        make_config(values)
    assert name in str(caught.value)


def test_every_setting_is_a_flag_and_names_are_unique() -> None:
    names = [name for name, _ in SETTINGS]
    assert len(names) == len(set(names))
    text = build_parser().format_help()
    for name in names:
        assert f"--{name}" in text
    for group in GROUPS:
        assert f"\n{group}:\n" in text


def test_choices_agree_with_what_the_library_offers() -> None:
    """config.py may not import these modules, so a test keeps the lists equal."""
    from dreamrie.optimizers import OPTIMIZERS

    offered = get_args(GROUPS["optimizer"].model_fields["optimizer"].annotation)
    assert set(offered) == set(OPTIMIZERS)


def test_a_configuration_cannot_be_changed() -> None:
    config = parse_config(NEEDED)
    with pytest.raises(ValueError, match="frozen"):
        config.adapter.rank = 5  # type: ignore[misc]


# -------------------------------------------------------------------------------------- fuzz

texts = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), max_size=30
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
names = st.one_of(st.sampled_from([name for name, _ in SETTINGS]), texts)


@given(st.dictionaries(names, anything, max_size=6))
def test_any_values_are_a_configuration_or_a_config_error(values: dict[str, Any]) -> None:
    """And what is accepted is printed so that it reads back equal."""
    try:
        config = make_config(NEEDED_VALUES | values)
    except ConfigError:
        return
    again = make_config(parse_yaml(to_yaml(config)) | config.run.model_dump())
    assert again == config


@example("0\x85")
@example("line\u2028end\nand\ttab ")
@given(texts.filter(lambda text: bool(text.strip())))
def test_any_prompt_survives_the_settings_file(prompt: str) -> None:
    config = make_config(NEEDED_VALUES | {"instance_prompt": prompt, "validation_prompt": [prompt]})
    again: TrainConfig = make_config(parse_yaml(to_yaml(config)))
    assert again.data.instance_prompt == prompt
    assert again.validation.validation_prompt == [prompt]


@given(st.text(max_size=60))
def test_any_text_is_settings_or_a_config_error(text: str) -> None:
    try:
        make_config(NEEDED_VALUES | parse_yaml(text))
    except ConfigError:
        pass
