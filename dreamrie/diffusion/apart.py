"""Read the adapters that a training is to stay orthogonal to, as strictly as one that is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from dreamrie.adapter_container import find_adapter
from dreamrie.adapter_reading import read_adapter
from dreamrie.diffusion.components import Components
from dreamrie.lora import LowRank


def read_others(components: Components, paths: Sequence[Path]) -> list[dict[str, LowRank]]:
    """The changes of each file, checked against the base model.

    Args:
        components: the base model, without adapter.
        paths: of `--orthogonal_to`; see `dreamrie.load_adapter`.

    Returns:
        Factors by layer, one mapping for each file; scalings are left out, for they turn no direction.

    Raises:
        AdapterError: a file is missing, damaged, not finite, or made for another model or other base weights.
    """
    return [read_adapter(components.unet, path).changes for path in paths]


def others_fingerprint(paths: Sequence[Path]) -> str:
    """Digest of the files that a training stays orthogonal to, wherever they lie; their order decides last bits.

    Args:
        paths: of `--orthogonal_to`.

    Returns:
        Their number and 16 hexadecimal digits.

    Raises:
        AdapterError: a file is missing.
    """
    rows = []
    for path in paths:
        with find_adapter(path).open("rb") as file:
            rows.append(hashlib.file_digest(file, "sha256").hexdigest())
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]
    return f"{len(rows)} files, {digest}"
