"""What a start is asked for, and how it writes what it found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dreamrie.errors import ConfigError
from dreamrie.fixed_rank import Point, working_dtype
from dreamrie.loi.session import is_packed
from dreamrie.team import ALONE, Team

if TYPE_CHECKING:
    from jaxtyping import Float

    from dreamrie.lora.pairs import LoraPair

log = logging.getLogger("dreamrie.lora.inits")


@dataclass(frozen=True)
class Data:
    """Batches of the training, and how to look at them.

    Attributes:
        loss: loss(model, batch) -> one number; the training loss.
        batches: finite; the same on every process.
        used: used(batch) -> (rows, length) of bool, which places of the rows of tokens the loss depends on, so that
            padding does not count as input; None where all do.
        team: the processes that train together.
    """

    loss: Callable[[nn.Module, Any], Tensor]
    batches: Iterable[Any]
    used: Callable[[Any], Tensor | None] | None = None
    team: Team = ALONE


@dataclass(frozen=True)
class Loi:
    """Settings of the starts that have a size of their own; see `locally_optimal_init`.

    Attributes:
        alpha: size of the start, of `orthonormal` too; None: 0.1 / sqrt(r).
        estimator: of the gradient.
        lr: largest learning rate, where it is the size of a step that is added to the factors.
        avoid: for each pair, input directions that its start must not respond to.
    """

    alpha: float | None = None
    estimator: Any = "mean_gradient"
    lr: float | None = None
    avoid: Sequence[Tensor | None] | None = None


@dataclass(frozen=True)
class Request:
    """One call of a start.

    Attributes:
        name: of the start, for those that share a function.
        model: holds the pairs.
        pairs: where to write; anchored or not as the table says.
        generator: source of random numbers.
        seed: of streams that PEFT draws from; layer n takes seed + n.
        data: None where no batches were given.
        loi: sizes.
    """

    name: str
    model: nn.Module
    pairs: Sequence[LoraPair]
    generator: torch.Generator
    seed: int
    data: Data | None = None
    loi: Loi = field(default_factory=Loi)

    def given_data(self) -> Data:
        """The batches.

        Returns:
            As given.

        Raises:
            ConfigError: there are none.
        """
        if self.data is None:
            raise ConfigError(
                f"the start {self.name!r} is computed from batches: attach with init='orthonormal' (or 'default' for "
                "eva), then call dreamrie.lora.start_pairs with a loss and batches."
            )
        return self.data


def dtype_of(pair: LoraPair) -> torch.dtype:
    """Precision to compute the start of a pair in: fp64 for an fp64 pair, else fp32."""
    return working_dtype(pair.left.dtype)


def base_matrix(pair: LoraPair, name: str) -> Float[Tensor, "out in_"]:
    """The base weight as a matrix, in the precision of `dtype_of`; a copy.

    Args:
        pair: of the layer.
        name: of the start, for the message.

    Returns:
        (out, in).

    Raises:
        ConfigError: it is quantized.
    """
    if is_packed(pair.base_weight):
        raise ConfigError(
            f"layer {pair.name!r}: the start {name!r} is computed from the base weight, which is quantized "
            "here. Use orthonormal, or locally_optimal_init with estimator='sketch'."
        )
    return pair.as_matrix(pair.base_weight.detach()).to(dtype_of(pair)).clone()


def write_point(pair: LoraPair, point: Point) -> None:
    """Write a start of rank r, and its frozen copy where the pair has an anchor.

    Args:
        pair: to write.
        point: on any device.
    """
    device = pair.left.device
    on_device = Point(point.u.to(device), point.s.to(device), point.v.to(device))
    pair.set_start(on_device, anchored=bool(pair.anchor_rank))


def write_factors(
    pair: LoraPair, left: Float[Tensor, "out r"], right: Float[Tensor, "r in_"]
) -> None:
    """Write factors as they are, whose product is zero.

    Args:
        pair: a pair without anchor.
        left: `lora_B`.
        right: `lora_A`.

    Raises:
        ConfigError: a shape is not that of the pair.
    """
    found, wanted = (left.shape, right.shape), ((pair.out, pair.rank), (pair.rank, pair.in_))
    if found != wanted:
        shapes = [tuple(shape) for shape in found]
        raise ConfigError(f"layer {pair.name!r}: a start has shapes {shapes}, expected {wanted}.")
    with torch.no_grad():
        pair.left_matrix().copy_(left)
        pair.right_matrix().copy_(right)
