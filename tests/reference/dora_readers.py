"""Models of what programs compute with from a file of kohya's names that has `dora_scale`, for one layer.

Written from what the programs' own threads say, and for diffusers from its warning, not from anybody's code:

diffusers   leaves `dora_scale` out of kohya's names, with a warning
A1111       takes norms over the outputs, one for each input (LyCORIS issue 216: "calculations on the input")
ComfyUI     one norm for each output if the shape says so, but of the base without the change (its pull request 15458)
Forge       follows ComfyUI (its pull request 2856)
LyCORIS     norms of base plus change for each output, where it was trained so: PEFT's formula
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Reader = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of the base's weight (out, in), the product with its scaling, and dora_scale (out, 1)."""


def without(weight: Tensor, product: Tensor, scale: Tensor) -> Tensor:
    return weight + product


def by_input(weight: Tensor, product: Tensor, scale: Tensor) -> Tensor:
    moved = weight + product
    return moved * (scale / moved.norm(dim=0, keepdim=True))


def by_base(weight: Tensor, product: Tensor, scale: Tensor) -> Tensor:
    return (weight + product) * (scale / weight.norm(dim=1, keepdim=True))


def by_output(weight: Tensor, product: Tensor, scale: Tensor) -> Tensor:
    moved = weight + product
    return moved * (scale / moved.norm(dim=1, keepdim=True))


READERS: dict[str, Reader] = {
    "diffusers": without,
    "A1111": by_input,
    "ComfyUI": by_base,
    "Forge": by_base,
    "LyCORIS": by_output,
}
