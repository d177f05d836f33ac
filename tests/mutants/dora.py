"""Faults of DoRA: norms of the wrong thing, magnitudes that are lost, rounded, or trained like factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dreamrie import adapter_file, adapter_peft
from dreamrie.diffusion import merging
from dreamrie.lora import LoraPair, attach, dora
from dreamrie.optimizers import libraries
from dreamrie.trainer import loop
from tests import test_adapter_magnitudes as files
from tests.lora import test_dora as laws
from tests.mutants import Law, Mutant, replaced


def column_norms(weight: Tensor, product: Tensor, magnitude: Tensor) -> Tensor:
    """Directions by input, as A1111 takes them."""
    moved = weight.double() + product.double()
    return magnitude.double()[:, None] * moved / moved.norm(dim=0, keepdim=True)


def base_norms(weight: Tensor, product: Tensor, magnitude: Tensor) -> Tensor:
    """Norms of the base alone, as ComfyUI takes them."""
    moved = weight.double() + product.double()
    return (magnitude.double() / weight.double().norm(dim=1))[:, None] * moved


def magnitude_as_factor(weight: Tensor, product: Tensor, magnitude: Tensor) -> Tensor:
    """Rows times m, without a division."""
    return magnitude.double()[:, None] * (weight.double() + product.double())


def plain_lora(weight: Tensor, product: Tensor, magnitude: Tensor) -> Tensor:
    return weight.double() + product.double()


good_named = adapter_file.named_magnitudes


def halved(magnitudes: Any, layers: Any, place: Any) -> dict[str, Tensor]:
    """Rounded to fp16 on the way."""
    found = good_named(magnitudes, layers, place)
    return {name: tensor.half().float() for name, tensor in found.items()}


def decaying(optimizer: Any, pairs: Any, lr: float) -> Any:
    magnitudes = [pair.magnitude for pair in pairs if pair.magnitude is not None]
    optimizer.add_param_group({"params": magnitudes, "lr": lr, "weight_decay": 0.1})
    return optimizer


def sixteenfold(optimizer: Any, pairs: Any, lr: float) -> Any:
    """The rate of lora_B, as PEFT's helper gives it."""
    magnitudes = [pair.magnitude for pair in pairs if pair.magnitude is not None]
    optimizer.add_param_group({"params": magnitudes, "lr": 16 * lr, "weight_decay": 0.0})
    return optimizer


def fault(name: str, law: Law, why: str, impl: Any, owner: Any, **wrong: Any) -> Mutant:
    """A mutant with attributes of one module or class replaced; the law calls `impl`."""

    @contextmanager
    def broken() -> Iterator[Any]:
        with replaced(owner, **wrong):
            yield impl

    return Mutant(name=name, law=law, broken=broken, why=why)


FORMULA = laws.law_a_dora_layer_is_its_formula
ARRIVE = files.law_the_file_is_the_trained_weight
BASE = files.law_merged_weights_are_those_of_the_layer

MUTANTS = [
    fault("dora: norms of columns", FORMULA, "m has one number a row", dora, dora, dora_weight=column_norms),
    fault("dora: norms of the base", FORMULA, "W + s B A is divided by its own", dora, dora, dora_weight=base_norms),
    fault("dora: no norms", FORMULA, "m is no factor", dora, dora, dora_weight=magnitude_as_factor),
    fault("dora: no magnitude", FORMULA, "that is LoRA", dora, dora, dora_weight=plain_lora),
    fault(
        "dora: magnitudes as PEFT leaves them",
        laws.law_a_start_computes_what_the_base_does,
        "over bf16 they are rounded to 8 bits, and step 0 is not the base",
        None,
        attach,
        reset_magnitudes_=lambda pairs: None,
    ),
    fault(
        "dora: magnitudes decay",
        laws.law_magnitudes_take_plain_steps,
        "they take the base weight with them to zero",
        libraries,
        libraries,
        _with_magnitudes=decaying,
    ),
    fault(
        "dora: magnitudes at the rate of lora_B",
        laws.law_magnitudes_take_plain_steps,
        "the ratio of LoRA+ is of the factors",
        libraries,
        libraries,
        _with_magnitudes=sixteenfold,
    ),
    fault(
        "dora: magnitudes not in the checkpoint",
        laws.law_dora_resumes,
        "they go back to their start",
        loop,
        LoraPair,
        parameters=property(lambda pair: (pair.left, pair.right)),
    ),
    fault(
        "dora: magnitudes not in diffusers' file", ARRIVE, "that is LoRA", files.REAL, adapter_file,
        named_magnitudes=lambda *_: {},
    ),
    fault(
        "dora: magnitudes in fp16 in PEFT's folder", ARRIVE, "the weight is rounded too", files.REAL, adapter_peft,
        named_magnitudes=halved,
    ),
    fault(
        "dora: magnitudes in fp16", ARRIVE, "the whole weight is rounded with them", files.REAL, adapter_file,
        named_magnitudes=halved,
    ),
    fault(
        "dora: the base without magnitudes", BASE, "that is LoRA", merging, merging, dora_weight=plain_lora
    ),
    fault("dora: the base by columns", BASE, "one number a row", merging, merging, dora_weight=column_norms),
]  # fmt: skip
