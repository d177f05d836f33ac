"""Where an adapter starts: one file for each kind of start, and `start_pairs`, which writes one by name."""

from __future__ import annotations

from dreamrie.lora.inits.request import Data, Loi, Request, write_factors, write_point
from dreamrie.lora.inits.start import find_init, start_pairs

__all__ = [
    "Data",
    "Loi",
    "Request",
    "find_init",
    "start_pairs",
    "write_factors",
    "write_point",
]
