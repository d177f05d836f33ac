"""Wrong implementations that the laws must reject, and the registry they live in.

A *law* is a plain function `law(impl) -> None` that raises AssertionError when `impl` breaks it. `impl` is whatever
offers the functions the law calls: the real module, or the same module with one attribute replaced. The normal tests
run a law on the real module, `tests/contracts/test_the_tests.py` runs the very same law on every mutant.

A *mutant* is one deliberate fault, described by a context manager that yields the broken implementation:

    def law_scaling_enters(impl): ...                       # tests/properties/test_x_laws.py

    MUTANTS = [                                              # tests/mutants/x.py
        Mutant(
            name="scaling forgotten",
            law=law_scaling_enters,
            broken=lambda: replaced(dreamrie.x, recover=recover_without_scaling),
            why="c is part of X: without it the step is c times too long",
        ),
    ]

`replaced(module, attribute=wrong, ...)` swaps module attributes in process and restores them afterwards; no file is
patched. A law that takes an example as second argument becomes `law(impl)` through `each(law, examples)`; the mutant is
caught when any of the examples fails.

To add a file of mutants, put a module with a list `MUTANTS` into this folder.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

Law = Callable[[Any], None]


@dataclass(frozen=True)
class Mutant:
    """One deliberate fault and the law that must reject it."""

    name: str
    law: Law
    broken: Callable[[], AbstractContextManager[Any]]
    why: str
    # Failed assertions and `pytest.raises` count as caught; add another type only where the fault cannot even be
    # evaluated (e.g. shapes that do not fit).
    raises: tuple[type[BaseException], ...] = ()


@contextmanager
def replaced(module: ModuleType | type, **attributes: Any) -> Iterator[Any]:
    """Yield `module` with some attributes replaced by wrong ones, and restore them."""
    with mock.patch.multiple(module, **attributes):
        yield module


@contextmanager
def instead(implementation: Any) -> Iterator[Any]:
    """Yield a complete wrong implementation, for faults that are no replaced attribute."""
    yield implementation


def each(law: Callable[[Any, Any], None], examples: Iterable[Any]) -> Law:
    """Turn `law(impl, example)` into `law(impl)` over fixed examples."""
    fixed = tuple(examples)

    @functools.wraps(law)
    def over_all(impl: Any) -> None:
        for example in fixed:
            law(impl, example)

    return over_all


def all_mutants() -> list[Mutant]:
    """Collect `MUTANTS` of every module in this folder; names are unique."""
    modules = [
        importlib.import_module(f"{__name__}.{file.name}")
        for file in pkgutil.iter_modules(__path__)
    ]
    mutants = [mutant for module in modules for mutant in getattr(module, "MUTANTS", ())]
    names = [m.name for m in mutants]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"mutant names must be unique, repeated: {repeated}")
    return mutants


def is_caught(mutant: Mutant) -> bool:
    """Run the mutant's law on the broken implementation."""
    try:
        with mutant.broken() as implementation:
            mutant.law(implementation)
    except (AssertionError, pytest.fail.Exception, *mutant.raises):
        return True
    return False
