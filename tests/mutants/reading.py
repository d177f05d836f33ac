"""Wrong readings between norm and step: changes that are not noticed, and a norm that loses digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import dreamrie.riemannion as riemannion
import dreamrie.riemannion_reading as reading
from dreamrie.riemannion_layers import Batch
from dreamrie.riemannion_reading import Marks
from tests.mutants import Mutant, each
from tests.mutants.broken_optimizers import wrong_class, wrong_path
from tests.properties import test_riemannion_reading_laws as laws

_marks = reading.marks_of
CHANGES = each(laws.law_no_change_in_between_is_missed, laws.CHANGES)


def without_versions(groups: Any, state: Any) -> Marks:
    """Objects and addresses alone: what is written in place goes unseen."""
    addresses = [float(p.data_ptr()) for group in groups for p in group["params"]]
    return Marks(_marks(groups, state).objects, addresses)


def without_objects(groups: Any, state: Any) -> Marks:
    """A new gradient of the same version passes for the old one."""
    return Marks([], _marks(groups, state).numbers)


def without_addresses(groups: Any, state: Any) -> Marks:
    found = _marks(groups, state)
    addresses = {float(p.data_ptr()) for group in groups for p in group["params"]}
    return Marks(found.objects, [n for n in found.numbers if n not in addresses])


def without_state(groups: Any, state: Any) -> Marks:
    return _marks(groups, {})


class NeverForgets(riemannion.Riemannion):
    """The reading outlives the step."""

    def _batches(self) -> list[Batch]:
        return self._reading.batches if self._reading else super()._batches()


class ReadsTwice(riemannion.Riemannion):
    """Nothing is kept: right, and as slow as before."""

    def tangent_grad_norm(self, *, for_step: bool = False) -> Tensor:
        return super().tangent_grad_norm()


def norm_of_normal_part(batches: Sequence[Batch]) -> Tensor:
    """The core is taken away twice: once with the left part, once more with the right one."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        core = batch.state.u.mT @ batch.gradient_v
        parts = (batch.gradient_v, batch.gradient_t_u)
        total += sum(part.square().sum() for part in parts) - 2 * core.square().sum()
    return total.clamp_min(0).sqrt()


def norm_of_products(batches: Sequence[Batch]) -> Tensor:
    """The core is counted on both sides."""
    parts = [part for batch in batches for part in (batch.gradient_v, batch.gradient_t_u)]
    return torch.stack([part.square().sum() for part in parts]).sum().sqrt()


MUTANTS: list[Mutant] = [
    wrong_path(
        "reading kept without versions",
        CHANGES,
        "clipped gradients would be stepped unclipped",
        marks_of=without_versions,
    ),
    wrong_path(
        "reading kept without objects",
        CHANGES,
        "the gradient of another batch would pass for the one that was read",
        marks_of=without_objects,
    ),
    wrong_path(
        "reading kept without addresses",
        CHANGES,
        "factors that were exchanged would be stepped as the old ones",
        marks_of=without_addresses,
    ),
    wrong_path(
        "reading kept without state",
        CHANGES,
        "a loaded momentum would not count",
        marks_of=without_state,
    ),
    wrong_class(
        "reading outlives its step",
        CHANGES,
        "each step would repeat the first one",
        NeverForgets,
    ),
    wrong_class(
        "norm keeps nothing for the step",
        laws.law_the_step_takes_what_the_norm_read,
        "all layers are read twice in each step",
        ReadsTwice,
    ),
    wrong_path(
        "core taken from both parts of the norm",
        laws.law_the_norm_loses_no_digits,
        "a gradient inside the core would have no norm",
        norm_of=norm_of_normal_part,
    ),
    wrong_path(
        "core counted in both parts of the norm",
        laws.law_the_norm_loses_no_digits,
        "sqrt(2) too large where the gradient lies in the core",
        norm_of=norm_of_products,
    ),
]
