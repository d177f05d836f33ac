"""The model card of a language model's adapter, and publishing both; written from what the run has recorded.

The same records give the same bytes: there is no date, and no name of a folder or file of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from dreamrie.adapter_container import read_metadata
from dreamrie.config import OutputSettings, parse_yaml
from dreamrie.llm.templates import FORMS
from dreamrie.publishing import cards
from dreamrie.publishing.hub import BEST, plain_files, publish, push_when_done
from dreamrie.run_folder import CARD, CARD_MARK, PEFT_FILES

_TAGS = ("lora", "peft", "text-generation")
_PAPER = " ([arXiv 2507.12142](https://arxiv.org/abs/2507.12142))"


@dataclass(frozen=True)
class Run:
    """What a run has recorded.

    Attributes:
        facts: of the adapter file.
        settings: of `config.yaml`.
        record: of `run.json`.
        scores: step to accuracies by name, in the order in which they were measured.
        best_step: whose adapter is in `best/`; None without scores.
    """

    facts: Mapping[str, str]
    settings: Mapping[str, Any]
    record: Mapping[str, Any]
    scores: Mapping[int, Mapping[str, float]]
    best_step: int | None

    @property
    def base(self) -> str:
        """Hub id of the base model; "" for a folder, a file or a package: only the Hub knows commits."""
        source = self.record["base_model"]
        return str(source["base_model"]) if source["base_model_commit"] else ""


def hand_over(folder: Path, output: OutputSettings, *, complete: bool) -> None:
    """What happens to the folder of a run behind its last step: a model card, and publishing if that was asked for.

    Args:
        folder: output folder, where all is saved.
        output: settings of the run.
        complete: it came to its end; a run that was stopped is not published.

    Raises:
        CheckpointError: it could not be published. Everything is in the folder, and the message says how to go on.
        ConfigError: the folder lacks something that would be published.
    """
    cards.leave_card(folder, write_card)
    push_when_done(folder, output, push, complete=complete)


def push(folder: Path, hub_model_id: str, api: HfApi | None = None) -> str:
    """Publish a run: its card and its adapter, that of `best/` too; examples, settings and records stay.

    Args:
        folder: output folder of a finished run.
        hub_model_id: OWNER/NAME, or NAME for a repository of the user's own.
        api: of the Hub, for tests.

    Returns:
        Address of the repository.

    Raises:
        ConfigError: the name is not one, or the folder holds no finished run.
        CheckpointError: the Hub is switched off, there is no valid token, or the upload failed. Nothing is lost.
    """
    return publish(folder, hub_model_id, write_card, hub_files, api)


def hub_files(folder: Path) -> dict[str, Path]:
    """Exactly the files that are published.

    Args:
        folder: output folder of a run with its model card.

    Returns:
        Path in the repository to the file.

    Raises:
        ConfigError: one of them is a link, which could lead to anything, or is missing.
    """
    names = [CARD, *PEFT_FILES]
    if (folder / BEST).exists():
        names += [f"{BEST}/{name}" for name in PEFT_FILES]
    return plain_files(folder, names)


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
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "scores" in row]
    best = folder / BEST / "best.json"
    return Run(
        read_metadata(folder / PEFT_FILES[1]),
        parse_yaml((folder / "config.yaml").read_text("utf-8"), "config.yaml"),
        json.loads((folder / "run.json").read_text("utf-8")),
        {int(row["step"]): row["scores"] for row in rows},
        int(json.loads(best.read_text("utf-8"))["step"]) if best.exists() else None,
    )


def card_text(run: Run) -> str:
    """The card.

    Args:
        run: what was recorded.

    Returns:
        Markdown with YAML before it; the same for the same run.
    """
    name = f"`{run.base}`" if run.base else "a language model from a local folder"
    paragraphs = [
        "\n".join(_front_matter(run)),
        f"# LoRA for {cards.plain(run.base) or 'a language model'}",
        CARD_MARK,
        f"A LoRA adapter in PEFT's format for {name}. It was trained on {_rows(run.record['examples'])}, on the "
        "answers alone.",
        "## How to load it\n" + "\n".join(_snippet(run)),
        "## Training\n" + "\n".join(_training(run)),
        _score_section(run),
        "## Licence\nThat of the base model also binds what is made from it; see there.",
        f"Written by dreamrie {run.facts.get('dreamrie_version', '')} from the records of the run.",
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def _front_matter(run: Run) -> list[str]:
    """What hubs read."""
    lines = ["---", "tags:", *(f"- {cards.quoted(tag)}" for tag in _TAGS)]
    if run.base:
        lines += [f"base_model: {cards.quoted(run.base)}", "base_model_relation: adapter"]
    return [*lines, "library_name: peft", "pipeline_tag: text-generation", "---"]


def _rows(counts: Mapping[str, int]) -> str:
    """How many rows of which tasks; other layouts call a task after a file, which stays unnamed."""
    known = {task: count for task, count in counts.items() if task in FORMS}
    total = sum(counts.values())
    named = [f"{count} of {task}" for task, count in known.items()]
    if named and total > sum(known.values()):
        named.append(f"{total - sum(known.values())} others")
    return f"{total} examples" + (f" ({', '.join(named)})" if named else "")


def _snippet(run: Run) -> list[str]:
    """Python that loads it with plain PEFT."""
    base = json.dumps(run.base or "FOLDER-OF-THE-BASE-MODEL")
    pin = run.record["base_model"]["base_model_commit"]
    lines = [
        "```py",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base}{f', revision={json.dumps(pin)}' if pin else ''})",
        'model = PeftModel.from_pretrained(base, "FOLDER-OR-HUB-ID-OF-THIS-ADAPTER")',
        "```",
    ]
    if run.best_step is not None:
        lines += ["", f'For the adapter of step {run.best_step} add `subfolder="best"`.']
    return lines


def _training(run: Run) -> list[str]:
    """Facts, one a line."""
    settings, optimizer = run.settings, str(run.record["optimizer"])
    rank = run.facts.get("rank_trained", settings.get("rank"))
    size, times = settings.get("train_batch_size"), settings.get("gradient_accumulation_steps") or 1
    rows = [
        ("steps", run.facts.get("steps", "not recorded")),
        ("rank", f"{rank} trained; the file has rank {run.facts.get('rank_exported', rank)}"),
        ("optimizer", optimizer + (_PAPER if optimizer == "riemannion" else "")),
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
        ("batch size", f"{size}" if times == 1 else f"{size} x {times} accumulated"),
        ("prompt", f"{settings.get('template')}, at most {settings.get('max_length')} tokens"),
        ("base weights", settings.get("quantization") or settings.get("base_precision")),
        ("seed", settings.get("seed")),
    ]
    return ["| | |", "|---|---|", *(f"| {name} | {cards.cell(value)} |" for name, value in rows)]


def _score_section(run: Run) -> str:
    """Accuracy before training, at the end, and of the adapter in `best/`."""
    if not run.scores:
        return ""
    steps = {0: "before training", max(run.scores): "at the end"}
    if run.best_step is not None:
        steps[run.best_step] = f"step {run.best_step}, in `best/`"
    lines = [
        f"## Accuracy\nOn {_rows(run.record['held_out'])} that were held out, by the likelihood of the answers:",
        "",
        "| | accuracy |",
        "|---|---|",
    ]
    for step in sorted(set(steps) & set(run.scores)):
        lines.append(f"| {steps[step]} | {run.scores[step]['accuracy']:.1%} |")
    return "\n".join(lines)
