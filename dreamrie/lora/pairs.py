"""One LoRA pair of one layer, read from any model that carries PEFT layers.

PEFT's `lora_B` is the left factor (out, R), its `lora_A` the right factor (R, in); the paper's
letters are crossed (its A is `lora_B`, its B is `lora_A` transposed). The change of the weight is

    delta = scaling * left @ right                      (out, in)

An anchored pair has R = 2 r. Its first r columns and rows hold the trained point X, its last r the
frozen start X0 with the minus sign in the left factor, so delta = X - X0 and the base weight is
never written (docs/method.md 3). A plain pair has R = r and no anchor. A pair with a magnitude is DoRA's:
the weight is then another function of the product, see `dreamrie.lora.dora`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.fixed_rank import Point, point_from_factors

if TYPE_CHECKING:
    from collections.abc import Iterable

# The number of frozen columns is a plain attribute of the module that owns the left factor: it is
# copied with the layer and vanishes with the adapter, so it can never outlive or miss its tensor.
ANCHOR_MARK = "dreamrie_anchor_rank"

# A product whose last singular value is this far below its first has no reliable rank r.
_RANK_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}


@dataclass(eq=False)
class LoraPair:
    """The two factors of one adapted layer, with what is needed to read them as a matrix.

    Attributes:
        name: path of the layer inside the model, for example `mid_block.attentions.0.to_q`.
        left: `lora_B` weight, (out, R) or (out, R, 1, 1) for a convolution.
        right: `lora_A` weight, (R, in) or (R, in, kh, kw) for a convolution.
        scaling: factor between `left @ right` and the change of the weight.
        rank: r, the number of trained columns of `left` and rows of `right`, the first ones.
        anchor_rank: number of frozen trailing columns and rows; 0 for a plain pair.
        base_weight: weight of the layer below the adapter; read, never written.
        module: the PEFT layer.
        adapter_name: name of the adapter inside the PEFT layer.
        transposed: True when the base weight is stored (in, out), as GPT-2's Conv1D does.
        magnitude: (out,), the trained norms of the rows of the weight, for DoRA; else None.
    """

    name: str
    left: nn.Parameter
    right: nn.Parameter
    scaling: float
    rank: int
    anchor_rank: int
    base_weight: nn.Parameter
    module: nn.Module
    adapter_name: str
    transposed: bool = False
    magnitude: nn.Parameter | None = None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All that a training may move: left, right and, for DoRA, the magnitude."""
        factors = (self.left, self.right)
        return factors if self.magnitude is None else (*factors, self.magnitude)

    @property
    def out(self) -> int:
        """Rows of the weight matrix."""
        return int(self.left.shape[0])

    @property
    def in_(self) -> int:
        """Columns of the weight matrix; kernel positions count as columns for a convolution."""
        return int(self.right[0].numel())

    def left_matrix(self) -> Tensor:
        """Left factor as an (out, R) view; writing into it writes the parameter."""
        return self.left.view(self.left.shape[0], self.left.shape[1])

    def right_matrix(self) -> Tensor:
        """Right factor as an (R, in) view; writing into it writes the parameter.

        Raises:
            ConfigError: the factor lies in memory in an order that has no such view.
        """
        if not self.right.is_contiguous():
            raise ConfigError(
                f"layer {self.name!r}: lora_A of shape {tuple(self.right.shape)} is not contiguous "
                "(channels_last?), so it has no matrix view. Call .contiguous() on the model first."
            )
        return self.right.view(self.right.shape[0], -1)

    def as_matrix(self, like_base: Tensor) -> Tensor:
        """A tensor shaped like the base weight (its gradient, say) as (out, in)."""
        if self.transposed:
            return like_base.T
        return like_base.reshape(like_base.shape[0], -1)

    def delta(self) -> Tensor:
        """Dense (out, in) product, scaling and anchor included; fp32, or fp64.

        It is the change of the weight, except with a magnitude: see `dreamrie.lora.dora`.
        """
        left, right = _wide(self.left_matrix().detach()), _wide(self.right_matrix().detach())
        return self.scaling * (left @ right)

    def point(self) -> Point:
        """The trained half as a point X = u diag(s) v^T, whatever the factors are.

        Returns:
            u (out, r), s (r,) descending and > 0, v (in, r); fp32, or fp64 for fp64 factors.

        Raises:
            ConfigError: the product has rank below r, as PEFT's default start with lora_B = 0.
            NumericalError: a factor is not finite.
        """
        left = _wide(self.left_matrix().detach()[:, : self.rank])
        right = _wide(self.right_matrix().detach()[: self.rank]).T
        size = float(torch.linalg.vector_norm(left)) * float(torch.linalg.vector_norm(right))
        if not math.isfinite(size):
            raise NumericalError(
                f"layer {self.name!r}: the LoRA factors hold values that are not finite."
            )
        point = point_from_factors(left, right, self.scaling)
        # The products of PEFT's `orthogonal` start vanish only up to rounding: measure against
        # the factors, then against the largest singular value.
        tolerance = _RANK_TOLERANCE[point.s.dtype]
        largest, smallest = float(point.s[0]), float(point.s[-1])
        if largest <= tolerance * self.scaling * size or smallest <= 1e-3 * tolerance * largest:
            raise ConfigError(
                f"layer {self.name!r}: lora_B @ lora_A has rank below r = {self.rank} (singular "
                f"values {largest:.1e} to {smallest:.1e}), as PEFT's default start with lora_B = 0 "
                "has. That is not a point of the fixed-rank manifold. Start from "
                "dreamrie.attach_lora(model, rank, target_modules) and, if wanted, "
                "dreamrie.locally_optimal_init; or train this adapter with AdamW."
            )
        return point

    def anchor(self) -> Point | None:
        """The frozen half X0 = u0 diag(s0) v0^T with its sign removed; None for a plain pair."""
        if self.anchor_rank == 0:
            return None
        left = -_wide(self.left_matrix().detach()[:, self.rank :])
        right = _wide(self.right_matrix().detach()[self.rank :]).T
        return point_from_factors(left, right, self.scaling)

    def set_start(self, point: Point, anchored: bool) -> None:
        """Write a start: the trained half, and as anchor the same numbers with a minus sign.

            left = [ u sqrt(s/c) | -u sqrt(s/c) ],   right = [ sqrt(s/c) v^T ; sqrt(s/c) v^T ]

        Args:
            point: X; u (out, r), s (r,) > 0, v (in, r).
            anchored: must say whether this pair has an anchor, so that nobody moves the function
                of the model by accident.

        Raises:
            ConfigError: shapes do not fit, or `anchored` is not what the layer is.
            NumericalError: the point is not finite or a singular value is not positive.
        """
        if anchored != (self.anchor_rank > 0):
            raise ConfigError(
                f"layer {self.name!r} has {self.anchor_rank} anchor columns but the start was "
                f"asked with anchored={anchored}. Use dreamrie.attach_lora with an anchored start."
            )
        wanted = ((self.out, self.rank), (self.rank,), (self.in_, self.rank))
        found = tuple(tuple(part.shape) for part in point)
        if found != wanted:
            raise ConfigError(f"layer {self.name!r}: start has shapes {found}, expected {wanted}.")
        if not all(bool(part.isfinite().all()) for part in point) or float(point.s.min()) <= 0:
            raise NumericalError(
                f"layer {self.name!r}: a start must be finite with positive singular values."
            )
        root = (point.s / self.scaling).sqrt()
        left = (point.u * root).to(self.left)
        right = (point.v * root).T.to(self.right)
        with torch.no_grad():
            self.left_matrix()[:, : self.rank].copy_(left)
            self.right_matrix()[: self.rank].copy_(right)
            if anchored:
                self.left_matrix()[:, self.rank :].copy_(-left)
                self.right_matrix()[self.rank :].copy_(right)


