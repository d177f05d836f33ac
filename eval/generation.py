"""Draws the pictures of a scored run: which ones, from which noise, and each exactly once, whatever interrupts it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dreamrie.diffusion.adapters import adapter_off
from dreamrie.diffusion.images import list_images, load_image, save_png
from dreamrie.diffusion.pipeline import Components, sample
from dreamrie.errors import ConfigError, ImageError
from dreamrie.files import write_atomic
from dreamrie.streams import derive_seed
from eval.pictures import read_folder
from eval.prompts import PromptSet
from eval.results import PICTURES, Picture

_log = logging.getLogger(__name__)

PROTOCOL = "protocol.json"
CONCEPT, DRIFT, DRIFT_BASE = "concept", "drift", "drift-base"
# Says where something lies, not what it is: its hash stands beside it.
_LABELS = frozenset({"adapter"})


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn, with DDIM.

    Attributes:
        steps: of denoising. guidance: weight of classifier-free guidance. batch_size: pictures at a time.
    """

    steps: int
    guidance: float
    batch_size: int = 8


@dataclass(frozen=True)
class Gallery:
    """Decoded pictures of a run.

    Attributes:
        pictures: what was asked for. images: what was drawn, in the same order.
    """

    pictures: tuple[Picture, ...]
    images: tuple[Image.Image, ...]

    def of(self, kind: str) -> Gallery:
        """The part of one kind."""
        return self.keep([picture.kind == kind for picture in self.pictures])

    def keep(self, flags: Sequence[bool]) -> Gallery:
        """The part whose flag is set."""
        rows = [row for row, flag in enumerate(flags) if flag]
        return Gallery(
            tuple(self.pictures[row] for row in rows), tuple(self.images[row] for row in rows)
        )


def plan_concept(
    prompts: PromptSet, count: int, token: str, subject_class: str, seed: int, *, first: int = 0
) -> list[Picture]:
    """The pictures of the subject.

    A seed follows from (`seed`, number of the prompt, number of the picture) and from nothing else, so that every
    adapter starts from the same noise.

    Args:
        prompts: what to draw.
        count: pictures for each prompt.
        token: rare token; empty for a base model, which does not know it.
        subject_class: "dog".
        seed: of the run.
        first: number of the first prompt.

    Returns:
        Prompt after prompt, files PPP-II.png.
    """
    both = zip(prompts.full(token, subject_class), prompts.plain(subject_class), strict=True)
    return [
        Picture(
            f"{number:03d}-{image:02d}.png",
            prompt,
            text,
            derive_seed(seed, "eval", number, image),
            CONCEPT,
        )
        for number, (prompt, text) in enumerate(both, start=first)
        for image in range(count)
    ]


def plan_drift(prompts: PromptSet, seed: int) -> list[Picture]:
    """Pictures of unrelated prompts, with the adapter and from the same noise without it.

    Args:
        prompts: without subject.
        seed: of the run.

    Returns:
        Those with the adapter, then those without, in the same order.
    """
    return [
        Picture(
            f"{kind}-{number:03d}.png",
            prompt.template,
            prompt.template,
            derive_seed(seed, "eval-drift", number, 0),
            kind,
        )
        for kind in (DRIFT, DRIFT_BASE)
        for number, prompt in enumerate(prompts.prompts)
    ]


def claim_output(output: Path, protocol: Mapping[str, Any]) -> None:
    """Make a folder the home of a run, or go on with the run that lives there.

    Args:
        output: folder of the run; made if missing.
        protocol: whatever decides the pictures, as JSON can hold it.

    Raises:
        ConfigError: the folder holds a run of another protocol or pictures of unknown origin, or cannot be written.
    """
    path = output / PROTOCOL
    if path.is_file():
        _compare(path, protocol)
        return
    folder = output / PICTURES
    if folder.is_dir() and list_images(folder):
        raise ConfigError(
            f"{folder} holds pictures, but {path} does not say how they were drawn. Choose another --output."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(protocol, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise ConfigError(
            f"--output {output} cannot be written: {error}. Choose another folder."
        ) from error


def _compare(path: Path, protocol: Mapping[str, Any]) -> None:
    """Name every difference of two protocols: pictures of both must not share a mean."""
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}). Remove the folder and run again."
        ) from error
    now = json.loads(json.dumps(protocol))
    differences = [
        f"{name} was {before.get(name, 'not given')!r} and is {now.get(name, 'not given')!r}"
        for name in dict.fromkeys([*before, *now])
        if name not in _LABELS and before.get(name) != now.get(name)
    ]
    if differences:
        raise ConfigError(
            f"{path.parent} holds a run of another protocol: {'; '.join(differences)}. Pictures of both must not be "
            "mixed: choose another --output, or repeat the first command to go on with its run."
        )


