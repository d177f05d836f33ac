"""One micro-batch of pictures, of one or of several sizes, and how the error of each picture is weighed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d


@dataclass(frozen=True)
class Batch:
    """One micro-batch with everything random already drawn, so that its loss is a fixed function.

    Attributes:
        latents: clean latents x0 of each picture, (channels, height, width), fp32.
        noise: standard normal, of the same shapes.
        timesteps: (batch,), integers below the number of training timesteps.
        text: embeddings of the prompts, (batch, tokens, width).
        weights: (batch,), what each picture counts in the loss.
        names: what each row shows, for messages.
        masks: what each latent pixel of a picture counts, (1, height, width) in [0, 1]; None: all the same.
    """

    latents: tuple[Tensor, ...]
    noise: tuple[Tensor, ...]
    timesteps: Tensor
    text: Tensor
    weights: Tensor
    names: tuple[str, ...]
    masks: tuple[Tensor | None, ...]

    def rows_by_shape(self) -> list[list[int]]:
        """Numbers of the rows that can be stacked, group by group, in the order in which shapes first appear."""
        groups: dict[torch.Size, list[int]] = {}
        for row, latents in enumerate(self.latents):
            groups.setdefault(latents.shape, []).append(row)
        return list(groups.values())


def picture_errors(squared: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """Mean squared error of each picture, over the part that its mask shows.

    Args:
        squared: squared errors, (rows, channels, height, width).
        masks: for each row (1, height, width), not zero everywhere, or None.

    Returns:
        (rows,): sum(mask * squared) / sum(mask), the sums over channels too.
    """
    means = squared.flatten(1).mean(1)
    if all(mask is None for mask in masks):
        return means
    # A row without a mask keeps its plain mean, to the bit, whatever its neighbours have.
    parts = [
        mean if mask is None else (mask * row).sum() / (mask.sum() * len(row))
        for mean, mask, row in zip(means, masks, squared, strict=True)
    ]
    return torch.stack(parts)


def latent_mask(alpha: Tensor | None, scale: int) -> Tensor | None:
    """Average an alpha over the pixels that each latent covers.

    Args:
        alpha: (1, height, width) in [0, 1], cut and mirrored as its picture was; or None.
        scale: pixels per latent along one side.

    Returns:
        (1, height / scale, width / scale), or None.
    """
    return None if alpha is None else avg_pool2d(alpha, scale)
