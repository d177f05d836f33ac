"""D7, D8, N2, N5: what a batch holds, what the loss is, and that both are pure functions."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from dreamrie.diffusion import task as task_module
from dreamrie.diffusion.data import ConceptSet
from dreamrie.diffusion.pipeline import (
    ATTENTION_TARGETS,
    encode_posterior,
    encode_prompts,
    sample,
)
from dreamrie.errors import ConfigError
from dreamrie.lora import attach_lora
from dreamrie.streams import derive_seed
from tests.small_models import KINDS, small_components, small_folder, write_pictures


@functools.cache
def _pictures() -> tuple[Path, list[Path]]:
    """A folder with 5 pictures of a concept, and 3 of its class."""
    folder = Path(tempfile.mkdtemp(prefix="dreamrie-pictures-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_pictures(folder / "concept", 5, 64, seed=1)
    return folder / "concept", write_pictures(folder / "class", 3, 64, seed=2)


def make_task(
    impl: Any = task_module,
    kind: str = "sd2-eps",
    *,
    prior: bool = True,
    flip: bool = False,
    folder: Path | None = None,
    pictures: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A task on a small model with anchored rank-2 adapters."""
    parts = small_components(kind)
    concept_dir, class_images = _pictures()
    concept = ConceptSet(
        folder or concept_dir,
        "a photo of a sks dog",
        resolution=64,
        random_flip=flip,
        class_images=class_images if prior else (),
        class_prompt="a photo of a dog",
        **(pictures or {}),
    )
    generator = torch.Generator().manual_seed(0)
    pairs = attach_lora(parts.unet, 2, ATTENTION_TARGETS, init="orthonormal", generator=generator)
    settings: dict[str, Any] = {"batch_size": 2, "seed": 5, **options}
    return impl.DreamBoothTask(parts, pairs, concept, **settings)


def gradients(task: Any, loss: Tensor) -> Tensor:
    """All factor gradients in one vector."""
    factors = [factor for pair in task.pairs for factor in (pair.left, pair.right)]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, factors)])


def rows_of(batch: Any, rows: list[int], **changes: Any) -> Any:
    """Some rows of a batch, in the given order."""
    tuples = ("latents", "noise", "names", "masks")
    parts = {name: tuple(getattr(batch, name)[row] for row in rows) for name in tuples}
    parts |= {name: getattr(batch, name)[rows] for name in ("timesteps", "text", "weights")}
    return type(batch)(**parts | changes)


def half_of(batch: Any, rows: list[int]) -> Any:
    """Some rows of a batch, each counting the same."""
    return rows_of(batch, rows, weights=torch.full((len(rows),), 1 / len(rows)))


def law_prior_halves_equal_two_passes(impl: Any) -> None:
    """D7: loss and gradient with weight w are those of two separate passes, mean + w * mean."""
    weight = 0.3
    task = make_task(impl, prior_loss_weight=weight)
    batch = task.batch(1, 0)
    assert len(batch.names) == 4
    assert [name.startswith("picture") for name in batch.names] == [True] * 4
    concept = task.loss(half_of(batch, [0, 1]))
    others = task.loss(half_of(batch, [2, 3]))
    together = task.loss(batch)
    assert abs(float((concept - others).detach())) > 1e-3
    expected = concept + weight * others
    assert abs(float((together / expected).detach()) - 1) < 1e-6
    found, wanted = gradients(task, together), gradients(task, expected)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def law_the_halves_are_concept_then_class(impl: Any) -> None:
    """Each row carries the latents, the prompt and the weight of its own set."""
    task = make_task(impl, prior_loss_weight=0.25, kind="tiny-vae")
    text = encode_prompts(task.components, ["a photo of a sks dog", "a photo of a dog"])
    assert float((text[0] - text[1]).abs().max()) > 1e-3
    for step in (1, 2):
        batch = task.batch(step, 0)
        assert batch.weights.tolist() == [0.5, 0.5, 0.125, 0.125]
        for row, name in enumerate(batch.names):
            kind = row // 2
            pictures = task.concept.sets[kind]
            assert torch.equal(batch.text[row], text[kind])
            index = [path.name for path in pictures.paths].index(name)
            view = next(view for view in pictures.views() if view.picture == index)
            mean = encode_posterior(task.components.vae, pictures.pixels(view)[None]).mean[0]
            assert float((batch.latents[row] - mean).abs().max()) < 1e-5


