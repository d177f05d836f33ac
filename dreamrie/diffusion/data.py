"""The pictures of a run as tensors, in an order that is a pure function of seed and position."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dreamrie.diffusion.buckets import BUCKET_ASPECT
from dreamrie.diffusion.captions import read_captions
from dreamrie.diffusion.framing import Framing, Taken, take_picture
from dreamrie.diffusion.images import BACKGROUND, find_pictures
from dreamrie.errors import ConfigError, ImageError
from dreamrie.streams import stream_generator

_log = logging.getLogger(__name__)


class View(NamedTuple):
    """One part of one picture: a square, or in a bucket of its own aspect the whole.

    Attributes:
        picture: number of the picture.
        top: first row of the part, in pixels.
        left: first column of the part.
        flipped: mirrored left to right.
    """

    picture: int
    top: int
    left: int
    flipped: bool


class PictureSet:
    """Decoded pictures with their prompts, held as 8-bit tensors of the size from which training cuts its views.

    Args:
        paths: picture files; every one is decoded here, so that no bad file is met in mid-run.
        prompt: what all of them show.
        resolution: side of the squares, in pixels.
        center_crop: take the middle square instead of a random one.
        random_flip: mirror half of the views.
        captions: what each of them shows; None: the prompt says it for all.
        bucket_unit: keep the aspect of each picture, with sides that are multiples of this and an area of about
            `resolution` squared; None: squares.
        background: 8-bit RGB color behind transparent pictures.
        mask: let transparent parts count nothing in the loss.

    Attributes:
        prompt: as given.
        prompts: for each picture its caption, or the prompt.
        paths: as given.
        transparent: names of the pictures that are transparent somewhere.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        prompt: str,
        *,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        captions: Sequence[str] | None = None,
        bucket_unit: int | None = None,
        background: tuple[int, int, int] = BACKGROUND,
        mask: bool = False,
    ) -> None:
        self.paths = list(paths)
        self.prompt = prompt
        self.prompts = [prompt] * len(self.paths) if captions is None else list(captions)
        self._random_flip = random_flip
        framing = Framing(resolution, center_crop, bucket_unit, background, mask)
        self._taken = self._take_all(framing)
        self.transparent = self._names([taken.is_transparent for taken in self._taken])
        size = f"{resolution} px" if bucket_unit is None else "their training size"
        if small := self._names([taken.is_enlarged for taken in self._taken]):
            _log.warning(
                "%d of %d pictures are smaller than %s and were enlarged: %s",
                len(small),
                len(self),
                size,
                ", ".join(small),
            )
        if narrow := self._names([taken.is_cut for taken in self._taken]):
            _log.warning(
                "%d of %d pictures are narrower than 1 to %d, so their ends are cut off: %s",
                len(narrow),
                len(self),
                BUCKET_ASPECT,
                ", ".join(narrow),
            )

    def __len__(self) -> int:
        return len(self.paths)

    def views_of(self, index: int) -> list[View] | None:
        """Every view of one picture that can be drawn, or None when random crops are too many to keep."""
        tops, lefts = self._taken[index].starts
        if len(tops) > 1 or len(lefts) > 1:
            return None
        flips = (False, True) if self._random_flip else (False,)
        return [View(index, tops[0], lefts[0], flip) for flip in flips]

    def views(self) -> list[View] | None:
        """Every view of every picture, or None when those of one cannot be counted."""
        found: list[View] = []
        for index in range(len(self)):
            views = self.views_of(index)
            if views is None:
                return None
            found += views
        return found

    def view_at(self, seed: int, stream: str, position: int) -> View:
        """Choose the view for one position of an endless stream.

        Each run through the pictures is a new permutation, so that all are seen equally often.

        Args:
            seed: of the run.
            stream: name of the stream.
            position: 0, 1, 2, ...

        Returns:
            The view, the same for the same arguments.
        """
        epoch, place = divmod(position, len(self))
        order = torch.randperm(
            len(self), generator=stream_generator(seed, f"{stream}/order", epoch)
        )
        index = int(order[place])
        draw = torch.rand(3, generator=stream_generator(seed, f"{stream}/view", position)).tolist()
        flipped = self._random_flip and draw[0] < 0.5
        starts = self._taken[index].starts
        top, left = (
            row[int(share * len(row))] for share, row in zip(draw[1:], starts, strict=True)
        )
        return View(index, top, left, flipped)

    def pixels(self, view: View) -> Tensor:
        """Cut a view out of its picture.

        Args:
            view: from `view_at` or `views`.

        Returns:
            (3, height, width), fp32 in [-1, 1]; both sides are the resolution, or those of the picture's bucket.
        """
        return self._cut(self._taken[view.picture].pixels, view).to(torch.float32) / 127.5 - 1.0

    def alpha(self, view: View) -> Tensor | None:
        """Cut a view out of the alpha of its picture, if that is to weigh the loss.

        Args:
            view: from `view_at` or `views`.

        Returns:
            (1, height, width), fp32 in [0, 1], not zero everywhere; None: all of it counts.
        """
        mask = self._taken[view.picture].mask
        return None if mask is None else self._cut(mask, view).to(torch.float32) / 255.0

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width of the views of one picture, in pixels."""
        return self._taken[index].size

    def sizes(self) -> dict[tuple[int, int], int]:
        """How many pictures are used at each (height, width), the most frequent first."""
        return dict(Counter(taken.size for taken in self._taken).most_common())

    def _cut(self, tensor: Tensor, view: View) -> Tensor:
        """The part of (channels, height, width) that a view shows, mirrored if it is."""
        height, width = self.size_of(view.picture)
        part = tensor[:, view.top : view.top + height, view.left : view.left + width]
        return part.flip(-1) if view.flipped else part

    def _take_all(self, framing: Framing) -> list[Taken]:
        """Decode all pictures one after the other, and name all bad ones together."""
        found: list[Taken] = []
        failures: list[str] = []
        for path in self.paths:
            try:
                found.append(take_picture(path, framing))
            except ImageError as error:
                failures.append(str(error))
        if failures:
            listed = "\n  ".join(failures)
            raise ImageError(
                f"{len(failures)} of {len(self)} files cannot be used:\n  {listed}\nRemove or replace them."
            )
        return found

    def _names(self, which: Sequence[bool]) -> list[str]:
        """Names of some of the pictures."""
        return [path.name for path, chosen in zip(self.paths, which, strict=True) if chosen]


class ConceptSet:
    """The pictures of a concept and, for prior preservation, of its class. All are decoded here, once.

    Captions in the folder (see `read_captions`) take the place of the prompt, picture by picture.

    Args:
        instance_dir: folder with the pictures of the concept.
        prompt: names the concept.
        resolution: side of the training squares in pixels; a multiple of 8.
        center_crop: take the middle square of a picture that is not square.
        random_flip: mirror half of the pictures.
        class_images: picture files of the class, or what makes them, which is asked when the concept's pictures have
            been found to be good; none: no prior preservation.
        class_prompt: names the class.
        bucket_unit: keep the aspect of each picture (see `PictureSet`); None: squares.
        background: 8-bit RGB color behind transparent pictures.
        mask: let transparent parts of the concept's pictures count nothing; those of the class count whole.

    Attributes:
        instance: the concept.
        prior: the class, or None.
        resolution: as given.
    """

    def __init__(
        self,
        instance_dir: Path,
        prompt: str,
        *,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        class_images: Sequence[Path] | Callable[[], Sequence[Path]] = (),
        class_prompt: str | None = None,
        bucket_unit: int | None = None,
        background: tuple[int, int, int] = BACKGROUND,
        mask: bool = False,
    ) -> None:
        if resolution < 8 or resolution % 8:
            raise ConfigError(
                f"--resolution must be a multiple of 8, at least 8; got {resolution}. A latent covers 8 x 8 pixels."
            )
        if not prompt.strip():
            raise ConfigError(
                '--instance_prompt is empty. Name the concept: "a photo of a sks dog".'
            )
        self.resolution = resolution
        paths = find_pictures(instance_dir)
        captions = read_captions(instance_dir, paths, prompt)
        self.instance = PictureSet(
            paths,
            prompt,
            resolution=resolution,
            center_crop=center_crop,
            random_flip=random_flip,
            captions=captions,
            bucket_unit=bucket_unit,
            background=background,
            mask=mask,
        )
        self.prior: PictureSet | None = None
        if files := class_images() if callable(class_images) else class_images:
            if not (class_prompt or "").strip():
                raise ConfigError('--class_prompt is empty. Name the class: "a photo of a dog".')
            self.prior = PictureSet(
                files,
                class_prompt or "",
                resolution=resolution,
                center_crop=center_crop,
                random_flip=random_flip,
                bucket_unit=bucket_unit,
                background=background,
            )
        _log.info(
            "%d pictures of the concept, %s, %d of its class",
            len(self.instance),
            "without captions"
            if captions is None
            else f"each with a caption, such as {captions[0]!r}",
            len(self.prior) if self.prior else 0,
        )

    @property
    def sets(self) -> list[PictureSet]:
        """The concept, then the class if there is one."""
        return [self.instance] if self.prior is None else [self.instance, self.prior]
