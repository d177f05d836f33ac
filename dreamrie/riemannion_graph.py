"""The step of all layers as CUDA graphs, for the usual case; everything else is left to the step without them.

At rank 4 the work of a step takes a GPU a millisecond, and Python ten times as long to hand it out, kernel by kernel. A
graph is handed out in one piece. It reads and writes tensors that stay where they are, so gradients are copied into
stacks first, and the state of the layers becomes rows of such stacks.

    reading   gradients -> the norm, all small matrices, and what is to be known of the layers
    writing   the tall products -> state and factors

Between the two, once a step, the host looks at a few numbers. If a layer's factors were changed from outside, or a
layer needs the exact step, nothing has been written, and the whole step is taken without graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dreamrie.riemannion_capture import Program
from dreamrie.riemannion_fast import (
    Begun,
    begin_steps,
    can_be_fast,
    finish_step,
    moved_and_hits,
)
from dreamrie.riemannion_layers import (
    Batch,
    Factor,
    Layer,
    State,
    as_written,
    by_shape,
    have_state,
    layers_of,
    scaling_of,
    stack_state,
)
from dreamrie.riemannion_reading import Marks, norm_of
from dreamrie.riemannion_rows import can_stack, keep_rows, write_factors_
from dreamrie.riemannion_step import FusedState, StepOptions, Work, balanced_factors, recover

# Where graphs are recorded. Elsewhere the same program can run without one, which the tests do.
RECORDS_ON = ("cuda",)
# Each takes time and memory. A model whose layers come and go gets no more of them than this.
MOST_RECORDINGS = 4


class Report(NamedTuple):
    """What the host is to know of a reading before anything is written."""

    own: bool
    """All factors are what the state wrote; otherwise neither the norm nor a step from it is of use."""
    trusted: bool
    """No layer needs the exact step; otherwise the step must be taken without graphs."""
    eventful: bool
    """A layer was not finite, or a singular value was lifted to the floor."""


class _Stack:
    """Layers of one shape: their state and their gradients in tensors that stay."""

    def __init__(self, layers: list[Layer], state: State) -> None:
        self.layers = layers
        stacked = stack_state(layers, state)
        # A copy of the same strides, of which the rows are views.
        self.state = FusedState(*(torch.empty_like(part).copy_(part) for part in stacked))
        self.sides = tuple(
            torch.stack([torch.zeros_like(factor.parameter) for factor in factors])
            for factors in self.factors
        )
        # Graphs know its address, and the cache that it comes from forgets.
        self.scaling = scaling_of(layers)
        self.lifted = torch.zeros(len(layers), dtype=torch.long, device=stacked.s.device)

    @property
    def factors(self) -> tuple[list[Factor], list[Factor]]:
        """All tall factors, and all short ones."""
        return [layer.tall for layer in self.layers], [layer.short for layer in self.layers]

    def keep(self, state: State) -> None:
        """Put the rows into the state of the optimizer."""
        keep_rows(self.layers, range(len(self.layers)), self.state, {}, state)

    def batch(self) -> Batch:
        """What `riemannion_layers.read` makes of layers in the gauge of their state."""
        rank = self.layers[0].rank
        found = []
        for factors, side in zip(self.factors, self.sides, strict=True):
            columns = side[:, :rank].mT if factors[0].is_right else side[..., :rank]
            found.append(recover(columns.to(self.state.u.dtype), self.state.s, self.scaling))
        return Batch(self.layers, self.state, found[0], found[1], self.lifted)


class Recording:
    """The step of some layers, recorded.

    Args:
        groups: parameter groups of the optimizer.
        state: of the optimizer; its tensors become rows of stacks.
        layers: those that `can_record`.

    Attributes:
        layers: of all shapes, in the order of `rows`.
        norm: of the Riemannian gradient, after `read`; overwritten by the next one.
        report: what `read` returned last.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], state: State, layers: list[Layer]) -> None:
        self._groups, self._state = list(groups), state
        self._parameters = [factor.parameter for layer in layers for factor in layer.factors]
        self._others = _other_parameters(groups, self._parameters)
        self._options = _options_of(groups)
        self._addresses = _addresses(self._parameters)
        device = self._parameters[0].device
        self._rates = [torch.zeros((), dtype=torch.float64, device=device) for _ in groups]
        self._set_rates = [float("nan")] * len(groups)
        self._stacks = [_Stack(alike, state) for alike in _stackable(layers)]
        self.layers = [layer for stack in self._stacks for layer in stack.layers]
        self._begun: list[Begun] = []
        self._seen: Marks | None = None
        self.report = Report(own=False, trusted=False, eventful=False)
        self._details = self._summary = self.norm = torch.zeros(0, device=device)
        self.adopt()
        slots = {
            id(factor.parameter): row
            for stack in self._stacks
            for factors, side in zip(stack.factors, stack.sides, strict=True)
            for factor, row in zip(factors, side.unbind(), strict=True)
        }
        self._slots = [slots[id(parameter)] for parameter in self._parameters]
        self._record(device.type == "cuda")

    def _record(self, recorded: bool) -> None:
        """Do everything once, put back what that has written, and record it."""
        self._copy_gradients()
        written = [*self._parameters, *(part for stack in self._stacks for part in stack.state)]
        written = [tensor.detach() for tensor in written]
        before = [tensor.clone() for tensor in written]
        try:
            self._read()
            self._write()
        finally:
            torch._foreach_copy_(written, before)
        pool = torch.cuda.graph_pool_handle() if recorded else None
        self._reading = Program(self._read, pool, recorded)
        self._writing = Program(self._write, pool, recorded)
        self._seen = None

    def still_fits(self, groups: Sequence[dict[str, Any]], state: State) -> bool:
        """Tell whether all that the graphs have been recorded with is as it was: addresses, options, layers.

        Args:
            groups: parameter groups of the optimizer.
            state: of the optimizer.
        """
        return (
            state is self._state
            and len(groups) == len(self._groups)
            and all(now is then for now, then in zip(groups, self._groups, strict=True))
            and all(_is_plain(group) for group in groups)
            and _options_of(groups) == self._options
            and all(parameter.grad is not None for parameter in self._parameters)
            and all(parameter.grad is None for parameter in self._others)
            and _addresses(self._parameters) == self._addresses
            and len(state) == len(self._entries)
            and all(now is then for now, then in zip(state.values(), self._entries, strict=True))
            and all(entry.get(key) is kept for entry, key, kept in self._kept)
        )

    def read(self) -> Report:
        """Read gradients and learning rates as they are, unless that has been done, and wait for what comes out."""
        now = self._marks()
        if self._seen is None or not self._seen.still_hold(now):
            for number, (group, rate) in enumerate(zip(self._groups, self._rates, strict=True)):
                if group["lr"] != self._set_rates[number]:
                    rate.fill_(group["lr"])
                    self._set_rates[number] = group["lr"]
            self._copy_gradients()
            self._reading.run()
            self.report = Report(*self._summary.tolist())
            self._seen = now
        return self.report

    def forget(self) -> None:
        """Read anew at the next call, whatever has or has not changed."""
        self._seen = None

    def write(self) -> None:
        """Hand out the writing; `read` has just said that all factors are own and all layers trusted."""
        self._writing.run()
        self._seen = None
        torch.autograd.graph.increment_version(self._versions)

    def rows(self) -> list[tuple[Layer, bool, int]]:
        """Of the last reading: each layer, whether it was finite, and how many singular values were lifted."""
        return [
            (layer, bool(ok), int(hits))
            for layer, (ok, hits) in zip(self.layers, self._details.T.tolist(), strict=True)
        ]

    def adopt(self) -> None:
        """Take what a step without graphs has left in the state into the stacks."""
        for stack in self._stacks:
            for own, part in zip(stack.state, stack_state(stack.layers, self._state), strict=True):
                own.copy_(part)
            stack.keep(self._state)
        self._entries = list(self._state.values())
        self._kept = [(entry, *item) for entry in self._entries for item in entry.items()]
        kept = [part for stack in self._stacks for part in stack.state]
        self._versions = [*self._parameters, *kept]
        self._seen = None

    def _marks(self) -> Marks:
        """What a reading depends on, beside what `still_fits` looks at."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        numbers = [tensor._version for tensor in (*gradients, *self._versions)]
        rates = [group["lr"] for group in self._groups]
        options = [number for some in _options_of(self._groups) for number in some]
        return Marks(list(gradients), [*numbers, *rates, *options])

    def _copy_gradients(self) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_copy_(self._slots, gradients)

    def _read(self) -> None:
        """From the stacks of gradients to small matrices and numbers; the state is not written."""
        batches = [stack.batch() for stack in self._stacks]
        self.norm = norm_of(batches)
        self._begun = begin_steps([self._work(batch) for batch in batches])
        smalls = [begun.small for begun in self._begun]
        own = torch.cat([as_written(batch.layers, self._state) for batch in batches])
        trusted = torch.cat([small.trusted for small in smalls])
        ok = torch.cat([small.ok for small in smalls])
        hits = torch.cat([moved_and_hits(b.small, b.work.options)[1] for b in self._begun])
        self._details = torch.stack([ok.long(), hits])
        self._summary = torch.stack([own.all(), trusted.all(), (~ok | (hits > 0)).any()])

    def _work(self, batch: Batch) -> Work:
        group = batch.layers[0].group
        number = next(i for i, other in enumerate(self._groups) if other is group)
        options = StepOptions(self._rates[number], *(group[key] for key in StepOptions._fields[1:]))
        return Work(batch.state, batch.gradient_v, batch.gradient_t_u, options)

    def _write(self) -> None:
        """From small matrices to state and factors."""
        old: list[Tensor] = []
        new: list[Tensor] = []
        for stack, begun in zip(self._stacks, self._begun, strict=True):
            after = finish_step(begun).state
            old += stack.state
            new += after
            columns = [
                balanced_factors(frame, after.s, stack.scaling) for frame in (after.u, after.v)
            ]
            # Factors that do not move are what the state wrote, bit for bit.
            write_factors_(stack.layers, range(len(stack.layers)), *columns)
        torch._foreach_copy_(old, new)


def count_events(recording: Recording) -> list[Layer]:
    """Count what happened to the layers in a step that has been written; returns those that were not finite."""
    groups = {id(layer.group): layer.group for layer in recording.layers}.values()
    if not recording.report.eventful and not any(any(g["skipped_in_a_row"]) for g in groups):
        return []
    skipped = []
    for layer, ok, hits in recording.rows():
        if not ok:
            skipped.append(layer)
            continue
        layer.group["skipped_in_a_row"][layer.index] = 0
        layer.group["floor_hits"][layer.index] += hits
    return skipped


def can_record(groups: Sequence[dict[str, Any]], state: State) -> list[Layer]:
    """List the layers with gradients, if all of them are of the kind that a recording is for.

    Args:
        groups: parameter groups of an optimizer.
        state: of the optimizer.

    Returns:
        Empty where there is no GPU or another one is current, before the first step, for learning rates that are
        tensors, other spectral maps than msign, decay to an anchor, convolutions, and whatever `can_be_fast` does not
        take.
    """
    device = groups[0]["params"][0].device
    if device.type not in RECORDS_ON or not _is_current(device):
        return []
    if any(parameter.device != device for group in groups for parameter in group["params"]):
        return []
    if not all(_is_plain(group) for group in groups):
        return []
    layers = [layer for group in groups for layer in layers_of(group) if _has_gradients(layer)]
    others = _other_parameters(groups, [f.parameter for layer in layers for f in layer.factors])
    if not layers or not all(have_state(layers, state)) or any(p.grad is not None for p in others):
        return []
    return layers if all(_is_fast(alike, state) for alike in _stackable(layers)) else []


def _stackable(layers: list[Layer]) -> list[list[Layer]]:
    """Collect layers of one group and shape that lie in memory alike: tall on the left, or tall on the right."""
    groups: dict[tuple[int, bool], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((id(layer.group), layer.tall.is_right), []).append(layer)
    return [alike for part in groups.values() for alike in by_shape(part)]


def _is_current(device: torch.device) -> bool:
    """Tell whether streams and graphs are made on this device if none is named."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def _is_plain(group: dict[str, Any]) -> bool:
    """Tell whether the options of a group are numbers that a graph can hold."""
    anchored = group["decay_to"] == "anchor" and group["weight_decay"] and any(group["anchor_rank"])
    return group["core_map"] == "msign" and not isinstance(group["lr"], Tensor) and not anchored


