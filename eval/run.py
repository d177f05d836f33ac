"""`python -m eval run`: draw pictures of a concept with an adapter, score them, write the report."""

from __future__ import annotations

import argparse
from pathlib import Path

from dreamrie.diffusion.components import Components
from dreamrie.diffusion.source import EMBEDDED
from dreamrie.errors import ConfigError
from eval import scoring
from eval.concept_scores import concept_scores
from eval.encoders import lpips
from eval.generation import CONCEPT, Gallery, Sampling, read_drawn
from eval.options import (
    FOR_EMBEDDED,
    FOR_PHOTOS,
    LPIPS,
    add_encoder_flags,
    check_at_least,
    load_diversity,
    load_encoders,
    read_weights,
    split_names,
    write_json,
)
from eval.prompts import FROZEN, KINDS, SUBJECT, load_prompts
from eval.results import FILE
from eval.running import (
    Concept,
    Design,
    adapter_facts,
    check_reference,
    draw_concept,
    finish,
    load_base,
)
from eval.scoring import Score, make_score

HELP = "draw pictures of a concept with an adapter, score them, write a report"

# Steps and guidance; those of the embedded model are its card's.
_REAL, _EMBEDDED = (50, 7.0), (25, 4.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of this command.
    """
    add = parser.add_argument
    add("--adapter", type=Path, help="folder of a training; left out: the base model is scored")
    add("--reference", type=Path, required=True, help="folder of at least two real pictures")
    add("--subject-class", required=True, help="what the concept is, such as dog")
    add("--token", help='rare token of the training, such as sks; "" if it had none')
    add("--prompts", help=f"{', '.join(sorted(FROZEN))}, DreamBooth's own file, or a text file")
    add(
        "--kind",
        choices=KINDS,
        default="object",
        help="which prompts, without --prompts or from DreamBooth's own file; default object",
    )
    add("--images-per-prompt", type=int, default=4, metavar="N")
    add("--output", type=Path, help="default runs/eval-ADAPTER")
    add("--model", help="base model; default that of the adapter, else the embedded one")
    add("--steps", type=int, help="of DDIM; default 50, embedded model 25")
    add("--guidance", type=float, help="default 7, embedded model 4")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=8, metavar="N")
    add_encoder_flags(parser, f"{FOR_PHOTOS}; embedded model {FOR_EMBEDDED}")
    add("--json", type=Path, help=f"a copy of OUTPUT/{FILE}")


def run(options: argparse.Namespace) -> str:
    """Draw what is missing, then score and report.

    Args:
        options: parsed command line.

    Returns:
        The table; "" in all processes but the main one.
    """
    concept = _concept(options)
    facts = adapter_facts(concept)
    reference = check_reference(concept)
    accelerator, components = load_base(options.model, facts)
    design = make_design(options, concept, components)
    embedded = components.source.resolved == EMBEDDED
    names = options.encoders or (FOR_EMBEDDED if embedded else FOR_PHOTOS)
    files = read_weights(options.weights, [*split_names(names), LPIPS])
    if accelerator.is_main_process:  # weights that cannot be had are named before the drawing
        encoders, (diversity, note) = load_encoders(names, files), load_diversity(files.get(LPIPS))
    protocol = draw_concept(accelerator, components, design, concept)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return ""
    plan = design.plan(concept)
    gallery = read_drawn(concept.output, plan)
    scores = concept_scores(encoders, gallery, reference, design.backgrounds(concept))
    scores += diversity_score(diversity, gallery)
    result, report = finish(concept, protocol, plan, scores)
    if options.json:
        write_json(options.json, (result.folder / FILE).read_bytes())
    lines = [scoring.table(scores), *([note] if note else []), f"report: {report}"]
    return "\n".join(lines)


def _concept(options: argparse.Namespace) -> Concept:
    """The subject as the flags describe it."""
    token, adapter = options.token, options.adapter
    if adapter is not None and token is None:
        raise ConfigError(
            '--token is missing: name the rare token of the training, such as sks, or "" if there was none. Without '
            "it in the prompts the adapter does not know what it is asked for."
        )
    if not options.subject_class.strip():
        raise ConfigError("--subject-class is empty. Say what the concept is, such as dog.")
    name = "base"
    if adapter is not None:
        name = (adapter if adapter.is_dir() else adapter.parent).resolve().name
    output = options.output or Path("runs") / f"eval-{name}"
    return Concept(
        adapter, options.reference, (token or "").strip(), options.subject_class.strip(), output
    )


def make_design(options: argparse.Namespace, concept: Concept, components: Components) -> Design:
    """What is drawn, with the defaults of the model.

    Args:
        options: parsed command line.
        concept: the subject.
        components: base model.

    Returns:
        The design.

    Raises:
        ConfigError: a number is out of range, or the prompts have no place for the subject.
    """
    embedded = components.source.resolved == EMBEDDED
    steps, guidance = _EMBEDDED if embedded else _REAL
    steps = steps if options.steps is None else options.steps
    guidance = guidance if options.guidance is None else options.guidance
    check_at_least("--images-per-prompt", options.images_per_prompt, 1)
    check_at_least("--steps", steps, 1)
    check_at_least("--guidance", guidance, 1)
    check_at_least("--batch-size", options.batch_size, 1)
    usual = {"object": "objects", "living": "living"}[options.kind]
    name = options.prompts or ("embedded" if embedded else usual)
    prompts = load_prompts(name, options.kind, subject_class=concept.subject_class)
    if not prompts.has_subject:
        raise ConfigError(
            f"--prompts {name}: there is no {SUBJECT} in them; they measure the drift, which every run does."
        )
    drift = load_prompts("drift-embedded" if embedded else "drift")
    sampling = Sampling(steps, float(guidance), options.batch_size)
    return Design(((prompts, options.images_per_prompt),), drift, sampling, options.seed)


def diversity_score(distance: lpips.LPIPS | None, gallery: Gallery) -> list[Score]:
    """How different the pictures of one prompt are.

    Args:
        distance: LPIPS, or None if its weights are not at hand.
        gallery: all pictures of the run.

    Returns:
        One score, keyed by prompt; none without the distance or with one picture a prompt.
    """
    concept = gallery.of(CONCEPT)
    prompts = [picture.prompt for picture in concept.pictures]
    if distance is None or len(set(prompts)) == len(prompts):
        return []
    values, names = distance.diversity(concept.images, prompts)
    return [make_score("LPIPS diversity", values, names, "diversity", distance, names)]
