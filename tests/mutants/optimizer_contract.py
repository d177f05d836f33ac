"""Wrong optimizers around the step: factors misread or miswritten, and shortcuts in torch's contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import dreamrie.fixed_rank as fixed_rank
import dreamrie.riemannion as riemannion
import dreamrie.riemannion_layers as layers
import dreamrie.riemannion_step as step
from dreamrie.riemannion_step import FusedState
from tests.mutants import Mutant, replaced
from tests.mutants.broken_optimizers import wrong_class, wrong_path, wrong_step
from tests.properties import test_riemannion_path_laws as path_laws
from tests.properties import test_riemannion_state_laws as state_laws
from tests.properties import test_riemannion_step_laws as step_laws
from tests.properties import test_riemannion_symmetry_laws as symmetry_laws

_recover = step.recover
_balanced = step.balanced_factors


@contextmanager
def _factor_attributes(**wrong: Any) -> Iterator[Any]:
    with replaced(layers.Factor, **wrong):
        yield riemannion


# ------------------------------------------------------------------------------------------------- factors


def recover_without_scaling(factor_gradient: Tensor, s: Tensor, scaling: Any) -> Tensor:
    return factor_gradient / s.sqrt().unsqueeze(-2)


def recover_nothing(factor_gradient: Tensor, s: Tensor, scaling: Any) -> Tensor:
    """The factor gradient itself: no division by sqrt(c s)."""
    return factor_gradient


def recover_damped(factor_gradient: Tensor, s: Tensor, scaling: Any) -> Tensor:
    return factor_gradient / ((scaling * s).sqrt() + 1e-6).unsqueeze(-2)


def balanced_without_scaling(frame: Tensor, s: Tensor, scaling: Any) -> Tensor:
    return frame * s.sqrt().unsqueeze(-2)


def balanced_all_on_one_side(frame: Tensor, s: Tensor, scaling: Any) -> Tensor:
    return frame * (s / scaling).unsqueeze(-2)


def stale_point(known: Any, state: Any) -> list[bool]:
    """The stored point is believed whatever the parameters say."""
    return layers.have_state(known, state)


def trained_beside_a_decayed_anchor(self: Any, rank: int) -> Tensor:
    """The anchor is decayed along with the point."""
    parameter = self.parameter.detach()
    target, anchor = (
        (parameter[:rank], parameter[rank:])
        if self.is_right
        else (parameter[:, :rank], parameter[:, rank:])
    )
    anchor.mul_(1 - 1e-3)
    return target


def columns_channels_last(self: Any, tensor: Tensor, start: int, stop: int) -> Tensor:
    """Kernel positions before input channels, while they are written the other way round."""
    matrix = tensor.detach()
    matrix = (matrix.permute(0, 2, 3, 1) if matrix.ndim == 4 else matrix).flatten(1)
    return matrix[start:stop].mT if self.is_right else matrix[:, start:stop]


def momentum_lost_on_entry(old_point: Any, tangent: Any, new_point: Any) -> Any:
    return fixed_rank.Tangent(torch.zeros_like(tangent.d_left), torch.zeros_like(tangent.d_right))


def entry_by_division(group_layers: Any, state: Any) -> Any:
    """Foreign factors taken for balanced ones: columns divided where an r x r system has to be solved."""
    point = layers.enter_point(group_layers)
    scaling = layers.scaling_of(group_layers, point.u.dtype)
    tall, short = (g.to(point.u.dtype) for g in layers.stack_gradients(group_layers))
    nil = torch.zeros_like(point.u), torch.zeros_like(point.v)
    target = fixed_rank.working_dtype(group_layers[0].tall.parameter.dtype)
    return layers.Batch(
        group_layers,
        FusedState(*(part.to(target) for part in (*point, *nil))),
        _recover(tall, point.s, scaling).to(target),
        _recover(short, point.s, scaling).to(target),
        torch.zeros(len(group_layers), dtype=torch.long),
    )


# ------------------------------------------------------------------------------------------------- contract


class GradientWriting(riemannion.Riemannion):
    """Turns a missing gradient into zeros and momentum into p.grad, as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return super().step(closure)


class GradientScaling(riemannion.Riemannion):
    """Normalizes p.grad in place."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= parameter.grad.norm() + 1e-12
        return super().step(closure)


class SteppingTwice(riemannion.Riemannion):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step()


class ParameterDtypeState(riemannion.Riemannion):
    """State in the dtype of the parameters, as torch's own load_state_dict leaves it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.optim.Optimizer.load_state_dict(self, state_dict)


class Bf16State(riemannion.Riemannion):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for parameter, entry in self.state.items():
            for value in entry.values():
                value.copy_(value.to(parameter.dtype))
        for group in self.param_groups:
            for layer in layers.layers_of(group):
                entries = [self.state[f.parameter] for f in layer.factors]
                s = entries[0]["singular_values"]
                for factor, entry in zip(layer.factors, entries, strict=True):
                    factor.write_(_balanced(entry["basis"], s, layer.scaling))
        return result


class LazyState(riemannion.Riemannion):
    """Loads options and forgets the state: it will be made at the first step anyway."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.state.clear()


class AliasedState(riemannion.Riemannion):
    """Keeps the tensors of the argument."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            self.state[parameter] = state_dict["state"][index]


