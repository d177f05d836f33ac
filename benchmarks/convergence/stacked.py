"""Many adapters on one U-Net: the rows of a batch belong to them in turn, and each layer multiplies by all at once.

The factors of all trainings lie in one flat tensor, gradients in another. Each training sees its own part as ordinary
parameters of ordinary LoRA pairs, so that any optimizer of the library steps it; where the optimizer is better off on
the processor, the two tensors have a twin there, and one copy each way is all that a step moves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dreamrie.lora import LoraPair

WARMUP = 3


class StackedLinear(nn.Module):
    """A linear layer with the adapters of several trainings: part k of the rows gets adapter k.

    Args:
        base: shared and frozen.
        left: (runs, out, R). right: (runs, R, in).
        scaling: factor between left @ right and the change of the weight.
        magnitude: (runs, out), norms of the rows of the weight, for DoRA.
    """

    def __init__(
        self,
        base: Any,
        left: nn.Parameter,
        right: nn.Parameter,
        scaling: float,
        magnitude: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.base, self.left, self.right, self.scaling = base, left, right, scaling
        self.magnitude = magnitude

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """Rows (runs * n, ..., in) to (runs * n, ..., out)."""
        y: Tensor = self.base(x)
        rows = x.reshape(len(self.left), -1, x.shape[-1])
        change = self.scaling * ((rows @ self.right.mT) @ self.left.mT)
        if self.magnitude is None:
            return y + change.view_as(y)
        # As in dreamrie.lora.dora, the norms are constants for the gradient.
        with torch.no_grad():
            moved = self.base.weight + self.scaling * (self.left @ self.right)
            norms = torch.linalg.vector_norm(moved, dim=2)
        bias = 0.0 if self.base.bias is None else self.base.bias
        turned = (y - bias).view_as(change) + change
        return ((self.magnitude / norms)[:, None] * turned).view_as(y) + bias


def twin(unet: Any) -> Any:
    """A U-Net of its own over the same weights: what is put on it does not touch the other."""
    shared = {id(value): value for value in (*unet.parameters(), *unet.buffers())}
    return copy.deepcopy(unet, shared)


class Bank:
    """The factors of all trainings, and the U-Net that computes with them.

    Args:
        unet: without adapters; stays as it is.
        runs: pairs of each training, all of one shape, with magnitudes or without. Their parameters are replaced: they
            lie in the bank then.
        home: device on which the optimizers step.

    Attributes:
        unet: over the same weights, with stacked layers.
        values: all factors, flat, on the device of the U-Net. gradients: theirs.
    """

    def __init__(self, unet: Any, runs: Sequence[Sequence[LoraPair]], home: torch.device) -> None:
        device = next(unet.parameters()).device
        shapes = [part.shape for pair in runs[0] for part in pair.parameters]
        sizes = [len(runs) * shape.numel() for shape in shapes]
        self.values = torch.zeros(sum(sizes), device=device)
        self.gradients = torch.zeros_like(self.values)
        self._home_values, self._home_gradients = self.values, self.gradients
        if home != device:
            self._home_values, self._home_gradients = (
                torch.zeros(sum(sizes), device=home, pin_memory=device.type == "cuda")
                for _ in range(2)
            )
        self._parameters: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        stacked = (
            self._parts(self.values, sizes, shapes),
            self._parts(self.gradients, sizes, shapes),
        )
        self.unet = twin(unet)
        width = len(runs[0][0].parameters)
        for number, pair in enumerate(runs[0]):
            leaves = []
            for value, gradient in zip(
                *(part[width * number : width * (number + 1)] for part in stacked), strict=True
            ):
                leaf = nn.Parameter(value)
                leaf.grad = gradient
                leaves.append(leaf)
            base = self.unet.get_submodule(pair.name)
            left, right, *magnitude = leaves
            self.unet.set_submodule(
                pair.name, StackedLinear(base, left, right, pair.scaling, *magnitude)
            )
        own = (
            self._parts(self._home_values, sizes, shapes),
            self._parts(self._home_gradients, sizes, shapes),
        )
        for run, pairs in enumerate(runs):
            for number, pair in enumerate(pairs):
                first = width * number
                self._adopt(run, pair, *(part[first : first + width] for part in own))
        self.push()

    @staticmethod
    def _parts(flat: Tensor, sizes: Sequence[int], shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Parts of a flat tensor, (runs, *shape) each."""
        return [
            part.view(-1, *shape)
            for part, shape in zip(flat.split(list(sizes)), shapes, strict=True)
        ]

    def _adopt(
        self, run: int, pair: LoraPair, values: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Let a pair's parameters be parts of the bank: values and gradients of each of its parameters in turn."""
        module: Any = pair.module
        homes = (
            ("left", module.lora_B),
            ("right", module.lora_A),
            ("magnitude", module.lora_magnitude_vector),
        )
        for (name, home), value, gradient in zip(homes, values, gradients, strict=False):
            holder = home[pair.adapter_name]
            value[run].copy_(holder.weight.detach())
            parameter = nn.Parameter(value[run])
            parameter.grad = gradient[run]
            holder.weight = parameter
            setattr(pair, name, parameter)
            self._parameters.append((parameter, value[run], gradient[run]))

    @property
    def is_apart(self) -> bool:
        """Whether the optimizers step on another device than the model."""
        return self._home_values is not self.values

    def pull(self) -> None:
        """Bring the gradients to where the optimizers step."""
        if self.is_apart:
            self._home_gradients.copy_(self.gradients)

    def push(self) -> None:
        """Bring the factors to where the model is."""
        if self.is_apart:
            self.values.copy_(self._home_values, non_blocking=True)

    def check_in_place(self) -> None:
        """Every parameter still lies in the bank.

        Raises:
            SystemExit: an optimizer has put another tensor into a parameter, which the model would not see.
        """
        for parameter, value, gradient in self._parameters:
            there = parameter.grad is not None and parameter.grad.data_ptr() == gradient.data_ptr()
            if parameter.data_ptr() != value.data_ptr() or not there:
                raise SystemExit(
                    "this optimizer does not step in place, so it cannot train in a stack"
                )


def run_on_graph(
    work: Callable[[], None], device: torch.device, wanted: bool
) -> Callable[[], None]:
    """Record work on fixed tensors once, so that each repetition is one launch; on a processor it is called as it is.

    Args:
        work: reads and writes the same tensors every time; is called a few times here.
        device: of those tensors.
        wanted: whether to record.

    Returns:
        What repeats the work.
    """
    if device.type != "cuda" or not wanted:
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay
