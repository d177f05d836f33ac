"""One model for many adapters: each is put on inside a block, and taken off again at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dreamrie.errors import NumericalError
from dreamrie.lora import base_fingerprint
from dreamrie.lora.injecting import put_back, trainable_flags

ADAPTER = "default"


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Inside, an adapter may be put on the model; afterwards the model is as it was before.

    Args:
        model: without an adapter.

    Yields:
        Nothing.

    Raises:
        NumericalError: something inside wrote to the base weights, so nothing measured later would mean anything.
    """
    # An adapter replaces a layer that has no parts.
    leaves = {name: each for name, each in model.named_modules() if not any(each.children())}
    flags = trainable_flags(model)
    before, training = base_fingerprint(model), model.training
    try:
        yield
    finally:
        put_back(model, leaves, ADAPTER, flags)
        model.train(training)
    if base_fingerprint(model) != before:
        raise NumericalError(
            f"the base weights of {type(model).__name__} are not those from before\n"
            "  where: a training or a measurement that began with them\n"
            "  what to do: report this; what was measured so far is right, load the model anew to go on"
        )
