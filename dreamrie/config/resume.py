"""Whether a run may go on with other settings than it began with."""

from __future__ import annotations

from dreamrie.config.reading import make_config
from dreamrie.config.text import message, parse_yaml
from dreamrie.config.train_config import GROUPS, TrainConfig
from dreamrie.errors import ConfigError

# What the steps do not depend on: where things lie, what is looked at on the way. That the pictures are the same,
# wherever they lie, is checked by their content.
CHANGEABLE = frozenset(
    {
        *("instance_data_dir", "class_data_dir", "sample_batch_size", "output_dir"),
        *("validation_prompt", "num_validation_images", "validation_steps", "num_inference_steps"),
        *("report_to", "logging_dir", "spectrum_steps"),
        *("checkpointing_steps", "checkpoints_total_limit"),
    }
)


def check_same_settings(saved: str, config: TrainConfig, where: str) -> None:
    """Refuse to go on with settings that would make another training of it.

    A longer or shorter run is allowed where the learning rate does not depend on the length.

    Args:
        saved: settings of the checkpoint, as YAML.
        config: resolved settings of now.
        where: the checkpoint, for the message.

    Raises:
        ConfigError: a setting differs; the message has each with both values.
    """
    before = make_config(parse_yaml(saved, where))
    allowed = set(CHANGEABLE)
    if config.schedule.lr_scheduler == "constant":
        allowed.add("max_train_steps")
    differing = []
    for group, model in GROUPS.items():
        for name in model.model_fields:
            old, new = (getattr(getattr(c, group), name) for c in (before, config))
            # The side in pixels that was left to the model is only known when the model is loaded.
            unknown = name == "resolution" and None in (old, new)
            if group != "run" and name not in allowed and old != new and not unknown:
                differing.append(f"{name} was {old!r} and is now {new!r}")
    if differing:
        raise ConfigError(
            message(
                f"the run cannot go on with other settings: {'; '.join(differing)}",
                where,
                f"give the settings of that run (its config.yaml is a --config); these may change: "
                f"{', '.join(sorted(allowed))}",
            )
        )
