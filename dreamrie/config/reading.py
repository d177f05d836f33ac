"""From words to `TrainConfig`: flags, YAML, precedence, and messages that say what to change."""

from __future__ import annotations

import argparse
import difflib
import logging
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dreamrie.config.llm_config import LlmConfig
from dreamrie.config.method import groups_of
from dreamrie.config.text import message, parse_yaml
from dreamrie.config.train_config import TrainConfig
from dreamrie.errors import ConfigError

logger = logging.getLogger(__name__)

# A settings file is a page; anything longer was given by mistake.
MAX_FILE_BYTES = 1_000_000

AnyConfig = TypeVar("AnyConfig", TrainConfig, LlmConfig)
Kind = type[TrainConfig] | type[LlmConfig]


def _fields(kind: Kind) -> dict[str, tuple[str, FieldInfo]]:
    """All settings: name to (group, field)."""
    return {
        name: (group, field)
        for group, model in groups_of(kind).items()
        for name, field in model.model_fields.items()
    }


def closest(word: str, known: Iterable[str]) -> str:
    """End of a message: the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "`--help` lists the settings."


# --------------------------------------------------------------------------------------- flags


def _types(field: FieldInfo) -> tuple[Any, ...]:
    """Types a field may take, without None."""
    annotation: Any = field.annotation
    choices = get_args(annotation)
    if type(None) in choices:
        return tuple(choice for choice in choices if choice is not type(None))
    return (annotation,)


def _base_type(annotation: Any) -> Any:
    """`int` of Annotated[int, ...]."""
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _number(kind: type) -> Any:
    """Argparse type that keeps what is not a number as text: the schema words the complaint."""

    def convert(text: str) -> int | float | str:
        try:
            return int(text) if kind is int else float(text)
        except ValueError:
            return text

    return convert


def _add_flag(group: Any, name: str, field: FieldInfo) -> None:
    """One setting as a flag; a switch also gets --no_..., to overrule a file."""
    kind = _base_type(_types(field)[0])
    text = (field.description or "").replace("%", "%%")
    default = field.get_default(call_default_factory=True)
    if not field.is_required() and default not in (None, []) and kind is not bool:
        text += f" (default: {default})"
    flag, common = f"--{name}", {"dest": name, "default": argparse.SUPPRESS}
    if kind is bool:
        extra = ["-v"] if name == "verbose" else []
        group.add_argument(*extra, flag, action="store_true", help=text, **common)
        group.add_argument(f"--no_{name}", action="store_false", help=argparse.SUPPRESS, **common)
    elif kind in (int, float):
        group.add_argument(
            flag, type=_number(kind), metavar=kind.__name__.upper(), help=text, **common
        )
    elif getattr(kind, "__origin__", None) is list:
        group.add_argument(flag, nargs="+", action="extend", metavar="TEXT", help=text, **common)
    elif choices := get_args(kind):
        metavar = "{" + ",".join(choices) + "}"
        group.add_argument(flag, metavar=metavar, help=text, **common)
    else:
        metavar = "PATH" if kind is Path else "TEXT"
        group.add_argument(flag, metavar=metavar, help=text, **common)


def build_parser() -> argparse.ArgumentParser:
    """Command line made from the schema, one section of --help per group."""
    parser = argparse.ArgumentParser(
        prog="train_dreambooth.py",
        usage="%(prog)s --instance_data_dir FOLDER --instance_prompt TEXT [settings]",
        description="Train a concept from a few pictures with a low-rank adapter.",
        epilog="Precedence: flag, then --config file, then default.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    add_settings(parser, TrainConfig)
    return parser


def add_settings(parser: argparse.ArgumentParser, kind: Kind, without: Sequence[str] = ()) -> None:
    """Declare a flag for every setting, one section of --help per group, and --config.

    Args:
        parser: of the command.
        kind: which configuration.
        without: settings that the command has flags for already.
    """
    for name, model in groups_of(kind).items():
        section = parser.add_argument_group(name, (model.__doc__ or "").strip())
        for setting, field in model.model_fields.items():
            if setting not in without:
                _add_flag(section, setting, field)
        if name == "run":
            section.add_argument(
                "--config",
                type=Path,
                metavar="FILE.yaml",
                help="settings by the same names, one `name: value` per line",
                default=argparse.SUPPRESS,
            )


def normalized(argv: Sequence[str]) -> list[str]:
    """--dry-run is --dry_run; `--x -1e-3` is `--x=-1e-3`, which argparse takes for a flag.

    Args:
        argv: command line whose flags are settings.

    Returns:
        The same for argparse.
    """
    words: list[str] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            words.append("--" + name[2:].replace("-", "_") + equals + value)
        elif re.match(r"-[.0-9]", word) and words and re.fullmatch(r"--\w+", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Values of the flags that were given."""
    try:
        known, unknown = build_parser().parse_known_args(normalized(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(
            message(str(error), "command line", "`--help` shows how to use it")
        ) from error
    if unknown:
        word = unknown[0]
        if not word.startswith("-"):
            raise ConfigError(
                message(
                    f"{word!r} belongs to no flag", "command line", "put text with blanks in quotes"
                )
            )
        name = word.lstrip("-").partition("=")[0]
        raise ConfigError(
            message(
                f"--{name} is not a setting", "command line", closest(name, _fields(TrainConfig))
            )
        )
    return vars(known)


def is_verbose(argv: Sequence[str]) -> bool:
    """Whether tracebacks are wanted; asked before anything can fail."""
    return "-v" in argv or "--verbose" in argv


# ------------------------------------------------------------------------------------ checking


def _explain(error: ValidationError, sources: dict[str, str], kind: Kind) -> str:
    """First complaint of the schema in our words; the others by name."""
    issues = error.errors(include_url=False)
    first, fields = issues[0], _fields(kind)
    # Location: (group, setting, index...), (group, setting, type...) or () for a combination.
    named = [str(part) for part in first["loc"][1:] if part in fields]
    complaint = str(first["msg"]).removeprefix("Value error, ")
    name = named[0] if named else complaint.split(" ")[0].strip("'")
    where = sources.get(name, "not given")
    if first["type"] == "missing":
        return message(f"--{name} is missing", "command line", _describe(name, fields))
    if not named:
        return message(complaint, where, "change one of the two settings")
    got = reprlib.repr(first["input"])
    what = f"{name} cannot be {got}: {complaint[:1].lower()}{complaint[1:]}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        choices = [str(choice) for choice in get_args(_base_type(_types(fields[name][1])[0]))]
        return message(what, where, closest(first["input"], choices))
    others = {str(part) for issue in issues for part in issue["loc"][1:] if part in fields} - {name}
    more = f" (also wrong: {', '.join(sorted(others))})" if others else ""
    return message(what, where, _describe(name, fields) + more)


def _describe(name: str, fields: Mapping[str, tuple[str, FieldInfo]]) -> str:
    """What a setting is, from the schema."""
    return f"give {name}: {fields[name][1].description}" if name in fields else "see --help"


def make_config(values: dict[str, Any], sources: dict[str, str] | None = None) -> TrainConfig:
    """Check the settings of a DreamBooth training, see `config_of`.

    Args:
        values: setting name to value, as from YAML or flags.
        sources: setting name to where it was given, for messages.

    Returns:
        The resolved configuration. Errors are those of `config_of`.
    """
    return config_of(TrainConfig, values, sources)


def config_of(
    kind: type[AnyConfig], values: Mapping[str, Any], sources: Mapping[str, str] | None = None
) -> AnyConfig:
    """Check values by setting name and fill in what follows from them.

    Args:
        kind: which configuration.
        values: setting name to value, as from YAML or flags.
        sources: setting name to where it was given, for messages.

    Returns:
        The resolved configuration.

    Raises:
        ConfigError: an unknown name, a value out of range or of another type, a bad combination.
    """
    fields, sources = _fields(kind), dict(sources or {})
    nested: dict[str, dict[str, Any]] = {group: {} for group in groups_of(kind)}
    for name, value in values.items():
        if name not in fields:
            where = sources.get(name, "settings")
            raise ConfigError(message(f"{name} is not a setting", where, closest(name, fields)))
        if value is None and not fields[name][1].is_required():
            continue  # `variant:` with nothing after it is the default
        nested[fields[name][0]][name] = value
    try:
        config = kind.model_validate(nested).resolved()
    except ValidationError as error:
        raise ConfigError(_explain(error, sources, kind)) from error
    _check_start(config, sources)
    for name, remedy in config.idle().items():
        if values.get(name) is not None:
            logger.warning("--%s does nothing without %s", name, remedy)
    return config


def _check_start(config: TrainConfig | LlmConfig, sources: dict[str, str]) -> None:
    """Refuse a start that is small beside a step that is added to the factors, before the model is loaded."""
    scale, rate = config.adapter.start_scale, config.optimizer.step_of_factors
    if scale is None or rate is None or abs(scale) >= rate * (1 - 1e-9):
        return
    given = [name for name in ("start_scale", "learning_rate") if name in sources]
    raise ConfigError(
        message(
            f"start_scale {scale:g} is less than learning_rate {rate:g}: {config.optimizer.optimizer} adds its steps "
            "to the factors, and beside a small start their product is not small",
            ", ".join(sources[name] for name in given) or "settings",
            f"--start_scale of at least {rate:g}, or --learning_rate of at most {abs(scale):g}",
        )
    )


def _read_file(path: Path) -> dict[str, Any]:
    """Values of a settings file."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(
                message(
                    f"the settings file is larger than {MAX_FILE_BYTES} bytes",
                    str(path),
                    "give a YAML file of settings to --config",
                )
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            message(
                f"the settings file cannot be opened: {error}",
                f"--config {path}",
                "check the path and that it is UTF-8 text",
            )
        ) from error
    return parse_yaml(text, str(path))


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Read the command line and the file it names; flag, then file, then default.

    Args:
        argv: arguments without the program's name.

    Returns:
        The resolved configuration.

    Raises:
        ConfigError: anything about it that cannot work.
    """
    return read_config(TrainConfig, _parse_flags(argv))


def read_config(kind: type[AnyConfig], given: Mapping[str, Any]) -> AnyConfig:
    """Join flags and the file that they name; flag, then file, then default.

    Args:
        kind: which configuration.
        given: setting name to value of the flags that were given; "config" is the file.

    Returns:
        The resolved configuration. Errors are those of `config_of`, and a file that cannot be read.
    """
    flags = dict(given)
    path = flags.pop("config", None)
    values = _read_file(path) if path is not None else {}
    sources = dict.fromkeys(values, str(path)) | {
        name: f"--{name} on the command line" for name in flags
    }
    return config_of(kind, values | flags, sources)