def lora_pairs(
    model: nn.Module, adapter_name: str | None = None, *, use_dora: bool = False
) -> list[LoraPair]:
    """Find every LoRA pair of a PEFT, diffusers, transformers or plain torch model.

    An anchored layout is recognised by the mark that `attach_lora` leaves on the layer.

    Args:
        model: any module with LoRA layers inside.
        adapter_name: which adapter; may be left out when there is only one.
        use_dora: take layers with a magnitude too; the caller must not forget it.

    Returns:
        The pairs in the order of `model.named_modules()`.

    Raises:
        ConfigError: no LoRA layer, no such adapter, several adapters and no name, or a layer kind
            that has no matrix form (embeddings, merged weights, DoRA unless asked for, ...).
    """
    layers = [
        (name.removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]
    if not layers:
        raise ConfigError(
            "the model has no LoRA layer. Add some with dreamrie.attach_lora(model, rank, "
            f"target_modules); layers that can be adapted: {candidate_names(model)}."
        )
    present = sorted({name for _, layer in layers for name in _adapters_of(layer)})
    if adapter_name is None and len(present) > 1:
        raise ConfigError(f"the model has several adapters {present}: pass adapter_name=...")
    chosen = adapter_name if adapter_name is not None else present[0]
    if chosen not in present:
        raise ConfigError(f"the model has no adapter named {chosen!r}; it has {present}.")
    pairs = [
        _read_pair(name, layer, chosen) for name, layer in layers if chosen in _adapters_of(layer)
    ]
    if not use_dora:
        _refuse_magnitudes(pairs)
    return pairs


def _refuse_magnitudes(pairs: Iterable[LoraPair]) -> None:
    """What takes the product of the factors for the change of the weight cannot take DoRA."""
    for pair in pairs:
        if pair.magnitude is not None:
            raise ConfigError(
                f"layer {pair.name!r}, adapter {pair.adapter_name!r}: DoRA's magnitude rescales the rows of the "
                f"weight, so its change is not the product of the factors. Use lora_pairs(..., use_dora=True) for what "
                "does not need that product, or LoraConfig(use_dora=False)."
            )


def keep_in_fp32(pairs: Iterable[LoraPair]) -> None:
    """Train in fp32, whatever PEFT made: it takes the precision of the base, in which small steps are lost.

    Args:
        pairs: of a model that is about to be trained; what is in fp64 stays as it is.
    """
    for pair in pairs:
        for parameter in pair.parameters:
            if parameter.dtype != torch.float64:
                parameter.data = parameter.data.float()


def mask_anchor_gradients_(pairs: Iterable[LoraPair]) -> None:
    """Set the gradient of every frozen half to zero, in place.

    Autograd fills it although nobody trains it. At step 0 it is as large as the trained half's, so
    a global gradient norm that counts it is too large by sqrt(2). Call before clipping.
    """
    for pair in pairs:
        if pair.anchor_rank:
            if pair.left.grad is not None:
                pair.left.grad[:, pair.rank :] = 0
            if pair.right.grad is not None:
                pair.right.grad[pair.rank :] = 0


def candidate_names(model: nn.Module, limit: int = 24) -> str:
    """Short names of the layers that can carry a LoRA, most frequent first, as one line."""
    counts: dict[str, int] = {}
    for name, module in adaptable_modules(model):
        parts = name.split(".")
        short = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            counts[short] = counts.get(short, 0) + 1
    ordered = sorted(counts, key=lambda key: (-counts[key], key))
    listed = ", ".join(f"{key} ({counts[key]}x)" for key in ordered[:limit])
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return (listed or "none") + more


def adaptable_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named modules outside of PEFT layers; a PEFT layer itself is listed, its inside is not."""
    found: list[tuple[str, nn.Module]] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
        found.append((name, module))
    return found


def _adapters_of(layer: LoraLayer) -> list[str]:
    """Names of the adapters that a PEFT LoRA layer holds, of whatever kind."""
    return [*layer.lora_A.keys(), *layer.lora_embedding_A.keys()]


def _read_pair(name: str, layer: LoraLayer, adapter: str) -> LoraPair:
    """Build the pair of one layer, or say why it has no matrix form."""

    def refuse(what: str, remedy: str) -> ConfigError:
        return ConfigError(f"layer {name!r}, adapter {adapter!r}: {what}. {remedy}")

    if adapter in layer.lora_embedding_A:
        raise refuse(
            "LoRA on an Embedding has no product of two layer inputs",
            "Leave the embedding out of target_modules; Linear and Conv2d layers are supported.",
        )
    dora: Any = layer.lora_magnitude_vector
    magnitude = dora[adapter].weight if adapter in dora else None
    if magnitude is not None and magnitude.ndim != 1:
        # PEFT does not list the magnitude of a convolution among the parts of its adapter, so it cannot be removed.
        raise refuse(
            "DoRA on a convolution cannot be trained here", "Leave it out, or use use_dora=False."
        )
    if adapter in layer.lora_variant and magnitude is None:
        kind = type(layer.lora_variant[adapter]).__name__
        raise refuse(f"the LoRA variant {kind} is not a plain product", "Use a plain LoraConfig.")
    if adapter in layer.merged_adapters:
        raise refuse("the adapter is merged into the base weight", "Unmerge it first.")
    down: Any = layer.lora_A[adapter]
    up: Any = layer.lora_B[adapter]
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    known = isinstance(down, nn.Linear | nn.Conv2d)
    if not known or not isinstance(weight, nn.Parameter):
        raise refuse(
            f"a {type(base).__name__} layer has no (out, in) matrix form here",
            "Linear and Conv2d layers are supported.",
        )
    if getattr(base, "groups", 1) != 1:
        raise refuse("a grouped convolution is several matrices", "Leave it out.")
    if up.bias is not None:
        raise refuse("lora_bias=True adds a bias to the change", "Use LoraConfig(lora_bias=False).")
    scaling = float(layer.scaling[adapter])
    if not (math.isfinite(scaling) and scaling > 0):
        raise refuse(f"scaling must be positive, got {scaling}", "Set lora_alpha > 0.")
    anchor_rank = int(getattr(up, ANCHOR_MARK, 0))
    return LoraPair(
        name=name,
        left=up.weight,
        right=down.weight,
        scaling=scaling,
        rank=int(down.weight.shape[0]) - anchor_rank,
        anchor_rank=anchor_rank,
        base_weight=weight,
        module=layer,
        adapter_name=adapter,
        transposed=bool(getattr(layer, "fan_in_fan_out", False)),
        magnitude=magnitude,
    )


def _wide(tensor: Tensor) -> Tensor:
    """fp64 stays, everything else becomes fp32: QR and SVD have no half-precision kernels."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
