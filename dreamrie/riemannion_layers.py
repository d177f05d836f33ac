"""The layers of Riemannion: LoRA pairs seen as points, momenta and gradients of one tall orientation.

Reading a layer means: take its factors c * left @ right as the point X, and turn the loss gradients of the factors into
the products G v and G^T u with the gradient G of the change. If the factors are the ones the optimizer wrote, this is a
division of columns; any other factors are read through the SVD gauge, where it is the solution of r x r systems.

The step is equivariant under transposition, so each layer is treated as tall, max(out, in) rows, and (out, in) and
(in, out) share a batch.

Layout of the state, per parameter: `basis` and `momentum`, both (rows, r), and for the tall one `singular_values` (r,).
The momentum of the tall parameter is normal to its basis, that of the short one carries the core.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.fixed_rank import (
    Factors,
    Point,
    Tangent,
    point_from_factors,
    transport,
    working_dtype,
)
from dreamrie.riemannion_rows import (
    can_stack,
    column_of,
    equal_rows,
    stack_columns,
    stack_rows,
)
from dreamrie.riemannion_step import FusedState, balanced_factors, recover

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger(__name__)

State = Mapping[Tensor, dict[str, Any]]


class Factor(NamedTuple):
    """One of the two parameters of a layer, seen as a matrix with one column per rank."""

    parameter: nn.Parameter
    is_right: bool

    def columns(self, tensor: Tensor, start: int, stop: int) -> Float[Tensor, "n k"]:
        """Return columns start:stop of the parameter, or of a tensor of its shape."""
        matrix = tensor.detach().flatten(1)
        return matrix[start:stop].mT if self.is_right else matrix[:, start:stop]

    @property
    def rows(self) -> int:
        """Out for the left factor, in for the right one."""
        shape = self.parameter.shape
        return math.prod(shape[1:]) if self.is_right else shape[0]

    def trained(self, rank: int) -> Tensor:
        """Return the first columns where they lie in the parameter, in its own shape."""
        parameter = self.parameter.detach()
        return parameter[:rank] if self.is_right else parameter[:, :rank]

    def write_(self, columns: Float[Tensor, "n k"]) -> None:
        """Write the first k columns; the others keep their bytes."""
        target = self.trained(columns.shape[-1])
        target.copy_((columns.mT if self.is_right else columns).reshape(target.shape))


@dataclass(frozen=True, eq=False)
class Layer:
    """One pair, turned so that `tall` has at least as many rows as `short`."""

    group: dict[str, Any]
    index: int
    tall: Factor
    short: Factor

    @property
    def name(self) -> str:
        """The layer, as the pair called it."""
        return str(self.group["names"][self.index])

    @property
    def rank(self) -> int:
        """Trained columns r."""
        return int(self.group["rank"][self.index])

    @property
    def anchor_rank(self) -> int:
        """Frozen columns."""
        return int(self.group["anchor_rank"][self.index])

    @property
    def scaling(self) -> float:
        """The factor c in front of the product."""
        return float(self.group["scaling"][self.index])

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """Both, tall first."""
        return self.tall, self.short


class Batch(NamedTuple):
    """Layers of one shape with their point, momentum and recovered gradient products."""

    layers: list[Layer]
    state: FusedState
    gradient_v: Tensor
    gradient_t_u: Tensor
    lifted: Tensor
    """Singular values raised to the floor while reading, (layers,)."""


def split(layers: list[Layer], first: list[bool]) -> tuple[list[Layer], list[Layer]]:
    """Split by a flag per layer, order kept."""
    pairs = list(zip(layers, first, strict=True))
    return [layer for layer, flag in pairs if flag], [layer for layer, flag in pairs if not flag]


def layers_of(group: dict[str, Any]) -> list[Layer]:
    """List the layers of a parameter group, turned tall."""
    layers = []
    for index in range(len(group["names"])):
        left = Factor(group["params"][2 * index], is_right=False)
        right = Factor(group["params"][2 * index + 1], is_right=True)
        tall, short = (right, left) if right.rows > left.rows else (left, right)
        layers.append(Layer(group, index, tall, short))
    return layers


def by_shape(layers: list[Layer]) -> list[list[Layer]]:
    """Collect layers that can be stepped as one batch."""
    shapes: dict[Any, list[Layer]] = {}
    for layer in layers:
        parameter = layer.tall.parameter
        key = (
            layer.tall.rows,
            layer.short.rows,
            layer.rank,
            layer.anchor_rank,
            parameter.dtype,
            parameter.device,
        )
        shapes.setdefault(key, []).append(layer)
    return list(shapes.values())


def with_gradients(layers: list[Layer]) -> list[Layer]:
    """Keep the layers that have gradients.

    Args:
        layers: any layers.

    Returns:
        Those with both gradients.

    Raises:
        ConfigError: a layer has one gradient of two.
    """
    kept = []
    for layer in layers:
        there = [factor.parameter.grad is not None for factor in layer.factors]
        if all(there):
            kept.append(layer)
        elif any(there):
            side = "right" if (layer.short if there[0] else layer.tall).is_right else "left"
            raise ConfigError(
                f"layer {layer.name} has a gradient for one factor, the {side} one has none; both are "
                "needed, half of the tangent space is unknown. Train both factors or freeze both."
            )
    return kept


def gather(factors: list[Factor], tensors: list[Tensor], start: int, stop: int) -> Tensor:
    """Stack columns start:stop of factors, or of tensors of their shapes, (layers, rows, k)."""
    sides = [factor.is_right for factor in factors]
    if can_stack(tensors, sides):
        return stack_columns(tensors, sides, start, stop)
    pairs = zip(factors, tensors, strict=True)
    return torch.stack([factor.columns(tensor, start, stop) for factor, tensor in pairs])


def stack_trained(layers: list[Layer]) -> tuple[Tensor, Tensor]:
    """Stack the trained columns of both factors, (layers, rows, r) each."""
    rank = layers[0].rank
    tall, short = [layer.tall for layer in layers], [layer.short for layer in layers]
    return (
        gather(tall, [factor.parameter for factor in tall], 0, rank),
        gather(short, [factor.parameter for factor in short], 0, rank),
    )


def stack_gradients(layers: list[Layer]) -> tuple[Tensor, Tensor]:
    """Stack the gradients of the trained columns, (layers, rows, r) each; all layers have them."""
    sides = []
    for factors in ([layer.tall for layer in layers], [layer.short for layer in layers]):
        gradients = []
        for layer, factor in zip(layers, factors, strict=True):
            gradient = factor.parameter.grad
            if gradient is None or gradient.is_sparse:
                raise ConfigError(f"layer {layer.name} has no dense gradient.")
            gradients.append(gradient)
        sides.append(gather(factors, gradients, 0, layers[0].rank))
    return sides[0], sides[1]


def stack_state(layers: list[Layer], state: State) -> FusedState:
    """Stack the stored points and momenta."""
    tall = [state[layer.tall.parameter] for layer in layers]
    short = [state[layer.short.parameter] for layer in layers]
    return FusedState(
        stack_rows([entry["basis"] for entry in tall]),
        stack_rows([entry["singular_values"] for entry in tall]),
        stack_rows([entry["basis"] for entry in short]),
        stack_rows([entry["momentum"] for entry in tall]),
        stack_rows([entry["momentum"] for entry in short]),
    )


def scaling_of(layers: list[Layer], dtype: torch.dtype | None = None) -> Float[Tensor, "layers 1"]:
    """Return the LoRA scalings as a column."""
    parameter = layers[0].tall.parameter
    values = tuple(layer.scaling for layer in layers)
    return column_of(values, dtype or working_dtype(parameter.dtype), parameter.device)


def anchor_of(layers: list[Layer]) -> Factors:
    """Return the frozen start X0 as factors; the sign that makes the layer compute X - X0 is taken out."""
    sides = []
    start, stop = layers[0].rank, layers[0].rank + layers[0].anchor_rank
    for factors in ([layer.tall for layer in layers], [layer.short for layer in layers]):
        stacked = gather(factors, [factor.parameter for factor in factors], start, stop)
        sides.append(stacked.to(working_dtype(stacked.dtype)))
    return Factors(-scaling_of(layers).unsqueeze(-1) * sides[0], sides[1])


def are_finite(tensors: tuple[Tensor, Tensor]) -> list[bool]:
    """Tell for each layer of a batch whether both tensors are finite."""
    flags = [torch.isfinite(tensor).all(dim=-1).all(dim=-1) for tensor in tensors]
    verdict: list[bool] = (flags[0] & flags[1]).tolist()
    return verdict


def have_state(layers: list[Layer], state: State) -> list[bool]:
    """Tell for each layer whether a point is stored."""
    return [bool(state.get(layer.tall.parameter)) for layer in layers]


def are_own(layers: list[Layer], state: State) -> list[bool]:
    """Tell for each layer, of any shape, whether its factors are bit for bit what its state wrote.

    Comparing tensor versions would be cheaper but misses writes through `.data` and does not survive a checkpoint.
    """
    known = have_state(layers, state)
    shapes = by_shape(split(layers, known)[0])
    if not shapes:
        return known
    flags = [as_written(alike, state) for alike in shapes]
    # One transfer to the host for all of them.
    verdicts = iter(torch.cat([flag.to(flags[0].device) for flag in flags]).tolist())
    own = {id(layer) for alike in shapes for layer in alike if next(verdicts)}
    return [id(layer) in own for layer in layers]


def as_written(layers: list[Layer], state: State) -> Tensor:
    """Tell for each layer of a shape whether it has the factors that its state wrote, (layers,)."""
    points, scaling = stack_state(layers, state), scaling_of(layers)
    same = torch.ones(len(layers), dtype=torch.bool, device=points.u.device)
    for frame, current in zip((points.u, points.v), stack_trained(layers), strict=True):
        same &= equal_rows(current, balanced_factors(frame, points.s, scaling).to(current.dtype))
    return same


def read_all(shapes: list[list[Layer]], state: State) -> list[Batch]:
    """Read layers of several shapes, see `read`; one transfer to the host."""
    own = iter(are_own([layer for layers in shapes for layer in layers], state))
    return [read(layers, state, [next(own) for _ in layers]) for layers in shapes]


def read(layers: list[Layer], state: State, own: list[bool] | None = None) -> Batch:
    """Read points, momenta and gradients of layers of one shape.

    Args:
        layers: of one shape.
        state: of the optimizer; not written.
        own: what `are_own` says of them, if it has been asked.

    Returns:
        The batch; its layers may be in another order.

    Raises:
        ConfigError: the product of a layer's factors has a rank below r.
        NumericalError: the factors of a layer are not finite.
    """
    known, foreign = split(layers, are_own(layers, state) if own is None else own)
    parts = [
        reader(part, state) for part, reader in ((known, _read_own), (foreign, _enter)) if part
    ]
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    joined = zip(first.state, second.state, strict=True)
    return Batch(
        first.layers + second.layers,
        FusedState(*(torch.cat(pair) for pair in joined)),
        torch.cat([first.gradient_v, second.gradient_v]),
        torch.cat([first.gradient_t_u, second.gradient_t_u]),
        torch.cat([first.lifted, second.lifted]),
    )


def _read_own(layers: list[Layer], state: State) -> Batch:
    """Read layers whose factors are in the gauge of their state: divide columns."""
    points, scaling = stack_state(layers, state), scaling_of(layers)
    tall, short = (gradient.to(points.u.dtype) for gradient in stack_gradients(layers))
    return Batch(
        layers,
        points,
        recover(tall, points.s, scaling),
        recover(short, points.s, scaling),
        torch.zeros(len(layers), dtype=torch.long, device=points.u.device),
    )


def enter_point(layers: list[Layer]) -> Point:
    """Read the points of arbitrary factors, in fp64 because column scales may differ by many orders."""
    tall, short = stack_trained(layers)
    dtype = _entry_dtype(tall)
    tall_wide, short_wide = tall.to(dtype), short.to(dtype)
    # Not the precision of the factors: in bf16, sound columns of a high rank come closer to each other than that.
    _check_rank(layers, (tall_wide, short_wide), torch.finfo(working_dtype(tall.dtype)).eps)
    return point_from_factors(tall_wide * scaling_of(layers, dtype).unsqueeze(-1), short_wide)


def _entry_dtype(tensor: Tensor) -> torch.dtype:
    """Return fp64 where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _enter(layers: list[Layer], state: State) -> Batch:
    """Read layers with arbitrary factors and carry an earlier momentum to the new point."""
    point = enter_point(layers)
    dtype, target = point.u.dtype, working_dtype(layers[0].tall.parameter.dtype)
    scaling = scaling_of(layers, dtype).unsqueeze(-1)
    tall, short = (factor.to(dtype) for factor in stack_trained(layers))
    gradient_tall, gradient_short = (gradient.to(dtype) for gradient in stack_gradients(layers))
    # d loss / d tall = c (G v) (v^T short), whatever the factors.
    gradient_v = torch.linalg.solve(point.v.mT @ short, gradient_tall / scaling, left=False)
    gradient_t_u = torch.linalg.solve(point.u.mT @ tall, gradient_short / scaling, left=False)
    momenta = Tangent(torch.zeros_like(point.u), torch.zeros_like(point.v))
    for row, known in enumerate(have_state(layers, state)):
        if known:
            logger.info("%s: factors changed from outside, read again", layers[row].name)
            old = FusedState(*(part[0].to(dtype) for part in stack_state([layers[row]], state)))
            here = Point(point.u[row], point.s[row], point.v[row])
            carried = transport(Point(old.u, old.s, old.v), Tangent(old.m_left, old.m_right), here)
            momenta.d_left[row], momenta.d_right[row] = carried
    floor = layers[0].group["sigma_floor"]
    entered = FusedState(point.u, point.s.clamp_min(floor), point.v, *momenta)
    return Batch(
        layers,
        FusedState(*(part.to(target) for part in entered)),
        gradient_v.to(target),
        gradient_t_u.to(target),
        (point.s < floor).sum(dim=-1),
    )


def _check_rank(layers: list[Layer], factors: tuple[Tensor, Tensor], eps: float) -> None:
    """Raise when factors are not finite, or a product has a rank below r: it is off the manifold."""
    for layer, finite in zip(layers, are_finite(factors), strict=True):
        if not finite:
            raise NumericalError(
                f"the factors of layer {layer.name} are not finite. Load a sound adapter before training."
            )
    rank = layers[0].rank
    for factor in factors:
        # left @ right has rank r exactly when both factors have independent columns, whatever their lengths.
        lengths = torch.linalg.vector_norm(factor, dim=-2, keepdim=True)
        unit = factor / torch.where(lengths > 0, lengths, 1.0)
        smallest = torch.linalg.svdvals(torch.linalg.qr(unit).R)[..., -1].tolist()
        for layer, value in zip(layers, smallest, strict=True):
            if value <= rank * eps:
                raise ConfigError(
                    f"the LoRA product of layer {layer.name} has a rank below {rank} (a fresh LoRA layer "
                    "has one factor zero), and there is no tangent space at such a point. Start from "
                    "dreamrie.attach_lora(..., init='orthonormal') and dreamrie.locally_optimal_init(...)."
                )
