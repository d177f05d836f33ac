"""Settings that are refused: strict numbers, messages that name the nearest setting, and the type of each one."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from dreamrie.config import GROUPS, build_parser, make_config, parse_config
from dreamrie.errors import ConfigError
from tests.small_settings import NEEDED, NEEDED_VALUES, SETTINGS

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
    (["--init", "eva"], ["'eva'", "rank 0", "--init loi"]),
    (["--use_rslora"], ["use_rslora", "riemannion", "--optimizer adamw"]),
    (["--use_dora"], ["use_dora", "riemannion", "no longer that product", "--optimizer adamw"]),
    (["--use_dora", "--optimizer", "muon"], ["use_dora", "muon", "matrices only"]),
    (["--use_dora", "--optimizer", "sgd", "--init", "pissa"], ["'pissa'", "--init default"]),
    (["--start_scale", "0"], ["start_scale", "not be 0"]),
    (["--start_scale", "0.1", "--init", "pissa"], ["start_scale", "loi"]),
    (["--start_scale", "-0.1", "--init", "orthonormal"], ["start_scale -0.1", "positive"]),
    (["--start_scale", "0.1", "--optimizer", "adamw"], ["start_scale", "--init loi"]),
    (["--momentum", "0.9", "--optimizer", "adamw"], ["momentum", "adamw"]),
    (["--optimizer", "lora_muon", "--init", "default"], ["that lora_muon moves on", "--init loi"]),
    (["--optimizer", "lorafa", "--init", "loi"], ["'loi' keeps a frozen copy", "lorafa"]),
    (["--core_map", "namoo"], ["did you mean namo?"]),
    (["--core_map", "namo", "--optimizer", "imuon"], ["not a setting of imuon", "riemannion"]),
    (["--bias_correction"], ["bias_correction is not a setting of riemannion", "riemann_adam"]),
    (["--class_prompt", "a dog"], ["--class_prompt", "--with_prior_preservation"]),
    (["--class_data_dir", "c"], ["--class_data_dir", "--with_prior_preservation"]),
    (["--num_class_images", "100"], ["--num_class_images", "--with_prior_preservation"]),
    (["--prior_loss_weight", "1"], ["--prior_loss_weight", "--with_prior_preservation"]),
    (["--loi_batches", "8", "--init", "pissa"], ["--loi_batches", "--init loi"]),
    (["--loi_batches", "8", "--optimizer", "adamw"], ["--loi_batches", "--init loi"]),
    (["--loi_estimator", "sketch", "--init", "olora"], ["--loi_estimator", "--init loi"]),
    (["--orthogonal_to", "a", "--init", "pissa"], ["--orthogonal_to", "--init loi"]),
    (["--orthogonal_to", "a", "--optimizer", "adamw"], ["orthogonal_to", "--optimizer riemannion"]),
    (["--orthogonal_to", ""], ["orthogonal_to", "must not be empty"]),
    (
        ["--preview_from_export"],
        ["preview_from_export", "does nothing", "--validation_prompt or --score_steps"],
    ),
    (["--lr_warmup_steps", "401"], ["lr_warmup_steps", "400"]),
    (["--with_prior_preservation"], ["class_data_dir", "with_prior_preservation"]),
    (["--with_prior_preservation", "--class_data_dir", "c"], ["class_prompt"]),
    (["--score_steps", "-1"], ["score_steps", "greater than or equal to 0"]),
    (["--score_images", "3", "--score_steps", "9"], ["score_images", "equal to 4"]),
    (["--token", "skz", "--score_steps", "9"], ["'skz'", "a photo of a sks dog", "--token"]),
    (["--token", "dog", "--score_steps", "9"], ["subject_class", "behind 'dog'"]),
    (["--aspect_buckets", "--center_crop"], ["aspect_buckets", "center_crop", "leave one"]),
    (["--alpha", "masks"], ["alpha", "'masks'", "did you mean mask?"]),
    (["--background_color", "mauve"], ["background_color", "'mauve'", "white", "#rrggbb"]),
    (["--background_color", "#12345"], ["'#12345'", "hexadecimal"]),
    (["--background_color", "#12345g"], ["'#12345g'", "hexadecimal"]),
    (["--background_color", "ff8000"], ["'ff8000'", "#rrggbb"]),
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
