"""The pictures of a run as tensors, in an order that is a pure function of seed and position."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreamrie.diffusion.captions import read_captions
from dreamrie.diffusion.images import find_pictures, fit_shorter_side, map_images
from dreamrie.diffusion.streams import stream_generator
from dreamrie.errors import ConfigError

_log = logging.getLogger(__name__)


class View(NamedTuple):
    """One square of one picture.

    Attributes:
        picture: number of the picture.
        top: first row of the square, in pixels.
        left: first column of the square.
        flipped: mirrored left to right.
    """

    picture: int
    top: int
    left: int
    flipped: bool


class PictureSet:
    """Decoded pictures with their prompts, held as 8-bit tensors whose shorter side is the resolution.

    Args:
        paths: picture files; every one is decoded here, so that no bad file is met in mid-run.
        prompt: what all of them show.
        resolution: side of the squares, in pixels.
        center_crop: take the middle square instead of a random one.
        random_flip: mirror half of the views.
        captions: what each of them shows; None: the prompt says it for all.

    Attributes:
        prompt: as given.
        prompts: for each picture its caption, or the prompt.
        paths: as given.
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
    ) -> None:
        self.paths = list(paths)
        self.prompt = prompt
        self.prompts = [prompt] * len(self.paths) if captions is None else list(captions)
        self._resolution = resolution
        self._center_crop = center_crop
        self._random_flip = random_flip
        taken = map_images(self.paths, self._take)
        self._pictures = [picture for picture, _ in taken]
        small = [
            p.name for p, (_, side) in zip(self.paths, taken, strict=True) if side < resolution
        ]
        if small:
            _log.warning(
                "%d of %d pictures are smaller than %d px and were enlarged: %s",
                len(small),
                len(taken),
                resolution,
                ", ".join(small),
            )

    def __len__(self) -> int:
        return len(self.paths)

    def views_of(self, index: int) -> list[View] | None:
        """Every view of one picture that can be drawn, or None when random crops are too many to keep."""
        if not self._center_crop and self._slack(index) != (0, 0):
            return None
        flips = (False, True) if self._random_flip else (False,)
        return [View(index, *self._center(index), flip) for flip in flips]

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
        if self._center_crop:
            return View(index, *self._center(index), flipped)
        slack = self._slack(index)
        top, left = (int(share * (room + 1)) for share, room in zip(draw[1:], slack, strict=True))
        return View(index, top, left, flipped)

    def pixels(self, view: View) -> Tensor:
        """Cut a view out of its picture.

        Args:
            view: from `view_at` or `views`.

        Returns:
            (3, resolution, resolution), fp32 in [-1, 1].
        """
        rows = slice(view.top, view.top + self._resolution)
        columns = slice(view.left, view.left + self._resolution)
        square = self._pictures[view.picture][:, rows, columns]
        if view.flipped:
            square = square.flip(-1)
        return square.to(torch.float32) / 127.5 - 1.0

    def _take(self, image: Image.Image) -> tuple[Tensor, int]:
        """What is kept of a decoded picture: (3, height, width), resized, and the shorter side it had."""
        array = np.array(fit_shorter_side(image, self._resolution))
        return torch.from_numpy(array).permute(2, 0, 1).contiguous(), min(image.size)

    def _slack(self, index: int) -> tuple[int, int]:
        """Rows and columns beyond the square."""
        height, width = self._pictures[index].shape[1:]
        return height - self._resolution, width - self._resolution

    def _center(self, index: int) -> tuple[int, int]:
        """Top and left of the middle square."""
        rows, columns = self._slack(index)
        return rows // 2, columns // 2


class ConceptSet:
    """The pictures of a concept and, for prior preservation, of its class. All are decoded here, once.

    Captions in the folder (see `read_captions`) take the place of the prompt, picture by picture.

    Args:
        instance_dir: folder with the pictures of the concept.
        prompt: names the concept.
        resolution: side of the training squares in pixels; a multiple of 8.
        center_crop: take the middle square of a picture that is not square.
        random_flip: mirror half of the pictures.
        class_images: picture files of the class; none: no prior preservation.
        class_prompt: names the class.

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
        class_images: Sequence[Path] = (),
        class_prompt: str | None = None,
    ) -> None:
        if resolution < 8 or resolution % 8:
            raise ConfigError(
                f"--resolution must be a multiple of 8, at least 8; got {resolution}. A latent covers 8 x 8 pixels."
            )
        if not prompt.strip():
            raise ConfigError(
                '--instance_prompt is empty. Name the concept: "a photo of a sks dog".'
            )
        if class_images and not (class_prompt or "").strip():
            raise ConfigError('--class_prompt is empty. Name the class: "a photo of a dog".')
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
        )
        self.prior: PictureSet | None = None
        if class_images:
            self.prior = PictureSet(
                class_images,
                class_prompt or "",
                resolution=resolution,
                center_crop=center_crop,
                random_flip=random_flip,
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
