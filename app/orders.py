"""From what a user asks for to pictures: which to draw, with which settings, and the work that draws them."""

from __future__ import annotations

import json
import secrets
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from app.asked import AskError, Generate
from app.drawing import DrawingProcess, ModelFacts
from app.fresh import fresh_folder
from app.gallery import Entry
from app.jobs import Progress
from app.storage import Owner, Storage

Look = Literal[
    "beside the base model", "by itself", "at rising strength", "at falling rank", "base model only"
]
LOOKS: tuple[Look, ...] = get_args(Look)
SEEDS = 2**32
# Strengths of a strip; 1 is as trained.
_STRIP_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
_LONGEST_STRIP = 8
_KEPT_ORDERS = 200
_ZIP = "pictures.zip"


@dataclass(frozen=True)
class Drawn:
    """One picture that was drawn.

    Attributes:
        file: PNG, which also carries its settings.
        caption: in words. settings: all that it takes to draw it again.
    """

    file: Path
    caption: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a drawing job has made.

    Attributes:
        pictures: in the order in which they are shown.
        columns: how many belong side by side.
        seed: of the first picture.
        archive: zip file of the pictures and `settings.json`.
    """

    pictures: list[Drawn]
    columns: int
    seed: int
    archive: Path


@dataclass(frozen=True)
class _Use:
    """An adapter in one picture."""

    entry: Entry
    scale: float
    rank: int | None


def plan(
    asked: Generate, entries: Sequence[Entry], look: Look, base: str
) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """Say which pictures an order means.

    Args:
        asked: checked.
        entries: of its adapters, in the same order.
        look: how they are shown.
        base: id of the base model, for the settings.

    Returns:
        Caption and settings of each picture, and how many belong side by side.

    Raises:
        AskError: the look needs an adapter and none was chosen, or more than one.
    """
    seed = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed
    seeds = [(seed + number) % SEEDS for number in range(asked.count)]
    uses = [
        _Use(entry, choice.scale, None if choice.rank == entry.rank else choice.rank)
        for entry, choice in zip(entries, asked.adapters, strict=True)
    ]
    if look in {"at rising strength", "at falling rank"} and len(uses) != 1:
        raise AskError(f'"{look}" shows one concept: choose exactly one, {len(uses)} are chosen.')
    with_name = "with " + " and ".join(use.entry.title for use in uses)
    if not uses or look == "base model only":
        rows = [("base model", value, []) for value in seeds]
        columns = min(len(rows), 4)
    elif look == "beside the base model":
        rows = [row for v in seeds for row in (("base model", v, []), (with_name, v, uses))]
        columns = 2
    elif look == "by itself":
        rows = [(with_name, value, uses) for value in seeds]
        columns = min(len(rows), 4)
    else:
        rows = _strip(uses[0], look, seeds[0])
        columns = len(rows)
    pictures = [
        (f"{caption} · seed {value}", _settings(asked, used, value, base))
        for caption, value, used in rows
    ]
    return pictures, columns


def _strip(use: _Use, look: Look, seed: int) -> list[tuple[str, int, list[_Use]]]:
    """One concept, a little different from picture to picture."""
    if look == "at rising strength":
        return [
            (f"strength {scale:g}", seed, [_Use(use.entry, scale, use.rank)] if scale else [])
            for scale in _STRIP_SCALES
        ]
    top = use.entry.rank
    ranks = sorted({round(top ** (k / (_LONGEST_STRIP - 1))) for k in range(_LONGEST_STRIP)})
    if top <= _LONGEST_STRIP:
        ranks = list(range(1, top + 1))
    return [
        (f"rank {rank} of {top}", seed, [_Use(use.entry, use.scale, rank)])
        for rank in reversed(ranks)
    ]


def _settings(asked: Generate, uses: Sequence[_Use], seed: int, base: str) -> dict[str, Any]:
    """All that it takes to draw a picture again."""
    return {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "seed": seed,
        "steps": asked.steps,
        "guidance_scale": asked.guidance,
        "width": asked.width,
        "height": asked.height,
        "base_model": base,
        "adapters": [
            {
                "id": use.entry.id,
                "title": use.entry.title,
                "scale": use.scale,
                "rank": use.rank,
                "path": use.entry.path,
            }
            for use in uses
        ],
    }


class DrawWork:
    """Implements `app.jobs.Work`: draw the pictures of one order.

    Args:
        storage: where the pictures go.
        owner: whose they are.
        drawing: the process that draws.
        planned: see `plan`.
        columns: see `plan`.
    """

    name = "pictures"

    def __init__(
        self,
        storage: Storage,
        owner: Owner,
        drawing: DrawingProcess,
        planned: Sequence[tuple[str, dict[str, Any]]],
        columns: int,
    ) -> None:
        self._storage, self._owner, self._drawing = storage, owner, drawing
        self._planned, self._columns = planned, columns

    def run(self, report: Callable[[Progress], None], cancelled: threading.Event) -> Outcome:
        """Draw.

        Args:
            report: is told how far it is.
            cancelled: stops it.

        Returns:
            The pictures.
        """
        storage, owner = self._storage, self._owner
        for old in storage.names(owner, "pictures")[_KEPT_ORDERS - 1 :]:
            storage.remove(owner, "pictures", old)
        with fresh_folder(storage, owner, "pictures", self._planned[0][1]["prompt"]) as name:
            drawn = self._draw(name, report, cancelled)
            archive = storage.file(owner, "pictures", name, _ZIP)
            _pack(archive, drawn)
        return Outcome(drawn, self._columns, drawn[0].settings["seed"], archive)

    def _draw(
        self, name: str, report: Callable[[Progress], None], cancelled: threading.Event
    ) -> list[Drawn]:
        drawn, orders = [], []
        for number, (caption, settings) in enumerate(self._planned):
            file = self._storage.file(self._owner, "pictures", name, f"{number:02d}.png")
            # Where a file lies is nobody's business but the server's.
            kept = [
                {key: value for key, value in use.items() if key != "path"}
                for use in settings["adapters"]
            ]
            public = {**settings, "adapters": kept}
            used = [
                {"path": str(use["path"]), "scale": use["scale"], "rank": use["rank"]}
                for use in settings["adapters"]
            ]
            orders.append(
                {
                    **{key: settings[key] for key in ("prompt", "negative_prompt", "seed")},
                    **{key: settings[key] for key in ("steps", "width", "height")},
                    "guidance": settings["guidance_scale"],
                    "adapters": used,
                    "file": str(file),
                    "settings": public,
                }
            )
            drawn.append(Drawn(file, caption, public))
        self._drawing.draw({"id": name, "pictures": orders}, report, cancelled)
        return drawn


def _pack(archive: Path, drawn: Sequence[Drawn]) -> None:
    """All pictures and their settings in one file."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for picture in drawn:
            packed.write(picture.file, picture.file.name)
        settings = [{"file": p.file.name, "caption": p.caption, **p.settings} for p in drawn]
        packed.writestr("settings.json", json.dumps(settings, indent=2, ensure_ascii=False))


def sizes(facts: ModelFacts) -> tuple[int, ...]:
    """Sides in pixels that a model draws: its own, and half to one and a half of it in eighths.

    Args:
        facts: of the model.

    Returns:
        Multiples of the model's unit, rising.
    """
    near = {facts.resolution * eighths // 8 for eighths in range(4, 13)}
    return tuple(sorted({max(side // facts.unit, 1) * facts.unit for side in near}))
