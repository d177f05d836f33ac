"""Faults of the PEFT bridge: scaling misread, factors mixed up, anchor lost, export rounded or cut short."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dreamrie.lora as real
from dreamrie import riemannion_step
from dreamrie.errors import ConfigError
from dreamrie.fixed_rank import Point, point_from_factors
from dreamrie.lora import LoraPair, LowRank, arithmetic, attach, pairs
from dreamrie.riemannion import Riemannion
from tests.mutants import Law, Mutant, replaced
from tests.properties import test_lora_laws as laws

# A law that expects an error fails with pytest's own exception when none comes.
NO_ERROR = (AssertionError, pytest.fail.Exception)


def bridge(
    name: str,
    law: Law,
    why: str,
    owner: Any,
    raises: tuple[type[BaseException], ...] = (AssertionError,),
    **wrong: Any,
) -> Mutant:
    """A mutant with attributes of one module or class of the bridge replaced."""

    @contextmanager
    def patched() -> Iterator[Any]:
        with replaced(owner, **wrong):
            yield laws.Everything()

    return Mutant(name=name, law=law, broken=patched, why=why, raises=raises)


# ------------------------------------------------------------------------------------------------ reading a pair

read_pair, find_pairs = pairs._read_pair, real.lora_pairs
good_delta, good_set_start = LoraPair.delta, LoraPair.set_start


def alpha_for_scaling(name: str, layer: Any, adapter: str) -> LoraPair:
    pair = read_pair(name, layer, adapter)
    pair.scaling = float(layer.lora_alpha[adapter])
    return pair


def scaling_one(name: str, layer: Any, adapter: str) -> LoraPair:
    pair = read_pair(name, layer, adapter)
    pair.scaling = 1.0
    return pair


def alpha_over_full_width(name: str, layer: Any, adapter: str) -> LoraPair:
    """alpha / (2 rank), as if every layout were anchored."""
    pair = read_pair(name, layer, adapter)
    pair.scaling = float(layer.lora_alpha[adapter]) / (2 * pair.rank)
    return pair


def swapped_delta(self: LoraPair) -> Tensor:
    """lora_A^T lora_B^T: the paper's letters taken for PEFT's."""
    return self.scaling * (self.right_matrix().T @ self.left_matrix().T).detach()


def kernel_transposed_delta(self: LoraPair) -> Tensor:
    """Columns of a convolution in the order (kh, kw, in)."""
    if self.right.ndim != 4:
        return good_delta(self)
    right = self.right.detach().permute(0, 2, 3, 1).reshape(self.right.shape[0], -1)
    return self.scaling * self.left_matrix().detach() @ right


def trained_half_delta(self: LoraPair) -> Tensor:
    """X in place of X - X0."""
    left, right = self.left_matrix().detach(), self.right_matrix().detach()
    return self.scaling * left[:, : self.rank] @ right[: self.rank]


def neighbours_factor(model: nn.Module, adapter_name: str | None = None) -> list[LoraPair]:
    """Each layer gets the right factor of the next layer of its shape."""
    found = find_pairs(model, adapter_name)
    rights = [pair.right for pair in found]
    for n, pair in enumerate(found):
        same = [k for k in range(len(found)) if rights[k].shape == pair.right.shape]
        pair.right = rights[same[(same.index(n) + 1) % len(same)]]
    return found


def point_without_scaling(self: LoraPair) -> Point:
    left, right = self.left_matrix().detach(), self.right_matrix().detach()
    return point_from_factors(left[:, : self.rank], right[: self.rank].T, 1.0)


def point_of_everything(self: LoraPair) -> Point:
    """The leading r triples of X - X0: trained and frozen columns in one product."""
    left, right = self.left_matrix().detach(), self.right_matrix().detach()
    whole = point_from_factors(left, right.T, self.scaling)
    return Point(whole.u[:, : self.rank], whole.s[: self.rank], whole.v[:, : self.rank])


def start_without_scaling(self: LoraPair, point: Point, anchored: bool) -> None:
    good_set_start(self, point._replace(s=point.s * self.scaling), anchored)


def anchor_with_plus(self: LoraPair, point: Point, anchored: bool) -> None:
    good_set_start(self, point, anchored)
    if anchored:
        with torch.no_grad():
            self.left_matrix()[:, self.rank :].neg_()


def anchor_as_point(self: LoraPair) -> Point:
    """The sign of the frozen half left in."""
    left, right = self.left_matrix().detach(), self.right_matrix().detach()
    return point_from_factors(left[:, self.rank :], right[self.rank :].T, self.scaling)


# ------------------------------------------------------------------------------------------------------ attaching

inject, layer_ranks, resolve = attach.inject, attach._layer_ranks, attach.resolve_targets


def base_left_trainable(model: nn.Module, config: Any, adapter_name: str) -> None:
    inject(model, config, adapter_name)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def base_rewritten(model: Any, rank: int, targets: Any, **options: Any) -> list[LoraPair]:
    """PiSSA as PEFT does it on the real layer: W - X0 in place of an anchor."""
    found = attach.attach_lora(model, rank, targets, **options)
    for pair in found if options.get("init") == "pissa" else ():
        with torch.no_grad():
            pair.left_matrix()[:, pair.rank :] = 0
            pair.base_weight -= pair.delta().to(pair.base_weight).reshape(pair.base_weight.shape)
    return found


def only_what_matches(model: Any, targets: Any, adapter_name: str = "default") -> Any:
    """Names that match nothing are dropped, as PEFT does."""
    if isinstance(targets, str):
        return resolve(model, targets, adapter_name)
    known = {name.split(".")[-1] for name, _ in model.named_modules()}
    return resolve(model, [t for t in targets if t in known] or targets, adapter_name)


def rank_cut_silently(layers: dict[str, Any], rank: int, with_anchor: bool) -> dict[str, int]:
    sides = {name: min(attach.matrix_shape(layer)) for name, layer in layers.items()}
    return {name: min(rank, side // 2) for name, side in sides.items()}


def rank_as_asked(layers: dict[str, Any], rank: int, with_anchor: bool) -> dict[str, int]:
    layer_ranks(layers, rank, with_anchor)
    return dict.fromkeys(layers, rank)


def fingerprint_of_everything(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + str(tensor.double().sum().item()).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ training


class AnchorDecays(Riemannion):
    """Weight decay reaches the frozen half."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            keep = 1 - group["lr"] * group["weight_decay"]
            for index, parameter in enumerate(group["params"]):
                rank = group["rank"][index // 2]
                half = parameter.data[rank:] if index % 2 else parameter.data[:, rank:]
                half *= keep
        return result


class AnchorFollows(Riemannion):
    """The frozen half is copied from the trained one after each step."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                rank, data = group["rank"][index // 2], parameter.data
                if index % 2:
                    data[rank:] = data[:rank]
                else:
                    data[:, rank:] = -data[:, :rank]
        return result


def mask_nothing(given: Any) -> None:
    """The anchor counted in the clip norm."""


def mask_left_only(given: Any) -> None:
    for pair in given:
        if pair.left.grad is not None:
            pair.left.grad[:, pair.rank :] = 0


def mask_trained_half(given: Any) -> None:
    for pair in given:
        pair.left.grad[:, : pair.rank] = 0


def recover_without_scaling(gradient: Tensor, s: Tensor, scaling: Any) -> Tensor:
    return gradient / s.sqrt()


def recover_by_s(gradient: Tensor, s: Tensor, scaling: Any) -> Tensor:
    return gradient / (scaling * s)


def recover_nothing(gradient: Tensor, s: Tensor, scaling: Any) -> Tensor:
    return gradient


def recover_reversed(gradient: Tensor, s: Tensor, scaling: Any) -> Tensor:
    """Columns divided by each other's singular value."""
    return riemannion_step.recover(gradient, s.flip(-1), scaling)


# -------------------------------------------------------------------------------------------------------- export

balance, change_of, balanced = arithmetic.balance, arithmetic.change_of, arithmetic.balanced_factors


def rank_r_export(pair: LoraPair, **options: Any) -> LowRank:
    return balanced(pair, **{**options, "rank": pair.rank})


def half_first(pair: LoraPair) -> LowRank:
    """fp16 cast before balancing."""
    change = change_of(pair)
    return LowRank(change.left.half().double(), change.right.half().double())


def without_scaling(pair: LoraPair) -> LowRank:
    change = change_of(pair)
    return LowRank(change.left / pair.scaling, change.right)


def trained_half(pair: LoraPair) -> LowRank:
    change = change_of(pair)
    return LowRank(change.left[:, : pair.rank], change.right[: pair.rank])


def not_balanced(change: LowRank, **options: Any) -> LowRank:
    return LowRank(change.left.double(), change.right.double())


def one_sided(change: LowRank, **options: Any) -> LowRank:
    """U and S V^T: exact, but not balanced."""
    left, right = balance(change, **options)
    root = left.norm(dim=0)
    return LowRank(left / root, right * root[:, None])


def smallest_kept(change: LowRank, *, rank: int | None = None, drop_below: float = 0.0) -> LowRank:
    whole = balance(change, drop_below=drop_below)
    keep = whole.left.shape[1] if rank is None else rank
    return LowRank(whole.left[:, -keep:], whole.right[-keep:])


def unweighted(changes: Any, weights: Any = None) -> LowRank:
    return arithmetic.combine(changes)


def weights_on_both_sides(changes: Any, weights: Any = None) -> LowRank:
    scaled = [LowRank(c.left, w * c.right) for w, c in zip(weights, changes, strict=True)]
    return arithmetic.combine(scaled, weights)


def linear_energy(singular_values: Tensor, rank: int) -> float:
    return float(singular_values[:rank].sum() / singular_values.sum())


DELTA, GAUGE = laws.law_a9_delta_is_what_the_layer_does, laws.law_a9_gauge_there_and_back
MERGED, ATTACH = laws.law_a2_merged_equals_factored, laws.law_a1_attach_changes_nothing
TARGETS, RANKS = laws.law_a5_every_target_must_match, laws.law_a5_rank_must_fit
RECOVER, NORM = laws.law_12_recovered_products, laws.law_a10_anchor_is_not_in_the_norm
ANCHOR, EXPORT = laws.law_a10_anchor_keeps_its_bytes, laws.law_a11_export_on_the_untouched_base
HALF, SUMS = laws.law_a11_export_survives_fp16, laws.law_a12_arithmetic_is_dense_arithmetic
ZERO = laws.law_a13_a_zero_product_is_no_point

MUTANTS = [
    bridge("alpha for alpha/r", DELTA, "r times too large", pairs, _read_pair=alpha_for_scaling),
    bridge("scaling ignored in delta", DELTA, "c is part of X", pairs, _read_pair=scaling_one),
    bridge("alpha/2r for a plain pair", DELTA, "half", pairs, _read_pair=alpha_over_full_width),
    bridge("A/B swapped in delta", DELTA, "the transposed change", LoraPair, delta=swapped_delta),
    bridge(
        "convolution flattened channels-last", DELTA, "columns of another order",
        LoraPair, delta=kernel_transposed_delta,
    ),
    bridge("another layer's factor", DELTA, "one shape, two layers", real, lora_pairs=neighbours_factor),
    bridge("delta without the anchor", MERGED, "X, not X - X0", LoraPair, delta=trained_half_delta),
    bridge("point without scaling", GAUGE, "c times off", LoraPair, point=point_without_scaling),
    bridge("point of both halves", GAUGE, "X - X0 is another matrix", LoraPair, point=point_of_everything),
    bridge("start without scaling", GAUGE, "c times off", LoraPair, set_start=start_without_scaling),
    bridge("anchor read with its sign", GAUGE, "-X0", LoraPair, anchor=anchor_as_point),
    bridge("anchor with a plus sign", ATTACH, "W + 2 X0", LoraPair, set_start=anchor_with_plus),
    bridge("base left trainable", ATTACH, "only adapters train", attach, inject=base_left_trainable),
    bridge(
        "base rewritten by PEFT's PiSSA", ATTACH, "the stock base is gone",
        real, attach_lora=base_rewritten,
    ),
    bridge(
        "fingerprint of base and adapter", ATTACH, "differs after attaching",
        real, base_fingerprint=fingerprint_of_everything,
    ),
    bridge(
        "partial match accepted", TARGETS, "a misspelt layer would not train",
        attach, NO_ERROR, resolve_targets=only_what_matches,
    ),
    bridge(
        "rank cut without an error", RANKS, "another rank than asked",
        attach, NO_ERROR, _layer_ranks=rank_cut_silently,
    ),
    bridge(
        "2r above the smaller side", RANKS, "point and anchor do not fit",
        attach, (AssertionError, ConfigError), _layer_ranks=rank_as_asked,
    ),
    bridge("anchor decays", ANCHOR, "X0 moves", laws.Everything, Riemannion=AnchorDecays),
    bridge("anchor follows the point", ANCHOR, "X0 moves", laws.Everything, Riemannion=AnchorFollows),
    bridge("anchor counted in the norm", NORM, "sqrt(2)", real, mask_anchor_gradients_=mask_nothing),
    bridge("half of the anchor in the norm", NORM, "its lora_A", real, mask_anchor_gradients_=mask_left_only),
    bridge("trained half masked", NORM, "nothing left", real, mask_anchor_gradients_=mask_trained_half),
    bridge(
        "PEFT gradients recovered without scaling", RECOVER, "sqrt(c) off",
        laws.Everything, recover=staticmethod(recover_without_scaling),
    ),
    bridge(
        "PEFT gradients divided by c s", RECOVER, "sqrt(c s) off",
        laws.Everything, recover=staticmethod(recover_by_s),
    ),
    bridge(
        "PEFT gradients taken as they are", RECOVER, "vanish with s",
        laws.Everything, recover=staticmethod(recover_nothing),
    ),
    bridge(
        "PEFT gradients divided by another column's s", RECOVER, "columns mixed up",
        laws.Everything, recover=staticmethod(recover_reversed),
    ),
    bridge("rank-r export", EXPORT, "half of X - X0", arithmetic, balanced_factors=rank_r_export),
    bridge("export without scaling", EXPORT, "1/c off", arithmetic, change_of=without_scaling),
    bridge("export without the anchor", EXPORT, "X, not X - X0", arithmetic, change_of=trained_half),
    bridge("fp16 cast before balancing", HALF, "the halves cancel", arithmetic, change_of=half_first),
    bridge("export not balanced", HALF, "the halves cancel", arithmetic, balance=not_balanced),
    bridge("export with all of S on one side", HALF, "uneven range", arithmetic, balance=one_sided),
    bridge("sum without weights", SUMS, "every change counted once", real, combine=unweighted),
    bridge("weights on both factors", SUMS, "squared", real, combine=weights_on_both_sides),
    bridge("truncation keeps the smallest", SUMS, "not the best", real, balance=smallest_kept),
    bridge("kept energy without squares", SUMS, "Frobenius", real, kept_energy=linear_energy),
    bridge(
        "zero product read as a point", ZERO, "rank 0 is off the manifold",
        pairs, NO_ERROR, _RANK_TOLERANCE=dict.fromkeys((torch.float32, torch.float64), -1.0),
    ),
]  # fmt: skip