def law_weight_zero_is_no_prior(impl: Any) -> None:
    """D7: w = 0 gives the loss and gradient of a run without class pictures."""
    with_prior = make_task(impl, prior_loss_weight=0.0)
    without = make_task(impl, prior=False)
    for step, micro in ((1, 0), (3, 1)):
        ours, theirs = with_prior.batch(step, micro), without.batch(step, micro)
        assert ours.names[:2] == theirs.names
        losses = with_prior.loss(ours), without.loss(theirs)
        assert float(losses[1].detach()) > 1e-2
        assert abs(float((losses[0] / losses[1]).detach()) - 1) < 1e-6
        found, wanted = gradients(with_prior, losses[0]), gradients(without, losses[1])
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def law_order_of_rows_is_irrelevant(impl: Any) -> None:
    """D7: a shuffled batch has the same loss."""
    task = make_task(impl, prior_loss_weight=0.7)
    batch = task.batch(1, 0)
    mixed = rows_of(batch, [2, 0, 3, 1])
    ratio = task.loss(mixed) / task.loss(batch)
    assert abs(float(ratio.detach()) - 1) < 1e-6


def law_the_target_is_the_models_own(impl: Any) -> None:
    """D8: epsilon for an epsilon model, v = sqrt(a) epsilon - sqrt(1 - a) x0 for a v model."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(6, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 1, 250, 500, 750, 999])
    for kind in ("sd2-eps", "sd2-v", "sd15"):
        parts = small_components(kind)
        target = impl.denoising_target(parts, latents, noise, timesteps)
        kept = parts.noise_scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        assert float((velocity - noise).abs().max()) > 1
        wanted = velocity if kind == "sd2-v" else noise.double()
        assert float((target - wanted).abs().max()) < 1e-6, kind


def law_the_loss_is_the_denoising_error(impl: Any) -> None:
    """The loss equals the formula written out, with noise added by the model's own schedule."""
    for kind in ("sd2-eps", "sd2-v"):
        task = make_task(impl, kind, prior=False)
        batch = task.batch(2, 0)
        parts = task.components
        kept = parts.noise_scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
        latents, noise = torch.stack(batch.latents), torch.stack(batch.noise)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        with torch.no_grad():
            output = parts.unet(noisy, batch.timesteps, batch.text).sample
        target = noise
        if kind == "sd2-v":
            target = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        wanted = float((output.double() - target.double()).square().mean())
        assert abs(float(task.loss(batch).detach()) / wanted - 1) < 1e-5, kind


def law_micro_batches_add_up(impl: Any) -> None:
    """N2: four micro-batches of one picture are one of four, class pictures included."""
    whole = make_task(impl, batch_size=4, samples_per_step=4)
    pieces = make_task(impl, batch_size=1, samples_per_step=4)
    for step in (1, 2):
        batch = whole.batch(step, 0)
        parts = [pieces.batch(step, micro) for micro in range(4)]
        assert [part.names[0] for part in parts] == list(batch.names[:4])
        loss = whole.loss(batch)
        mean = torch.stack([pieces.loss(part) for part in parts]).mean()
        assert abs(float((mean / loss).detach()) - 1) < 1e-6
        found, wanted = gradients(pieces, mean), gradients(whole, loss)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5


