"""Random streams as pure functions: (seed, what for, counters) gives a generator, whatever ran before.

So a batch can be asked for twice, in any order and on any device, and a resumed run needs no random state.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, stream: str, *counters: int) -> int:
    """Mix a run's seed with the name of a use and its counters.

    Args:
        seed: of the run.
        stream: what the numbers are for; different names give unrelated numbers.
        counters: position inside the stream.

    Returns:
        An integer in [0, 2^63).
    """
    text = ":".join([stream, str(seed), *map(str, counters)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1


def stream_generator(seed: int, stream: str, *counters: int) -> torch.Generator:
    """Make a CPU generator for one use.

    Args:
        seed: of the run.
        stream: what the numbers are for.
        counters: position inside the stream.

    Returns:
        A fresh generator.
    """
    return torch.Generator("cpu").manual_seed(derive_seed(seed, stream, *counters))
