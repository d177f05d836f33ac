"""One scored subject from adapter to report; what `run` does once and `paper` does for each subject."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dreamrie.diffusion.adapters import (
    find_adapter,
    load_saved_adapter,
    read_metadata,
    remove_adapter,
)
from dreamrie.diffusion.pipeline import Components, check_prompt, load_components
from dreamrie.diffusion.source import EMBEDDED, FLAG
from dreamrie.errors import ConfigError
from dreamrie.trainer import make_accelerator
from eval import pictures
from eval.generation import (
    Sampling,
    claim_output,
    draw,
    plan_concept,
    plan_drift,
)
from eval.prompts import PromptSet
from eval.results import Picture, Result, save_result
from eval.scoring import Score

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Concept:
    """One subject.

    Attributes:
        adapter: folder or file; None: the base model alone. reference: folder of real pictures.
        token: "sks", or "" if the prompts are to have none. subject_class: "dog". output: folder of the run.
    """

    adapter: Path | None
    reference: Path
    token: str
    subject_class: str
    output: Path


@dataclass(frozen=True)
class Design:
    """What is drawn of a subject.

    Attributes:
        prompts: sets, each with the number of pictures for one prompt. drift: unrelated prompts, or None.
        sampling: how; seed: first seed, from which every picture's own is derived.
    """

    prompts: tuple[tuple[PromptSet, int], ...]
    drift: PromptSet | None
    sampling: Sampling
    seed: int

    def plan(self, concept: Concept) -> list[Picture]:
        """All pictures of a subject; the drift is left out without adapter."""
        found: list[Picture] = []
        first = 0
        for prompts, count in self.prompts:
            found += plan_concept(
                prompts, count, concept.token, concept.subject_class, self.seed, first=first
            )
            first += len(prompts.prompts)
        if self.drift is not None and concept.adapter is not None:
            found += plan_drift(self.drift, self.seed)
        return found

    def backgrounds(self, concept: Concept) -> dict[str, str]:
        """Expected color by prompt, for the prompts that name one."""
        return {
            text: prompt.background
            for prompts, _ in self.prompts
            for text, prompt in zip(
                prompts.full(concept.token, concept.subject_class), prompts.prompts, strict=True
            )
            if prompt.background is not None
        }


def adapter_facts(concept: Concept) -> dict[str, str]:
    """What the adapter says about itself; a token that it was not trained with is said.

    Args:
        concept: its adapter may be None.

    Returns:
        Facts of the file's header.
    """
    facts = {} if concept.adapter is None else read_metadata(concept.adapter)
    trained = facts.get("instance_prompt", "")
    if concept.token and trained and concept.token not in trained.split():
        _log.warning(
            "the token %r does not stand in %r, which %s was trained with",
            concept.token,
            trained,
            concept.adapter,
        )
    return facts


def load_base(model: str | None, facts: Mapping[str, str]) -> tuple[Any, Components]:
    """Load the base model where this process computes.

    Args:
        model: what the user named, or None: the one that the adapter was trained on, else the embedded one.
        facts: of the adapter, see `adapter_facts`.

    Returns:
        The accelerator and the model.

    Raises:
        ConfigError: the model cannot be had.
    """
    accelerator = make_accelerator()
    revision = None
    trained_on = facts.get("base_model", "")
    if model is None and trained_on:
        model, revision = trained_on, facts.get("base_model_commit") or None
    if model == EMBEDDED:  # as protocols and adapters name it
        model = None
    try:
        with accelerator.main_process_first():  # it fills the cache that the others read
            parts = load_components(
                model,
                revision=revision,
                device=accelerator.device,
                prediction_type=facts.get("prediction_type"),
            )
    except ConfigError as error:
        raise ConfigError(str(error).replace(FLAG, "--model")) from error
    return accelerator, parts


def make_protocol(components: Components, design: Design, concept: Concept) -> dict[str, Any]:
    """Whatever decides the pictures.

    Args:
        components: base model.
        design: what is drawn.
        concept: of which subject.

    Returns:
        Values that JSON can hold.
    """
    file = None if concept.adapter is None else find_adapter(concept.adapter)
    return {
        "base_model": components.source.resolved,
        "base_model_commit": components.source.commit,
        "prediction_type": components.prediction_type,
        "adapter": None if concept.adapter is None else str(concept.adapter),
        "adapter_sha256": None if file is None else hashlib.sha256(file.read_bytes()).hexdigest(),
        "token": concept.token,
        "class": concept.subject_class,
        "prompts": [_describe(prompts) | {"images": count} for prompts, count in design.prompts],
        "drift_prompts": None
        if design.drift is None or concept.adapter is None
        else _describe(design.drift),
        "sampler": "ddim",
        "steps": design.sampling.steps,
        "guidance": design.sampling.guidance,
        "size_px": components.resolution,
        "precision": str(components.dtype).removeprefix("torch."),
        "seed": design.seed,
        "versions": {name: metadata.version(name) for name in ("diffusers", "torch")},
    }


def _describe(prompts: PromptSet) -> dict[str, Any]:
    return {"name": prompts.name, "sha256": prompts.sha256, "count": len(prompts.prompts)}


def draw_concept(
    accelerator: Any, components: Components, design: Design, concept: Concept
) -> dict[str, Any]:
    """Draw this process's share of a subject's pictures; what is there already stays.

    Args:
        accelerator: tells which process this is.
        components: base model without adapter; it carries none afterwards.
        design: what is drawn.
        concept: of which subject.

    Returns:
        The protocol.
    """
    plan = design.plan(concept)
    for prompt in dict.fromkeys(picture.prompt for picture in plan):
        check_prompt(components.tokenizer, prompt, "--prompts")
    if concept.adapter is not None:
        load_saved_adapter(components, concept.adapter)
    try:
        protocol = make_protocol(components, design, concept)
        with accelerator.main_process_first():
            claim_output(concept.output, protocol)
        share = (accelerator.process_index, accelerator.num_processes)
        draw(components, plan, concept.output, design.sampling, share)
    finally:
        remove_adapter(components)
    return protocol


def check_reference(concept: Concept) -> pictures.Folder:
    """Read the real pictures, of which at least two are needed.

    Args:
        concept: the subject.

    Returns:
        The pictures.
    """
    pictures.check_apart(concept.output / "pictures", concept.reference)
    return pictures.read_folder(concept.reference, 2)


def finish(
    concept: Concept,
    protocol: Mapping[str, Any],
    plan: Sequence[Picture],
    scores: Sequence[Score],
) -> tuple[Result, Path]:
    """Save the scores and write the report.

    Args:
        concept: the subject.
        protocol: whatever decided the pictures.
        plan: the pictures.
        scores: their scores.

    Returns:
        The result, and the path of the report.
    """
    result = Result(concept.output, protocol, str(concept.reference), tuple(plan), tuple(scores))
    save_result(result)
    # Plots are slow to import, and a process that only draws needs none.
    return result, Path(importlib.import_module("eval.report").write_report(result))
