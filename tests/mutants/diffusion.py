"""Faults in pictures, class pictures, the DreamBooth loss and the adapter file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image
from torch import Tensor, nn

from dreamrie import adapter_file
from dreamrie.diffusion import images, prior, task
from dreamrie.errors import ImageError
from dreamrie.lora import LoraPair
from tests import test_adapter_file
from tests.diffusion import test_images, test_prior, test_task
from tests.mutants import Mutant, replaced


def unsorted_list(directory: Path) -> list[Path]:
    """Visible files in the order of the file system, here made unlike the alphabet."""
    return _list_images(directory)[::-1]


def hidden_too(directory: Path) -> list[Path]:
    """Every file."""
    return sorted(entry for entry in directory.iterdir() if entry.is_file())


def header_only(path: Path) -> Image.Image:
    """Pillow's own `verify`, which passes a JPEG cut in the middle."""
    try:
        with Image.open(path) as image:
            image.verify()
    except OSError as error:
        raise ImageError(f"{path}: {error}") from error
    return Image.new("RGB", (1, 1))


def noise_always(components: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The target of an epsilon model, whatever the model says."""
    return noise


def velocity_always(components: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The target of a v model, whatever the model says."""
    velocity: Tensor = components.noise_scheduler.get_velocity(latents, noise, timesteps)
    return velocity


def velocity_of_the_noise(
    components: Any, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Latents and noise in each other's place."""
    if components.prediction_type == "epsilon":
        return noise
    swapped: Tensor = components.noise_scheduler.get_velocity(noise, latents, timesteps)
    return swapped


def changed_batch(**changes: Any) -> AbstractContextManager[Any]:
    """The task module with a batch whose fields went through the given functions."""
    batch = task.DreamBoothTask.batch

    def wrong(self: task.DreamBoothTask, step: int, micro: int) -> task.Batch:
        found = batch(self, step, micro)
        fields = {name: change(getattr(found, name)) for name, change in changes.items()}
        return dataclasses.replace(found, **fields)

    return method_replaced("batch", wrong)


@contextmanager
def method_replaced(name: str, wrong: Any) -> Iterator[Any]:
    """The task module with one method of the task replaced."""
    with mock.patch.object(task.DreamBoothTask, name, wrong):
        yield task


def loss_times_rows(self: task.DreamBoothTask, model: Any, batch: task.Batch) -> Tensor:
    """A sum over the pictures instead of their mean."""
    return _model_loss(self, model, batch) * len(batch.names)


def same_micro_batch(self: task.DreamBoothTask, step: int, micro: int) -> task.Batch:
    """The first micro-batch, again and again."""
    return _batch(self, step, 0)


def without_prompt(settings: dict[str, object]) -> str:
    """A folder name that depends on everything but the prompt."""
    return _folder_name({**settings, "prompt": "class"})


def one_folder(settings: dict[str, object]) -> str:
    """The same folder for every seed and sampler."""
    return _folder_name({"prompt": settings["prompt"]})


def factors_swapped(pairs: Sequence[LoraPair]) -> dict[str, Tensor]:
    """Each factor under the other's name."""
    flipped = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {
        name.replace(side, flipped[side]): tensor
        for name, tensor in _tensors(pairs).items()
        for side in flipped
        if side in name
    }


def scaling_forgotten(pairs: Sequence[LoraPair]) -> dict[str, Tensor]:
    """The factors as if alpha were the rank."""
    return _tensors([dataclasses.replace(pair, scaling=1.0) for pair in pairs])


def anchor_left_out(pairs: Sequence[LoraPair]) -> dict[str, Tensor]:
    """The trained point alone, X instead of X - X0."""
    return _tensors(
        [
            dataclasses.replace(
                pair,
                left=nn.Parameter(pair.left.detach()[:, : pair.rank]),
                right=nn.Parameter(pair.right.detach()[: pair.rank]),
            )
            for pair in pairs
        ]
    )


def raw_and_unchecked(pairs: Sequence[LoraPair]) -> dict[str, Tensor]:
    """The factors as they lie in memory, whatever is in them."""
    tensors = {} if pairs else _tensors(pairs)
    for pair in pairs:
        tensors[f"unet.{pair.name}.lora_A.weight"] = pair.right.detach().clone()
        tensors[f"unet.{pair.name}.lora_B.weight"] = pair.scaling * pair.left.detach()
    return tensors


def truncated(pairs: Sequence[LoraPair]) -> Any:
    """Factors of rank r, half of what the change needs."""
    return _export(pairs, rank=pairs[0].rank)


_list_images = images.list_images
_folder_name = prior.folder_name
_batch = task.DreamBoothTask.batch
_model_loss = task.DreamBoothTask.model_loss
_tensors = adapter_file.diffusers_tensors
_export = adapter_file.export_factors

_PICTURES = [
    Mutant(
        "pictures unsorted",
        test_images.law_names_decide_the_order,
        lambda: replaced(images, list_images=unsorted_list),
        "a run then depends on the file system",
    ),
    Mutant(
        "hidden files taken",
        test_images.law_names_decide_the_order,
        lambda: replaced(images, list_images=hidden_too),
        "one .DS_Store ends a run",
    ),
    Mutant(
        "only headers checked",
        test_images.law_every_file_is_decoded,
        lambda: replaced(images, load_image=header_only),
        "a truncated JPEG opens, and passes Pillow's verify",
    ),
]

_CLASS_PICTURES = [
    Mutant(
        "all class pictures made again",
        test_prior.law_exactly_the_missing_are_made,
        lambda: replaced(prior, _is_picture=lambda path: False),
        "hours of sampling for nothing",
    ),
    Mutant(
        "damaged class pictures kept",
        test_prior.law_exactly_the_missing_are_made,
        lambda: replaced(prior, _is_picture=lambda path: path.exists()),
        "a run that was killed while sampling leaves half a file",
    ),
    Mutant(
        "class pictures of another prompt reused",
        test_prior.law_another_prompt_never_reuses,
        lambda: replaced(prior, folder_name=without_prompt),
        "the prior would hold the wrong class",
    ),
    Mutant(
        "class pictures of another seed reused",
        test_prior.law_another_prompt_never_reuses,
        lambda: replaced(prior, folder_name=one_folder),
        "a run then depends on what was made before",
    ),
]

_LOSS = [
    Mutant(
        "epsilon target for a v model",
        test_task.law_the_target_is_the_models_own,
        lambda: replaced(task, denoising_target=noise_always),
        "SD 2.x at 768 pixels then learns to draw noise",
    ),
    Mutant(
        "v target for an epsilon model",
        test_task.law_the_target_is_the_models_own,
        lambda: replaced(task, denoising_target=velocity_always),
        "the reverse of the same fault",
    ),
    Mutant(
        "latents and noise swapped in v",
        test_task.law_the_target_is_the_models_own,
        lambda: replaced(task, denoising_target=velocity_of_the_noise),
        "the sign and the roles of v are easily confused",
    ),
    Mutant(
        "epsilon target in the loss of a v model",
        test_task.law_the_loss_is_the_denoising_error,
        lambda: replaced(task, denoising_target=noise_always),
        "the target must also reach the loss",
    ),
    Mutant(
        "prior weight on the concept",
        test_task.law_the_halves_are_concept_then_class,
        lambda: changed_batch(weights=lambda weights: weights.flip(0)),
        "the halves of the batch are swapped",
    ),
    Mutant(
        "concept prompt on class pictures",
        test_task.law_the_halves_are_concept_then_class,
        lambda: changed_batch(text=lambda text: text[[0, 0, 0, 0]]),
        "the class pictures would teach the new word",
    ),
    Mutant(
        "prior weight forgotten",
        test_task.law_prior_halves_equal_two_passes,
        lambda: changed_batch(weights=lambda weights: weights.new_full((4,), 0.5)),
        "w has to reach the loss",
    ),
    Mutant(
        "mean over both halves together",
        test_task.law_weight_zero_is_no_prior,
        lambda: changed_batch(weights=lambda weights: weights / len(weights) * 2),
        "the concept would count half when class pictures join",
    ),
    Mutant(
        "pictures weighted by their place",
        test_task.law_order_of_rows_is_irrelevant,
        lambda: method_replaced(
            "model_loss",
            lambda self, model, batch: _model_loss(
                self, model, dataclasses.replace(batch, weights=batch.weights.sort().values)
            ),
        ),
        "the loss may not depend on the order of a batch",
    ),
    Mutant(
        "loss summed over pictures",
        test_task.law_the_loss_is_the_denoising_error,
        lambda: method_replaced("model_loss", loss_times_rows),
        "the learning rate would depend on the batch size",
    ),
    Mutant(
        "one micro-batch repeated",
        test_task.law_micro_batches_add_up,
        lambda: method_replaced("batch", same_micro_batch),
        "accumulation would add nothing",
    ),
]

_FILE = [
    Mutant(
        "factors under each other's names",
        test_adapter_file.law_norm_in_the_file_is_the_norm_in_memory,
        lambda: replaced(adapter_file, diffusers_tensors=factors_swapped),
        "the paper's A is PEFT's lora_B",
        raises=(AssertionError, RuntimeError),
    ),
    Mutant(
        "scaling not folded into the file",
        test_adapter_file.law_stock_diffusers_reproduces_the_model,
        lambda: replaced(adapter_file, diffusers_tensors=scaling_forgotten),
        "alpha instead of alpha / rank: the effect is several times too weak or strong",
    ),
    Mutant(
        "anchor left out of the file",
        test_adapter_file.law_stock_diffusers_reproduces_the_model,
        lambda: replaced(adapter_file, diffusers_tensors=anchor_left_out),
        "the stock base plus X is not the trained model, X - X0 is the change",
    ),
    Mutant(
        "file truncated to rank r",
        test_adapter_file.law_norm_in_the_file_is_the_norm_in_memory,
        lambda: replaced(adapter_file, export_factors=truncated),
        "X - X0 has rank 2r",
    ),
    Mutant(
        "unbalanced factors in the file",
        test_adapter_file.law_norm_in_the_file_is_the_norm_in_memory,
        lambda: replaced(adapter_file, diffusers_tensors=raw_and_unchecked),
        "trained point and anchor cancel, which fp16 cannot hold",
    ),
    Mutant(
        "values that are not finite saved",
        test_adapter_file.law_nothing_empty_or_broken_is_written,
        lambda: replaced(adapter_file, diffusers_tensors=raw_and_unchecked),
        "a diverged run would end as a black adapter",
    ),
    Mutant(
        "empty adapter saved",
        test_adapter_file.law_nothing_empty_or_broken_is_written,
        lambda: replaced(adapter_file, _is_dust=lambda pair, change: False),
        "a file that does nothing looks like a success",
    ),
]

MUTANTS: list[Mutant] = [*_PICTURES, *_CLASS_PICTURES, *_LOSS, *_FILE]
