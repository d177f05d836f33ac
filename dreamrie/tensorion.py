"""Tensorion: Muon for convolution kernels and other tensors of two or more dimensions.

A tensor is unfolded into a matrix, some of its dimensions as rows and the others as columns, and Muon acts on that
matrix. Everything in Muon but the orthogonalization is entrywise, so the choice of the unfolding may change from step
to step and the momentum keeps the shape of the tensor. A matrix has one unfolding, itself: there Tensorion is
`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` to the bit, because that very class makes the step.

Source: arXiv:2606.25975.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from dreamrie.errors import ConfigError, NumericalError

CHOICES = ("square", "nuclear")


class Unfolding(NamedTuple):
    """Which dimensions of a tensor become rows, and which columns; each ascending, dimension 0 among the rows."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def unfold(self, tensor: Tensor) -> Tensor:
        """Return the matrix of a tensor, (product of the row dimensions, product of the column dimensions)."""
        rows = math.prod(tensor.shape[dim] for dim in self.rows)
        return tensor.permute(*self.rows, *self.columns).reshape(rows, -1)

    def fold(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Return the tensor of a matrix; the inverse of `unfold`."""
        order = (*self.rows, *self.columns)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrix.reshape([shape[dim] for dim in order]).permute(inverse)


def unfoldings(dims: int) -> Iterator[Unfolding]:
    """Yield every unfolding of a tensor, transposes left out; few rows first.

    Args:
        dims: number of dimensions, at least 2.

    Yields:
        2^(dims - 1) - 1 unfoldings.
    """
    for extra in range(dims - 1):
        for chosen in combinations(range(1, dims), extra):
            rows = (0, *chosen)
            yield Unfolding(rows, tuple(dim for dim in range(dims) if dim not in rows))


def most_square(shape: torch.Size) -> Unfolding:
    """Return the unfolding whose smaller side is largest, the first of equals.

    The more singular values a matrix has, the more of a momentum's energy an orthogonal step of its shape can follow.

    Args:
        shape: of the tensor, two or more dimensions.

    Returns:
        For (16, 8, 3, 3): rows 0 and 2, columns 1 and 3, hence 48 x 24.
    """

    def smaller_side(unfolding: Unfolding) -> int:
        rows = math.prod(shape[dim] for dim in unfolding.rows)
        return min(rows, math.prod(shape) // max(rows, 1))

    return max(unfoldings(len(shape)), key=smaller_side)


def largest_nuclear_norm(momentum: Tensor) -> Unfolding:
    """Return the unfolding in which a momentum has the largest nuclear norm, the first of equals.

    The nuclear norm is what a step of spectral norm 1 gains to first order: this choice gains most.

    Args:
        momentum: two or more dimensions, finite.

    Returns:
        The unfolding; costs 2^(dims - 1) - 1 singular value decompositions.
    """

    def gain(unfolding: Unfolding) -> float:
        matrix = unfolding.unfold(momentum).float()
        return float(torch.linalg.matrix_norm(matrix, "nuc"))

    if momentum.ndim == 2:
        return next(unfoldings(2))
    return max(unfoldings(momentum.ndim), key=gain)


class Tensorion(Optimizer):
    """Muon on unfolded tensors, for convolution kernels.

    Biases, norms and embeddings belong to AdamW; the scale 0.2 sqrt(max(rows, columns)) gives updates the size of
    AdamW's, so that one lr serves both.

    Args:
        params: tensors of two or more dimensions, or dicts {"params": [...], "lr": ...} for parameter groups.
        lr: AdamW's unit, see above.
        momentum: factor of the running mean of gradients, in [0, 1); Nesterov's form, as in Muon.
        weight_decay: decoupled, multiplied by lr.
        unfolding: "square" takes the unfolding whose smaller side is largest, the same at every step; "nuclear" takes
            at every step the one in which the momentum has the largest nuclear norm.

    Raises:
        ConfigError: an option is bad, or a parameter has fewer than two dimensions.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        unfolding: Literal["square", "nuclear"] = "square",
    ) -> None:
        given: list[Any] = list(params)
        if not given:
            raise ConfigError("Tensorion: no parameters were given.")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "unfolding": unfolding,
        }
        super().__init__(given, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add {"params": [...], option: value, ...}; options not given take the defaults.

        Args:
            param_group: "params" and any option of the constructor.

        Raises:
            ConfigError: an option is bad, or a parameter has fewer than two dimensions.
        """
        group = self.defaults | param_group
        if group["unfolding"] not in CHOICES:
            raise ConfigError(
                f"Tensorion: unfolding {group['unfolding']!r} is unknown; use one of {', '.join(CHOICES)}."
            )
        for name in ("lr", "weight_decay"):
            if not float(group[name]) >= 0:
                raise ConfigError(f"Tensorion: {name} must be at least 0, got {group[name]}.")
        if not 0 <= group["momentum"] < 1:
            raise ConfigError(f"Tensorion: momentum must be in [0, 1), got {group['momentum']}.")
        params = [group["params"]] if isinstance(group["params"], Tensor) else [*group["params"]]
        for index, parameter in enumerate(params):
            if parameter.ndim < 2 or not parameter.numel():
                raise ConfigError(
                    f"Tensorion: parameter {index} of the group has shape {tuple(parameter.shape)}; two or more "
                    "dimensions are needed. Give biases and norms to torch.optim.AdamW."
                )
        super().add_param_group(param_group | {"params": params})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; parameters without a gradient are left alone.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            NumericalError: a gradient is not finite. Nothing is written.
        """
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                    raise NumericalError(
                        f"Tensorion: the gradient of parameter {index}, group {number}, shape "
                        f"{tuple(parameter.shape)}, is not finite. Lower the learning rate, or look for an overflow in "
                        "the loss."
                    )
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        """Let torch's Muon step the unfolded copies of a group, and fold them back."""
        pairs = [(kernel, kernel.grad) for kernel in group["params"] if kernel.grad is not None]
        if not pairs:
            return
        kernels, gradients = zip(*pairs, strict=True)
        chosen = [self._choose(*pair, group) for pair in pairs]
        # Without a copy, a matrix that is a view of its tensor would be written through, others would not.
        matrices = [
            nn.Parameter(unfolding.unfold(kernel.detach()).clone())
            for unfolding, kernel in zip(chosen, kernels, strict=True)
        ]
        options = {key: group[key] for key in ("lr", "momentum", "weight_decay")}
        muon = Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
        for unfolding, kernel, gradient, matrix in zip(
            chosen, kernels, gradients, matrices, strict=True
        ):
            matrix.grad = unfolding.unfold(gradient)
            if "momentum" in self.state[kernel]:
                buffer = unfolding.unfold(self.state[kernel]["momentum"]).clone()
                muon.state[matrix]["momentum_buffer"] = buffer
        muon.step()
        for unfolding, kernel, matrix in zip(chosen, kernels, matrices, strict=True):
            kernel.copy_(unfolding.fold(matrix.detach(), kernel.shape))
            buffer = muon.state[matrix]["momentum_buffer"]
            self.state[kernel]["momentum"] = unfolding.fold(buffer, kernel.shape).contiguous()

    def _choose(self, kernel: Tensor, gradient: Tensor, group: dict[str, Any]) -> Unfolding:
        """Return the unfolding that a step takes."""
        if group["unfolding"] == "square":
            return most_square(kernel.shape)
        momentum = group["momentum"]
        old = self.state[kernel].get("momentum", torch.zeros_like(kernel))
        return largest_nuclear_norm(gradient.lerp(old.lerp(gradient, 1 - momentum), momentum))
