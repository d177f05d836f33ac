"""How a wrong piece gets into the optimizer, and short forms of its mutants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import dreamrie.riemannion as riemannion
import dreamrie.riemannion_groups as groups
import dreamrie.riemannion_layers as layers
import dreamrie.riemannion_maps as maps
import dreamrie.riemannion_step as step
from tests.mutants import Law, Mutant, each, replaced
from tests.properties import test_riemannion_direction_laws as direction_laws
from tests.properties import test_riemannion_step_laws as step_laws
from tests.properties.one_step import STEP_POINTS


@contextmanager
def broken_step(**wrong: Any) -> Iterator[Any]:
    """Yield the step module with wrong pieces, in place wherever the optimizer imported them."""
    with ExitStack() as stack:
        for module in (step, layers, groups, maps, riemannion):
            here = {name: value for name, value in wrong.items() if hasattr(module, name)}
            if here:
                stack.enter_context(replaced(module, **here))
        yield step


@contextmanager
def broken_optimizer(**wrong: Any) -> Iterator[Any]:
    """Yield the optimizer's module on top of a broken step."""
    with broken_step(**wrong):
        yield riemannion


@contextmanager
def other_class(wrong: type[Any]) -> Iterator[Any]:
    """Yield the optimizer's module with a wrong subclass in the place of Riemannion."""
    with replaced(riemannion, Riemannion=wrong):
        yield riemannion


# ------------------------------------------------------------------------------------------------- registry


def wrong_step(name: str, law: Law, why: str, **wrong: Any) -> Mutant:
    return Mutant(name, law, lambda: broken_step(**wrong), why)


def wrong_path(name: str, law: Law, why: str, **wrong: Any) -> Mutant:
    return Mutant(name, law, lambda: broken_optimizer(**wrong), why)


def wrong_class(name: str, law: Law, why: str, wrong: type[Any]) -> Mutant:
    return Mutant(name, law, lambda: other_class(wrong), why)


DENSE = each(step_laws.law_o5_step_equals_dense, STEP_POINTS)
SPECTRUM = each(direction_laws.law_o6_direction_has_the_closed_form_spectrum, STEP_POINTS)
MOVE = each(direction_laws.law_o6_first_order_move, STEP_POINTS)
DECAY = each(step_laws.law_o18_decay_acts_on_the_point, STEP_POINTS)
