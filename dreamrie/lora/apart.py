"""Keep LoRA pairs orthogonal to other adapters, so that both can be added with less interference.

A change D of a layer responds to the input x by D x, so two changes with orthogonal row spaces never respond to the
same direction of the input. The goal is that of Orthogonal Adaptation (arXiv:2312.02432), which freezes the row space;
here it moves, but only among directions that are orthogonal to the row space V of the given changes: the matrices of
rank r with X V = 0 are a manifold of fixed rank themselves, and the gradient on it is G (I - V V^T). Locally optimal
initialization starts there (`dreamrie.loi`), and a hook takes the part along V out of the gradient of `lora_A`; the
momentum and the steps of Riemannion are combinations of such gradients and stay there too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dreamrie.fixed_rank import working_dtype
from dreamrie.loi.complement import check_room
from dreamrie.lora.arithmetic import LowRank
from dreamrie.lora.comparing import DUST, decompose
from dreamrie.lora.pairs import LoraPair

_log = logging.getLogger(__name__)

# Beside its factor, as the mark of an anchor: it goes where the adapter goes.
_MARK = "dreamrie_avoided"
# Directions of two adapters that enclose a smaller angle are one direction.
_SAME = 1e-6


def row_space(changes: Sequence[LowRank]) -> Tensor:
    """Orthonormal basis of the input directions that at least one change responds to.

    Args:
        changes: of one layer, left (out, k, ...), right (k, in, ...), at least one; ranks may differ.

    Returns:
        V (in, q), fp64, on the CPU; q = 0 if all changes are zero. Errors are those of
        `dreamrie.lora.comparing.decompose`.
    """
    points = [decompose(change) for change in changes]
    parts = [point.v[:, point.s > DUST * point.s[0]] for point in points]
    basis, values, _ = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
    return basis[:, values > _SAME]


def keep_apart(pairs: Iterable[LoraPair], others: Sequence[Mapping[str, LowRank]]) -> None:
    """Take the directions of other adapters out of every later gradient of `lora_A`, and remember them for the start.

    This keeps a change orthogonal that is so at its start; see `avoided`. It needs an optimizer that moves within the
    span of its gradients: Riemannion does, Adam's division by entries does not.

    Args:
        pairs: on the model, with gradients switched on, before LOI.
        others: changes of each other adapter by layer. Layers that only they have are not looked at.

    Raises:
        ConfigError: the other adapters leave a layer fewer directions than its rank.
    """
    counts: list[int] = []
    found: list[tuple[LoraPair, Tensor]] = []
    for pair in pairs:
        changes = [other[pair.name] for other in others if pair.name in other]
        if not changes:
            continue
        basis = row_space(changes)
        check_room(pair.name, pair.in_, basis, pair.rank)
        found.append((pair, basis.to(pair.right.device, working_dtype(pair.right.dtype))))
    for pair, basis in found:
        setattr(_owner(pair), _MARK, basis)
        pair.right.register_hook(_without(basis))
        counts.append(int(basis.shape[1]))
    if others:
        _log.info(
            "kept orthogonal to %d given adapters: %d layers avoid %d to %d of their input directions",
            len(others), len(counts), min(counts, default=0), max(counts, default=0),
        )  # fmt: skip


def avoided(pairs: Iterable[LoraPair]) -> list[Tensor | None] | None:
    """What `keep_apart` found for each pair: V (in, q); None for a free layer, or for all if there is no other.

    Args:
        pairs: any.

    Returns:
        For `dreamrie.locally_optimal_init`.
    """
    found: list[Tensor | None] = [getattr(_owner(pair), _MARK, None) for pair in pairs]
    return found if any(basis is not None for basis in found) else None


def _owner(pair: LoraPair) -> Any:
    """The module that holds `lora_A`."""
    layer: Any = pair.module
    return layer.lora_A[pair.adapter_name]


def _without(basis: Tensor) -> Callable[[Tensor], Tensor]:
    """Hook: a gradient (R, in, ...) without its part along V."""

    def project(gradient: Tensor) -> Tensor:
        rows = gradient.flatten(1).to(basis.dtype)
        rows = rows - (rows @ basis) @ basis.T
        return rows.to(gradient.dtype).reshape(gradient.shape)

    return project
