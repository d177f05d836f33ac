"""Random streams of the pictures; they are the same as those of the texts."""

from __future__ import annotations

from dreamrie.streams import derive_seed, stream_generator

__all__ = ["derive_seed", "stream_generator"]