def draw(
    components: Components,
    plan: Sequence[Picture],
    output: Path,
    sampling: Sampling,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Draw what is missing of this process's share.

    The batches are those of an uninterrupted run: sums of floating-point numbers depend on a batch's size, so a
    half-saved batch is drawn whole, and what was saved of it stays. With the same batch size and number of processes
    the files are the same to the byte, however often the run was stopped.

    Args:
        components: the model with its adapter.
        plan: all pictures of the run.
        output: folder of the run, claimed.
        sampling: how.
        share: (k, n): this is process k of n and draws pictures k, k + n, k + 2 n, ...

    Returns:
        Number of pictures saved.
    """
    mine = plan[share[0] :: share[1]]
    saved = 0
    for batch in _batches(mine, sampling.batch_size):
        missing = [picture for picture in batch if not _is_whole(output / PICTURES / picture.file)]
        if not missing:
            continue
        base = batch[0].kind == DRIFT_BASE
        with adapter_off(components) if base else contextlib.nullcontext():
            images = sample(
                components,
                [picture.prompt for picture in batch],
                [picture.seed for picture in batch],
                steps=sampling.steps,
                guidance_scale=sampling.guidance,
                batch_size=sampling.batch_size,
            )
        for picture, image in zip(batch, images, strict=True):
            if picture in missing:
                save_png(image, output / PICTURES / picture.file)
        saved += len(missing)
        _log.info("%s: %s drawn, %d new pictures so far", output, batch[-1].file, saved)
    return saved


def _batches(plan: Sequence[Picture], size: int) -> list[list[Picture]]:
    """Consecutive pictures, those of the base model apart."""
    parts = [
        [picture for picture in plan if (picture.kind == DRIFT_BASE) is base]
        for base in (False, True)
    ]
    return [part[start : start + size] for part in parts for start in range(0, len(part), size)]


def _is_whole(path: Path) -> bool:
    """Whether a picture is there and decodes; a damaged one is ours, so it is drawn again."""
    if not path.exists():
        return False
    try:
        load_image(path)
    except ImageError as error:
        _log.warning("%s It is drawn again.", error)
        return False
    return True


def read_drawn(output: Path, plan: Sequence[Picture]) -> Gallery:
    """Decode the pictures of a finished run.

    Args:
        output: folder of the run.
        plan: all its pictures.

    Returns:
        The pictures in the order of the plan.

    Raises:
        ImageError: some are missing, broken or of one color, or there are others.
    """
    folder = output / PICTURES
    wanted = {picture.file for picture in plan}
    found = {path.name for path in list_images(folder)}
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing:
        raise ImageError(
            f"{folder}: {len(missing)} of {len(wanted)} pictures are missing: {', '.join(missing)}. A missing picture "
            "must not make a smaller mean: run the same command again, on every process."
        )
    if extra:
        raise ImageError(f"{folder}: {', '.join(extra)} are not of this run. Remove them.")
    try:
        decoded = read_folder(folder, 1)
    except ImageError as error:
        raise ImageError(
            f"{error} These were drawn by this run and would be drawn the same again: look at the training of the "
            "adapter, or take another --seed with another --output."
        ) from error
    by_name = dict(zip(decoded.names, decoded.images, strict=True))
    return Gallery(tuple(plan), tuple(by_name[picture.file] for picture in plan))