class HiddenMomentum(riemannion.Riemannion):
    """Keeps a buffer that no checkpoint sees."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self._velocity = [entry["momentum"].clone() for entry in self.state.values()]
        return result


class ClaimingToUnscale(riemannion.Riemannion):
    """Tells GradScaler that it handles the loss scale itself, and does not."""

    _step_supports_amp_scaling = True


class OptionsOfTheFirstGroup(riemannion.Riemannion):
    """Groups without options of their own."""

    def step(self, closure: Any = None) -> Any:
        first = self.param_groups[0]
        for group in self.param_groups[1:]:
            group.update({name: first[name] for name in ("lr", "momentum", "weight_decay")})
        return super().step(closure)


class ForgettingCounters(riemannion.Riemannion):
    def _count_skips(self, skipped: Any) -> None:
        return None


class NormWithAnchor(riemannion.Riemannion):
    """The norm over whole factors counts the frozen half too."""

    def tangent_grad_norm(self) -> Tensor:
        squares = [
            p.grad.square().sum()
            for g in self.param_groups
            for p in g["params"]
            if p.grad is not None
        ]
        return torch.stack(squares).sum().sqrt()


# ------------------------------------------------------------------------------------------------- registry


MUTANTS = [
    wrong_step(
        "scaling left out of the recovery",
        step_laws.law_12_recovered_products_equal_the_gradient,
        "c is part of X",
        recover=recover_without_scaling,
    ),
    wrong_step(
        "no division by sqrt(c s)",
        step_laws.law_12_recovered_products_equal_the_gradient,
        "factor gradients are not G v",
        recover=recover_nothing,
    ),
    wrong_step(
        "damped recovery",
        step_laws.law_12_recovered_products_equal_the_gradient,
        "tiny s lose their gradient",
        recover=recover_damped,
    ),
    wrong_path(
        "no division by sqrt(c s): gauge",
        path_laws.law_o5_path_equals_dense,
        "another direction",
        recover=recover_nothing,
    ),
    wrong_path(
        "scaling left out of the factors",
        path_laws.law_o4_example_by_hand,
        "X is c times too large",
        balanced_factors=balanced_without_scaling,
    ),
    wrong_path(
        "s in both factors",
        path_laws.law_o4_example_by_hand,
        "the product holds s twice",
        balanced_factors=balanced_all_on_one_side,
    ),
    wrong_path(
        "foreign factors taken for balanced ones",
        symmetry_laws.law_o1_gauge,
        "the first gradient is read wrongly",
        _enter=entry_by_division,
    ),
    wrong_path(
        "momentum lost when factors are read again",
        symmetry_laws.law_o1_gauge_in_mid_run,
        "the path jumps",
        transport=momentum_lost_on_entry,
    ),
    wrong_path(
        "stale master written back",
        symmetry_laws.law_o15_foreign_factors_are_read_again,
        "an adapter loaded in mid-run vanishes",
        are_own=stale_point,
    ),
    Mutant(
        "anchor decays with the point",
        state_laws.law_a10_anchor_is_frozen,
        lambda: _factor_attributes(trained=trained_beside_a_decayed_anchor),
        "the start moves under the change",
    ),
    wrong_class(
        "missing gradients become zeros",
        state_laws.law_o7_gradients_are_read_only,
        "momentum moves a frozen layer",
        GradientWriting,
    ),
    wrong_class(
        "p.grad normalized in place",
        state_laws.law_o7_gradients_are_read_only,
        "p.grad belongs to the caller",
        GradientScaling,
    ),
    Mutant(
        "convolution read channels-last, written channels-first",
        symmetry_laws.law_convolutions_are_matrices,
        lambda: _factor_attributes(columns=columns_channels_last),
        "kernel positions and input channels change places",
    ),
    wrong_class(
        "momentum outside of the state",
        state_laws.law_o17_all_state_is_in_the_state,
        "a checkpoint would miss it",
        HiddenMomentum,
    ),
    wrong_class(
        "loss scale left to the optimizer",
        state_laws.law_o12_grad_scaler,
        "an overflow must leave every layer",
        ClaimingToUnscale,
    ),
    wrong_class(
        "options of the first group for all",
        path_laws.law_groups_and_layers_do_not_mix,
        "each group has its own lr",
        OptionsOfTheFirstGroup,
    ),
    wrong_class("step twice", path_laws.law_o4_example_by_hand, "two steps for one", SteppingTwice),
    wrong_class(
        "state rounded when loaded",
        state_laws.law_o8_state_is_fp32,
        "torch casts state to the parameters' dtype",
        ParameterDtypeState,
    ),
    wrong_class(
        "bf16 state",
        state_laws.law_bf16_masters_do_not_stall,
        "steps below the resolution vanish",
        Bf16State,
    ),
    wrong_class(
        "lazy state",
        state_laws.law_o9_18_state_round_trip,
        "momentum is lost before the first step",
        LazyState,
    ),
    wrong_class(
        "state aliased when loaded",
        state_laws.law_o9_18_state_round_trip,
        "two optimizers share memory",
        AliasedState,
    ),
    wrong_class(
        "skips not counted",
        state_laws.law_o11_non_finite_gradients_are_skipped,
        "a run of NaN goes unseen",
        ForgettingCounters,
    ),
    wrong_class(
        "anchor counted in the tangent norm",
        state_laws.law_tangent_norm_counts_the_point_alone,
        "sqrt(2) too large at step 0",
        NormWithAnchor,
    ),
]
