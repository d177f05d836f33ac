"""The only bridge to PEFT: attach, find pairs, gauge in and out, frozen anchor, exact arithmetic."""

from __future__ import annotations

from dreamrie.lora.arithmetic import (
    LowRank,
    balance,
    balanced_factors,
    change_of,
    combine,
    export_factors,
    kept_energy,
)
from dreamrie.lora.attach import attach_lora, resolve_targets
from dreamrie.lora.fingerprint import base_fingerprint
from dreamrie.lora.inits import start_pairs
from dreamrie.lora.pairs import (
    LoraPair,
    candidate_names,
    lora_pairs,
    mask_anchor_gradients_,
)

__all__ = [
    "LoraPair",
    "LowRank",
    "attach_lora",
    "balance",
    "balanced_factors",
    "base_fingerprint",
    "candidate_names",
    "change_of",
    "combine",
    "export_factors",
    "kept_energy",
    "lora_pairs",
    "mask_anchor_gradients_",
    "resolve_targets",
    "start_pairs",
]
