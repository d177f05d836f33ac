"""Scores of concepts for the plane of image against text similarity; they were made while the concepts were trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.gallery import Entry, Gallery
from app.storage import Owner, Storage, StorageError
from dreamrie.trainer import scored_folder
from eval.report.plane import PlanePoint
from eval.training.choice import choose
from eval.training.scorer import RECORDS, read_curve, summary

_SHEET = "pictures.png"


@dataclass(frozen=True)
class Scoring:
    """One scored step of one concept.

    Attributes:
        id: "ENTRY@STEP". entry: the concept. step: 0 is the base model.
        image, text: (mean, low, high); text may be None. kept: how well prompts are followed, as text similarity is.
        drift, copies: numbers or None. is_chosen: the scores chose it.
        sheet: its pictures, or None. adapter: id in the gallery, "" if there is none.
    """

    id: str
    entry: Entry
    step: int
    image: tuple[float, float, float]
    text: tuple[float, float, float] | None
    kept: tuple[float, float, float] | None
    drift: float | None
    copies: float | None
    is_chosen: bool
    sheet: Path | None
    adapter: str


def scored_entries(storage: Storage, gallery: Gallery, owner: Owner) -> list[Entry]:
    """Concepts that have scores.

    Args:
        storage: of the app.
        gallery: of the app.
        owner: who looks.

    Returns:
        In the order of the gallery.
    """
    return [e for e in gallery.entries(owner) if _folder(storage, owner, e) is not None]


def scorings(storage: Storage, owner: Owner, entries: Sequence[Entry]) -> list[Scoring]:
    """All scored steps of some concepts.

    Args:
        storage: of the app.
        owner: who looks.
        entries: see `scored_entries`.

    Returns:
        Concept by concept, by rising step. Steps whose pictures could not be scored are left out.
    """
    found = []
    for entry in entries:
        folder = _folder(storage, owner, entry)
        if folder is None:
            continue
        try:
            curve = read_curve(folder / RECORDS)
        except (OSError, ValueError, KeyError):
            continue  # it is being written, or somebody has edited it
        choice = choose(curve)
        for row in curve.rows:
            values = summary(curve, row)
            if "image" in values:
                chosen = choice is not None and choice.step == row.step
                found.append(_scoring(entry, folder, row.step, values, chosen))
    return found


def points(found: Sequence[Scoring]) -> list[PlanePoint]:
    """The same for the chart, with the base model once for each concept.

    Args:
        found: see `scorings`.
    """
    return [
        PlanePoint(
            id=scoring.id,
            label=f"{scoring.entry.title}, "
            + (f"step {scoring.step}" if scoring.step else "base model"),
            series=scoring.entry.title,
            image=scoring.image,
            text=scoring.text,
            is_base=scoring.step == 0,
            is_chosen=scoring.is_chosen,
        )
        for scoring in found
    ]


def _folder(storage: Storage, owner: Owner, entry: Entry) -> Path | None:
    """Where the scores of a concept are; None if it has none."""
    if entry.kind == "example":
        folder = entry.path.parent
    elif entry.kind == "run":
        try:
            folder = storage.folder(owner, "runs", entry.id.removeprefix("run:").split("@")[0])
        except StorageError:
            return None
    else:
        return None
    return folder if (folder / RECORDS).is_file() else None


def _scoring(
    entry: Entry, folder: Path, step: int, values: dict[str, Any], is_chosen: bool
) -> Scoring:
    if entry.kind == "example":  # of these only the chosen adapter is kept
        sheet = folder / f"{scored_folder(folder, step).name}.webp"
        adapter = entry.id if is_chosen else ""
    else:
        sheet = scored_folder(folder, step) / _SHEET
        adapter = f"{entry.id.split('@')[0]}@{step}" if step else ""
    return Scoring(
        id=f"{entry.id}@{step}",
        entry=entry,
        step=step,
        image=values["image"],
        text=values.get("text"),
        kept=values.get("prompts_kept"),
        drift=values.get("drift"),
        copies=values.get("copies"),
        is_chosen=is_chosen,
        sheet=sheet if sheet.is_file() else None,
        adapter=adapter,
    )
