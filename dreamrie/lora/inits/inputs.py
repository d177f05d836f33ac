"""Run the base model on batches and show the inputs of each adapted layer, as rows of a matrix."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from dreamrie.errors import ConfigError
from dreamrie.loi.estimators import evaluate
from dreamrie.loi.session import exchanged, without_change
from dreamrie.lora.inits.request import Request

if TYPE_CHECKING:
    from jaxtyping import Float

    from dreamrie.lora.pairs import LoraPair


class Inputs:
    """Watches the layers of a request; use it as a context manager, which removes the hooks.

    Args:
        request: model, loss, and which places count.
        see: see(number of the pair, rows (n, in)) is called whenever the layer runs.
        least: rows that a layer must see at a time.

    Attributes:
        batches: as given, kept in memory.
    """

    def __init__(self, request: Request, see: Callable[[int, Tensor], None], least: int) -> None:
        self._request, self._see, self._least = request, see, least
        self._data = request.given_data()
        self.batches = list(self._data.batches)
        self._places: Tensor | None = None
        self._fed: set[int] = set()
        self._stack = contextlib.ExitStack()
        if not self.batches:
            raise ConfigError(f"the start {request.name!r} got no batch: `batches` is empty.")

    def __enter__(self) -> Inputs:
        """Put hooks on the layers."""
        for pair in self._request.pairs:
            _check_padding(pair, self._request.name)
        for number, pair in enumerate(self._request.pairs):
            handle = pair.module.register_forward_pre_hook(self._hook(number, pair))
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove them."""
        self._stack.close()

    @torch.no_grad()
    def feed(self, number: int) -> None:
        """Run the model without its adapter on a batch.

        Args:
            number: of the batch.

        Raises:
            ConfigError: the loss does not use some layer.
        """
        request, data, batch = self._request, self._data, self.batches[number]
        self._places = data.used(batch) if data.used is not None else None
        self._fed.clear()
        with exchanged(request.model, request.pairs, *without_change(request.pairs)):
            evaluate(data.loss, request.model, batch, number + 1)
        unused = sorted(set(range(len(request.pairs))) - self._fed)
        if unused:
            raise ConfigError(
                f"layer {request.pairs[unused[0]].name!r}: the loss does not use it, so the start {request.name!r} "
                f"sees no inputs ({len(unused)} such layers). Leave it out of target_modules, or use another start."
            )

    def _hook(self, number: int, pair: LoraPair) -> Any:
        """What a layer calls before it runs."""

        def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            rows = as_rows(pair, arguments[0], self._places)
            if len(rows) < self._least:
                raise ConfigError(
                    f"layer {pair.name!r} sees {len(rows)} rows of inputs in a batch, and the start "
                    f"{self._request.name!r} of rank {pair.rank} needs at least {self._least}. Raise the size of a "
                    "batch, lower the rank, or use another start."
                )
            self._fed.add(number)
            self._see(number, rows)

        return look


def as_rows(
    pair: LoraPair, inputs: Tensor, places: Tensor | None = None
) -> Float[Tensor, "rows in_"]:
    """Inputs of a layer as the rows that its matrix is applied to.

    Args:
        pair: of the layer.
        inputs: (..., in) of a Linear, (batch, channels, height, width) of a Conv2d.
        places: which of the leading (rows, length) count; None, or another shape: all.

    Returns:
        One row for each place; for a convolution each patch, in the order of its weight.
    """
    layer: Any = pair.module
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        patches = unfold(inputs, base.kernel_size, base.dilation, base.padding, base.stride)  # type: ignore[arg-type]
        return patches.transpose(1, 2).reshape(-1, pair.in_)
    if places is not None and places.shape == inputs.shape[:-1]:
        return inputs[places]
    return inputs.reshape(-1, inputs.shape[-1])


def _check_padding(pair: LoraPair, name: str) -> None:
    """Patches are cut with zeros around the picture."""
    layer: Any = pair.module
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d) and (
        base.padding_mode != "zeros" or isinstance(base.padding, str)
    ):
        raise ConfigError(
            f"layer {pair.name!r}: the start {name!r} sees the inputs of a convolution as patches with zeros around "
            f"the picture; this one has padding {base.padding!r}, mode {base.padding_mode!r}. Use another start."
        )
