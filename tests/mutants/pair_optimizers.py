"""Wrong optimizers of LoRA pairs: Alg. 6 as printed, roots and scalings lost, momenta in the wrong frame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import dreamrie.optimizers as impl
from dreamrie.optimizers import factors, imuon, lora_muon, lora_rite, pair_optimizer, riemannian
from dreamrie.optimizers.factors import Answer, Side
from tests.mutants import Law, Mutant, replaced
from tests.properties import test_optimizers_laws as laws


@contextmanager
def broken(module: ModuleType | type, **wrong: Any) -> Iterator[Any]:
    """Yield the package of optimizers with a wrong piece in one of its modules."""
    with replaced(module, **wrong):
        yield impl


def named(law: Any, name: str) -> Law:
    """The law for one optimizer."""

    def of_one(package: Any) -> None:
        law(package, name)

    of_one.__name__, of_one.__module__ = law.__name__, law.__module__
    return of_one


# ------------------------------------------------------------------------------------------------- Algorithm 6

_weighted = riemannian.weighted_core
_second = riemannian.second_moment


def core_with_plus_signs(l: Tensor, r: Tensor, rank: int, a: Tensor, b: Tensor) -> Tensor:  # noqa: E741
    """Line 14 as printed."""
    return -_weighted(l, r, rank, a, b)


def core_with_swapped_weights(l: Tensor, r: Tensor, rank: int, a: Tensor, b: Tensor) -> Tensor:  # noqa: E741
    return _weighted(l, r, rank, b, a)


def second_moment_as_printed(average: Tensor, block: Tensor) -> Tensor:
    """Line 12: the decay weighs the new term, so that there is no memory."""
    return (1 - riemannian.BETA2) * average + riemannian.BETA2 * block.square().sum(dim=(-2, -1))


def second_moment_without_square(average: Tensor, block: Tensor) -> Tensor:
    return _second(average, block.square().sum(dim=(-2, -1), keepdim=True) ** 0.25)


def second_moment_one_for_both(average: Tensor, block: Tensor) -> Tensor:
    """Per entry instead of per block: the mean of the squares."""
    return _second(average, block / block[0].numel() ** 0.5)


@contextmanager
def smoothed_blocks() -> Iterator[Any]:
    """Second moments of the smoothed gradient in the place of the raw one."""

    def read_smoothed(layers: Any, state: Any) -> Any:
        batch = _read(layers, state)
        beta = layers[0].group["momentum"]
        smooth = (
            beta * batch.state.m_left + (1 - beta) * batch.gradient_v,
            beta * batch.state.m_right + (1 - beta) * batch.gradient_t_u,
        )
        read_smoothed.blocks = smooth  # type: ignore[attr-defined]
        return batch

    def second(average: Tensor, block: Tensor) -> Tensor:
        left, right = read_smoothed.blocks  # type: ignore[attr-defined]
        return _second(average, left if block.shape == left.shape else right)

    _read = riemannian.read
    with replaced(riemannian, read=read_smoothed, second_moment=second):
        yield impl


# ------------------------------------------------------------------------------------------------- factor methods

_half, _directions = lora_muon.half, lora_muon.directions


def half_with_root(momentum: Tensor, triangle: Tensor) -> Tensor:
    """S^1/2 in the place of S^-1/2."""
    return factors.tall_msign(momentum @ triangle.mT) @ triangle / 2


def half_whitened_once(momentum: Tensor, triangle: Tensor) -> Tensor:
    """The second S^-1/2 forgotten."""
    return factors.tall_msign(factors.divide(momentum, triangle)) / 2


def half_of_its_own(left: Side, right: Side, momentum: float) -> Answer:
    """Each factor whitened by its own Gram matrix."""
    return _directions(
        left._replace(triangle=right.triangle), right._replace(triangle=left.triangle), momentum
    )


def unscaled(layers: Any, dtype: Any = None) -> Tensor:
    return torch.ones(len(layers), 1, dtype=torch.float64)


def plain_gradient(gradient: Tensor, triangle: Tensor) -> Tensor:
    """Momentum of the gradients of the factors: does not turn with them."""
    return gradient


def joint_without_other(own: Side, m_own: Tensor, other: Side, m_other: Tensor) -> Tensor:
    """Half of the joint momentum."""
    return m_own @ other.triangle.mT


def split_decay_of_one(layers: Any, sides: Any, answer: Answer) -> Any:
    """sigma on the factors alone: the step shrinks too."""
    group = layers[0].group
    sigma = (1 - group["lr"] * group["weight_decay"]) ** 0.5
    return tuple(
        sigma * side.factor - group["lr"] * step
        for side, step in zip(sides, (answer.left, answer.right), strict=True)
    )


def pull_twice(left: Side, right: Side, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The part that both factors share is counted in both."""
    by_right = a @ factors.divide_transposed(b.mT @ right.frame, right.triangle)
    by_left = b @ factors.divide_transposed(a.mT @ left.frame, left.triangle)
    return left.factor - by_right, right.factor - by_left


