"""Faults in pictures of several sizes, in alpha as a weight of the loss, and in what class pictures are known by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor

from dreamrie.diffusion import batch, buckets, data, framing, prior, task
from tests.diffusion import test_buckets, test_masks, test_prior_models
from tests.mutants import Mutant, replaced


@contextmanager
def patched(yielded: ModuleType, owner: Any, name: str, wrong: Any) -> Iterator[Any]:
    """Yield a module while an attribute of something that it uses is replaced."""
    with mock.patch.object(owner, name, wrong):
        yield yielded


# ----------------------------------------------------------------------------------------- sizes


def sides_rounded_apart(width: int, height: int, resolution: int, unit: int) -> tuple[int, int]:
    """Each side of the ideal rectangle to its nearest multiple, which may be 3 to 1 or 20 % too small."""
    shape = min(2.0, max(0.5, width / height)) ** 0.5
    across, down = (max(1, round(side / unit)) for side in (resolution * shape, resolution / shape))
    return across * unit, down * unit


def sides_exchanged(width: int, height: int, resolution: int, unit: int) -> tuple[int, int]:
    """Rows and columns in each other's place."""
    return _bucket_size(height, width, resolution, unit)


def longest_side(width: int, height: int, resolution: int, unit: int) -> tuple[int, int]:
    """The longer side is the resolution: strips get few pixels."""
    scale = resolution / max(width, height)
    return max(1, round(width * scale / unit)) * unit, max(1, round(height * scale / unit)) * unit


def stretched(image: Image.Image, size: tuple[int, int], *_: Any) -> Image.Image:
    """Both sides resized to the bucket, whatever becomes of the aspect."""
    return image.resize(size, Image.Resampling.LANCZOS)


def cut_at_the_corner(image: Image.Image, size: tuple[int, int], *_: Any) -> Image.Image:
    """The beginning of the picture instead of its middle."""
    scale = max(size[0] / image.width, size[1] / image.height)
    fitted = image.resize((round(image.width * scale), round(image.height * scale)))
    return fitted.crop((0, 0, *size))


# ------------------------------------------------------------------------------ loss over groups


def mean_over_groups(self: task.DreamBoothTask, model: Any, batch: task.Batch) -> Tensor:
    """Each size counts the same, however many pictures have it."""
    groups = batch.rows_by_shape()
    total = batch.weights.sum()
    parts = [
        self._group_loss(model, batch, rows) / batch.weights[rows].sum() * total for rows in groups
    ]
    return torch.stack(parts).mean()


def first_group_only(self: task.DreamBoothTask, model: Any, batch: task.Batch) -> Tensor:
    """What can be stacked with the first picture."""
    return self._group_loss(model, batch, batch.rows_by_shape()[0])