LAWS = (
    law_prior_halves_equal_two_passes,
    law_the_halves_are_concept_then_class,
    law_weight_zero_is_no_prior,
    law_order_of_rows_is_irrelevant,
    law_the_target_is_the_models_own,
    law_the_loss_is_the_denoising_error,
    law_micro_batches_add_up,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    law(task_module)


def test_a_batch_is_a_pure_function_of_seed_step_and_micro() -> None:
    """N5: asked for twice, in any order, by another task: the same bytes; else other noise."""
    task, twin = make_task(), make_task()
    before = torch.random.get_rng_state()
    first = task.batch(3, 1)
    for other in (twin.batch(3, 1), (task.batch(1, 0), task.batch(3, 1))[1]):
        assert all(map(torch.equal, first.noise, other.noise))
        assert all(map(torch.equal, first.latents, other.latents))
        assert torch.equal(first.timesteps, other.timesteps)
        assert first.names == other.names
    assert torch.equal(torch.random.get_rng_state(), before)
    for different in (task.batch(3, 0), task.batch(4, 1), make_task(seed=6).batch(3, 1)):
        assert float((different.noise[0] - first.noise[0]).abs().max()) > 0.1
        assert float((different.latents[0] - first.latents[0]).abs().max()) > 1e-3


def test_steps_walk_through_the_pictures() -> None:
    """5 pictures, 2 a step: each is seen twice in 5 steps; initialization has its own noise."""
    task = make_task(prior=False)
    names = [name for step in range(1, 6) for name in task.batch(step, 0).names]
    assert sorted(names) == sorted(2 * [path.name for path in task.concept.instance.paths])
    start = list(task.loi_batches(3))
    assert len(start) == 3
    assert all(map(torch.equal, start[1].noise, task.batch(0, 1).noise))
    assert float((start[0].noise[0] - task.batch(1, 0).noise[0]).abs().max()) > 0.1


def test_timesteps_cover_the_schedule() -> None:
    task = make_task(prior=False, kind="tiny-vae")
    drawn = torch.cat([task.batch(step, 0).timesteps for step in range(1, 301)])
    assert drawn.min() < 20
    assert drawn.max() > 980
    assert abs(float(drawn.double().mean()) - 499.5) < 60


def test_a_loss_is_described_by_its_files() -> None:
    task = make_task()
    batch = task.batch(1, 0)
    text = task.describe(batch)
    for name, timestep in zip(batch.names, batch.timesteps.tolist(), strict=True):
        assert f"{name} at timestep {timestep}" in text


@pytest.mark.parametrize("kind", KINDS)
def test_only_factors_get_gradients(kind: str) -> None:
    task = make_task(kind=kind, gradient_checkpointing=True)
    task.model.train()
    task.loss(task.batch(1, 0)).backward()
    factors = {id(factor) for pair in task.pairs for factor in (pair.left, pair.right)}
    for name, parameter in task.model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in factors), name
    # q, k, v, out of self- and cross-attention in 4 blocks: down, middle, and two on the way up.
    assert len(task.pairs) == 4 * 2 * 4


def test_checkpointing_changes_no_gradient() -> None:
    plain, saving = make_task(), make_task(gradient_checkpointing=True)
    saving.model.train()
    batch = plain.batch(1, 0)
    wanted = gradients(plain, plain.loss(batch))
    saved = saving.loss(batch)
    saved.backward()
    found = torch.cat([f.grad.flatten() for pair in saving.pairs for f in (pair.left, pair.right)])
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_the_loss_of_another_model_is_that_models() -> None:
    """`locally_optimal_init` hands the model in; the loss must use it."""
    task = make_task()
    batch = task.batch(1, 0)
    other = copy.deepcopy(task.model)
    with torch.no_grad():
        other.conv_out.bias.add_(1.0)
    difference = task.model_loss(other, batch) - task.loss(batch)
    assert float(difference.detach().abs()) > 0.1