def _has_gradients(layer: Layer) -> bool:
    gradients = [factor.parameter.grad for factor in layer.factors]
    return all(gradient is not None and not gradient.is_sparse for gradient in gradients)


def _is_fast(layers: list[Layer], state: State) -> bool:
    """Tell whether layers of one shape can be stepped by `begin_steps`, as one stack."""
    points = stack_state(layers, state)
    for factors in ([layer.tall for layer in layers], [layer.short for layer in layers]):
        if not can_stack([f.parameter for f in factors], [f.is_right for f in factors]):
            return False
    return can_be_fast(Work(points, points.u, points.v, StepOptions(0.0)))


def _options_of(groups: Sequence[dict[str, Any]]) -> list[list[float]]:
    """What is written into a graph, and is no tensor."""
    return [
        [*(group[key] for key in StepOptions._fields[1:]), *group["scaling"]] for group in groups
    ]


def _other_parameters(groups: Sequence[dict[str, Any]], taken: Sequence[Tensor]) -> list[Tensor]:
    known = {id(parameter) for parameter in taken}
    return [p for group in groups for p in group["params"] if id(p) not in known]


def _addresses(parameters: Sequence[Tensor]) -> list[Any]:
    """Where parameters lie, and as what."""
    return [(parameter.data_ptr(), parameter.dtype, parameter.stride()) for parameter in parameters]
