"""One short text by which trainings with the same settings know each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from pydantic import BaseModel

# Groups that the steps depend on; pictures and scores on the way change no step.
_GROUPS = ("model", "data", "prior", "adapter", "optimizer", "schedule")
# Where things lie on one machine, and how it computes; and the side in pixels, which may wait for the model and is a
# fact of its own.
_LEFT_OUT = frozenset(
    {
        *("instance_data_dir", "class_data_dir", "data", "orthogonal_to", "resolution"),
        "torch_compile",
    }
)
# Switches that were added later: off, they are what trainings had before there were any, and so are their hashes.
_LATER = frozenset({"use_dora"})
# What a setting was where it has no value now, for the same reason.
_EARLIER = {"loi_batches": 32}


def settings_hash(groups: Mapping[str, BaseModel]) -> str:
    """Hash of the settings that decide what a training learns.

    Args:
        groups: resolved settings by the name of their group; those that only look or write are left out.

    Returns:
        16 hexadecimal digits, the same on every machine.
    """
    values = {
        name: value
        for group in _GROUPS
        if group in groups  # a language model has no class pictures
        for name, given in groups[group]
        for value in [_EARLIER.get(name) if given is None else given]
        if name not in _LEFT_OUT and value is not None and not (name in _LATER and not value)
    }
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
