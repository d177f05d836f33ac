"""Encoders of pictures and texts, pinned: one name, one network, one preprocessing.

`load_encoder("dino")` gives an object with `embed_images`, and `embed_texts` where the network reads texts.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from dreamrie.errors import ConfigError
from eval.encoders.base import Encoder
from eval.encoders.registry import BUILDERS

NAMES = tuple(sorted(BUILDERS))

__all__ = ["NAMES", "Encoder", "load_encoder"]


def load_encoder(name: str, weights: Path | None = None) -> Encoder:
    """Build an encoder in fp32 and evaluation mode.

    Args:
        name: one of `NAMES`.
        weights: file with the weights, instead of the hub's; the offline encoders bring their own.

    Returns:
        The encoder, on the CPU.

    Raises:
        ConfigError: an unknown name, weights that cannot be had, or a file of another architecture.
    """
    if name not in BUILDERS:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown encoder {name!r}; known: {', '.join(NAMES)}.{hint}")
    if weights is not None and not weights.is_file():
        raise ConfigError(f"encoder {name!r}: there is no weights file {weights}.")
    return BUILDERS[name](name, weights)
