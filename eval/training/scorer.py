"""Scores a model in training on fixed prompts and seeds, and judges what it sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamrie.diffusion.adapters import adapter_off
from dreamrie.diffusion.exported import drawn_from_file
from dreamrie.diffusion.images import contact_sheet, save_png
from dreamrie.diffusion.pipeline import Components, sample
from dreamrie.errors import NumericalError
from dreamrie.files import write_atomic
from dreamrie.run_folder import ADAPTER
from dreamrie.streams import derive_seed
from dreamrie.trainer import Verdict, scored_folder
from eval import metrics
from eval.encoders import Encoder
from eval.metrics import percentile_interval
from eval.pictures import is_blank
from eval.report.curves import plot_curves
from eval.training.alarm import judge
from eval.training.choice import choose
from eval.training.curve import Curve, StepScores, Yardstick

RECORDS, PLOT = "scores.jsonl", "scores.png"
_COLUMNS = 4


@dataclass(frozen=True)
class Plan:
    """What is drawn and compared at every scoring of a run.

    Attributes:
        prompt_set: name and hash of the set that the prompts are from.
        prompts: prompt of each picture, token included. texts: the same as text similarity reads them.
        drift_prompts: unrelated prompts. reference: real pictures of the concept, at least two.
        image_encoder: for image similarity, copies and drift. text_encoder: for text similarity, if any.
        steps, guidance_scale, batch_size: of the sampler. max_steps: of the training.
        from_export: draw with the file that the run has saved for the scoring, loaded by diffusers.
    """

    prompt_set: str
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    drift_prompts: tuple[str, ...]
    reference: tuple[Image.Image, ...]
    image_encoder: Encoder
    text_encoder: Encoder | None
    steps: int
    guidance_scale: float
    batch_size: int
    max_steps: int
    from_export: bool = False


class ConceptScorer:
    """Implements `dreamrie.trainer.Scorer` for a U-Net that learns a concept.

    The seeds depend on nothing, so that steps of a run, and runs, are compared on the same noise; training draws from
    streams of its own. Writes `scores.jsonl` (every single value), `scores.png` and one sheet of pictures a scoring.

    Args:
        components: the model in training.
        plan: what to draw.
        folder: output folder of the run.
    """

    def __init__(self, components: Components, plan: Plan, folder: Path) -> None:
        self._components, self._plan, self._folder = components, plan, folder
        self._real = plan.image_encoder.embed_images(plan.reference)
        self._texts = plan.text_encoder.embed_texts(plan.texts) if plan.text_encoder else None
        _, nearest_real = metrics.copy_score(self._real, self._real)
        ceiling = float(metrics.ceiling(self._real).mean())
        self._yardstick = Yardstick(plan.prompts, ceiling, nearest_real)
        self._rows: list[StepScores] = []

    @property
    def curve(self) -> Curve:
        """All scorings so far."""
        return Curve(self._yardstick, self._rows)

    def __call__(self, step: int) -> Verdict:
        """Draw, score, record and judge.

        Args:
            step: optimizer step; 0 before training.

        Returns:
            The verdict.
        """
        row = self._score(step)
        self._rows.append(row)
        self._record()
        curve = self.curve
        choice = choose(curve)
        opinion = judge(curve, choice, self._plan.max_steps)
        best_step = choice.step if choice else None
        if len(self._rows) > 1:  # one point is no curve
            self._plot(curve, best_step)
        return Verdict(
            summary(curve, row),
            best_step,
            choice.reason if choice else "",
            opinion.message,
            opinion.is_alarm,
        )

    def state(self) -> str:
        """All scorings so far, as `scores.jsonl` holds them."""
        lines = [self._facts(), *map(as_record, self._rows)]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def restore(self, state: str) -> None:
        """Go on as after the scorings of `state`; those that were made later are made again.

        Args:
            state: from `state`, of a run with the same settings.
        """
        rows = [json.loads(line) for line in state.strip("\n").split("\n")[1:]]
        self._rows = [_from_record(row, len(self._plan.prompts)) for row in rows]
        self._record()

    def _draw(self, prompts: Sequence[str], stream: str) -> list[Image.Image] | None:
        """Pictures on the fixed seeds of a stream; None if the model draws numbers that are not finite."""
        plan = self._plan
        try:
            return sample(
                self._components,
                prompts,
                [derive_seed(0, f"score/{stream}", number) for number in range(len(prompts))],
                steps=plan.steps,
                guidance_scale=plan.guidance_scale,
                batch_size=plan.batch_size,
            )
        except NumericalError:
            return None

    @cached_property
    def _base_drift(self) -> Tensor:
        """Embeddings of the unrelated prompts as the base model draws them."""
        with adapter_off(self._components):
            pictures = self._draw(self._plan.drift_prompts, "drift")
        if pictures is None:
            raise NumericalError("the base model itself draws pictures that are not finite.")
        return self._plan.image_encoder.embed_images(pictures)

    def _as_scored(self, step: int) -> AbstractContextManager[None]:
        """The model to score: as it is in memory, or as a user of the file that was just saved will have it."""
        if not self._plan.from_export:
            return nullcontext()
        if step == 0:  # nothing has changed, so there is no file
            return adapter_off(self._components)
        return drawn_from_file(self._components, scored_folder(self._folder, step) / ADAPTER)

    def _score(self, step: int) -> StepScores:
        """All single values of one scoring."""
        plan, encoder = self._plan, self._plan.image_encoder
        base = self._base_drift
        with self._as_scored(step):
            pictures, others = self._draw(plan.prompts, "concept"), None
            if step > 0:
                others = self._draw(plan.drift_prompts, "drift")
        if pictures is None or (step > 0 and others is None):
            return _unscored(step, len(plan.prompts), ("all, their numbers are not finite",))
        folder = scored_folder(self._folder, step)
        folder.mkdir(parents=True, exist_ok=True)
        save_png(contact_sheet(pictures, columns=_COLUMNS), folder / "pictures.png")
        drawn = [*zip(pictures, plan.prompts, strict=True)]
        drawn += zip(others or [], plan.drift_prompts, strict=bool(others))
        blank = tuple(
            f"{number} ({prompt})"
            for number, (picture, prompt) in enumerate(drawn)
            if is_blank(picture)
        )
        if blank:
            return _unscored(step, len(plan.prompts), blank)
        ours = encoder.embed_images(pictures)
        text, margin = self._read(pictures, ours)
        return StepScores(
            step,
            metrics.image_similarity(ours, self._real),
            text,
            margin,
            metrics.copy_score(ours, self._real)[0],
            None if others is None else metrics.prior_drift(base, encoder.embed_images(others)),
        )

    def _read(
        self, pictures: list[Image.Image], ours: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Text similarity and prompt margin; `ours` are the pictures as the image encoder sees them."""
        plan = self._plan
        if plan.text_encoder is None or self._texts is None:
            return None, None
        seen = ours
        if plan.text_encoder is not plan.image_encoder:
            seen = plan.text_encoder.embed_images(pictures)
        distinct = list(dict.fromkeys(plan.texts))
        own = [distinct.index(text) for text in plan.texts]
        rows = self._texts[[plan.texts.index(text) for text in distinct]]
        return metrics.text_similarity(seen, self._texts), metrics.prompt_margin(seen, rows, own)

    def _record(self) -> None:
        """Write the single values of all scorings; the first line says what they depend on."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._folder / RECORDS, self.state().encode())

    def _facts(self) -> dict[str, Any]:
        """What all scores of the run depend on."""
        plan = self._plan
        encoders = [e for e in (plan.image_encoder, plan.text_encoder) if e is not None]
        return {
            "prompt_set": plan.prompt_set,
            "prompts": plan.prompts,
            "texts": plan.texts,
            "drift_prompts": plan.drift_prompts,
            "steps": plan.steps,
            "guidance_scale": plan.guidance_scale,
            "max_steps": plan.max_steps,
            "from_export": plan.from_export,
            "metrics": {
                name: metrics.VERSIONS[name]
                for name in (
                    *("image_similarity", "text_similarity", "prompt_margin"),
                    *("copy_score", "prior_drift"),
                )
            },
            "encoders": {
                e.name: {"weights_sha256": e.weights_sha256, "preprocessing": e.preprocessing}
                for e in encoders
            },
            "ceiling": self._yardstick.ceiling,
            "nearest_real": self._yardstick.nearest_real.tolist(),
        }

    def _plot(self, curve: Curve, chosen: int | None) -> None:
        """Draw the curves so far."""
        rows = [summary(curve, row) | {"step": row.step} for row in curve.rows]
        plot_curves(rows, self._folder / PLOT, chosen, curve.yardstick.ceiling)


def summary(curve: Curve, row: StepScores) -> dict[str, Any]:
    """Means with 95 % intervals of one scoring.

    Args:
        curve: of the run.
        row: one of its scorings.

    Returns:
        "image", "text" and "prompts_kept" as (mean, low, high), "drift", "copies"; or "blank" alone.
    """
    if row.blank:
        return {"blank": len(row.blank)}
    found: dict[str, Any] = {}
    draws = {"image": curve.image(row)}
    if row.text is not None:
        draws["text"] = curve.text(row)
    if curve.judges_prompts:
        draws["prompts_kept"] = curve.prompts_kept(row)
    for name, values in draws.items():
        found[name] = (float(values[0]), *percentile_interval(values[1:]))
    found["drift"] = None if row.drift is None else float(row.drift.mean())
    found["copies"] = curve.copies(row)
    return found


def as_record(row: StepScores) -> dict[str, Any]:
    """A scoring as JSON."""

    def listed(values: Tensor | None) -> list[float] | None:
        return None if values is None else values.tolist()

    if row.blank:
        return {"step": row.step, "blank": list(row.blank)}
    return {
        "step": row.step,
        "image": listed(row.image),
        "text": listed(row.text),
        "margin": listed(row.margin),
        "nearest": listed(row.nearest),
        "drift": listed(row.drift),
    }


def read_curve(path: Path) -> Curve:
    """The scorings of a run from its `scores.jsonl`.

    Args:
        path: the file.

    Returns:
        The curve.
    """
    facts, *rows = [json.loads(line) for line in path.read_text("utf-8").strip("\n").split("\n")]
    prompts = tuple(facts["prompts"])
    yardstick = Yardstick(prompts, facts["ceiling"], torch.tensor(facts["nearest_real"]))
    return Curve(yardstick, [_from_record(row, len(prompts)) for row in rows])


def _from_record(row: dict[str, Any], count: int) -> StepScores:
    """The reverse of `as_record`."""
    if row.get("blank"):
        return _unscored(row["step"], count, tuple(row["blank"]))

    def tensor(name: str) -> Tensor | None:
        return None if row[name] is None else torch.tensor(row[name], dtype=torch.float64)

    image, nearest = (torch.tensor(row[name], dtype=torch.float64) for name in ("image", "nearest"))
    return StepScores(
        row["step"], image, tensor("text"), tensor("margin"), nearest, tensor("drift")
    )


def _unscored(step: int, count: int, blank: tuple[str, ...]) -> StepScores:
    """A scoring whose pictures cannot be scored."""
    nothing = torch.full((count,), float("nan"), dtype=torch.float64)
    return StepScores(step, nothing, None, None, nothing, None, blank)
