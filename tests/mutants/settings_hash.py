"""Faults of the hash of settings."""

from __future__ import annotations

import hashlib
from typing import Any

from dreamrie.config import identity
from tests import test_config_identity as laws
from tests.mutants import Mutant
from tests.mutants.adapter_files import faulty


def of_everything(groups: Any) -> str:
    """A moved folder makes another training of it."""
    return hashlib.sha256(repr(groups).encode()).hexdigest()


def of_names(groups: Any) -> str:
    return hashlib.sha256(repr(sorted(groups)).encode()).hexdigest()


def fault(name: str, why: str, **wrong: Any) -> Mutant:
    return faulty(
        name, laws.law_the_hash_is_of_what_decides, why, (identity, wrong), impl=laws.REAL
    )


WITHOUT = identity._LEFT_OUT - {"resolution"}
MUTANTS = [
    fault("hash of all settings", "a moved folder changes no step", settings_hash=of_everything),
    fault("hash of names alone", "values decide", settings_hash=of_names),
    fault("hash without the schedule", "the seed decides", _GROUPS=identity._GROUPS[:-1]),
    fault("hash with later switches", "earlier trainings have none", _LATER=frozenset()),
    fault(
        "hash with the compiler", "it only rounds", _LEFT_OUT=identity._LEFT_OUT - {"torch_compile"}
    ),
    fault("hash with the resolution", "it may wait for the model", _LEFT_OUT=WITHOUT),
]
