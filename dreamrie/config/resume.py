"""Whether a run may go on with other settings than it began with."""

from __future__ import annotations

from dreamrie.config.llm_config import LlmConfig
from dreamrie.config.method import groups_of
from dreamrie.config.reading import AnyConfig, config_of
from dreamrie.config.text import message, parse_yaml
from dreamrie.config.train_config import TrainConfig
from dreamrie.errors import ConfigError

# What the steps do not depend on: where things lie, what is looked at on the way. That the pictures and the other
# adapters are the same, wherever they lie, is checked by their content.
CHANGEABLE = frozenset(
    {
        *("instance_data_dir", "class_data_dir", "output_dir", "orthogonal_to"),
        *("validation_prompt", "num_validation_images", "validation_steps", "num_inference_steps"),
        *("data", "validation_data", "validation_rows"),
        *("report_to", "logging_dir", "spectrum_steps"),
        *("checkpointing_steps", "checkpoints_total_limit", "push_to_hub", "hub_model_id"),
    }
)
# These follow from others unless they are given; a difference in them alone is one all the same.
DERIVED = frozenset(
    {
        *("start_scale", "lr_warmup_steps", "max_grad_norm", "momentum", "init"),
        "loi_batches",
        *("score_prompts", "score_encoders", "score_inference_steps", "token", "subject_class"),
    }
)


def with_earlier_warmup(saved: str, config: AnyConfig, where: str) -> AnyConfig:
    """Keep the warm-up of a run that is made longer or shorter: its default depends on the length.

    Args:
        saved: settings of the checkpoint, as YAML.
        config: resolved settings of now.
        where: the checkpoint, for messages.

    Returns:
        The settings of now, with the earlier warm-up where the present one is the default of another length.
    """
    before = config_of(type(config), parse_yaml(saved, where)).schedule
    now = config.schedule
    default = config.default_warmup(now.max_train_steps)
    if before.max_train_steps == now.max_train_steps or now.lr_warmup_steps != default:
        return config
    schedule = now.model_copy(update={"lr_warmup_steps": before.lr_warmup_steps})
    return config.model_copy(update={"schedule": schedule})


def check_same_settings(saved: str, config: TrainConfig | LlmConfig, where: str) -> None:
    """Refuse to go on with settings that would make another training of it.

    A longer or shorter run is allowed where the learning rate does not depend on the length.

    Args:
        saved: settings of the checkpoint, as YAML.
        config: resolved settings of now.
        where: the checkpoint, for the message.

    Raises:
        ConfigError: a setting differs; the message has each with both values.
    """
    values = parse_yaml(saved, where)
    if values.get("init") == "orthonormal" and values.get("start_scale") is None:
        # Before this start had a setting it had this size.
        values["start_scale"] = 0.1 / config.adapter.rank**0.5
    before: TrainConfig | LlmConfig = (
        config_of(LlmConfig, values)
        if isinstance(config, LlmConfig)
        else config_of(TrainConfig, values)
    )
    allowed = set(CHANGEABLE)
    if config.schedule.lr_scheduler == "constant":
        allowed.add("max_train_steps")
    differing: dict[str, str] = {}
    for group, model in groups_of(type(config)).items():
        for name in model.model_fields:
            old, new = (getattr(getattr(c, group), name) for c in (before, config))
            # A side in pixels that is left to the model is only known when the model is loaded.
            unknown = name == "resolution" and new is None
            if group != "run" and name not in allowed and old != new and not unknown:
                differing[name] = f"{name} was {old!r} and is now {new!r}"
    if differing:
        given = [text for name, text in differing.items() if name not in DERIVED]
        raise ConfigError(
            message(
                f"the run cannot go on with other settings: {'; '.join(given or differing.values())}",
                where,
                f"give the settings of that run (its config.yaml is a --config); these may change: "
                f"{', '.join(sorted(allowed))}",
            )
        )
