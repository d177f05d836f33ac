"""`python -m eval paper`: the paper's protocol, subject after subject, and the mean over subjects."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamrie.config import parse_yaml
from dreamrie.diffusion.adapters import read_metadata
from dreamrie.errors import ConfigError, DreamrieError
from eval.concept_scores import image_scores, text_scores
from eval.encoders import Encoder
from eval.generation import Sampling, read_drawn
from eval.options import (
    add_encoder_flags,
    check_at_least,
    load_encoders,
    read_weights,
    split_names,
    write_json,
)
from eval.pictures import Folder, read_folder
from eval.prompts import SUBJECT, Prompt, PromptSet, load_prompts
from eval.prompts.reading import read_classes
from eval.results import Result
from eval.running import Concept, Design, draw_concept, finish, load_base
from eval.scoring import Score, provenance

HELP = "the paper's protocol: 15 subjects, mean and standard error over subjects"
CONFIG = Path(__file__).with_name("paper.yaml")
CLASSES = "prompts_and_classes.txt"
BASE_SUFFIX = ", base prompt"


@dataclass(frozen=True)
class Settings:
    """Contents of a settings file; `eval/paper.yaml` says what each value rests on."""

    subjects: list[str]
    base_prompt: str
    base_images: int
    images_per_prompt: int
    token: str
    model: str
    sampler: str
    steps: int
    guidance: float
    seed: int
    encoders: list[str]


@dataclass(frozen=True)
class Subject:
    """One subject of the data set: where everything of it lies, and what is drawn of it."""

    name: str
    concept: Concept
    design: Design
    reference: Folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of this command.
    """
    add = parser.add_argument
    add("--config", type=Path, default=CONFIG, help="settings; default eval/paper.yaml")
    add("--data", type=Path, required=True, help=f"DreamBooth's folder, with {CLASSES}")
    add("--adapters", type=Path, required=True, help="folder with one adapter folder a subject")
    add("--output", type=Path, required=True)
    add("--subjects", metavar="NAME,NAME", help="some of those in the settings")
    add("--model", help="base model; default that of the settings")
    add("--batch-size", type=int, default=8, metavar="N")
    add_encoder_flags(parser, "those of the settings")
    add("--json", type=Path, help="write the table with the settings")


def run(options: argparse.Namespace) -> str:
    """Draw and score every subject.

    Args:
        options: parsed command line.

    Returns:
        The table; "" in all processes but the main one.
    """
    settings = read_settings(options.config)
    subjects = find_subjects(options, settings)
    names = options.encoders or ",".join(settings.encoders)
    files = read_weights(options.weights, split_names(names))
    accelerator, components = load_base(options.model or settings.model, {})
    encoders = load_encoders(names, files) if accelerator.is_main_process else []
    protocols = [
        draw_concept(accelerator, components, subject.design, subject.concept)
        for subject in subjects
    ]
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return ""
    results = {
        subject.name: _score(subject, protocol, encoders)
        for subject, protocol in zip(subjects, protocols, strict=True)
    }
    if options.json:
        used = {"encoders": split_names(names), "model": components.source.resolved}
        content: dict[str, Any] = {
            "settings": {**dataclasses.asdict(settings), **used},
            "subjects": _means(results),
            "provenance": provenance(next(iter(results.values())).scores),
        }
        content["summary"] = {name: _over_subjects(name, results) for name in _columns(results)}
        write_json(options.json, (json.dumps(content, indent=2) + "\n").encode())
    return table(results)


def read_settings(path: Path) -> Settings:
    """Read a settings file; every value must be there, and nothing else.

    Args:
        path: flat YAML.

    Returns:
        The settings.

    Raises:
        ConfigError: the file is missing, a setting is missing, unknown or of another type, or a number cannot work.
    """
    if not path.is_file():
        raise ConfigError(f"--config: there is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read as text ({error}).") from error
    values = parse_yaml(text, str(path))
    fields = {field.name: str(field.type) for field in dataclasses.fields(Settings)}
    missing, unknown = sorted(set(fields) - set(values)), sorted(set(values) - set(fields))
    if missing or unknown:
        raise ConfigError(
            f"{path}: missing settings: {', '.join(missing) or 'none'}; unknown ones: {', '.join(unknown) or 'none'}. "
            f"Start from a copy of {CONFIG.name}."
        )
    for name, kind in fields.items():
        if not _has_type(values[name], kind):
            raise ConfigError(f"{path}: {name} is {values[name]!r}; expected is {kind}.")
    settings = Settings(**values)
    for name in ("base_images", "images_per_prompt", "steps", "guidance"):
        check_at_least(f"{path}: {name}", values[name], 1)
    if settings.sampler != "ddim":
        raise ConfigError(f"{path}: sampler {settings.sampler!r} is unknown; allowed: ddim.")
    if settings.base_prompt.count(SUBJECT) != 1:
        raise ConfigError(f"{path}: base_prompt must hold {SUBJECT} once, where the subject goes.")
    return settings


