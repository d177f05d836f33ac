"""Faults of drawing: adapters that do not add up, traces of earlier drawings, a look that is not the file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from dreamrie import adapter_file
from dreamrie.diffusion import exported, generating
from dreamrie.lora import LowRank, stacking
from tests.diffusion import test_exported, test_generating
from tests.lora import test_stacking
from tests.mutants import Law, Mutant, replaced
from tests.mutants.diffusion import anchor_left_out

good_activate, good_changes = generating.activate, generating.changes_of
good_tensors, good_name = adapter_file.diffusers_tensors, generating._name


def last_only(unet: Any, scales: Mapping[str, float]) -> None:
    name = list(scales)[-1]
    good_activate(unet, {name: scales[name]})


def scales_ignored(unet: Any, scales: Mapping[str, float]) -> None:
    good_activate(unet, dict.fromkeys(scales, 1.0))


def scales_swapped(unet: Any, scales: Mapping[str, float]) -> None:
    good_activate(unet, dict(zip(scales, list(scales.values())[::-1], strict=True)))


def absolute_scales(unet: Any, scales: Mapping[str, float]) -> None:
    good_activate(unet, {name: abs(scale) for name, scale in scales.items()})


def averaged(unet: Any, scales: Mapping[str, float]) -> None:
    good_activate(unet, {name: scale / len(scales) for name, scale in scales.items()})


def never_at_rest(model: Any) -> None:
    """What acted in the last drawing acts in the next one too."""


def by_place(use: Any) -> str:
    digest = hashlib.sha256(str(use.path.resolve()).encode()).hexdigest()
    return f"{digest}-{use.rank}"


def whatever_the_rank(use: Any) -> str:
    return good_name(dataclasses.replace(use, rank=None))


def own_scaling_forgotten(contents: Any, rank: int | None) -> Any:
    ones = dict.fromkeys(contents.scalings, 1.0)
    return good_changes(dataclasses.replace(contents, scalings=ones), rank)


def first_columns(contents: Any, rank: int | None) -> Any:
    """The factors cut as they are, which is no best approximation."""
    whole = good_changes(contents, None)
    return {n: LowRank(c.left[:, :rank], c.right[:rank]) for n, c in whole.items()}


def whole_anyway(contents: Any, rank: int | None) -> Any:
    return good_changes(contents, None)


def half_as_strong(pairs: Any) -> dict[str, Tensor]:
    """A file whose every change is halved."""
    return {n: 0.5 * t if "lora_B" in n else t for n, t in good_tensors(pairs).items()}


def not_loaded(components: Any, path: Path, adapter_name: str) -> None:
    """The base then draws."""


@contextlib.contextmanager
def for_good(model: Any) -> Iterator[None]:
    """Set aside, and left there."""
    stacking.rest_lora(model)
    yield


def left_on(model: Any, adapter_name: str) -> None:
    """The file's adapter stays on the model."""


def fault(name: str, law: Law, why: str, module: ModuleType, **changed: Any) -> Mutant:
    """A mutant of one of the modules."""
    return Mutant(name, law, lambda: replaced(module, **changed), why)


def written(name: str, why: str, tensors: Any) -> Mutant:
    """A mutant of what is in the file, seen through `exported`."""

    @contextlib.contextmanager
    def broken() -> Iterator[Any]:
        with replaced(adapter_file, diffusers_tensors=tensors):
            yield exported

    return Mutant(name, test_exported.law_the_file_shows_what_training_draws, broken, why)


SUM, TRACE, AGAIN, STRENGTH = test_generating.LAWS
SHOWN, UNSEEN = test_exported.LAWS
ALONE = test_stacking.law_adapters_rest_until_they_are_asked

MUTANTS = [
    fault("generate: last adapter only", SUM, "the others act too", generating, activate=last_only),
    fault("generate: scales ignored", SUM, "0.7 is not 1", generating, activate=scales_ignored),
    fault("generate: scales swapped", SUM, "each has its own", generating, activate=scales_swapped),
    fault("generate: absolute scales", SUM, "-1.3 subtracts", generating, activate=absolute_scales),
    fault("generate: averaged", SUM, "a sum is no mean", generating, activate=averaged),
    fault(
        "generate: never at rest",
        TRACE,
        "without adapters the base draws",
        generating,
        rest_lora=never_at_rest,
    ),
    fault(
        "generate: whatever the rank",
        TRACE,
        "an adapter of rank 1 is not the one of rank 2",
        generating,
        _name=whatever_the_rank,
    ),
    fault("generate: named by place", AGAIN, "a file may be replaced", generating, _name=by_place),
    fault(
        "generate: own scaling forgotten",
        STRENGTH,
        "alpha over rank is part of the change",
        generating,
        changes_of=own_scaling_forgotten,
    ),
    fault(
        "generate: first columns", STRENGTH, "no nearest rank", generating, changes_of=first_columns
    ),
    fault("generate: rank ignored", STRENGTH, "as asked for", generating, changes_of=whole_anyway),
    written("preview: start not subtracted", "the file holds X - X0", anchor_left_out),
    written("preview: half as strong", "one half of the change", half_as_strong),
    fault("preview: not loaded", SHOWN, "the base", exported, load_with_diffusers=not_loaded),
    fault("preview: set aside for good", UNSEEN, "training goes on", exported, aside=for_good),
    fault("preview: left on", UNSEEN, "one adapter trains", exported, unstack_lora=left_on),
    fault(
        "stacking: acts at once", ALONE, "the caller says when", stacking, rest_lora=never_at_rest
    ),
]
