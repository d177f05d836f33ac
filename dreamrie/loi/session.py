"""Leave the caller's model, gradients and random streams as they were."""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dreamrie.errors import ConfigError
from dreamrie.fixed_rank import Point

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class LoiPair(Protocol):
    """What LOI needs to know of one LoRA layer; `dreamrie.lora.LoraPair` is one."""

    @property
    def name(self) -> str:
        """Path of the layer."""

    @property
    def left(self) -> nn.Parameter:
        """(out, R) or (out, R, 1, 1)."""

    @property
    def right(self) -> nn.Parameter:
        """(R, in) or (R, in, kh, kw)."""

    @property
    def base_weight(self) -> nn.Parameter:
        """Read, never written."""

    @property
    def scaling(self) -> float:
        """Factor in front of left @ right."""

    @property
    def rank(self) -> int:
        """r, the trained columns."""

    @property
    def anchor_rank(self) -> int:
        """Frozen columns; r, or 0 without an anchor."""

    @property
    def out(self) -> int:
        """Rows of the weight matrix."""

    @property
    def in_(self) -> int:
        """Columns of the weight matrix."""

    def as_matrix(self, like_base: Tensor) -> Tensor:
        """A tensor shaped like the base weight as (out, in)."""

    def delta(self) -> Tensor:
        """Change of the weight, (out, in)."""

    def point(self) -> Point:
        """The trained half."""

    def set_start(self, point: Point, anchored: bool) -> None:
        """Write trained half and anchor."""


class RandomState:
    """The random streams of python, numpy and torch (CPU and every CUDA device), to go back to."""

    def __init__(self) -> None:
        self._python = random.getstate()
        # numpy's stream matters only if somebody has loaded numpy; this module needs torch alone.
        self._numpy: Any = getattr(sys.modules.get("numpy"), "random", None)
        self._numpy_state = self._numpy.get_state() if self._numpy is not None else None
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Put every stream back."""
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.set_state(self._numpy_state)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate the model in eval mode without any gradient flag; restore modes, flags and RNG.

    Eval mode switches dropout off and keeps the running statistics of normalisation layers.
    """
    rng = RandomState()
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        rng.restore()


@contextlib.contextmanager
def exchanged(
    model: nn.Module, pairs: Sequence[LoiPair], lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> Iterator[list[tuple[nn.Parameter, nn.Parameter]]]:
    """Run the model with other factors, of any width, in place of the pairs' own.

    The caller's parameters are taken out of their modules and put back, never written, so their
    `.grad`, their hooks and the references that an optimizer holds stay valid.

    Args:
        model: the model that holds the pairs.
        pairs: n pairs.
        lefts: n matrices (out, k).
        rights: n matrices (k, in).

    Yields:
        The temporary (left, right) parameters, requiring gradients.

    Raises:
        ConfigError: a factor is not a parameter of this model.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    swaps: list[tuple[nn.Parameter, nn.Parameter]] = []
    temporary: list[tuple[nn.Parameter, nn.Parameter]] = []
    for pair, left, right in zip(pairs, lefts, rights, strict=True):
        if id(pair.left) not in owners or id(pair.right) not in owners:
            raise ConfigError(
                f"layer {pair.name!r}: its LoRA factors are not parameters of this model. Read the "
                "pairs again with dreamrie.lora_pairs(model)."
            )
        wide_left = left.reshape(pair.out, -1, *pair.left.shape[2:]).to(pair.left)
        wide_right = right.reshape(-1, *pair.right.shape[1:]).to(pair.right)
        temporary.append((nn.Parameter(wide_left), nn.Parameter(wide_right)))
        swaps += [(pair.left, temporary[-1][0]), (pair.right, temporary[-1][1])]
    try:
        for own, other in swaps:
            for module, name in owners[id(own)]:
                module._parameters[name] = other
        yield temporary
    finally:
        for own, _ in swaps:
            for module, name in owners[id(own)]:
                module._parameters[name] = own


def without_change(pairs: Sequence[LoiPair]) -> tuple[list[Tensor], list[Tensor]]:
    """Width-1 factors whose product is exactly zero: the base model."""
    lefts = [pair.left.new_zeros(pair.out, 1) for pair in pairs]
    return lefts, [pair.right.new_zeros(1, pair.in_) for pair in pairs]


def is_packed(weight: Tensor) -> bool:
    """Whether a base weight is quantized: bytes, or a tensor that is kept as several others. No gradient reaches it."""
    return not weight.is_floating_point() or hasattr(weight, "__tensor_flatten__")


def stored(tensor: Tensor, name: str = "") -> dict[str, Tensor]:
    """What a tensor is kept as: itself under its name, or the parts of a packed one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return {name: tensor}
    found: dict[str, Tensor] = {}
    for part in tensor.__tensor_flatten__()[0]:
        value = getattr(tensor, part)
        # A weight that is spread over processes has its mesh beside its part.
        found |= stored(value, f"{name}.{part}") if isinstance(value, Tensor) else {}
    return found


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes of what a tensor is kept as."""
    total = hashlib.sha256()
    for part in stored(tensor).values():
        flat = part.detach().contiguous().reshape(-1)
        total.update(f"{part.dtype} {tuple(part.shape)}".encode())
        if flat.numel():
            total.update(flat.view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()
