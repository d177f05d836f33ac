"""DoRA: the weight of a layer as trained norms of its rows times directions that a LoRA moves (arXiv:2402.09353).

    W' = diag(m) diag(||V_1||, ..., ||V_out||)^-1 V,      V = W + scaling * left @ right        (out, in)

with one number m_i for each row, that is for each output. PEFT owns the layer and treats the norms of V as constants in
its gradient, as the paper proposes. The change W' - W has no low rank, so nothing that adds, subtracts or truncates
changes can hold it; what can is the product together with m.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dreamrie.errors import ConfigError
from dreamrie.init_table import INITS
from dreamrie.loi.session import is_packed
from dreamrie.lora.pairs import LoraPair


def row_norms(weight: Tensor) -> Tensor:
    """Norm of each row.

    Args:
        weight: (out, in).

    Returns:
        (out,), fp64, on the device of the weight.
    """
    return torch.linalg.vector_norm(weight.double(), dim=1)


def dora_weight(weight: Tensor, product: Tensor, magnitude: Tensor) -> Tensor:
    """W', the weight that a DoRA layer computes with.

    Args:
        weight: W, (out, in).
        product: scaling * left @ right, (out, in).
        magnitude: m, (out,).

    Returns:
        (out, in), fp64, on the device of the weight.
    """
    moved = weight.double() + product.to(weight.device).double()
    scale = magnitude.to(weight.device).double() / row_norms(moved)
    return scale[:, None] * moved


@torch.no_grad()
def reset_magnitudes_(pairs: Iterable[LoraPair]) -> None:
    """Write the norms of the rows as they are, so that a start whose product is zero computes what the base does.

    PEFT rounds them to the precision of the base, and knows the factors only as they were when the layer was made.

    Args:
        pairs: those without a magnitude are left alone.

    Raises:
        ConfigError: a row is zero, so it has no direction.
    """
    for pair in pairs:
        if pair.magnitude is not None:
            weight = pair.as_matrix(pair.base_weight.detach())
            norms = row_norms(weight.double() + pair.delta().double())
            if not bool(norms.all()):
                raise ConfigError(
                    f"use_dora: layer {pair.name!r} has {int((norms == 0).sum())} rows of zeros, which have no "
                    "direction to scale. Leave it out of target_modules, or use_dora out."
                )
            pair.magnitude.copy_(norms)


def check_dora(init: str, layers: Mapping[str, nn.Module]) -> None:
    """Refuse what DoRA cannot start from, or be put on.

    Args:
        init: of `dreamrie.init_table`.
        layers: to be adapted, by path.

    Raises:
        ConfigError: the start is no zero change, or a layer is no plain Linear.
    """
    if INITS[init].anchored:
        allowed = ", ".join(name for name, entry in INITS.items() if not entry.anchored)
        raise ConfigError(
            f"use_dora takes starts whose product is zero, and init {init!r} is a point with a frozen copy, of which "
            f"the optimizers that train magnitudes would train all 2r columns. Use one of {allowed}."
        )
    for name, layer in layers.items():
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, nn.Linear) or not isinstance(weight, Tensor) or is_packed(weight):
            raise ConfigError(
                f"use_dora: layer {name!r} is a {type(layer).__name__}"
                f"{' whose weight is quantized' if isinstance(layer, nn.Linear) else ''}; DoRA here takes Linear "
                "layers in floating point, whose rows have norms. Leave it out of target_modules, or use_dora out."
            )
