"""An optimizer of LoRA pairs around a rule: torch's contract is kept here, the formula stands in the rule.

A rule is a pure function from layers of one shape and the state to a `Move`, which is then written. What Riemannion
does with missing and non-finite gradients, saved states, groups and anchors is done here by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from dreamrie.errors import ConfigError
from dreamrie.riemannion_checks import LoraPairLike, check_options, check_state
from dreamrie.riemannion_groups import (
    COUNTERS,
    count_skips,
    group_of_pairs,
    load_exactly,
    store_,
    tangent_norm,
)
from dreamrie.riemannion_layers import (
    Factor,
    Layer,
    State,
    are_finite,
    by_shape,
    enter_point,
    split,
    stack_gradients,
    with_gradients,
)


class Move(NamedTuple):
    """What a rule wants written for layers of one shape; the first dimension counts the layers."""

    layers: list[Layer]
    ok: Tensor
    """(layers,) False: something was not finite, the layer stays as it was."""
    moved: Tensor
    """(layers,) False: the factors keep their bytes."""
    left: Tensor
    """(layers, m, r) new first r columns of the left factor."""
    right: Tensor
    """(layers, n, r) new first r rows of the right factor, transposed."""
    left_state: dict[str, Tensor]
    """New state of the left factors by name; right_state of the right ones."""
    right_state: dict[str, Tensor]
    lifted: Tensor
    """(layers,) singular values raised to the floor."""


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """A method.

    Attributes:
        name: key of the table of optimizers.
        move: the formula; reads layers of one shape and the state, writes nothing.
        shapes: of the state of one factor, by name, from (layer, factor).
        tangent: the gradient norm is that of the Riemannian gradient, not of the trained columns.
        needs_rank: a first step needs products of rank r.
    """

    name: str
    move: Callable[[list[Layer], State], Move]
    shapes: Callable[[Layer, Factor], Shapes]
    tangent: bool = False
    needs_rank: bool = True


class PairOptimizer(Optimizer):
    """A rule over LoRA pairs.

    - The first `rank` columns of a pair are trained; the others are a frozen anchor and keep their bytes.
    - A layer without gradients is left alone. One gradient of two is a ConfigError.
    - A layer with a non-finite gradient, or whose step is not finite, keeps its parameters and state and is counted.
    - The state is fp32 (fp64 for fp64 parameters); gradients are read only.

    Args:
        rule: the method.
        pairs: LoRA pairs (see `LoraPairLike`), or dicts {"pairs": [...], "lr": ...} for parameter groups.
        lr: learning rate; the unit is the method's.
        momentum: in [0, 1).
        weight_decay: decoupled, multiplied by lr; of an anchored pair it shrinks X - X0.
        options: further options of the rule.

    Raises:
        ConfigError: a bad option, no pairs, or a pair that cannot be trained (the message names it).
    """

    def __init__(
        self,
        rule: Rule,
        pairs: Iterable[LoraPairLike] | Iterable[dict[str, Any]],
        lr: float | Tensor,
        momentum: float,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        self.rule = rule
        defaults = {
            "method": rule.name,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "sigma_floor": 1e-8,
            "max_consecutive_skips": 10,
            **options,
        }
        check_options(defaults, rule.name)
        given: list[Any] = list(pairs)
        if not given:
            raise ConfigError(
                f"{rule.name}: no LoRA pairs were given. Pass dreamrie.lora_pairs(model)."
            )
        super().__init__(given if isinstance(given[0], dict) else [{"pairs": given}], defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle; torch keeps the groups and the state alone."""
        return {**super().__getstate__(), "rule": self.rule}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add {"pairs": [...], option: value, ...}; options not given take the defaults.

        Args:
            param_group: "pairs" and any option of the constructor.

        Raises:
            ConfigError: as in the constructor.
        """
        taken = [p for other in self.param_groups for p in other["params"]]
        group = group_of_pairs(self.rule.name, param_group, self.defaults, taken)
        check_options(group, self.rule.name)
        if float(group["lr"]) * group["weight_decay"] >= 1:
            raise ConfigError(
                f"{self.rule.name}: lr {float(group['lr']):g} times weight_decay {group['weight_decay']:g} must be "
                "below 1, a step would decay everything. Lower one of them."
            )
        super().add_param_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None. A ConfigError (one gradient of two, a rank below r) comes before
            anything is written, a NumericalError (skipped too often) after the other layers were stepped.
        """
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moves: list[Move] = []
        skipped: list[Layer] = []
        for group in self.param_groups:
            for layers in by_shape(with_gradients(as_given(group))):
                finite, infinite = split(layers, are_finite(stack_gradients(layers)))
                skipped += infinite
                if finite:
                    self._check_start(finite)
                    moves.append(self.rule.move(finite, self.state))
        for move in moves:
            skipped += self._commit(move)
        count_skips(self.rule.name, skipped)
        return loss

    def _check_start(self, layers: list[Layer]) -> None:
        """Refuse layers that begin at a rank below r, where the formula divides by zero."""
        new = [layer for layer in layers if not self.state.get(layer.tall.parameter)]
        if new and self.rule.needs_rank:
            enter_point(new)

    def _commit(self, move: Move) -> list[Layer]:
        """Write a move; returns the layers that were not finite."""
        # One transfer to the host per batch.
        report = torch.stack([move.ok.long(), move.moved.long(), move.lifted.long()]).T.tolist()
        skipped: list[Layer] = []
        for row, (layer, (ok, moved, lifted)) in enumerate(zip(move.layers, report, strict=True)):
            if not ok:
                skipped.append(layer)
                continue
            layer.group["skipped_in_a_row"][layer.index] = 0
            layer.group["floor_hits"][layer.index] += lifted
            parts = ((move.left, move.left_state), (move.right, move.right_state))
            for factor, (columns, values) in zip(layer.factors, parts, strict=True):
                for key, value in values.items():
                    store_(self.state[factor.parameter], key, value[row])
                if moved:
                    factor.write_(columns[row])
        return skipped

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of an equally built optimizer returned, before or after its first step.

        Args:
            state_dict: see `torch.optim.Optimizer.state_dict`. A ConfigError (other layers, ranks, shapes or another
                optimizer's) comes before anything is changed.
        """

        def check(given: dict[str, Any]) -> None:
            check_state(self.param_groups, given, self.rule.name, self.rule.shapes, as_given)

        load_exactly(self, super().load_state_dict, state_dict, check)

    @property
    def skipped_steps(self) -> int:
        """How many layer steps were left out because something was not finite."""
        return sum(sum(group[COUNTERS[0]]) for group in self.param_groups)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradient over all layers, a scalar; the frozen anchor does not enter."""
        layers = [layer for group in self.param_groups for layer in as_given(group)]
        if self.rule.tangent:
            return tangent_norm(layers, self.state)
        total = torch.zeros((), dtype=torch.float64)
        for alike in by_shape(with_gradients(layers)):
            total = total + sum(g.square().sum().to(total) for g in stack_gradients(alike))
        return total.sqrt()


def as_given(group: dict[str, Any]) -> list[Layer]:
    """List the layers of a group with the left factor first: not every rule is symmetric under transposition."""
    return [
        Layer(
            group,
            index,
            Factor(group["params"][2 * index], is_right=False),
            Factor(group["params"][2 * index + 1], is_right=True),
        )
        for index in range(len(group["names"]))
    ]