def larger_pictures_count_more(squared: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """A mean over pixels instead of pictures."""
    return squared.flatten(1).sum(1) / (4 * 8 * 8)


def times_of_the_first_rows(
    self: task.DreamBoothTask, model: Any, batch: task.Batch, rows: list[int]
) -> Tensor:
    """Timesteps are not taken along when rows are grouped."""
    times = batch.timesteps.clone()
    times[rows] = batch.timesteps[: len(rows)]
    return _group_loss(self, model, dataclasses.replace(batch, timesteps=times), rows)


def noise_of_the_batch(self: task.DreamBoothTask, step: int, micro: int) -> task.Batch:
    """Noise drawn for the batch as a whole, so that it depends on how many rows there are."""
    found = _batch(self, step, micro)
    generator = torch.Generator().manual_seed(1000 * step + micro)
    noise = tuple(torch.randn(row.shape, generator=generator) for row in found.latents)
    return dataclasses.replace(found, noise=noise)


# ----------------------------------------------------------------------------------------- masks


def alpha_not_mirrored(self: data.PictureSet, view: data.View) -> Tensor | None:
    return _alpha(self, view._replace(flipped=False))


def alpha_of_the_first_square(self: data.PictureSet, view: data.View) -> Tensor | None:
    return _alpha(self, view._replace(left=0))


def mirrored_always(self: data.PictureSet, view: data.View) -> Tensor | None:
    return _alpha(self, view._replace(flipped=True))


def shifted(alpha: Tensor | None, scale: int) -> Tensor | None:
    """One latent pixel to the right."""
    found = _latent_mask(alpha, scale)
    return None if found is None else found.roll(1, dims=-1)


def nearest(alpha: Tensor | None, scale: int) -> Tensor | None:
    """The pixel in the middle of each latent instead of the mean."""
    return None if alpha is None else alpha[:, scale // 2 :: scale, scale // 2 :: scale]


def any_opaque(alpha: Tensor | None, scale: int) -> Tensor | None:
    """A latent counts whole where anything of it shows."""
    return None if alpha is None else torch.nn.functional.max_pool2d(alpha, scale)


def divided_by_pixels(squared: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """mean(mask * err): a small subject learns slowly."""
    return torch.stack(
        [
            (row if mask is None else mask * row).mean()
            for row, mask in zip(squared, masks, strict=True)
        ]
    )


def shifted_weights(squared: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """The mask beside its picture by a latent pixel."""
    return _errors(squared, [None if mask is None else mask.roll(1, -1) for mask in masks])


def divided_by_the_batch(squared: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """One sum of masks for all pictures: opaque ones count more."""
    each = [
        torch.ones_like(row[:1]) if m is None else m for row, m in zip(squared, masks, strict=True)
    ]
    whole = torch.stack(each)
    return (whole * squared).flatten(1).sum(1) / (whole.sum() * squared.shape[1] / len(squared))


def guarded_against_zero(squared: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """A small number below the line, and a mask of ones where there is none."""
    each = [
        torch.ones_like(row[:1]) if m is None else m for row, m in zip(squared, masks, strict=True)
    ]
    parts = zip(squared, each, strict=True)
    return torch.stack([(m * row).sum() / (m.sum() * len(row) + 1e-3) for row, m in parts])


# --------------------------------------------------------------------------------- class pictures


def known_by_place(components: Any) -> dict[str, object]:
    """The path of a folder says nothing about what lies in it."""
    return {"commit": components.source.commit}


def without_the_schedule(components: Any) -> dict[str, object]:
    return {**_model_key(components), "schedule": ""}


def only_the_unet(components: Any) -> dict[str, object]:
    key = _model_key(components)
    weights = key["weights"]
    assert isinstance(weights, list)
    return {**key, "weights": weights[:1]}


_bucket_size = buckets.bucket_size
_group_loss = task.DreamBoothTask._group_loss
_batch = task.DreamBoothTask.batch
_alpha = data.PictureSet.alpha
_latent_mask = batch.latent_mask
_errors = batch.picture_errors
_model_key = prior.model_key

_SIZES = [
    Mutant(
        f"bucket sides: {name}",
        test_buckets.law_a_bucket_is_the_nearest_to_aspect_and_area,
        lambda wrong=wrong: replaced(buckets, bucket_size=wrong),  # type: ignore[misc]
        why,
    )
    for name, wrong, why in (
        ("rounded one by one", sides_rounded_apart, "32 px in units of 16 px becomes 48 x 16"),
        ("exchanged", sides_exchanged, "a portrait would be cut as a landscape"),
        ("longest is the resolution", longest_side, "the area has to stay about the same"),
    )
] + [
    Mutant(
        f"pictures of a bucket {name}",
        test_buckets.law_the_pixels_are_the_middle_of_the_picture,
        lambda wrong=wrong: patched(data, framing, "cover", wrong),  # type: ignore[misc]
        why,
    )
    for name, wrong, why in (
        ("stretched", stretched, "faces would become narrower"),
        ("cut at the corner", cut_at_the_corner, "all that is lost would be lost at one end"),
    )
]

_GROUPS = [
    Mutant(
        "mean over the sizes",
        test_buckets.law_the_loss_is_the_mean_over_pictures_of_any_size,
        lambda: patched(task, task.DreamBoothTask, "model_loss", mean_over_groups),
        "one portrait among ten squares would count half",
    ),
    Mutant(
        "pictures of the first size only",
        test_buckets.law_order_of_mixed_rows_is_irrelevant,
        lambda: patched(task, task.DreamBoothTask, "model_loss", first_group_only),
        "the others would never be learned",
    ),
    Mutant(
        "mean over pixels",
        test_buckets.law_the_loss_is_the_mean_over_pictures_of_any_size,
        lambda: replaced(task, picture_errors=larger_pictures_count_more),
        "buckets differ in area",
    ),
    Mutant(
        "timesteps stay behind",
        test_buckets.law_the_loss_is_the_mean_over_pictures_of_any_size,
        lambda: patched(task, task.DreamBoothTask, "_group_loss", times_of_the_first_rows),
        "a row is known by its number in the batch, not in its group",
    ),
    Mutant(
        "noise drawn for the batch",
        test_buckets.law_micro_batches_of_mixed_sizes_add_up,
        lambda: patched(task, task.DreamBoothTask, "batch", noise_of_the_batch),
        "accumulation would change what is learned",
    ),
    Mutant(
        "mean over the sizes of each micro-batch",
        test_buckets.law_micro_batches_of_mixed_sizes_add_up,
        lambda: patched(task, task.DreamBoothTask, "model_loss", mean_over_groups),
        "how pictures meet would weigh them",
    ),
]

_MASKS = [
    Mutant(
        f"mask {name}",
        test_masks.law_the_mask_is_cut_and_mirrored_as_the_picture,
        lambda wrong=wrong: patched(task, data.PictureSet, "alpha", wrong),  # type: ignore[misc]
        "the background would be learned and the subject left out",
    )
    for name, wrong in (
        ("not mirrored", alpha_not_mirrored),
        ("always mirrored", mirrored_always),
        ("of the first square", alpha_of_the_first_square),
    )
] + [
    Mutant(
        f"mask {name}",
        law,
        lambda wrong=wrong: replaced(task, latent_mask=wrong),  # type: ignore[misc]
        why,
    )
    for name, law, wrong, why in (
        (
            "shifted by a latent pixel",
            test_masks.law_the_mask_is_an_area_mean_of_the_alpha,
            shifted,
            "8 pixels of background at one edge, 8 of the subject lost at the other",
        ),
        (
            "from single pixels",
            test_masks.law_the_mask_is_an_area_mean_of_the_alpha,
            nearest,
            "a thin line would be there or not by chance",
        ),
        (
            "grown to whole latents",
            test_masks.law_the_mask_is_cut_and_mirrored_as_the_picture,
            any_opaque,
            "soft edges would be hard",
        ),
    )
]

_WEIGHTS = [
    Mutant(
        "masked loss divided by the number of pixels",
        test_masks.law_a_masked_loss_is_the_weighted_mean,
        lambda: replaced(task, picture_errors=divided_by_pixels),
        "a small subject would learn more slowly than a large one",
    ),
    Mutant(
        "masked loss beside its picture",
        test_masks.law_a_masked_loss_is_the_weighted_mean,
        lambda: replaced(task, picture_errors=shifted_weights),
        "a mask has to lie where the subject is",
    ),
    Mutant(
        "weights of a mask divided by its pixels",
        test_masks.law_transparent_parts_have_no_gradient,
        lambda: replaced(batch, picture_errors=divided_by_pixels),
        "the weights of a picture add up to 1",
    ),
    Mutant(
        "masks ignored",
        test_masks.law_transparent_parts_have_no_gradient,
        lambda: replaced(batch, picture_errors=lambda squared, masks: squared.flatten(1).mean(1)),
        "the color of the background would be learned",
    ),
    Mutant(
        "masks divided by their sum over the batch",
        test_masks.law_rows_without_alpha_are_unchanged_to_the_bit,
        lambda: replaced(batch, picture_errors=divided_by_the_batch),
        "a picture's weight would depend on its neighbours",
    ),
    Mutant(
        "a small number added to the sum of a mask",
        test_masks.law_rows_without_alpha_are_unchanged_to_the_bit,
        lambda: replaced(batch, picture_errors=guarded_against_zero),
        "a run without transparency must not change by a bit",
    ),
]

_CLASS_PICTURES = [
    Mutant(
        f"class pictures known {name}",
        test_prior_models.law_another_model_never_reuses,
        lambda wrong=wrong: replaced(prior, model_key=wrong),  # type: ignore[misc]
        why,
    )
    for name, wrong, why in (
        ("by the place of the model", known_by_place, "a folder can be trained further"),
        ("without the noise schedule", without_the_schedule, "v and epsilon share weights' names"),
        ("by the U-Net alone", only_the_unet, "the VAE draws, the text encoder reads"),
    )
]

MUTANTS: list[Mutant] = [*_SIZES, *_GROUPS, *_MASKS, *_WEIGHTS, *_CLASS_PICTURES]
