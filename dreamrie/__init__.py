"""dreamrie: LoRA training on the manifold of fixed-rank matrices.

    pairs = dreamrie.attach_lora(model, rank=4, target_modules=["to_q", "to_k", "to_v"])
    dreamrie.locally_optimal_init(model, pairs, loss, batches, alpha=1e-4)  # a tenth of lr
    optimizer = dreamrie.Riemannion(pairs, lr=1e-3)

Names are resolved at first use, so `import dreamrie` loads torch and nothing heavier.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch as _torch  # noqa: F401  every public name needs it; loading it here makes the cost visible

if TYPE_CHECKING:
    from dreamrie.adapter_reading import LoadedAdapter, load_adapter
    from dreamrie.errors import (
        AdapterError,
        CheckpointError,
        ConfigError,
        DreamrieError,
        ImageError,
        NumericalError,
    )
    from dreamrie.fixed_rank import (
        Point,
        Tangent,
        inner_product,
        point_from_factors,
        project,
        random_point,
        retract,
        transport,
    )
    from dreamrie.loi import LoiReport, locally_optimal_init
    from dreamrie.lora import LoraPair, attach_lora, lora_pairs
    from dreamrie.riemannion import Riemannion

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DreamrieError",
    "ImageError",
    "LoadedAdapter",
    "LoiReport",
    "LoraPair",
    "NumericalError",
    "Point",
    "Riemannion",
    "Tangent",
    "__version__",
    "attach_lora",
    "inner_product",
    "load_adapter",
    "locally_optimal_init",
    "lora_pairs",
    "point_from_factors",
    "project",
    "random_point",
    "retract",
    "transport",
]

_HOMES = {
    "AdapterError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DreamrieError": "errors",
    "ImageError": "errors",
    "LoadedAdapter": "adapter_reading",
    "LoiReport": "loi",
    "LoraPair": "lora",
    "NumericalError": "errors",
    "Point": "fixed_rank",
    "Riemannion": "riemannion",
    "Tangent": "fixed_rank",
    "attach_lora": "lora",
    "inner_product": "fixed_rank",
    "load_adapter": "adapter_reading",
    "locally_optimal_init": "loi",
    "lora_pairs": "lora",
    "point_from_factors": "fixed_rank",
    "project": "fixed_rank",
    "random_point": "fixed_rank",
    "retract": "fixed_rank",
    "transport": "fixed_rank",
}


def __getattr__(name: str) -> Any:
    """Load the module that owns a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dreamrie' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dreamrie.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return list(__all__)
