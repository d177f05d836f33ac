"""Coordinates of the input directions that are orthogonal to given ones.

With orthonormal columns N of the complement of V, a gradient G that may only act there is G N, of shape (out, in - q),
and locally optimal initialization is the same problem with fewer columns: a start u diag(s) w^T of that problem stands
for X0 = u diag(s) (N w)^T, whose product with V is zero. Solved in these coordinates it cannot pick a null direction of
the projected gradient G (I - V V^T) that lies along V, which happens where fewer than 2r directions are left.

N is never formed: it is the rest of the Householder reflections of V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dreamrie.errors import ConfigError
from dreamrie.fixed_rank import Point, working_dtype

if TYPE_CHECKING:
    from jaxtyping import Float

    from dreamrie.loi.session import LoiPair


class Complement:
    """All directions of (in,) but those of `avoid`.

    Args:
        size: in.
        avoid: V (in, q) with independent columns, q < in; None or q = 0: nothing is left out.
    """

    def __init__(self, size: int, avoid: Float[Tensor, "in_ q"] | None = None) -> None:
        self.avoided = 0 if avoid is None else int(avoid.shape[1])
        self.size = size - self.avoided
        if avoid is not None and self.avoided:
            self._reflections = torch.geqrf(avoid)

    def restrict(self, rows: Float[Tensor, "k in_"]) -> Float[Tensor, "k size"]:
        """Rows N: what they are on the directions that are left."""
        if not self.avoided:
            return rows
        turned = torch.ormqr(*self._reflections, rows.contiguous(), left=False)
        return turned[:, self.avoided :]

    def share_outside(self, point: Point) -> float:
        """|X V| / |X| of a point with equal singular values, as a start has."""
        if not self.avoided:
            return 0.0
        turned = torch.ormqr(*self._reflections, point.v.T.contiguous(), left=False)
        return float(torch.linalg.norm(turned[:, : self.avoided]) / torch.linalg.norm(turned))

    def lift(self, columns: Float[Tensor, "size k"]) -> Float[Tensor, "in_ k"]:
        """N columns: the directions that coordinates stand for."""
        if not self.avoided:
            return columns
        padded = torch.cat([columns.new_zeros(self.avoided, columns.shape[1]), columns])
        return torch.ormqr(*self._reflections, padded)

    def lift_point(self, point: Point) -> Point:
        """A point of the smaller problem as one of the layer."""
        return Point(point.u, point.s, self.lift(point.v))

    def restrict_point(self, point: Point) -> Point:
        """The way back, for a point without a part along V."""
        return Point(point.u, point.s, self.restrict(point.v.T).T)


def complements(
    pairs: Sequence[LoiPair], avoid: Sequence[Tensor | None] | None
) -> list[Complement]:
    """One for each layer.

    Args:
        pairs: the layers.
        avoid: V (in, q) of each layer, orthonormal columns; None where the layer is free.

    Returns:
        In the precision and on the device of the layer's factors.

    Raises:
        ConfigError: another number of bases than layers, a basis of another size, or one that leaves fewer directions
            than the rank.
    """
    if avoid is None:
        return [Complement(pair.in_) for pair in pairs]
    if len(avoid) != len(pairs):
        raise ConfigError(f"avoid must hold one entry for each of {len(pairs)} layers.")
    found: list[Complement] = []
    for pair, basis in zip(pairs, avoid, strict=True):
        if basis is None:
            found.append(Complement(pair.in_))
            continue
        check_room(pair.name, pair.in_, basis, pair.rank)
        like = pair.right
        found.append(Complement(pair.in_, basis.to(like.device, working_dtype(like.dtype))))
    return found


def check_room(name: str, in_: int, avoid: Tensor, rank: int) -> None:
    """A change of a rank needs as many input directions.

    Args:
        name: of the layer.
        in_: its columns.
        avoid: (in, q).
        rank: of the change.

    Raises:
        ConfigError: the basis has another number of rows, or leaves fewer than `rank` directions.
    """
    if avoid.ndim != 2 or avoid.shape[0] != in_:
        raise ConfigError(
            f"layer {name!r}: directions to avoid have shape {tuple(avoid.shape)}, expected ({in_}, q)."
        )
    left = in_ - int(avoid.shape[1])
    if left < rank:
        raise ConfigError(
            f"layer {name!r}: the other adapters respond to {avoid.shape[1]} of its {in_} input directions; {left} are "
            f"left, and rank {rank} needs {rank}. Give fewer or thinner adapters (python -m dreamrie truncate), or a "
            "lower rank."
        )