def _has_type(value: Any, kind: str) -> bool:
    """Whether a YAML value fits an annotation of `Settings`."""
    if kind == "list[str]":
        return isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value)
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value).__name__ == kind


def find_subjects(options: argparse.Namespace, settings: Settings) -> list[Subject]:
    """Read everything that can be missing, before anything is drawn.

    Args:
        options: parsed command line.
        settings: see there.

    Returns:
        The subjects, in the order of the settings.

    Raises:
        ConfigError: a subject is unknown, or adapters or real pictures are missing; every one is named.
    """
    check_at_least("--batch-size", options.batch_size, 1)
    wanted = settings.subjects
    if options.subjects is not None:
        wanted = [name.strip() for name in options.subjects.split(",") if name.strip()]
    table_file = options.data / CLASSES
    classes = read_classes(table_file)
    unknown = [name for name in wanted if name not in classes or name not in settings.subjects]
    if unknown or not wanted:
        raise ConfigError(
            f"--subjects {', '.join(unknown) or 'names nothing'}: known are those of the settings that stand in "
            f"{table_file}: {', '.join(name for name in settings.subjects if name in classes)}."
        )
    found, faults = [], []
    for name in dict.fromkeys(wanted):
        word = classes[name]
        concept = Concept(
            options.adapters / name,
            options.data / name,
            settings.token,
            word,
            options.output / name,
        )
        design = _design(settings, load_prompts(table_file, subject_class=word), options.batch_size)
        try:
            read_metadata(options.adapters / name)
            found.append(Subject(name, concept, design, read_folder(concept.reference, 2)))
        except DreamrieError as error:
            faults.append(f"{name}: {error}")
    if faults:
        listed = "\n  ".join(faults)
        raise ConfigError(
            f"{len(faults)} of {len(wanted)} subjects cannot be scored, and nothing was drawn:\n  {listed}\n"
            "Complete them, or name the others with --subjects."
        )
    return found


def _design(settings: Settings, prompts: PromptSet, batch_size: int) -> Design:
    """The base prompt first, then the editing prompts."""
    base = PromptSet("base", (Prompt(settings.base_prompt),))
    return Design(
        ((base, settings.base_images), (prompts, settings.images_per_prompt)),
        None,
        Sampling(settings.steps, float(settings.guidance), batch_size),
        settings.seed,
    )


def _score(subject: Subject, protocol: Mapping[str, Any], encoders: Sequence[Encoder]) -> Result:
    """Scores of one subject: pictures of the base prompt, then those of the editing prompts."""
    plan = subject.design.plan(subject.concept)
    gallery = read_drawn(subject.concept.output, plan)
    number = subject.design.prompts[0][1]
    flags = [index < number for index in range(len(plan))]
    base, edits = gallery.keep(flags), gallery.keep([not flag for flag in flags])
    scores: list[Score] = []
    for encoder in encoders:
        real, drawn = (
            encoder.embed_images(part) for part in (subject.reference.images, gallery.images)
        )
        # All pictures first: report and comparison show the first score of a metric.
        scores += image_scores(encoder, gallery, drawn, subject.reference, real)
        of_base = torch.tensor(flags)
        scores += text_scores(encoder, edits, drawn[~of_base])
        likeness = image_scores(encoder, base, drawn[of_base], subject.reference, real)[0]
        scores.append(dataclasses.replace(likeness, name=encoder.image_score + BASE_SUFFIX))
    result, _ = finish(subject.concept, protocol, plan, scores)
    return result


def _columns(results: Mapping[str, Result]) -> list[str]:
    """Names of the scores, as the first subject has them."""
    return [score.name for score in next(iter(results.values())).scores]


def _means(results: Mapping[str, Result]) -> dict[str, dict[str, float]]:
    return {
        name: {score.name: score.mean for score in result.scores}
        for name, result in results.items()
    }


def _over_subjects(name: str, results: Mapping[str, Result]) -> dict[str, float | None]:
    """Mean and standard error of a score over subjects; the pictures of one subject are not independent."""
    rows = _means(results)
    values = torch.tensor([row[name] for row in rows.values()], dtype=torch.float64)
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": error, "subjects": len(values)}


def table(results: Mapping[str, Result]) -> str:
    """A line for each score and subject, the mean over subjects, and what the numbers depend on.

    Args:
        results: by subject, at least one.

    Returns:
        Lines of text.
    """
    rows = _means(results)
    width = max(len(name) for name in rows)
    lines = []
    for title in _columns(results):
        lines += [title, *(f"  {name:<{width}}  {row[title]:7.4f}" for name, row in rows.items())]
        whole = _over_subjects(title, results)
        error = whole["standard_error"]
        spread = "" if error is None else f" ± {error:.4f} standard error"
        lines += [f"  mean of {len(rows)} subjects: {whole['mean']:.4f}{spread}", ""]
    return "\n".join([*lines, *provenance(next(iter(results.values())).scores)])
