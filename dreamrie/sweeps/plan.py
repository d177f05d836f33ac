"""What a sweep trains: a base configuration, concepts and a grid of settings, as a list of checked trainings.

    task: dreambooth                 # or llm
    base: {max_train_steps: 400}     # settings, or the path of a settings file
    concepts:
      - {name: dog, instance_data_dir: photos/dog, instance_prompt: a sks dog}
    grid:
      learning_rate: [5e-2, 1e-1]    # every combination of the lists

Of a setting that is given twice the grid or the concept counts before the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamrie.checkpoint import list_checkpoints
from dreamrie.config import (
    LlmConfig,
    TrainConfig,
    check_same_settings,
    config_of,
    to_yaml,
)
from dreamrie.diffusion.images import check_images
from dreamrie.errors import ConfigError, DreamrieError
from dreamrie.run_folder import check_output_dir
from dreamrie.sweeps.parts import Parts, read_yaml

# The module whose command line trains, and the words before its flags.
COMMANDS = {"dreambooth": ("train_dreambooth",), "llm": ("dreamrie", "train-llm")}
SEED = "seed"


@dataclass(frozen=True)
class Run:
    """One training of a sweep.

    Attributes:
        name: of its folder: the concept and what is varied.
        concept: its name; "" where the file has none.
        varied: settings of the grid.
        config: resolved settings, its folder among them.
    """

    name: str
    concept: str
    varied: Mapping[str, Any]
    config: TrainConfig | LlmConfig

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.config.output.output_dir

    @property
    def steps(self) -> int:
        """Its length."""
        return self.config.schedule.max_train_steps


@dataclass(frozen=True)
class Sweep:
    """All trainings, in the order of the file: concepts outside, the last setting of the grid inside.

    Attributes:
        task: dreambooth or llm.
        varied: names of the settings of the grid.
        runs: at least one; no two share a folder.
    """

    task: str
    varied: tuple[str, ...]
    runs: tuple[Run, ...]


def read_sweep(path: Path, output_dir: Path) -> Sweep:
    """Read a sweep, and check every training of it.

    Args:
        path: of the YAML file.
        output_dir: gets a folder for each training.

    Returns:
        The trainings; nothing was written.

    Raises:
        ConfigError: something cannot work; the message has every such entry.
    """
    content = read_yaml(path, f"--config {path}")
    check_output_dir(output_dir)
    problems: list[str] = []
    parts = Parts.of(content, path, problems)
    _refuse(problems, path)
    runs: list[Run] = []
    complaints: dict[str, list[str]] = {}
    for name, concept, varied, values, sources in parts.entries(path):
        own = {"output_dir": str(output_dir / name)}
        try:
            config = _checked(parts.task, {**values, **own}, sources)
        except ConfigError as error:
            complaints.setdefault(str(error), []).append(name)
        else:
            runs.append(Run(name, concept, varied, config))
    total = len(runs) + sum(map(len, complaints.values()))
    problems += [f"{_named(names, total)}: {text}" for text, names in complaints.items()]
    problems += _clashes(runs)
    problems += _missing_data(runs)
    _refuse(problems, path)
    return Sweep(parts.task, tuple(parts.grid), tuple(runs))


def _checked(
    task: str, values: Mapping[str, Any], sources: Mapping[str, str]
) -> TrainConfig | LlmConfig:
    """The settings of one training."""
    if task == "llm":
        return config_of(LlmConfig, values, sources)
    return config_of(TrainConfig, values, sources)


def check_folders(sweep: Sweep) -> None:
    """Refuse folders that hold trainings with other settings, before anything is trained.

    Args:
        sweep: from `read_sweep`.

    Raises:
        ConfigError: a folder holds another training, or a longer one; the message has all of them.
    """
    problems = []
    for run in sweep.runs:
        try:
            _check_folder(run)
        except DreamrieError as error:
            problems.append(f"{run.name}: {error}")
    if problems:
        raise ConfigError(
            f"{len(problems)} of {len(sweep.runs)} folders cannot be gone on with; nothing was trained\n\n"
            + "\n\n".join(problems)
            + "\n\n  what to do: name another --output_dir, or move these folders away"
        )


def _check_folder(run: Run) -> None:
    """Compare what a folder holds with what it is to hold."""
    check_output_dir(run.folder)
    place = run.folder / "config.yaml"
    if not place.is_file():
        return  # nothing was trained there
    try:
        text = place.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{place} cannot be read: {error}") from error
    check_same_settings(text, run.config, str(place))
    last = max((int(path.name.split("-")[1]) for path in list_checkpoints(run.folder)), default=0)
    if last > run.steps:
        raise ConfigError(
            f"checkpoint-{last} is beyond the end of the training, which has {run.steps} steps\n"
            f"  where: {run.folder}"
        )


def _clashes(runs: list[Run]) -> list[str]:
    """Folders that a system which ignores case would take for one, and trainings that would be done twice."""
    folders: dict[str, Run] = {}
    trainings: dict[str, Run] = {}
    found = []
    for run in runs:
        other = folders.setdefault(run.name.casefold(), run)
        if other is not run:
            found.append(
                f"{run.name} and {other.name} would share a folder; name one of the two otherwise"
            )
        nowhere = run.config.output.model_copy(update={"output_dir": Path()})
        settings = to_yaml(run.config.model_copy(update={"output": nowhere}))
        same = trainings.setdefault(settings, run)
        if same is not run:
            found.append(
                f"{run.name} and {same.name} are the same training; leave one of the two out"
            )
    return found


def _missing_data(runs: list[Run]) -> list[str]:
    """What is trained on and cannot be used; each place is looked at once."""
    places: dict[Path, str] = {}
    for run in runs:
        who = f"concept {run.concept}" if run.concept else run.name
        if isinstance(run.config, TrainConfig):
            places.setdefault(run.config.data.instance_data_dir, who)
        else:
            named = [*run.config.data.data, *run.config.validation.validation_data]
            for text in named:
                if not text.startswith("datasets:"):
                    places.setdefault(Path(text).expanduser(), who)
    found = []
    has_pictures = bool(runs) and isinstance(runs[0].config, TrainConfig)
    for place, who in places.items():
        try:
            if has_pictures:
                check_images(place)
            elif not place.exists():
                raise ConfigError(f"{place} does not exist; give a file or folder of rows")
        except DreamrieError as error:
            found.append(f"{who}: {error}")
    return found


def _named(names: list[str], total: int) -> str:
    """Whom a message is about."""
    if len(names) == total > 1:
        return f"all {total} runs"
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _refuse(problems: list[str], path: Path) -> None:
    """Raise if there is anything to say."""
    if problems:
        count = len(problems)
        what = "entry" if count == 1 else "entries"
        raise ConfigError(
            f"{count} {what} of the sweep cannot work; nothing was trained\n  where: {path}\n\n"
            + "\n\n".join(problems)
        )
