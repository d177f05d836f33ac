"""Alg. 6 as printed, fault by fault, and wrong cores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import dreamrie.fixed_rank as fixed_rank
from tests.mutants import Law, Mutant, instead, replaced
from tests.properties import test_reference_laws as laws
from tests.reference import alg6


class PlusSigns(alg6.RiemannAdam):
    """Line 14 as printed: [lr dA, A_L], [B_R, lr dB + B]."""

    def factors(self, dA: Tensor, dB: Tensor) -> tuple[Tensor, Tensor]:
        return super().factors(-dA, -dB)


class NoMemory(alg6.RiemannAdam):
    """Line 12 as printed: gamma on the new term."""

    def second_moment(self, old: Tensor, block: Tensor) -> Tensor:
        return (1 - self.gamma) * old + self.gamma * block.norm() ** 2


class NoSquare(alg6.RiemannAdam):
    """Line 12 as printed: norms that are not squared."""

    def second_moment(self, old: Tensor, block: Tensor) -> Tensor:
        return self.gamma * old + (1 - self.gamma) * block.norm()


class FrameForPoint(alg6.RiemannAdam):
    """B_R where B belongs."""

    def factors(self, dA: Tensor, dB: Tensor) -> tuple[Tensor, Tensor]:
        left, _ = super().factors(dA, dB)
        return left, torch.cat([self.B_R, self.B_R - self.lr * dB], dim=1)


class GradientAtShiftedWeights(alg6.RiemannAdam):
    """Lines 7, 8 as printed: the loss at W + X."""

    def weights(self) -> Tensor:
        return self.W + self.X


class WithoutAlpha(alg6.RiemannAdam):
    """Lines 1 to 3 as printed: alpha does not occur."""

    def first_point(self, G: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
        return super().first_point(G, 1.0)


class SameIndices(alg6.RiemannAdam):
    """U_1 with V_1: the tangent space holds r singular triples, not 2r."""

    def first_point(self, G: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
        u, s, _ = super().first_point(G, alpha)
        return u, s, torch.linalg.svd(G, full_matrices=False)[2][: self.r].mT


class OneMoment(alg6.RiemannAdam):
    """One second moment for both blocks: transposition equivariant, hence not Alg. 6."""

    def second_moment(self, old: Tensor, block: Tensor) -> Tensor:
        dA, dB = self.tangent()
        return self.gamma * old + (1 - self.gamma) * (dA.norm() ** 2 + dB.norm() ** 2)


def straight_core(r_left: Tensor, r_right: Tensor, rank: int) -> Tensor:
    return r_left @ r_right.mT


def alg6_mutant(name: str, law: Law, why: str, wrong: type[Any]) -> Mutant:
    return Mutant(name, law, lambda: instead(SimpleNamespace(RiemannAdam=wrong)), why)


MUTANTS = [
    alg6_mutant("Alg. 6 line 14: plus signs", laws.law_21_descends, "the loss rises", PlusSigns),
    alg6_mutant(
        "Alg. 6 line 14: plus signs, path", laws.law_21_factored_equals_dense, "ascent", PlusSigns
    ),
    alg6_mutant(
        "Alg. 6 line 12: gamma on the new term",
        laws.law_21_factored_equals_dense,
        "no memory",
        NoMemory,
    ),
    alg6_mutant(
        "Alg. 6 line 12: no square", laws.law_21_factored_equals_dense, "another unit", NoSquare
    ),
    alg6_mutant(
        "Alg. 6 line 14: B_R for B",
        laws.law_21_factored_equals_dense,
        "the point is lost",
        FrameForPoint,
    ),
    alg6_mutant(
        "Alg. 6 lines 7, 8: gradient at W + X",
        laws.law_13_start_is_optimal_and_changes_nothing,
        "step 0 changes the function",
        GradientAtShiftedWeights,
    ),
    alg6_mutant(
        "Alg. 6 lines 1 to 3: no alpha",
        laws.law_13_start_is_optimal_and_changes_nothing,
        "the start has norm 1",
        WithoutAlpha,
    ),
    alg6_mutant(
        "start with (U_1, V_1)",
        laws.law_13_start_is_optimal_and_changes_nothing,
        "half of the energy",
        SameIndices,
    ),
    alg6_mutant(
        "one second moment for both blocks",
        laws.law_6_blocks_break_transposition,
        "this variant would be equivariant",
        OneMoment,
    ),
    Mutant(
        "core with the straight pairing",
        laws.law_20_odd_spectral_maps_act_on_the_core,
        lambda: replaced(fixed_rank, cross_core=straight_core),
        "Q_left R_left R_right^T Q_right^T is another matrix",
    ),
]
