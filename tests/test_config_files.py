"""Files of settings: YAML traps, files that cannot be read, and any text at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dreamrie.config import TrainConfig, make_config, parse_config, parse_yaml, to_yaml
from dreamrie.errors import ConfigError
from tests.small_settings import NEEDED, NEEDED_VALUES, SETTINGS, settings_file

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
        ("rank: 4\nseed: 1\nrank: 8\n", ["rank", "twice", "line 4", "that line 2"]),
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
