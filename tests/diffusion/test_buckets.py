"""Pictures of several sizes: what size each gets, what it shows, and that the loss stays the mean over pictures."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreamrie.diffusion import buckets, data
from dreamrie.diffusion import task as task_module
from dreamrie.diffusion.pipeline import encode_posterior
from dreamrie.loi import locally_optimal_init
from tests.diffusion.test_task import gradients, make_task, rows_of
from tests.small_models import write_pictures

# Width and height of the pictures, and what they become at 64 px in units of 16 px.
SIZES = {(64, 64): (64, 64), (100, 70): (80, 48), (70, 100): (48, 80), (130, 52): (96, 48)}


@functools.cache
def mixed_folder() -> Path:
    """One noisy picture for each of `SIZES`."""
    folder = Path(tempfile.mkdtemp(prefix="dreamrie-buckets-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for number, size in enumerate(SIZES):
        (square,) = write_pictures(folder / "square", 1, 140, seed=number)
        Image.open(square).resize(size).save(folder / f"{number}.png")
    return folder


def mixed_task(impl: Any = task_module, kind: str = "sd2-eps", **options: Any) -> Any:
    """A task on pictures of four sizes, in fp64."""
    pictures = {"bucket_unit": 16, **options.pop("pictures", {})}
    task = make_task(impl, kind, folder=mixed_folder(), pictures=pictures, **options)
    task.model.double()
    return task


def in_fp64(batch: Any) -> Any:
    """The same batch with fp64 numbers."""
    return dataclasses.replace(
        batch,
        latents=tuple(row.double() for row in batch.latents),
        noise=tuple(row.double() for row in batch.noise),
        text=batch.text.double(),
        weights=batch.weights.double(),
        masks=tuple(None if mask is None else mask.double() for mask in batch.masks),
    )


def squared_errors(task: Any, batch: Any) -> list[torch.Tensor]:
    """Squared error of each row, with gradients: one U-Net call a row, noise and target by the formulas."""
    found = []
    for row, (latents, noise) in enumerate(zip(batch.latents, batch.noise, strict=True)):
        time = batch.timesteps[row : row + 1]
        kept = task.components.noise_scheduler.alphas_cumprod.double()[time]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        output = task.model(noisy[None], time, batch.text[row : row + 1]).sample[0]
        target = noise
        if task.components.prediction_type == "v_prediction":
            target = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        found.append((output - target).square())
    return found


def law_a_bucket_is_the_nearest_to_aspect_and_area(impl: Any) -> None:
    """No allowed size has a smaller product of the two ratios (exact fractions); squares stay the square."""
    for resolution, unit in ((32, 16), (64, 16), (96, 32), (512, 64)):
        sides = range(unit, 2 * resolution + 1, unit)
        allowed = [(x, y) for x in sides for y in sides if max(x, y) <= 2 * min(x, y)]

        def cost(size: tuple[int, int], aspect: Fraction, area: int = resolution**2) -> Fraction:
            ratios = Fraction(*size) / aspect, Fraction(size[0] * size[1], area)
            return max(ratios[0], 1 / ratios[0]) * max(ratios[1], 1 / ratios[1])

        for width, height in ((640, 480), (300, 200), (1600, 900), (999, 100), (517, 331), (5, 7)):
            found = impl.bucket_size(width, height, resolution, unit)
            aspect = min(Fraction(2), max(Fraction(1, 2), Fraction(width, height)))
            assert found in allowed
            assert cost(found, aspect) == min(cost(size, aspect) for size in allowed)
            assert impl.bucket_size(height, width, resolution, unit) == found[::-1]
        assert impl.bucket_size(77, 77, resolution, unit) == (resolution, resolution)


def law_the_pixels_are_the_middle_of_the_picture(impl: Any) -> None:
    """Two ramps, scaled alike in both directions and cut on both sides, are found again within a level of 255."""
    for size, (wide, high) in SIZES.items():
        width, height = size
        across = np.linspace(20, 230, width)[None, :].repeat(height, 0)
        down = np.linspace(30, 200, height)[:, None].repeat(width, 1)
        array = np.stack([across, down, across], axis=-1).round().astype(np.uint8)
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "ramp.png"
            Image.fromarray(array).save(path)
            pictures = impl.PictureSet([path], "x", resolution=64, bucket_unit=16)
        assert pictures.views() == [data.View(0, 0, 0, False)]
        found = (pictures.pixels(data.View(0, 0, 0, False)).double().numpy() + 1) * 127.5
        assert found.shape == (3, high, wide)
        scale = max(wide / width, high / height)
        for channel, (out, side, low, top) in enumerate(
            ((wide, width, 20, 230), (high, height, 30, 200))
        ):
            cut = (round(side * scale) - out) // 2
            places = (np.arange(out) + cut + 0.5) / scale - 0.5
            wanted = low + (top - low) * places / (side - 1)
            line = found[channel].mean(axis=channel)
            # The filter meets the edge of the picture in the outermost three pixels.
            assert np.abs(line - wanted)[3:-3].max() < 1, (size, channel)


def law_the_loss_is_the_mean_over_pictures_of_any_size(impl: Any) -> None:
    """Loss and gradient are those of one U-Net call for each picture, mean + w * mean (fp64; measured 0 and 8e-16)."""
    for kind in ("sd2-eps", "sd2-v"):
        task = mixed_task(impl, kind, batch_size=4, prior_loss_weight=0.3)
        batch = in_fp64(task.batch(1, 0))
        assert len({row.shape for row in batch.latents}) == len(SIZES)
        assert batch.noise[1].shape == batch.latents[1].shape != batch.latents[0].shape
        means = [error.mean() for error in squared_errors(task, batch)]
        loss = task.loss(batch)
        wanted = torch.stack(means[:4]).mean() + 0.3 * torch.stack(means[4:]).mean()
        assert abs(float((loss / wanted).detach()) - 1) < 1e-7  # w is an fp32 number
        exact = (torch.stack(means) * batch.weights).sum()
        assert abs(float((loss / exact).detach()) - 1) < 5e-15
        found, right = gradients(task, loss), gradients(task, exact)
        assert float((found - right).norm() / right.norm()) < 5e-15


def law_micro_batches_of_mixed_sizes_add_up(impl: Any) -> None:
    """N2: four micro-batches of one picture are one of four, and two of two (fp64; measured 2e-16 and 1e-15)."""
    whole = mixed_task(impl, batch_size=4, samples_per_step=4)
    for size in (1, 2):
        pieces = mixed_task(impl, batch_size=size, samples_per_step=4)
        for step in (1, 2):
            batch = in_fp64(whole.batch(step, 0))
            parts = [in_fp64(pieces.batch(step, micro)) for micro in range(4 // size)]
            names = [name for part in parts for name in part.names[:size]]
            assert names == list(batch.names[:4])
            loss = whole.loss(batch)
            mean = torch.stack([pieces.loss(part) for part in parts]).mean()
            assert abs(float((mean / loss).detach()) - 1) < 5e-15
            found, wanted = gradients(pieces, mean), gradients(whole, loss)
            assert float((found - wanted).norm() / wanted.norm()) < 1e-14


def law_order_of_mixed_rows_is_irrelevant(impl: Any) -> None:
    """D7 with sizes: a shuffled batch, whose sizes appear in another order, has the same loss (fp64; measured 0)."""
    task = mixed_task(impl, batch_size=4, prior_loss_weight=0.7)
    batch = in_fp64(task.batch(1, 0))
    assert len(batch.rows_by_shape()) > 2
    mixed = rows_of(batch, [6, 3, 0, 5, 2, 7, 1, 4])
    assert abs(float((task.loss(mixed) / task.loss(batch)).detach()) - 1) < 5e-15


LAWS = (
    (law_a_bucket_is_the_nearest_to_aspect_and_area, buckets),
    (law_the_pixels_are_the_middle_of_the_picture, data),
    (law_the_loss_is_the_mean_over_pictures_of_any_size, task_module),
    (law_micro_batches_of_mixed_sizes_add_up, task_module),
    (law_order_of_mixed_rows_is_irrelevant, task_module),
)


@pytest.mark.parametrize(("law", "impl"), LAWS, ids=lambda value: value.__name__)
def test_law(law: Any, impl: Any) -> None:
    law(impl)


def test_the_sizes_are_those_of_the_table() -> None:
    for size, bucket in SIZES.items():
        assert buckets.bucket_size(*size, 64, 16) == bucket
    own = mixed_task(prior=False).concept.instance
    assert own.sizes() == {(high, wide): 1 for wide, high in SIZES.values()}


def test_square_pictures_are_the_same_with_and_without_buckets() -> None:
    """To the bit: the batch, and so the training."""
    plain, bucketed = make_task(flip=True), make_task(flip=True, pictures={"bucket_unit": 16})
    for step in (1, 2):
        ours, theirs = bucketed.batch(step, 0), plain.batch(step, 0)
        assert all(map(torch.equal, ours.latents, theirs.latents))
        assert torch.equal(bucketed.loss(ours), plain.loss(theirs))


def test_a_batch_of_mixed_sizes_is_a_pure_function() -> None:
    """N5: asked for again, and by another task, the same bytes."""
    task, twin = mixed_task(batch_size=3), mixed_task(batch_size=3)
    first = task.batch(2, 1)
    for other in (twin.batch(2, 1), (task.batch(1, 0), task.batch(2, 1))[1]):
        assert first.names == other.names
        assert torch.equal(first.timesteps, other.timesteps)
        for ours, theirs in zip(
            first.noise + first.latents, other.noise + other.latents, strict=True
        ):
            assert torch.equal(ours, theirs)


def test_every_view_of_a_bucket_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 pictures in two directions are 8 encodings, those of the pictures alone; then the VAE is not needed."""
    encoded: list[int] = []

    def counted(vae: Any, pixels: torch.Tensor) -> Any:
        encoded.append(len(pixels))
        return encode_posterior(vae, pixels)

    monkeypatch.setattr("dreamrie.diffusion.cache.encode_posterior", counted)
    task = mixed_task(kind="tiny-vae", prior=False, flip=True, batch_size=1)
    assert encoded == [2, 2, 2, 2]
    pictures = task.concept.instance
    for step in range(1, 9):
        view = pictures.view_at(5, "training/concept", step - 1)
        wanted = encode_posterior(task.components.vae, pictures.pixels(view)[None]).mean[0]
        assert float((task.batch(step, 0).latents[0] - wanted).abs().max()) < 1e-5
    assert sum(encoded) == 8


