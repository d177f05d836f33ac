"""The README.md of a run: a model card that hubs and people read, written from what the run has recorded.

The same records give the same bytes: there is no date, and no name of a folder or file of this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamrie.adapter_container import read_metadata
from dreamrie.config import parse_yaml
from dreamrie.diffusion.card_scores import Scores, read_scores, score_lines
from dreamrie.diffusion.source import ALIASES, EMBEDDED, HUB_ID, WITHDRAWN
from dreamrie.publishing import cards
from dreamrie.publishing.cards import cell as _cell
from dreamrie.publishing.cards import code as _code
from dreamrie.publishing.cards import plain as _plain
from dreamrie.publishing.cards import quoted as _quoted
from dreamrie.run_folder import ADAPTER, CARD_MARK

_MOST_SAMPLES = 6
_SAMPLE = re.compile(r"step-(\d{6,})-(\d+)\.png")
_TAGS = ("text-to-image", "diffusers", "lora", "template:sd-lora")
# Repositories whose licence is known; for others the card names none rather than a guess.
_LICENSES = {repository: "openrail++" for repository, _ in ALIASES.values()} | dict.fromkeys(
    (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "runwayml/stable-diffusion-v1-5",
        "CompVis/stable-diffusion-v1-4",
    ),
    "creativeml-openrail-m",
)


@dataclass(frozen=True)
class Base:
    """The base model as a card may name it.

    Attributes:
        hub_id: a living repository; "" for the embedded model and for local folders.
        commit: of the repository, if it is known.
        words: what it is called in a sentence.
        argument: what `from_pretrained` is given, in Python.
    """

    hub_id: str
    commit: str
    words: str
    argument: str


@dataclass(frozen=True)
class Run:
    """What a run has recorded.

    Attributes:
        facts: of the adapter file.
        settings: of `config.yaml`.
        record: of `run.json`.
        base: the base model.
        samples: prompt and relative path of the last pictures that it drew on the way.
        sample_step: step of those pictures.
        scores: None if it was not scored.
    """

    facts: Mapping[str, str]
    settings: Mapping[str, Any]
    record: Mapping[str, Any]
    base: Base
    samples: tuple[tuple[str, str], ...]
    sample_step: int
    scores: Scores | None


def leave_card(folder: Path) -> None:
    """Write the card at the end of a training, which is not lost when that fails.

    Args:
        folder: output folder of the run.
    """
    cards.leave_card(folder, write_card)


def write_card(folder: Path) -> Path:
    """Write the model card of a run.

    Args:
        folder: output folder of a run that has saved its adapter.

    Returns:
        Path of the card.

    Raises:
        ConfigError: the folder holds no run, its records are damaged, or a README.md of somebody else.
        CheckpointError: the card cannot be written; what was there before is intact.
    """
    return cards.write_card(folder, lambda of: card_text(read_run(of)))


def read_run(folder: Path) -> Run:
    """Read what a card says.

    Args:
        folder: output folder of a run that has saved its adapter.

    Returns:
        Its records. What missing or damaged ones raise goes through.
    """
    facts = read_metadata(folder / ADAPTER)
    record = json.loads((folder / "run.json").read_text("utf-8"))
    settings = parse_yaml((folder / "config.yaml").read_text("utf-8"), "config.yaml")
    step, samples = _samples(folder, settings)
    base = _base(record["base_model"])
    return Run(facts, settings, record, base, samples, step, read_scores(folder))


def card_text(run: Run) -> str:
    """The card.

    Args:
        run: what was recorded.

    Returns:
        Markdown with YAML before it; the same for the same run.
    """
    trigger = run.facts.get("instance_prompt", "")
    paragraphs = [
        "\n".join(_front_matter(run, trigger)),
        f"# LoRA: {_plain(trigger) or 'an image concept'}",
        CARD_MARK,
        "<Gallery />" if run.samples else "",
        f"A LoRA adapter for {run.base.words}. It was trained on {_pictures(run)} of one subject, to draw that subject "
        "from text.",
        f"## Trigger\nUse the words {_code(trigger)} in the prompt.",
        "## How to load it\n" + "\n".join(_snippet(run, trigger)),
        "## Training\n" + "\n".join(_training(run)),
        "## Scores\n" + "\n".join(score_lines(run.scores)),
        _sample_section(run),
        "## Pictures of people\nIf the training pictures show a person, publish or use this adapter only with that "
        "person's consent, and do not use it to deceive, harass or undress anybody.",
        f"## Licence\n{_license_words(run.base)}",
        f"Written by dreamrie {run.facts.get('dreamrie_version', '')} from the records of the run.",
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def _base(source: Mapping[str, Any]) -> Base:
    """Folders stay unnamed; what left the Hub is called by the living mirror of the same weights."""
    resolved, commit = str(source["resolved"]), str(source.get("commit") or "")
    if resolved == EMBEDDED:
        words = (
            "the small model that ships with dreamrie (64 x 64 pixels, a toy for tests and demos)"
        )
        return Base("", "", words, "embedded_directory()")
    if resolved in WITHDRAWN:
        mirror, pin = ALIASES[WITHDRAWN[resolved]]
        words = f"`{mirror}` (the same weights as `{resolved}`, which left the Hub)"
        return Base(mirror, pin or "", words, json.dumps(mirror))
    if HUB_ID.fullmatch(resolved):
        return Base(resolved, commit, f"`{resolved}`", json.dumps(resolved))
    return Base("", "", "a model from a local folder", '"FOLDER-OF-THE-BASE-MODEL"')


def _samples(folder: Path, settings: Mapping[str, Any]) -> tuple[int, tuple[tuple[str, str], ...]]:
    """The last step's pictures, with the prompts that they were drawn for."""
    place = folder / "samples"
    matches = [_SAMPLE.fullmatch(path.name) for path in place.iterdir()] if place.is_dir() else []
    found = sorted((int(m[1]), int(m[2]), m[0]) for m in matches if m)
    last = found[-1][0] if found else 0
    each = int(settings.get("num_validation_images") or 1)
    prompts = settings.get("validation_prompt") or []
    prompts = [prompts] if isinstance(prompts, str) else prompts
    rows = [
        (str(prompts[number // each]), f"samples/{name}")
        for step, number, name in found
        if step == last and number // each < len(prompts)
    ]
    return last, tuple(rows[:_MOST_SAMPLES])


def _front_matter(run: Run, trigger: str) -> list[str]:
    """What hubs read."""
    lines = ["---", "tags:", *(f"- {_quoted(tag)}" for tag in _TAGS)]
    if run.base.hub_id:
        lines += [f"base_model: {_quoted(run.base.hub_id)}", "base_model_relation: adapter"]
        license_of_base = _LICENSES.get(run.base.hub_id)
        lines += [f"license: {_quoted(license_of_base)}"] if license_of_base else []
    lines += ["library_name: diffusers", f"instance_prompt: {_quoted(trigger)}"]
    if run.samples:
        lines.append("widget:")
    for prompt, path in run.samples:
        lines += [f"- text: {_quoted(prompt)}", "  output:", f"    url: {path}"]
    return [*lines, "---"]


def _snippet(run: Run, trigger: str) -> list[str]:
    """Python that loads it with plain diffusers."""
    base = run.base
    pin = f", revision={json.dumps(base.commit)}" if base.commit else ""
    own = base.argument == "embedded_directory()"
    where = ["from dreamrie.diffusion.source import embedded_directory"] if own else []
    folder = "FOLDER-OR-HUB-ID-OF-THIS-ADAPTER"
    best = run.scores is not None and run.scores.best_step is not None
    return [
        "```py",
        "from diffusers import StableDiffusionPipeline",
        *where,
        "",
        f"pipe = StableDiffusionPipeline.from_pretrained({base.argument}{pin})",
        f'pipe.load_lora_weights("{folder}", weight_name="{ADAPTER}")',
        f"image = pipe({json.dumps(_plain(trigger), ensure_ascii=False)}).images[0]",
        "```",
        *(["", 'For the adapter in `best/` add `subfolder="best"`.'] if best else []),
    ]


def _training(run: Run) -> list[str]:
    """Facts, one a line."""
    settings, record = run.settings, run.record
    paper = " ([arXiv 2507.12142](https://arxiv.org/abs/2507.12142))"
    rank = run.facts.get("rank_trained", settings.get("rank"))
    rows = [
        ("steps", run.facts.get("steps", "not recorded")),
        ("rank", f"{rank} trained; the file has rank {run.facts.get('rank_exported', rank)}"),
        (
            "optimizer",
            f"{record['optimizer']}{paper if record['optimizer'] == 'riemannion' else ''}",
        ),
        ("start", settings.get("init")),
        *(
            [("kind", "DoRA: the norms of the rows are trained too")]
            if settings.get("use_dora")
            else []
        ),
        (
            "learning rate",
            f"{settings.get('learning_rate'):g}, {settings.get('lr_scheduler')} schedule",
        ),
        ("batch size", _batch(settings)),
        ("pictures", f"{_pictures(run)}{', with captions' if record.get('captions') else ''}"),
        ("resolution", f"{settings.get('resolution')} pixels"),
        ("prior preservation", _prior(run)),
        ("prediction type", record.get("prediction_type")),
        ("seed", settings.get("seed")),
    ]
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)]


def _batch(settings: Mapping[str, Any]) -> str:
    size, times = settings.get("train_batch_size"), settings.get("gradient_accumulation_steps") or 1
    return f"{size}" if times == 1 else f"{size} x {times} accumulated"


def _pictures(run: Run) -> str:
    count = len(run.record["pictures"]["concept"])
    return "one picture" if count == 1 else f"{count} pictures"


def _prior(run: Run) -> str:
    settings = run.settings
    if not settings.get("with_prior_preservation"):
        return "off"
    count = len(run.record["pictures"].get("class", ()))
    weight = settings.get("prior_loss_weight", 1.0)
    return f"{count} pictures of {_code(str(settings.get('class_prompt')))}, weight {weight:g}"


def _sample_section(run: Run) -> str:
    """Pictures with relative links, so that they travel with the folder."""
    if not run.samples:
        return ""
    lines = [f"## Samples\nDrawn at step {run.sample_step}, none left out or chosen by hand:", ""]
    if len(run.samples) == _MOST_SAMPLES:
        lines[0] = (
            f"## Samples\nThe first {_MOST_SAMPLES} that were drawn at step {run.sample_step}:"
        )
    lines += ["| prompt | picture |", "|---|---|"]
    lines += [
        f"| {_cell(_code(text))} | ![{number}]({path}) |"
        for number, (text, path) in enumerate(run.samples, 1)
    ]
    return "\n".join(lines)


def _license_words(base: Base) -> str:
    known = _LICENSES.get(base.hub_id)
    if known:
        return f"The base model is under {known}, which also binds what is made from it."
    return "That of the base model also binds what is made from it; see there."
