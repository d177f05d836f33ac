"""Typed, validated settings. The command line and YAML are read here and nowhere else.

Every setting has one name, the same on the command line (`--learning_rate 1e-3`) and in a file
(`learning_rate: 1e-3`, given by `--config FILE.yaml`). Precedence: flag, then file, then default.
"""

from __future__ import annotations

from dreamrie.config.llm_config import LlmConfig
from dreamrie.config.reading import (
    add_settings,
    build_parser,
    closest,
    config_of,
    is_verbose,
    make_config,
    parse_config,
    read_config,
)
from dreamrie.config.resume import check_same_settings, with_earlier_warmup
from dreamrie.config.schema import (
    AdapterSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    OutputSettings,
    PriorSettings,
    RunSettings,
    ScheduleSettings,
    ScoreSettings,
    ValidationSettings,
)
from dreamrie.config.text import parse_yaml, to_yaml
from dreamrie.config.train_config import GROUPS, TrainConfig

__all__ = [
    "GROUPS",
    "AdapterSettings",
    "DataSettings",
    "LlmConfig",
    "ModelSettings",
    "OptimizerSettings",
    "OutputSettings",
    "PriorSettings",
    "RunSettings",
    "ScheduleSettings",
    "ScoreSettings",
    "TrainConfig",
    "ValidationSettings",
    "add_settings",
    "build_parser",
    "check_same_settings",
    "closest",
    "config_of",
    "is_verbose",
    "make_config",
    "parse_config",
    "parse_yaml",
    "read_config",
    "to_yaml",
    "with_earlier_warmup",
]
