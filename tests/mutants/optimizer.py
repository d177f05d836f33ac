"""Faults, filled in with the laws."""

from __future__ import annotations

from tests.mutants import Mutant

MUTANTS: list[Mutant] = []