def test_validation_writes_the_same_seeds_at_every_step(tmp_path: Path) -> None:
    task = make_task(
        kind="tiny-vae",
        prior=False,
        validation_prompts=["a sks dog", "a tree"],
        num_validation_images=2,
        inference_steps=2,
    )
    assert task.validate(0, tmp_path / "samples") == {}
    task.validate(20, tmp_path / "samples")
    names = [
        f"step-{step:06d}{end}.png" for step in (0, 20) for end in ("", "-0", "-1", "-2", "-3")
    ]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == sorted(names)
    read = {name: np.asarray(Image.open(tmp_path / "samples" / name)) for name in names}
    assert np.array_equal(read["step-000000-3.png"], read["step-000020-3.png"])
    assert not np.array_equal(read["step-000000-2.png"], read["step-000000-3.png"])
    assert read["step-000000.png"].shape == (2 * 64 + 4, 2 * 64 + 4, 3)
    assert np.array_equal(read["step-000000.png"][:64, 68:], read["step-000000-1.png"])
    assert make_task(prior=False).validate(0, tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()


def test_samples_are_drawn_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch of samples is bounded by its own setting, and changes no picture."""
    sizes: list[int] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        sizes.append(options["batch_size"])
        return sample(*arguments, **options)

    monkeypatch.setattr(task_module, "sample", noted)
    sheets = []
    for size in (1, 3):
        task = make_task(
            prior=False,
            validation_prompts=["a tree"],
            num_validation_images=3,
            inference_steps=2,
            sample_batch_size=size,
        )
        task.validate(0, tmp_path / str(size))
        sheets.append(np.asarray(Image.open(tmp_path / str(size) / "step-000000.png"), dtype=int))
    assert sizes == [1, 3]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1


def test_samples_of_step_zero_are_the_base_models(tmp_path: Path) -> None:
    """The anchored start changes nothing, so step 0 shows what the base model draws."""
    task = make_task(
        prior=False, validation_prompts=["a tree"], num_validation_images=1, inference_steps=2
    )
    task.validate(0, tmp_path)
    seed = derive_seed(5, "sample", 0)
    base = sample(small_components("sd2-eps"), ["a tree"], [seed], steps=2)[0]
    drawn = np.asarray(Image.open(tmp_path / "step-000000-0.png"), dtype=int)
    assert np.abs(drawn - np.asarray(base, dtype=int)).max() <= 1
    with torch.no_grad():
        for pair in task.pairs:
            pair.left_matrix()[:, 0] += 0.5
    task.validate(1, tmp_path)
    moved = np.asarray(Image.open(tmp_path / "step-000001-0.png"), dtype=int)
    assert np.abs(moved - drawn).max() > 5


def test_the_file_of_a_task_names_its_base(tmp_path: Path) -> None:
    """The header says what was trained, on what, towards what."""
    task = make_task(kind="sd2-v", facts={"config_hash": "0123", "optimizer": "?"})
    with torch.no_grad():
        for pair in task.pairs:
            pair.left_matrix()[:, 0] += 0.5
    task.save(tmp_path, {"optimizer": "riemannion"})
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["base_model"] == str(small_folder("sd2-v").resolve())
    assert header["prediction_type"] == "v_prediction"
    assert header["instance_prompt"] == "a photo of a sks dog"
    assert (header["optimizer"], header["rank_trained"]) == ("riemannion", "2")
    assert header["dreamrie_version"]
    assert header["config_hash"] == "0123"


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"batch_size": 0}, "--train_batch_size"),
        ({"validation_prompts": ["x", " "]}, "--validation_prompt"),
    ],
)
def test_bad_settings_name_their_flag(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        make_task(prior=False, **options)


def test_resolution_must_suit_the_network() -> None:
    parts = small_components("sd2-eps")
    folder, _ = _pictures()
    concept = ConceptSet(folder, "x", resolution=72)
    with pytest.raises(ConfigError, match="--resolution 72 is not a multiple of 16"):
        task_module.DreamBoothTask(parts, [], concept, batch_size=1, seed=0)