def pull_to_zero(left: Side, right: Side, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return left.factor / 2, right.factor / 2


_anchored = factors.anchor_of


def anchor_with_its_sign(layers: Any) -> Any:
    found = _anchored(layers)
    return type(found)(-found.left, found.right)


# ------------------------------------------------------------------------------------------------- LoRA-RITE

_carried = lora_rite.carried


def carry_momentum_as_it_is(own: Side, passage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    moment, lost, _ = _carried(own, passage)
    return moment, lost, own.state["momentum"]


def carry_moment_as_it_is(own: Side, passage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, lost, average = _carried(own, passage)
    return own.state["second_moment"], lost, average


def lose_nothing(own: Side, passage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    moment, lost, average = _carried(own, passage)
    return moment, torch.zeros_like(lost), average


def carry_backwards(own: Side, passage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _carried(own, passage.mT)


def root_of_entries(matrix: Tensor) -> Tensor:
    """Adam's diagonal in the place of the matrix."""
    return torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1).rsqrt())


# ------------------------------------------------------------------------------------------------- what all share


def biased_always(pairs: Any, lr: float, bias_correction: bool = True, **rest: Any) -> Any:
    return _adam(pairs, lr, bias_correction=False, **rest)


_adam = riemannian.riemann_adam


class WritesTheAnchor(pair_optimizer.Factor):
    """Shrinks the rows behind the trained ones a little with every step."""

    def write_(self, columns: Tensor) -> None:
        super().write_(columns)
        if self.is_right:
            self.parameter.detach()[columns.shape[-1] :].mul_(1 - 1e-9)


MUTANTS = [
    *(
        Mutant(name, law, lambda m=module, w=wrong: broken(m, **w), why)
        for name, law, module, wrong, why in (
            (
                "Alg. 6 line 14 as printed",
                named(laws.law_o13_a_quadratic_is_solved, "riemann_adam"),
                riemannian,
                {"weighted_core": core_with_plus_signs},
                "plus signs climb",
            ),
            (
                "Alg. 6 line 14 as printed: path",
                laws.law_21_riemann_sgd_and_adam_equal_dense,
                riemannian,
                {"weighted_core": core_with_plus_signs},
                "plus signs climb",
            ),
            (
                "Alg. 6 with the blocks' weights swapped",
                laws.law_21_riemann_sgd_and_adam_equal_dense,
                riemannian,
                {"weighted_core": core_with_swapped_weights},
                "the core belongs to the right block",
            ),
            (
                "Alg. 6 line 12 as printed",
                laws.law_21_riemann_sgd_and_adam_equal_dense,
                riemannian,
                {"second_moment": second_moment_as_printed},
                "the second moment has no memory",
            ),
            (
                "Alg. 6 line 12 without square",
                laws.law_21_riemann_sgd_and_adam_equal_dense,
                riemannian,
                {"second_moment": second_moment_without_square},
                "the unit is wrong",
            ),
            (
                "Alg. 6 per entry",
                laws.law_bias_correction_is_a_switch,
                riemannian,
                {"second_moment": second_moment_one_for_both},
                "a block has norm lr, not its entries",
            ),
            (
                "bias correction never",
                laws.law_bias_correction_is_a_switch,
                riemannian,
                {"riemann_adam": biased_always},
                "the switch does nothing",
            ),
            (
                "LoRA-Muon with S^1/2",
                named(laws.law_factor_methods_equal_their_papers, "lora_muon"),
                lora_muon,
                {"half": half_with_root},
                "the root of the Gram matrix is inverted",
            ),
            (
                "LoRA-Muon with S^1/2: gauge",
                named(laws.law_5_products_do_not_depend_on_the_factors, "lora_muon"),
                lora_muon,
                {"half": half_with_root},
                "the step does not turn with the factors",
            ),
            (
                "LoRA-Muon whitened once",
                named(laws.law_5_products_do_not_depend_on_the_factors, "lora_muon"),
                lora_muon,
                {"half": half_whitened_once},
                "the step has the size of the factors",
            ),
            (
                "LoRA-Muon whitened by itself",
                named(laws.law_factor_methods_equal_their_papers, "lora_muon"),
                lora_muon,
                {"directions": half_of_its_own},
                "S_A belongs to B",
            ),
            (
                "scaling of the factors forgotten",
                named(laws.law_factor_methods_equal_their_papers, "lora_muon"),
                factors,
                {"scaling_of": unscaled},
                "c is part of X",
            ),
            (
                "scaling of the factors forgotten: X",
                named(laws.law_scaling_is_part_of_the_product, "lora_rite"),
                factors,
                {"scaling_of": unscaled},
                "the path of X depends on c",
            ),
            (
                "iMuon on factor gradients",
                named(laws.law_5_products_do_not_depend_on_the_factors, "imuon"),
                imuon,
                {"intrinsic": plain_gradient},
                "their momentum does not turn with the factors",
            ),
            (
                "iMuon of one momentum",
                named(laws.law_factor_methods_equal_their_papers, "imuon"),
                imuon,
                {"joint": joint_without_other},
                "the momentum of the other factor is missing",
            ),
            (
                "split decay of the factors alone",
                named(laws.law_factor_methods_equal_their_papers, "lora_muon"),
                factors,
                {"_decayed": split_decay_of_one},
                "the step is sigma times too short",
            ),
            (
                "anchored pull counted twice",
                named(laws.law_16_decay_pulls_to_the_anchor, "lora_muon"),
                factors,
                {"anchored_pull": pull_twice},
                "the change shrinks twice as fast within the core",
            ),
            (
                "factors decay to zero beside an anchor",
                named(laws.law_16_decay_pulls_to_the_anchor, "imuon"),
                factors,
                {"anchored_pull": pull_to_zero},
                "X0 is no fixed point",
            ),
            (
                "factors pulled to minus the anchor",
                named(laws.law_16_decay_pulls_to_the_anchor, "lora_rite"),
                factors,
                {"anchor_of": anchor_with_its_sign},
                "the frozen half holds -X0",
            ),
            (
                "LoRA-RITE keeps its momentum in the old frame",
                named(laws.law_factor_methods_equal_their_papers, "lora_rite"),
                lora_rite,
                {"carried": carry_momentum_as_it_is},
                "the frame of the other factor turns",
            ),
            (
                "LoRA-RITE keeps its momentum in the old frame: gauge",
                named(laws.law_5_products_do_not_depend_on_the_factors, "lora_rite"),
                lora_rite,
                {"carried": carry_momentum_as_it_is},
                "frames of different factors turn differently",
            ),
            (
                "LoRA-RITE keeps its second moment in the old frame",
                named(laws.law_factor_methods_equal_their_papers, "lora_rite"),
                lora_rite,
                {"carried": carry_moment_as_it_is},
                "P V P^T",
            ),
            (
                "LoRA-RITE loses mass",
                named(laws.law_factor_methods_equal_their_papers, "lora_rite"),
                lora_rite,
                {"carried": lose_nothing},
                "rho adds up what the projection loses",
            ),
            (
                "LoRA-RITE carries backwards",
                named(laws.law_factor_methods_equal_their_papers, "lora_rite"),
                lora_rite,
                {"carried": carry_backwards},
                "P is from the old frame to the new one",
            ),
            (
                "LoRA-RITE by entries",
                named(laws.law_5_products_do_not_depend_on_the_factors, "lora_rite"),
                lora_rite,
                {"inverse_root": root_of_entries},
                "a diagonal depends on the axes",
            ),
            (
                "own methods write the anchor",
                named(laws.law_a10_own_methods_keep_the_anchor, "lora_muon"),
                pair_optimizer,
                {"Factor": WritesTheAnchor},
                "the frozen half drifts",
            ),
        )
    ),
    Mutant(
        "Alg. 6 normalized by smoothed gradients",
        laws.law_21_riemann_sgd_and_adam_equal_dense,
        smoothed_blocks,
        "line 12 takes the raw blocks",
    ),
]
