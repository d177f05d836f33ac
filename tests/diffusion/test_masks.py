"""Alpha as a weight of the loss: where it lies, what it divides by, and what it leaves alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreamrie.config import parse_config
from dreamrie.diffusion import batch as batch_module
from dreamrie.diffusion import task as task_module
from dreamrie.diffusion.data import ConceptSet, PictureSet, View
from dreamrie.errors import ImageError
from tests.diffusion.test_buckets import in_fp64, squared_errors
from tests.diffusion.test_task import gradients, make_task, rows_of
from tests.small_models import write_pictures
from tests.small_settings import NEEDED

MASKED = {"mask": True}


def lopsided(width: int, height: int) -> np.ndarray[Any, Any]:
    """An alpha without any symmetry: a wedge that grows to the right and down, with steps of its own."""
    across = np.linspace(0, 1, width)[None, :]
    down = np.linspace(0, 1, height)[:, None]
    alpha = 255 * (0.7 * across**2 + 0.3 * down) * (across + 0.5 * down > 0.25)
    return alpha.round().astype(np.uint8)


def write_transparent(path: Path, size: tuple[int, int], alpha: np.ndarray[Any, Any]) -> Path:
    """A noisy picture with this alpha."""
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(np.dstack([noise, alpha])).save(path)
    return path


def block_mean(pixels: np.ndarray[Any, Any], block: int) -> np.ndarray[Any, Any]:
    """Mean over squares of `block` pixels, in fp64."""
    height, width = pixels.shape
    shape = (height // block, block, width // block, block)
    return pixels.astype(np.float64).reshape(shape).mean(axis=(1, 3))


def transparent_folder(folder: Path) -> Path:
    """Two pictures with an alpha, two without, all square."""
    write_pictures(folder, 2, 64, seed=4)
    for number in range(2):
        alpha = np.roll(lopsided(64, 64), 20 * number, axis=0)
        write_transparent(folder / f"see-through-{number}.png", (64, 64), alpha)
    return folder


def law_the_mask_is_cut_and_mirrored_as_the_picture(impl: Any) -> None:
    """Random crops, flips: the mask of a row is the block mean of the alpha under that view (fp32; measured 5e-7)."""
    with tempfile.TemporaryDirectory() as place:
        alpha = lopsided(112, 64)
        write_transparent(Path(place) / "wide.png", (112, 64), alpha)
        task = make_task(
            impl, folder=Path(place), prior=False, flip=True, pictures=MASKED, batch_size=1
        )
    seen = set()
    for step in range(1, 25):
        view = task.concept.instance.view_at(5, "training/concept", step - 1)
        seen.add(view)
        part = alpha[:, view.left : view.left + 64]
        wanted = block_mean(part[:, ::-1] if view.flipped else part, 8) / 255
        (found,) = task.batch(step, 0).masks
        assert found.shape == (1, 8, 8)
        assert np.abs(found[0].double().numpy() - wanted).max() < 2.5e-6
    assert {view.flipped for view in seen} == {False, True}
    assert len({view.left // 8 for view in seen}) > 3


def law_the_mask_is_an_area_mean_of_the_alpha(impl: Any) -> None:
    """A picture of twice the size, in a square and in a bucket: the mean over 16 x 16 pixels, to a level of 255.

    Measured 0.8 levels: the filter rounds to 8 bits after its pass along the rows and again along the columns.
    """
    for size, unit, cut in (((128, 128), None, 0), ((160, 112), 16, 4)):
        width, height = size
        alpha = lopsided(width, height)
        with tempfile.TemporaryDirectory() as place:
            write_transparent(Path(place) / "big.png", size, alpha)
            pictures = {**MASKED, "bucket_unit": unit}
            task = make_task(impl, folder=Path(place), prior=False, pictures=pictures, batch_size=1)
        (found,) = task.batch(1, 0).masks
        wanted = block_mean(alpha[2 * cut : height - 2 * cut], 16) / 255
        assert np.abs(found[0].double().numpy() - wanted).max() < 1 / 255
        # Neither the middle pixel nor a neighbour would do.
        assert np.abs(alpha[2 * cut + 8 : height - 2 * cut : 16, 8::16] / 255 - wanted).max() > 0.02


def law_a_masked_loss_is_the_weighted_mean(impl: Any) -> None:
    """sum(mask * err) / sum(mask) for each picture, then the mean over pictures (fp64; measured 2e-16 and 1e-15)."""
    with tempfile.TemporaryDirectory() as place:
        folder = transparent_folder(Path(place))
        task = make_task(impl, "sd2-v", folder=folder, pictures=MASKED, batch_size=4)
    task.model.double()
    batch = in_fp64(task.batch(1, 0))
    assert sum(mask is not None for mask in batch.masks) == 2
    errors = []
    for squared, mask in zip(squared_errors(task, batch), batch.masks, strict=True):
        each = torch.ones_like(squared[:1]) if mask is None else mask
        assert mask is None or 0.1 < float(each.mean()) < 0.7
        errors.append((each * squared).sum() / each.expand_as(squared).sum())
    wanted = torch.stack(errors[:4]).mean() + torch.stack(errors[4:]).mean()
    loss = task.loss(batch)
    assert abs(float((loss / wanted).detach()) - 1) < 5e-15
    found, right = gradients(task, loss), gradients(task, wanted)
    assert float((found - right).norm() / right.norm()) < 1e-14


def law_transparent_parts_have_no_gradient(impl: Any) -> None:
    """An error counts by mask / sum(mask), so where the mask is 0 it changes nothing (fp64; measured 1e-17)."""
    mask = torch.zeros(1, 6, 5, dtype=torch.float64)
    mask[0, 1:3, 2:4] = torch.tensor([[0.25, 1.0], [0.5, 0.75]], dtype=torch.float64)
    squared = torch.rand(1, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(impl.picture_errors(squared, [mask])[0], squared)
    wanted = (mask / 2.5 / 4).expand(4, -1, -1)
    assert float((slope[0] - wanted).abs().max()) < 1e-16


def law_rows_without_alpha_are_unchanged_to_the_bit(impl: Any) -> None:
    """Alone, and beside rows with a mask, whatever these hold: error.flatten(1).mean(1)."""
    squared = torch.rand(6, 4, 7, 9, generator=torch.Generator().manual_seed(1)) ** 2
    plain = squared.flatten(1).mean(1)
    mask = torch.rand(1, 7, 9, generator=torch.Generator().manual_seed(2))
    for masks in ([None] * 6, [None, mask, None, None, mask, None]):
        found = impl.picture_errors(squared, masks)
        for row, of_row in enumerate(masks):
            assert torch.equal(found[row], plain[row]) == (of_row is None)


LAWS = (
    (law_the_mask_is_cut_and_mirrored_as_the_picture, task_module),
    (law_the_mask_is_an_area_mean_of_the_alpha, task_module),
    (law_a_masked_loss_is_the_weighted_mean, task_module),
    (law_transparent_parts_have_no_gradient, batch_module),
    (law_rows_without_alpha_are_unchanged_to_the_bit, batch_module),
)


@pytest.mark.parametrize(("law", "impl"), LAWS, ids=lambda value: value.__name__)
def test_law(law: Any, impl: Any) -> None:
    law(impl)


def test_opaque_pictures_train_the_same_with_and_without_masks(tmp_path: Path) -> None:
    """To the bit, class pictures included; an alpha of 255 everywhere is none."""
    write_pictures(tmp_path, 3, 64)
    opaque = np.full((64, 64), 255, dtype=np.uint8)
    write_transparent(tmp_path / "opaque.png", (64, 64), opaque)
    tasks = [make_task(folder=tmp_path, pictures=pictures) for pictures in ({}, MASKED)]
    losses = [[task.loss(task.batch(step, 0)) for step in (1, 2, 3)] for task in tasks]
    assert all(map(torch.equal, *losses))
    assert tasks[1].concept.instance.transparent == []
    assert set(tasks[1].batch(1, 0).masks) == {None}


def test_transparent_class_pictures_count_whole(tmp_path: Path) -> None:
    alpha = lopsided(64, 64)
    path = write_transparent(tmp_path / "class.png", (64, 64), alpha)
    folder = transparent_folder(tmp_path / "concept")
    concept = ConceptSet(
        folder, "a sks dog", resolution=64, mask=True, class_images=[path], class_prompt="a dog"
    )
    assert concept.instance.transparent == ["see-through-0.png", "see-through-1.png"]
    assert concept.prior is not None
    assert concept.prior.alpha(View(0, 0, 0, False)) is None
    masked = [concept.instance.alpha(View(row, 0, 0, False)) is not None for row in range(4)]
    assert masked == [False, False, True, True]


def test_a_masked_batch_is_the_sum_of_its_rows(tmp_path: Path) -> None:
    """N2: masked rows add up as others do (fp64; measured 0)."""
    task = make_task(folder=transparent_folder(tmp_path), pictures=MASKED, batch_size=4)
    task.model.double()
    batch = in_fp64(task.batch(1, 0))
    parts = sum(task.loss(rows_of(batch, [row])) for row in range(8))
    assert abs(float((parts / task.loss(batch)).detach()) - 1) < 5e-15


@pytest.mark.parametrize(
    ("name", "rgb"),
    [
        ("white", (255, 255, 255)),
        ("black", (0, 0, 0)),
        ("grey", (128, 128, 128)),
        ("#0a80FE", (10, 128, 254)),
    ],
)
def test_the_background_shows_where_a_picture_is_transparent(
    tmp_path: Path, name: str, rgb: tuple[int, int, int]
) -> None:
    """Half opaque red, a quarter half transparent, a quarter transparent."""
    array = np.zeros((64, 64, 4), dtype=np.uint8)
    array[..., 0], array[:32, :, 3], array[32:, :32, 3] = 255, 255, 128
    Image.fromarray(array).save(tmp_path / "red.png")
    color = parse_config([*NEEDED, "--background_color", name]).data.background_rgb
    assert color == rgb
    pictures = PictureSet([tmp_path / "red.png"], "x", resolution=64, background=color)
    assert pictures.transparent == ["red.png"]
    pixels = (pictures.pixels(View(0, 0, 0, False)) + 1) * 127.5
    mixed = [255 * 128 / 255 + rgb[0] * 127 / 255, *(part * 127 / 255 for part in rgb[1:])]
    for place, wanted in (((10, 10), (255, 0, 0)), ((50, 10), mixed), ((50, 50), rgb)):
        found = pixels[:, place[0], place[1]].tolist()
        assert np.abs(np.array(found) - wanted).max() <= 1


def test_pictures_that_show_nothing_are_named_together(tmp_path: Path) -> None:
    """Transparent everywhere, or in the middle square that is all that training would see."""
    empty, edge = np.zeros((64, 128), dtype=np.uint8), np.zeros((64, 128), dtype=np.uint8)
    edge[:, :20] = 255
    paths = [
        write_transparent(tmp_path / "edge.png", (128, 64), edge),
        write_transparent(tmp_path / "empty.png", (128, 64), empty),
        *write_pictures(tmp_path, 1),
    ]
    with pytest.raises(ImageError) as caught:
        PictureSet(paths, "x", resolution=64, mask=True, center_crop=True)
    for word in ("2 of 3 files", "edge.png", "empty.png", "--alpha background"):
        assert word in str(caught.value)
    with pytest.raises(ImageError, match=r"1 of 3 files(.|\n)*empty\.png"):
        PictureSet(paths, "x", resolution=64, mask=True)
    with pytest.raises(ImageError, match=r"1 of 3 files(.|\n)*empty\.png"):
        PictureSet(paths, "x", resolution=64, mask=True, bucket_unit=16)
    assert PictureSet(paths, "x", resolution=64).transparent == ["edge.png", "empty.png"]


def test_a_random_crop_always_shows_something(tmp_path: Path) -> None:
    """Only squares that hold an opaque pixel are drawn, each of them; without a mask, all squares."""
    alpha = np.zeros((64, 200), dtype=np.uint8)
    alpha[30, 12], alpha[5, 190] = 1, 255
    path = write_transparent(tmp_path / "sparse.png", (200, 64), alpha)
    lefts = []
    for mask in (True, False):
        pictures = PictureSet([path], "x", resolution=64, mask=mask)
        views = [pictures.view_at(0, "s", position) for position in range(1500)]
        lefts.append({view.left for view in views})
        if mask:
            shown = [pictures.alpha(view) for view in views[:200]]
            assert all(part is not None and float(part.sum()) > 0 for part in shown)
    assert lefts[0] == set(range(13)) | set(range(127, 137))
    assert lefts[1] == set(range(137))


def test_a_picture_with_one_square_that_shows_something_is_encoded_once(tmp_path: Path) -> None:
    alpha = np.zeros((64, 128), dtype=np.uint8)
    alpha[:, 0] = 255
    path = write_transparent(tmp_path / "edge.png", (128, 64), alpha)
    pictures = PictureSet([path], "x", resolution=64, mask=True)
    assert pictures.views() == [View(0, 0, 0, False)]
