"""Latents of the pictures, encoded once where possible, so that the VAE can leave the accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dreamrie.diffusion.data import PictureSet, View
from dreamrie.diffusion.pipeline import Posterior, encode_posterior

# Pictures at a time, and their pixels: at 512 px one, because eight seem to need more memory than the training does.
_ENCODE_BATCH, _ENCODE_PIXELS = 8, 512 * 512


class LatentCache:
    """Latents of one picture set: encoded once where a picture's views can be counted, on demand otherwise.

    Args:
        vae: encodes; not used again after construction when nothing is `uncounted`.
        pictures: the set.

    Attributes:
        uncounted: names of the pictures whose random crops are too many to keep.
    """

    def __init__(self, vae: Any, pictures: PictureSet) -> None:
        self._vae = vae
        self._pictures = pictures
        self._stored: dict[View, Posterior] = {}
        self.uncounted: list[str] = []
        views: list[View] = []
        for index, path in enumerate(pictures.paths):
            own = pictures.views_of(index)
            if own is None:
                self.uncounted.append(path.name)
            views += own or ()
        groups: dict[tuple[int, int], list[View]] = {}
        for view in views:
            groups.setdefault(pictures.size_of(view.picture), []).append(view)
        for (height, width), group in groups.items():
            count = max(1, min(_ENCODE_BATCH, _ENCODE_PIXELS // (height * width)))
            for start in range(0, len(group), count):
                self._store(group[start : start + count])

    def posterior(self, view: View) -> Posterior:
        """Mean and standard deviation for one view, (channels, height, width), on the CPU."""
        if view in self._stored:
            return self._stored[view]
        mean, std = self._encode([view])
        return Posterior(mean[0].cpu(), std[0].cpu())

    def _store(self, views: Sequence[View]) -> None:
        """Encode and keep views of one size."""
        posterior = self._encode(views)
        for row, view in enumerate(views):
            self._stored[view] = Posterior(posterior.mean[row].cpu(), posterior.std[row].cpu())

    def _encode(self, views: Sequence[View]) -> Posterior:
        """Posterior of a stack of views of one size."""
        return encode_posterior(
            self._vae, torch.stack([self._pictures.pixels(view) for view in views])
        )
