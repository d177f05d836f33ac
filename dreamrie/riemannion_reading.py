"""One reading of all layers for both the gradient norm and the step that follows it.

Reading costs a third of a step on small models, and the norm needs all of it. A `Reading` holds what the norm has read
together with marks of everything it was read from; the step takes it if the marks are still the same. They are torch's
version counters, the addresses of the parameters, and the very objects that were seen: gradients and state are held
until then, so that no new tensor can take the place of an old one unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dreamrie.fixed_rank import remove_component
from dreamrie.riemannion_layers import (
    Batch,
    State,
    by_shape,
    layers_of,
    read_all,
    with_gradients,
)

Groups = Sequence[dict[str, Any]]


class Marks(NamedTuple):
    """What a reading depends on: objects that must be the same, and numbers that must be equal."""

    objects: list[object]
    numbers: list[float]

    def still_hold(self, now: Marks) -> bool:
        """Tell whether nothing has changed since."""
        return (
            self.numbers == now.numbers
            and len(self.objects) == len(now.objects)
            and all(old is new for old, new in zip(self.objects, now.objects, strict=True))
        )


class Reading(NamedTuple):
    """Batches, and the marks of what they were read from."""

    batches: list[Batch]
    marks: Marks


def read_groups(groups: Groups, state: State) -> list[Batch]:
    """Read all layers that have gradients, see `riemannion_layers.read`; one transfer to the host.

    Args:
        groups: parameter groups of the optimizer.
        state: of the optimizer; not written.

    Returns:
        One batch for each shape of each group.
    """
    shapes = [layers for group in groups for layers in by_shape(with_gradients(layers_of(group)))]
    return read_all(shapes, state)


def marks_of(groups: Groups, state: State) -> Marks:
    """Note what a reading of the groups depends on.

    Args:
        groups: parameter groups of the optimizer.
        state: of the optimizer.

    Returns:
        The marks. A write through `.data` leaves none.
    """
    objects: list[object] = []
    numbers: list[float] = []
    for group in groups:
        # A loaded state brings new groups, to which the layers of a reading would not belong.
        objects.append(group)
        numbers += [group["sigma_floor"], *group["scaling"]]
        for parameter in group["params"]:
            gradient, stored = parameter.grad, list(state.get(parameter, {}).values())
            objects += [gradient, *stored]
            numbers += [parameter.data_ptr(), parameter._version]
            numbers += [value._version for value in stored]
            if gradient is not None:
                numbers.append(gradient._version)
    return Marks(objects, numbers)


def norm_of(batches: Sequence[Batch]) -> Tensor:
    """Return the norm of the Riemannian gradient over all layers of some batches.

    Args:
        batches: of any shapes.

    Returns:
        sqrt(sum of |g_left|^2 + |g_right|^2), a scalar; NaN or Inf when a gradient is not finite.
    """
    squares = []
    for batch in batches:
        # Not |G v|^2 - |u^T G v|^2, which saves a product: the error of u^T G v, which depends on where in memory the
        # tensors lie, would enter in first order, and logs have to be the same to the byte.
        normal = remove_component(batch.state.u, batch.gradient_v)
        squares.append(normal.square().sum() + batch.gradient_t_u.square().sum())
    if not squares:
        return torch.zeros((), dtype=torch.float64)
    # On the device of the layers: nothing waits for it here.
    device = squares[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack([square.to(device, wide) for square in squares]).sum().sqrt()