def test_checkpointing_changes_no_gradient_of_several_sizes() -> None:
    """Each U-Net call of a batch is recomputed in the backward pass (fp64)."""
    plain, saving = mixed_task(), mixed_task(gradient_checkpointing=True)
    saving.model.train()
    batch = in_fp64(plain.batch(1, 0))
    wanted = gradients(plain, plain.loss(batch))
    saving.loss(batch).backward()
    found = [f.grad.flatten() for pair in saving.pairs for f in (pair.left, pair.right)]
    assert float((torch.cat(found) - wanted).norm() / wanted.norm()) < 1e-12


@pytest.mark.parametrize("estimator", ["mean_gradient", "sketch", "backprop_rsvd"])
def test_loi_sees_one_gradient_however_sizes_are_grouped(estimator: Any) -> None:
    """One batch of four sizes gives the start that four batches of one picture give (fp64)."""
    starts = []
    for size, count in ((4, 1), (1, 4)):
        task = mixed_task(prior=False, batch_size=size)
        batches = [in_fp64(batch) for batch in task.loi_batches(count)]
        assert sorted({name for batch in batches for name in batch.names}) == [
            f"{number}.png" for number in range(4)
        ]
        locally_optimal_init(
            task.model,
            task.pairs,
            task.model_loss,
            batches,
            alpha=0.1,
            estimator=estimator,
            generator=torch.Generator().manual_seed(3),
        )
        points = [pair.left_matrix()[:, :2] @ pair.right_matrix()[:2] for pair in task.pairs]
        assert all(float(point.detach().norm()) > 0.1 for point in points)
        starts.append(torch.cat([point.detach().flatten() for point in points]))
    assert float((starts[0] - starts[1]).norm() / starts[0].norm()) < 1e-8


def test_enlarged_and_narrow_pictures_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, size in (("a.png", (64, 64)), ("small.png", (30, 20)), ("strip.png", (300, 90))):
        Image.new("RGB", size).save(tmp_path / name)
    data.PictureSet(sorted(tmp_path.iterdir()), "x", resolution=64, bucket_unit=16)
    assert "1 of 3 pictures are smaller than their training size and were enlarged: small.png" in (
        caplog.text
    )
    assert "1 of 3 pictures are narrower than 1 to 2, so their ends are cut off: strip.png" in (
        caplog.text
    )
