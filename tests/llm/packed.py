"""Two linear layers whose weight cannot be read, as bitsandbytes and torchao have them: bytes and a scale.

Any arithmetic on the weight raises; only the layer's own forward pass may unpack it. Its bytes may be looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

KINDS = ("bytes", "wrapped")
# What moves, describes or hashes storage without seeing numbers in it.
_HARMLESS = {
    *("detach", "cpu", "cuda", "to", "contiguous", "reshape", "view", "numpy", "data_ptr", "numel", "size", "dim"),
    *("requires_grad_", "is_floating_point", "is_complex", "is_inference", "__get__", "__set__", "_is_view", "clone"),
    *("element_size", "is_contiguous", "stride", "storage_offset", "untyped_storage", "nelement", "__len__"),
    *("__hash__", "__repr__", "__format__", "get_device", "is_set_to", "is_shared"),
}  # fmt: skip


class WasReadError(Exception):
    """Somebody calculates with a packed weight."""


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Eight bits for a number, a scale for a row."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def unpacked(number: Tensor, scale: Tensor) -> Tensor:
    return number.to(scale.dtype) * scale


class Bytes(nn.Parameter):
    """Like bitsandbytes' parameter: uint8, not in the shape of the matrix; the scale is no tensor of the module."""

    scale: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ not in _HARMLESS:
            raise WasReadError(func.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class BytesLinear(nn.Linear):
    """A quantized layer whose class is its own; the scale travels in the state dict alone."""

    @classmethod
    def of(cls, dense: nn.Linear) -> BytesLinear:
        made = cls(dense.in_features, dense.out_features, bias=False, device="meta")
        number, made.scale = quantized(dense.weight.detach())
        made.weight = Bytes(number.view(torch.uint8).reshape(-1, 1), requires_grad=False)
        made.bias = dense.bias
        return made

    def forward(self, rows: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            number = self.weight.detach().as_subclass(Tensor).view(torch.int8)
            weight = unpacked(number.reshape(self.out_features, self.in_features), self.scale)
        return linear(rows, weight.to(rows.dtype), self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = self.scale


class Wrapped(Tensor):
    """Like torchao's tensor: it says that it is a matrix of floats, and holds two other tensors."""

    number: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, number: Tensor, scale: Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, number.shape, dtype=scale.dtype, device=number.device
        )
        made.number, made.scale = number, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["number", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Wrapped:
        return Wrapped(inner["number"], inner["scale"])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is linear:
            rows, weight, *bias = args
            matrix = unpacked(weight.number, weight.scale).to(rows.dtype)
            return linear(rows, matrix, *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return Wrapped(args[0].number, args[0].scale)
        raise WasReadError(str(func))


def pack_(model: nn.Module, kind: str) -> nn.Module:
    """Quantize every linear layer but the last of a model, as loaders do."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            if kind == "bytes":
                model.set_submodule(name, BytesLinear.of(module))
            else:
                wrapped = Wrapped(*quantized(module.weight.detach()))
                module.weight = nn.Parameter(wrapped, requires_grad=False)
    return model


def unpack_(model: nn.Module) -> nn.Module:
    """The dense model with the numbers that a packed one calculates with."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            module.weight.data = unpacked(*quantized(module.weight.detach()))
    return model
