"""Riemannion: Muon on the manifold of fixed-rank matrices, as an optimizer for any PEFT LoRA model.

The pure step is in `riemannion_step.py`, the reading of layers in `riemannion_layers.py`, checks of
arguments in `riemannion_checks.py`; this file keeps the contract
of `torch.optim.Optimizer` around them: options, groups, where the state lives, what happens to missing and non-finite
gradients.

Each layer is a LoRA pair with change c * left @ right. Its first `rank` columns (rows) are the trained point X, held
in the SVD gauge left = u sqrt(s / c), right = sqrt(s / c) v^T; further columns are a frozen anchor and never written.
The state is fp32 (fp64 for fp64 parameters); parameters are a rounded copy of it. Layers of one shape are stepped as
one batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.fixed_rank import remove_component
from dreamrie.riemannion_checks import LoraPairLike, check_options, check_pair, check_state
from dreamrie.riemannion_layers import (
    Batch,
    Layer,
    anchor_of,
    are_finite,
    are_own,
    by_shape,
    enter_point,
    layers_of,
    read,
    scaling_of,
    split,
    stack_gradients,
    with_gradients,
)
from dreamrie.riemannion_step import StepOptions, balanced_factors, fused_step

logger = logging.getLogger(__name__)

# One entry per layer: the first describe the model at hand, the second count.
_DESCRIPTION = ("names", "scaling", "rank", "anchor_rank")
_COUNTERS = ("skipped", "skipped_in_a_row", "floor_hits")
# For pickles and states written before an option existed.
_OPTIONS: dict[str, Any] = {
    "decay_to": "anchor",
    "sigma_floor": 1e-8,
    "exact_norm": False,
    "inner_iters": 1,
    "max_consecutive_skips": 10,
}


class Riemannion(Optimizer):
    """Spectral-norm steepest descent with momentum on the manifold of rank-r matrices, for LoRA pairs.

    Per step and layer: X <- SVD_r((1 - lr * weight_decay) X - lr * P(msign(M))), M the raw heavy-ball momentum of the
    Riemannian gradient (`riemannion_step.fused_step`). The path of X depends on the product left @ right alone, not on
    the factors, and not on the scale of the loss.

    - A layer without gradients is left alone, state included. One gradient of two is a ConfigError: half of the
      tangent space is unknown.
    - A layer with a non-finite gradient keeps its parameters and state to the bit and is counted.
    - Factors changed from outside (an adapter loaded, weights averaged in) are noticed, whatever way they were
      written, and read again; the momentum is carried to the new point. Gradients must belong to the current factors.
    - Average weights over X, never over the factors: their columns turn freely from step to step.
    - fp16 factor gradients underflow for small singular values; use fp32 or bf16, or a GradScaler.

    Source: arXiv:2507.12142, Eqs. (10)-(12), Alg. 4 as corrected in docs/method.md 4.1. Deviations from the paper:
    momentum is stored before msign; decay pulls to the anchor by default.

    Args:
        pairs: LoRA pairs (see `LoraPairLike`), or dicts {"pairs": [...], "lr": ...} for parameter groups.
        lr: spectral norm of the change of X per step, up to a factor in [1, 1.155]; a float or a one-element tensor.
        momentum: heavy-ball factor in [0, 1).
        weight_decay: decoupled, multiplied by lr.
        decay_to: "anchor": decay shrinks the exported change X - X0 (X itself without an anchor); "zero": always X.
        sigma_floor: smallest singular value kept in the state, > 0.
        exact_norm: divide each direction by its spectral norm, so that the step has norm lr exactly.
        inner_iters: repetitions of msign and projection, Eq. (13); 1 is Eq. (12).
        max_consecutive_skips: NumericalError once a layer was skipped so often in a row.

    Raises:
        ConfigError: a bad option, no pairs, or a pair that cannot be trained (the message names it).
    """

    def __init__(
        self,
        pairs: Iterable[LoraPairLike] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        decay_to: Literal["anchor", "zero"] = "anchor",
        sigma_floor: float = 1e-8,
        exact_norm: bool = False,
        inner_iters: int = 1,
        max_consecutive_skips: int = 10,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decay_to": decay_to,
            "sigma_floor": sigma_floor,
            "exact_norm": exact_norm,
            "inner_iters": inner_iters,
            "max_consecutive_skips": max_consecutive_skips,
        }
        check_options(defaults)
        given: list[Any] = list(pairs)
        if not given:
            raise ConfigError(
                "Riemannion: no LoRA pairs were given. Pass dreamrie.lora_pairs(model) of a model with LoRA layers."
            )
        groups = given if isinstance(given[0], dict) else [{"pairs": given}]
        super().__init__(groups, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; options that an older version did not know take their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in (_OPTIONS | self.defaults).items():
                group.setdefault(key, value)
            for key in _COUNTERS:
                group.setdefault(key, [0] * (len(group["params"]) // 2))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add {"pairs": [...], option: value, ...}; options not given take the defaults.

        Args:
            param_group: "pairs" and any option of the constructor.

        Raises:
            ConfigError: "pairs" is missing or empty, an option is bad, or a pair cannot be trained.
        """
        group = dict(param_group)
        pairs: list[LoraPairLike] = list(group.pop("pairs", ()))
        if not pairs or "params" in group:
            raise ConfigError(
                f"Riemannion: a parameter group needs a non-empty 'pairs' and no 'params', got keys "
                f"{sorted(param_group)}. Two factors of one layer belong together: pass LoRA pairs."
            )
        for key, value in self.defaults.items():
            group.setdefault(key, value)
        check_options(group)
        taken = {id(p) for other in self.param_groups for p in other["params"]}
        for pair in pairs:
            check_pair(pair)
            for parameter in (pair.left, pair.right):
                if id(parameter) in taken:
                    raise ConfigError(
                        f"Riemannion: a factor of {pair.name} is given twice. Pass each LoRA layer once; tied layers "
                        "are not supported."
                    )
                taken.add(id(parameter))
        group["params"] = [p for pair in pairs for p in (pair.left, pair.right)]
        group["names"] = [str(pair.name) for pair in pairs]
        group["scaling"] = [float(pair.scaling) for pair in pairs]
        group["rank"] = [int(pair.rank) for pair in pairs]
        group["anchor_rank"] = [int(pair.anchor_rank) for pair in pairs]
        for key in _COUNTERS:
            group[key] = [0] * len(pairs)
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
            What the closure returned, or None.

        Raises:
            ConfigError: a layer has one gradient of two, or its product has a rank below r. Nothing is written.
            NumericalError: a layer holds non-finite factors (nothing is written), or was skipped
                `max_consecutive_skips` times in a row (the other layers have been stepped).
        """
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches: list[Batch] = []
        skipped: list[Layer] = []
        for group in self.param_groups:
            for layers in by_shape(with_gradients(layers_of(group))):
                finite, infinite = split(layers, are_finite(stack_gradients(layers)))
                skipped += infinite
                if finite:
                    batches.append(read(finite, self.state))
        for batch in batches:
            skipped += self._advance(batch)
        self._count_skips(skipped)
        return loss

    def _advance(self, batch: Batch) -> list[Layer]:
        """Step one batch and commit it; returns the layers that were not finite."""
        layers, group = batch.layers, batch.layers[0].group
        lr = group["lr"]
        options = StepOptions(
            lr.reshape(()) if isinstance(lr, Tensor) else lr,
            *(group[key] for key in StepOptions._fields[1:]),
        )
        anchored = group["decay_to"] == "anchor" and group["weight_decay"] and layers[0].anchor_rank
        anchor = anchor_of(layers) if anchored else None
        result = fused_step(batch.state, batch.gradient_v, batch.gradient_t_u, options, anchor)
        new, scaling = result.state, scaling_of(layers)
        columns = [balanced_factors(frame, new.s, scaling) for frame in (new.u, new.v)]
        hits = result.floor_hits + batch.lifted
        # One transfer to the host per batch; the factors are written for layers that moved and no others.
        report = torch.stack([result.ok.long(), result.moved.long(), hits]).T.tolist()
        skipped: list[Layer] = []
        for row, (layer, (ok, moved, lifted)) in enumerate(zip(layers, report, strict=True)):
            if not ok:
                skipped.append(layer)
                continue
            group["skipped_in_a_row"][layer.index] = 0
            group["floor_hits"][layer.index] += lifted
            for side, factor in enumerate(layer.factors):
                entry = self.state[factor.parameter]
                _store_(entry, "basis", (new.u, new.v)[side][row])
                _store_(entry, "momentum", (new.m_left, new.m_right)[side][row])
                if moved:
                    factor.write_(columns[side][row])
            _store_(self.state[layer.tall.parameter], "singular_values", new.s[row])
        return skipped

    def _count_skips(self, layers: list[Layer]) -> None:
        """Count skipped layers; raise when one was skipped too often in a row."""
        if not layers:
            return
        logger.warning(
            "gradient not finite, left as they are: %s", [layer.name for layer in layers]
        )
        stuck = []
        for layer in layers:
            layer.group["skipped"][layer.index] += 1
            layer.group["skipped_in_a_row"][layer.index] += 1
            if layer.group["skipped_in_a_row"][layer.index] >= layer.group["max_consecutive_skips"]:
                stuck.append(layer.name)
        if stuck:
            raise NumericalError(
                f"Riemannion: max_consecutive_skips reached, the gradients of {stuck} were not finite in so many steps "
                "in a row. Lower the learning rate, train in fp32 or bf16, or look at the data of these steps."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of an equally built optimizer returned, before or after its first step.

        State stays in fp32 (fp64) whatever the dtype of the parameters; the base class would round it to theirs. It is
        copied: the argument and other optimizers that loaded it stay independent.

        Args:
            state_dict: see `torch.optim.Optimizer.state_dict`.

        Raises:
            ConfigError: the state is of other layers, ranks or shapes. Nothing is changed.
        """
        own = [{key: group[key] for key in _DESCRIPTION} for group in self.param_groups]
        checked: dict[str, Any] = {}

        def check(_: Optimizer, given: dict[str, Any]) -> None:
            check_state(self.param_groups, given)
            checked.update(given)

        def restore(_: Optimizer) -> None:
            for group, description, saved in zip(
                self.param_groups, own, checked["param_groups"], strict=True
            ):
                group.update(description)
                for parameter, key in zip(group["params"], saved["params"], strict=True):
                    if key in checked["state"]:
                        self.state[parameter] = {
                            name: value.detach().to(parameter.device, copy=True)
                            for name, value in checked["state"][key].items()
                        }

        # Last before and first after, so that hooks of others may change the input and see the final state.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    @property
    def skipped_steps(self) -> int:
        """How many layer steps were left out because of non-finite gradients."""
        return sum(sum(group["skipped"]) for group in self.param_groups)

    @property
    def floor_hits(self) -> int:
        """How many singular values were lifted to `sigma_floor`; frequent hits mean lr is far above them."""
        return sum(sum(group["floor_hits"]) for group in self.param_groups)

    @torch.no_grad()
    def spectra(self) -> dict[str, Tensor]:
        """Return the singular values of X of each layer, (r,) descending, by name; copies."""
        result: dict[str, Tensor] = {}
        for group in self.param_groups:
            for layer in layers_of(group):
                if are_own([layer], self.state)[0]:
                    values = self.state[layer.tall.parameter]["singular_values"]
                else:
                    values = enter_point([layer]).s[0]
                result[layer.name] = values.detach().clone()
        return result

    @torch.no_grad()
    def tangent_grad_norm(self) -> Tensor:
        """Return the norm of the Riemannian gradient over all layers, a scalar.

        Unlike the norm of the factor gradients it depends on the products alone, and the frozen anchor does not enter.

        Returns:
            sqrt(sum of |g_left|^2 + |g_right|^2) over layers with gradients; NaN or Inf when one is not finite.

        Raises:
            ConfigError: as in `step`.
            NumericalError: a layer holds non-finite factors.
        """
        total = torch.zeros((), dtype=torch.float64)
        for group in self.param_groups:
            for layers in by_shape(with_gradients(layers_of(group))):
                batch = read(layers, self.state)
                normal = remove_component(batch.state.u, batch.gradient_v)
                total = total + (normal.square().sum() + batch.gradient_t_u.square().sum()).to(
                    total
                )
        return total.sqrt()


def _store_(entry: dict[str, Any], key: str, value: Tensor) -> None:
    """Copy a row of a batch into the state, without keeping the batch alive."""
    if key in entry:
        entry[key].copy_(value)
    else:
        entry[key] = value.clone()
