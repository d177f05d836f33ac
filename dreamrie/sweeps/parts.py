"""The file of a sweep, taken apart; and the names that its trainings get."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamrie.config import LlmConfig, RunSettings, TrainConfig, closest, parse_yaml
from dreamrie.errors import ConfigError

KEYS = ("task", "base", "concepts", "grid")
TASKS: dict[str, type[TrainConfig] | type[LlmConfig]] = {
    "dreambooth": TrainConfig,
    "llm": LlmConfig,
}
# The sweep decides on these: each run has a folder of its own, and goes on whenever it can.
# A repository of the Hub would have to have a name of its own for each run: `python -m dreamrie push` afterwards.
OWN = frozenset({"output_dir", "hub_model_id", "push_to_hub", *RunSettings.model_fields})
# A file name has 255 bytes at most, and run folders are read by people.
_LONGEST_NAME, _LONGEST_PART = 150, 40


@dataclass(frozen=True)
class Parts:
    """The file, taken apart.

    Attributes:
        task: dreambooth or llm.
        base: settings of all trainings, and base_source: where they were given.
        concepts: settings of each, with its name; none: one entry for everything.
        grid: values by setting.
    """

    task: str
    base: Mapping[str, Any]
    base_source: str
    concepts: tuple[Mapping[str, Any], ...]
    grid: Mapping[str, list[Any]]

    @classmethod
    def of(cls, content: Mapping[str, Any], path: Path, problems: list[str]) -> Parts:
        """Take the file apart, and note what has the wrong form."""
        problems += [
            f"{key} is not a part of a sweep: {closest(key, KEYS)}"
            for key in content
            if key not in KEYS
        ]
        task = content.get("task", "dreambooth")
        if not isinstance(task, str) or task not in TASKS:
            problems.append(f"task cannot be {task!r}: give {' or '.join(TASKS)}")
            task = "dreambooth"
        base, base_source = content.get("base") or {}, f"{path}, base"
        if isinstance(base, str):
            base_source = base
            base = read_yaml(Path(base).expanduser(), f"base: {base} in {path}")
            # A file of settings names a folder of its own; here each run gets one.
            base = {name: value for name, value in base.items() if name != "output_dir"}
        if not isinstance(base, dict) or not all(isinstance(name, str) for name in base):
            problems.append(
                "base is neither a list of `name: value` lines nor the path of such a file"
            )
            base = {}
        concepts = _concepts(content.get("concepts"), problems)
        grid = _grid(content.get("grid"), problems)
        for where, names in (
            ("base", base),
            *((f"concept {concept['name']}", concept) for concept in concepts),
            ("grid", grid),
        ):
            problems += [
                f"{where}: {name} is decided by the sweep; leave it out"
                for name in names
                if name in OWN
            ]
        problems += [
            f"concept {concept['name']}: {name} is varied by the grid as well; keep one of the two"
            for concept in concepts
            for name in concept
            if name in grid
        ]
        return cls(task, base, base_source, concepts, grid)

    def entries(
        self, path: Path
    ) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, str]]]:
        """Name, concept, settings of the grid, all settings, and where each was given, of every run."""
        for concept in self.concepts or ({},):
            own = {key: value for key, value in concept.items() if key != "name"}
            title = str(concept.get("name", ""))
            for values in itertools.product(*self.grid.values()):
                varied = dict(zip(self.grid, values, strict=True))
                sources = {
                    **dict.fromkeys(self.base, self.base_source),
                    **dict.fromkeys(own, f"{path}, concept {title}"),
                    **dict.fromkeys(varied, f"{path}, grid"),
                }
                yield (
                    name_of(title, varied),
                    title,
                    varied,
                    {**self.base, **own, **varied},
                    sources,
                )


def _concepts(given: Any, problems: list[str]) -> tuple[Mapping[str, Any], ...]:
    """The concepts, each with a name of its own."""
    if given is None:
        return ()
    if not isinstance(given, list) or not given:
        problems.append("concepts is not a list of entries with a name: and settings")
        return ()
    found: list[Mapping[str, Any]] = []
    for number, entry in enumerate(given, 1):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip():
            problems.append(f"concept {number} has no name; write name: and its settings")
        elif not all(isinstance(key, str) for key in entry):
            problems.append(f"concept {name}: a setting's name is no text")
        elif name in [known["name"] for known in found]:
            problems.append(f"concept {name} is there twice; names of concepts must differ")
        else:
            found.append(entry)
    return tuple(found)


def _grid(given: Any, problems: list[str]) -> dict[str, list[Any]]:
    """Settings with the values that each takes."""
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        problems.append("grid is not a list of `setting: [value, value]` lines")
        return {}
    found = {}
    for name, values in given.items():
        if not isinstance(values, list) or not values:
            problems.append(f"grid: {name} is {values!r}; give a list of values, such as [1, 2]")
        elif any(value in values[:place] for place, value in enumerate(values)):
            problems.append(f"grid: {name} has a value twice: {values!r}")
        else:
            found[name] = values
    return found


def name_of(concept: str, varied: Mapping[str, Any]) -> str:
    """Name of a run's folder.

    Args:
        concept: its name, or "".
        varied: settings of the grid.

    Returns:
        Such as `dog,learning_rate=0.01,rank=4`; what no file name may hold is replaced, and told apart by a hash.
    """
    parts = [_part(concept.lstrip("-."), concept)] if concept else []
    parts += [
        f"{setting}={_part(text := value_text(value), text)}" for setting, value in varied.items()
    ]
    name = ",".join(parts) or "run"
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{_hash(name)}"
    return name


def value_text(value: Any) -> str:
    """A setting's value as people write it."""
    if isinstance(value, list):
        return "+".join(map(value_text, value))
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "default"}[value]
    return str(value)


def _part(text: str, whole: str) -> str:
    """Text that may stand in the name of a folder; a hash tells apart what has become equal."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", text)[:_LONGEST_PART].rstrip("-.")
    return plain if plain == whole else f"{plain}-{_hash(whole)}".lstrip("-")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def read_yaml(path: Path, where: str) -> dict[str, Any]:
    """Content of a settings file.

    Args:
        path: of the file.
        where: it was named, for messages.

    Returns:
        Values by name, not yet checked.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the file cannot be opened: {error}\n"
            f"  where: {where}\n"
            "  what to do: check the path and that it is UTF-8 text"
        ) from error
    return parse_yaml(text, str(path))
