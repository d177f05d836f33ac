"""Riemannion: Muon on the manifold of fixed-rank matrices, as an optimizer for any PEFT LoRA model.

The pure step is in `riemannion_step.py`, the reading of layers in `riemannion_layers.py`, checks of arguments in
`riemannion_checks.py`, other spectral maps than msign in `riemannion_maps.py`; this file keeps the contract of
`torch.optim.Optimizer` around them: options, where the state lives, what happens to missing and non-finite gradients.
What other optimizers of LoRA pairs do alike is in `riemannion_groups.py`.

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

from dreamrie.errors import ConfigError
from dreamrie.riemannion_checks import LoraPairLike, check_options, check_state
from dreamrie.riemannion_fast import fast_steps
from dreamrie.riemannion_graph import MOST_RECORDINGS, Recording, can_record, count_events
from dreamrie.riemannion_groups import (
    COUNTERS,
    count_skips,
    group_of_pairs,
    learning_rate,
    load_exactly,
)
from dreamrie.riemannion_layers import (
    Batch,
    Layer,
    anchor_of,
    are_own,
    enter_point,
    layers_of,
    scaling_of,
)
from dreamrie.riemannion_maps import mapped_direction, noise_numbers
from dreamrie.riemannion_reading import Reading, marks_of, norm_of, read_groups
from dreamrie.riemannion_rows import keep_rows, on_host, write_factors_
from dreamrie.riemannion_sharing import shared_steps
from dreamrie.riemannion_step import (
    StepOptions,
    StepResult,
    Work,
    balanced_factors,
)
from dreamrie.team import ALONE, Team

logger = logging.getLogger(__name__)

# For pickles and states written before an option existed.
_OPTIONS: dict[str, Any] = {
    "decay_to": "anchor",
    "sigma_floor": 1e-8,
    "exact_norm": False,
    "inner_iters": 1,
    "max_consecutive_skips": 10,
    "core_map": "msign",
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
    - On a GPU the step is recorded as CUDA graphs from the second one on (`riemannion_graph.py`). Tensors of the state
      are then written in place, as Adam's are: copy a `state_dict` that is to outlive a step.
    - Average weights over X, never over the factors: their columns turn freely from step to step.
    - fp16 factor gradients underflow for small singular values; use fp32 or bf16, or a GradScaler.

    Source: arXiv:2507.12142, Eqs. (10)-(12), Alg. 4 as corrected in docs/method.md 4.1. Deviations from the paper:
    momentum is stored before msign, its default is 0.5 instead of 0.9; decay pulls to the anchor by default.

    Args:
        pairs: LoRA pairs (see `LoraPairLike`), or dicts {"pairs": [...], "lr": ...} for parameter groups.
        lr: spectral norm of the change of X per step, up to a factor in [1, 1.155]; a float or a one-element tensor.
        momentum: heavy-ball factor in [0, 1); the paper has 0.9 (docs/optimizers.md measures both).
        weight_decay: decoupled, multiplied by lr.
        decay_to: "anchor": decay shrinks the exported change X - X0 (X itself without an anchor); "zero": always X.
        sigma_floor: smallest singular value kept in the state, > 0.
        exact_norm: divide each direction by its spectral norm, so that the step has norm lr exactly.
        inner_iters: repetitions of msign and projection, Eq. (13); 1 is Eq. (12).
        max_consecutive_skips: NumericalError once a layer was skipped so often in a row.
        core_map: what becomes of the spectrum of the momentum, see dreamrie/core_maps.py; msign is Eq. (12).

    Raises:
        ConfigError: a bad option, no pairs, or a pair that cannot be trained (the message names it).
    """

    def __init__(
        self,
        pairs: Iterable[LoraPairLike] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.5,
        weight_decay: float = 0.0,
        *,
        decay_to: Literal["anchor", "zero"] = "anchor",
        sigma_floor: float = 1e-8,
        exact_norm: bool = False,
        inner_iters: int = 1,
        max_consecutive_skips: int = 10,
        core_map: str = "msign",
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
            "core_map": core_map,
        }
        check_options(defaults)
        given: list[Any] = list(pairs)
        if not given:
            raise ConfigError(
                "Riemannion: no LoRA pairs were given. Pass dreamrie.lora_pairs(model) of a model with LoRA layers."
            )
        groups = given if isinstance(given[0], dict) else [{"pairs": given}]
        super().__init__(groups, defaults)

    _reading: Reading | None = None
    """What the norm has read for the next step."""

    _recording: Recording | None = None
    """The step as CUDA graphs, on a GPU, from the second step on."""

    _recordings = 0

    team: Team = ALONE
    """The processes that share the work, see `share_work`."""

    def share_work(self, team: Team) -> None:
        """Divide the layers of each step over processes that train together; the steps are the same, to the byte.

        Factors, state and the gradients at a step must be equal on all of them, and all must call `step`. Every process
        ends up with all factors and all state, so `state_dict` and loading are as without a team.

        Args:
            team: see `Team.here`; a team of one ends the sharing.
        """
        self.team = team

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; options that an older version did not know take their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in (_OPTIONS | self.defaults).items():
                group.setdefault(key, value)
            for key in COUNTERS:
                group.setdefault(key, [0] * (len(group["params"]) // 2))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add {"pairs": [...], option: value, ...}; options not given take the defaults.

        Args:
            param_group: "pairs" and any option of the constructor.

        Raises:
            ConfigError: "pairs" is missing or empty, an option is bad, or a pair cannot be trained.
        """
        taken = [p for other in self.param_groups for p in other["params"]]
        group = group_of_pairs("Riemannion", param_group, self.defaults, taken)
        check_options(group)
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
        recording = self._fitting_recording()
        if recording is not None and all(recording.read()[:2]):
            recording.write()
            self._count_skips(count_events(recording))
            return loss
        batches = self._batches()
        results = list(self._results(batches))
        skipped: list[Layer] = []
        reports = on_host(batches, results)
        for batch, result, report in zip(batches, results, reports, strict=True):
            skipped += self._commit(batch, result, report)
        if recording is not None:
            recording.adopt()
        self._count_skips(skipped)
        return loss

    def _fitting_recording(self, *, may_record: bool = True) -> Recording | None:
        """The step as CUDA graphs, recorded anew when something has changed; None where there can be none."""
        kept, self._recording = self._recording, None
        if self.team.size > 1:
            return None
        if kept is not None and kept.still_fits(self.param_groups, self.state):
            self._recording = kept
            return kept
        # The old one holds memory that the new one needs.
        del kept
        if may_record and self._recordings < MOST_RECORDINGS:
            layers = can_record(self.param_groups, self.state)
            if layers:
                self._recordings += 1
                self._recording = self._record(layers)
        return self._recording

    def _record(self, layers: list[Layer]) -> Recording | None:
        """Record the step; where that fails, steps go on without graphs."""
        if self._recordings == MOST_RECORDINGS:
            logger.warning(
                "layers, options or parameters have changed %d times, steps are slower from the next change on",
                MOST_RECORDINGS - 1,
            )
        try:
            return Recording(self.param_groups, self.state, layers)
        except RuntimeError as error:
            self._recordings = MOST_RECORDINGS
            logger.warning("the step cannot be recorded as CUDA graphs and is slower: %s", error)
            return None

    def _batches(self) -> list[Batch]:
        """What a step starts from: the reading of the norm, if there is one and nothing has changed since."""
        kept, self._reading = self._reading, None
        if kept is not None and kept.marks.still_hold(marks_of(self.param_groups, self.state)):
            return kept.batches
        return read_groups(self.param_groups, self.state)

    def _results(self, batches: list[Batch]) -> Iterable[StepResult]:
        """Step each batch, alone or with the team; nothing is written."""
        if self.team.size == 1 or not batches:
            return fast_steps([self._work(batch) for batch in batches])
        return shared_steps(self.team, batches, lambda batch: fast_steps([self._work(batch)])[0])

    def _work(self, batch: Batch) -> Work:
        """What the step takes, for one batch."""
        layers, group = batch.layers, batch.layers[0].group
        options = StepOptions(
            learning_rate(group),
            *(group[key] for key in StepOptions._fields[1:]),
        )
        anchored = group["decay_to"] == "anchor" and group["weight_decay"] and layers[0].anchor_rank
        anchor = anchor_of(layers) if anchored else None
        direction = mapped_direction(group, batch, self.state)
        return Work(batch.state, batch.gradient_v, batch.gradient_t_u, options, anchor, direction)

    def _commit(self, batch: Batch, result: StepResult, report: list[list[int]]) -> list[Layer]:
        """Write the step of a batch; returns the layers that were not finite."""
        layers, group = batch.layers, batch.layers[0].group
        new, scaling = result.state, scaling_of(layers)
        columns = [balanced_factors(frame, new.s, scaling) for frame in (new.u, new.v)]
        numbers = noise_numbers(group, batch, self.state)
        skipped: list[Layer] = []
        stepped: list[int] = []
        written: list[int] = []
        for row, (layer, (ok, moved, lifted)) in enumerate(zip(layers, report, strict=True)):
            if not ok:
                skipped.append(layer)
                continue
            group["skipped_in_a_row"][layer.index] = 0
            group["floor_hits"][layer.index] += lifted
            stepped.append(row)
            if moved:
                written.append(row)
        keep_rows(layers, stepped, new, numbers, self.state)
        write_factors_(layers, written, *columns)
        return skipped

    def _count_skips(self, layers: list[Layer]) -> None:
        """Count skipped layers; raise when one was skipped too often in a row."""
        count_skips("Riemannion", layers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of an equally built optimizer returned, before or after its first step.

        State stays in fp32 (fp64) whatever the dtype of the parameters; the base class would round it to theirs. It is
        copied: the argument and other optimizers that loaded it stay independent.

        Args:
            state_dict: see `torch.optim.Optimizer.state_dict`.

        Raises:
            ConfigError: the state is of other layers, ranks or shapes. Nothing is changed.
        """
        load_exactly(
            self,
            super().load_state_dict,
            state_dict,
            lambda given: check_state(self.param_groups, given),
        )

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
        layers = [layer for group in self.param_groups for layer in layers_of(group)]
        result: dict[str, Tensor] = {}
        for layer, own in zip(layers, are_own(layers, self.state), strict=True):
            if own:
                values = self.state[layer.tall.parameter]["singular_values"]
            else:
                values = enter_point([layer]).s[0]
            result[layer.name] = values.detach().clone()
        return result

    @torch.no_grad()
    def tangent_grad_norm(self, *, for_step: bool = False) -> Tensor:
        """Return the norm of the Riemannian gradient over all layers, a scalar.

        Unlike the norm of the factor gradients it depends on the products alone, and the frozen anchor does not enter.

        Args:
            for_step: keep what was read for the next `step`, which then reads nothing again. A change of factors,
                gradients or state in between is noticed, and all is read anew, unless it was written through `.data`.

        Returns:
            sqrt(sum of |g_left|^2 + |g_right|^2) over layers with gradients; NaN or Inf when one is not finite.

        Raises:
            ConfigError: as in `step`.
            NumericalError: a layer holds non-finite factors.
        """
        recording = self._fitting_recording(may_record=for_step)
        if recording is not None and recording.read().own:
            if not for_step:
                recording.forget()
            return recording.norm.clone()
        batches = read_groups(self.param_groups, self.state)
        if for_step:
            self._reading = Reading(batches, marks_of(self.param_groups, self.state))
        return norm_of(batches)
