"""Faults of what puts an adapter on its base model: a verdict that is always good, a merge that is another change."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamrie.diffusion import merging, verifying
from dreamrie.lora import LowRank
from tests import test_commands_merge_into_base as merge_laws
from tests import test_commands_verify as verify_laws
from tests.mutants import Mutant, replaced

good_judged, good_compared = verifying.judged, verifying.compared


def with_adapter(law: Any) -> Any:
    """The law on an adapter of its own."""

    @functools.wraps(law)
    def on_adapter(impl: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            law(impl, verify_laws.saved(Path(folder)))

    return on_adapter


def common_layers_only(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    both = set(expected) & set(found)
    return good_compared({n: expected[n] for n in both}, {n: found[n] for n in both})


def layers_of_the_reader_only(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    return good_compared(expected, {n: found[n] for n in found if n in expected})


def with_itself(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    return good_compared(expected, expected)


def norms_only(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    sizes = {n: verifying.change_norm(expected[n]) for n in expected}
    return {n: abs(size - verifying.change_norm(found[n])) / size for n, size in sizes.items()}


def lenient(known: Any, distances: Any, between: int, from_base: int) -> Any:
    """Greater instead of not at most: NaN passes."""
    found = good_judged(known, distances, between, from_base)
    nan = any(apart is not None and apart != apart for apart in distances.values())
    return dataclasses.replace(found, problems=()) if nan else found


def blind_to_pictures(known: Any, distances: Any, between: int, from_base: int) -> Any:
    return good_judged(known, distances, 0, from_base)


def blind_to_base(known: Any, distances: Any, between: int, from_base: int) -> Any:
    return good_judged(known, distances, between, 255)


def faulty(name: str, law: Any, why: str, **changed: Any) -> Mutant:
    """A mutant of `verifying`."""

    @contextlib.contextmanager
    def broken() -> Iterator[Any]:
        with replaced(verifying, **changed):
            yield verifying

    return Mutant(name, law, broken, why)


# ---------------------------------------------------------------------------------------- merging

good_add, good_dense = merging.add_to_weights_, merging.dense


def scale_forgotten(unet: Any, contents: Any, scale: float, dtype: Any) -> Any:
    return good_add(unet, contents, 1.0, dtype)


def scale_twice(unet: Any, contents: Any, scale: float, dtype: Any) -> Any:
    return good_add(unet, contents, scale * scale, dtype)


def own_scaling_forgotten(unet: Any, contents: Any, scale: float, dtype: Any) -> Any:
    ones = dict.fromkeys(contents.scalings, 1.0)
    return good_add(unet, dataclasses.replace(contents, scalings=ones), scale, dtype)


def next_layer(unet: Any, contents: Any, scale: float, dtype: Any) -> Any:
    """Each change on the next layer of the same shape."""
    shapes: dict[Any, list[str]] = {}
    for layer in contents.changes:
        shapes.setdefault(unet.get_submodule(layer).weight.shape, []).append(layer)
    moved = {
        layers[(number + 1) % len(layers)]: contents.changes[layer]
        for layers in shapes.values()
        for number, layer in enumerate(layers)
    }
    return good_add(unet, dataclasses.replace(contents, changes=moved), scale, dtype)


def last_layer_lost(unet: Any, contents: Any, scale: float, dtype: Any) -> Any:
    less = dict(list(contents.changes.items())[:-1])
    return good_add(unet, dataclasses.replace(contents, changes=less), scale, dtype)


def transposed(change: LowRank) -> Tensor:
    return good_dense(change).T.contiguous()


def kernel_first(change: LowRank) -> Tensor:
    """The columns of a kernel in the order (kh, kw, in)."""
    right = change.right.movedim(1, -1) if change.right.ndim == 4 else change.right
    return good_dense(LowRank(change.left, right))


def change_in_half(change: LowRank) -> Tensor:
    return good_dense(change).half().double()


def factors_in_half(change: LowRank) -> Tensor:
    return good_dense(LowRank(change.left.half(), change.right.half()))


def always_fp16(folder: Any) -> Any:
    return torch.float16


def merging_fault(name: str, law: Any, why: str, **changed: Any) -> Mutant:
    """A mutant of `merging`."""

    @contextlib.contextmanager
    def broken() -> Iterator[Any]:
        with replaced(merging, **changed):
            yield merging

    return Mutant(name, law, broken, why)


M1, M2, M3, M4 = merge_laws.LAWS

CHANGE = with_adapter(verify_laws.law_another_change_is_not_verified)
LOST, PICTURES = verify_laws.law_lost_layers_are_no_equality, verify_laws.law_pictures_decide_too

MUTANTS = [
    faulty(
        "verify: with itself", CHANGE, "nothing of the loader is looked at", compared=with_itself
    ),
    faulty(
        "verify: norms only",
        CHANGE,
        "a change with its outputs in another order has the same norm",
        compared=norms_only,
    ),
    faulty(
        "verify: coarse",
        CHANGE,
        "a thousandth more strength is another adapter",
        LARGEST_DISTANCE=0.01,
    ),
    faulty(
        "verify: common layers", LOST, "a lost layer is not common", compared=common_layers_only
    ),
    faulty(
        "verify: the reader's layers",
        LOST,
        "a loader may adapt more than the file says",
        compared=layers_of_the_reader_only,
    ),
    faulty("verify: NaN passes", LOST, "NaN is not greater than anything", judged=lenient),
    faulty("verify: no pictures", PICTURES, "two pictures differ", judged=blind_to_pictures),
    faulty(
        "verify: the base's pictures",
        PICTURES,
        "equal to each other, and to the base",
        judged=blind_to_base,
    ),
    merging_fault(
        "merge into base: scale forgotten", M1, "0.6 is not 1", add_to_weights_=scale_forgotten
    ),
    merging_fault(
        "merge into base: scale twice", M1, "-0.6 is not 0.36", add_to_weights_=scale_twice
    ),
    merging_fault(
        "merge into base: transposed", M1, "a square matrix hides it from shapes", dense=transposed
    ),
    merging_fault(
        "merge into base: next layer",
        M1,
        "layers of one shape are not one layer",
        add_to_weights_=next_layer,
    ),
    merging_fault(
        "merge into base: a layer lost",
        M1,
        "all layers carry the change",
        add_to_weights_=last_layer_lost,
    ),
    merging_fault(
        "merge into base: another precision",
        M1,
        "an fp32 base stays fp32",
        stored_dtype=always_fp16,
    ),
    merging_fault(
        "merge into base: pictures of a transpose", M2, "another function", dense=transposed
    ),
    merging_fault(
        "merge into base: alpha forgotten",
        M3,
        "alpha / rank is part of the change",
        add_to_weights_=own_scaling_forgotten,
    ),
    merging_fault(
        "merge into base: kernel first", M3, "a kernel is (in, kh, kw)", dense=kernel_first
    ),
    merging_fault(
        "merge into base: change in half", M4, "two roundings are not one", dense=change_in_half
    ),
    merging_fault(
        "merge into base: factors in half",
        M4,
        "the sum is rounded, not its parts",
        dense=factors_in_half,
    ),
]
