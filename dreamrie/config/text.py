"""Settings as text: YAML in, with the scalars of YAML 1.2, and out, so that it reads back equal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dreamrie.config.llm_config import LlmConfig
from dreamrie.config.method import groups_of
from dreamrie.config.train_config import TrainConfig
from dreamrie.errors import ConfigError


def message(what: str, where: str, remedy: str) -> str:
    """Three lines: what, where, what to do."""
    return f"{what}\n  where: {where}\n  what to do: {remedy}"


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: PyYAML's 1.1 rules read 1e-4 as text, `no` as False and 010 as 8."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )


def _refuse_repeats(node: yaml.Node, source: str) -> None:
    """A second use of a key is an error, however deep: YAML itself would silently take the last one."""
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _refuse_repeats(part, source)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                where = f"{source}, line {line}, and before that line {lines[name]}"
                raise ConfigError(
                    message(f"{key.value} is given twice", where, "keep one of the two")
                )
            lines[name] = line
        _refuse_repeats(value, source)


def _flat_mapping(node: yaml.Node | None, loader: _Loader, source: str) -> dict[str, Any]:
    """Build the one mapping of a settings file."""
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            message(
                "the settings file is not a list of `name: value` lines",
                source,
                "write one setting per line, named as the flags are: `rank: 4`",
            )
        )
    _refuse_repeats(node, source)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"{source}, line {key_node.start_mark.line + 1}"
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(
                message(f"{key!r} is not the name of a setting", where, "use a flag's name")
            )
        values[key] = loader.construct_object(value_node, deep=True)
    return values


def _refuse_bombs(text: str) -> None:
    """Ten lines of aliases can stand for a billion values, and deep nesting takes forever to read."""
    depth = 0
    for token in yaml.scan(text):
        depth += isinstance(token, yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken)
        depth -= isinstance(token, yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken)
        if isinstance(token, yaml.AliasToken) or depth > 10:
            raise yaml.YAMLError("aliases (*name) and deep nesting are not allowed")


def parse_yaml(text: str, source: str = "settings") -> dict[str, Any]:
    """Read `name: value` lines with YAML 1.2 scalars.

    Args:
        text: contents of a settings file.
        source: where the text comes from, for messages.

    Returns:
        Values by name, not yet checked.

    Raises:
        ConfigError: not YAML, not a flat mapping, a key twice, or a tag that builds objects.
    """
    try:
        _refuse_bombs(text)
        loader = _Loader(text)
        return _flat_mapping(loader.get_single_node(), loader, source)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            message(
                f"the settings file cannot be read as YAML: {reason}",
                source,
                "write one `name: value` per line; put text with : or # in quotes",
            )
        ) from error


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Escape what a reader would fold or refuse, such as unusual line ends."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)

# Quote by the rules of the reader, not by PyYAML's own: else the text "1e-4" would come back as a
# number.
_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *rules]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
} | {
    first: rules
    for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    if first not in _Loader.yaml_implicit_resolvers
}


def to_yaml(config: TrainConfig | LlmConfig) -> str:
    """Write a configuration so that `--config` reads the same one back."""
    idle = config.idle()
    parts = ["# Settings of a dreamrie training; use with --config.\n"]
    for group, model in groups_of(type(config)).items():
        if group == "run":
            continue
        values = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in getattr(config, group)
            if value is not None
            # Read back, a setting that does nothing would be refused or warned about.
            and not (
                name in idle
                and value == model.model_fields[name].get_default(call_default_factory=True)
            )
        }
        if values:
            text = yaml.dump(
                values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100_000
            )
            parts.append(f"\n# {group}\n{text}")
    return "".join(parts)
