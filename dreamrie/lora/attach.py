"""Put LoRA layers on a model with PEFT's own injection, and give them a start.

Without LOI the anchored start is a random orthonormal point of size |alpha|; `locally_optimal_init`
replaces it. PEFT's starts that rewrite the base weight (`pissa`, `olora`) are computed by PEFT on a
throw-away copy of each layer and taken as start and anchor, so the base stays as it is.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import nn

from dreamrie.errors import ConfigError
from dreamrie.fixed_rank import Point, point_from_factors, random_point
from dreamrie.lora.injecting import (
    check_layer,
    inject,
    matrix_shape,
    put_back,
    seeded,
    trainable_flags,
)
from dreamrie.lora.pairs import (
    ANCHOR_MARK,
    LoraPair,
    adaptable_modules,
    candidate_names,
    lora_pairs,
)

_log = logging.getLogger(__name__)

# PEFT starts whose product is zero: nothing to subtract, so a plain rank-r adapter.
_ZERO_STARTS = ("default", "gaussian", "orthogonal")
_ALLOWED = "orthonormal, default, gaussian, orthogonal, olora, pissa, pissa_niter_<number>"


def attach_lora(
    model: nn.Module,
    rank: int,
    target_modules: Sequence[str] | str,
    *,
    init: str = "orthonormal",
    alpha: float | None = None,
    anchored: bool | None = None,
    adapter_name: str = "default",
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[LoraPair]:
    """Add a LoRA to every matching layer; the output does not change, except with `anchored=False`.

    An anchored layer is one PEFT LoRA of rank 2r with scaling 1. If 2r exceeds the smaller side of
    a layer, its r is lowered to half of that side (logged), so that the layout fits.

    Args:
        model: a diffusers, transformers or plain torch model. Afterwards only adapter parameters
            require gradients.
        rank: r, at least 1 and at most the smaller side of every layer.
        target_modules: name endings as PEFT takes them (`["to_q", "to_out.0"]`), or one regular
            expression for the whole name. Each ending must match at least one layer.
        init: `orthonormal` (random orthonormal u, v), or the name of a start in PEFT.
        alpha: size of the `orthonormal` start, singular values |alpha|; default 0.1 / sqrt(r).
        anchored: default True for starts that are not zero. False with `orthonormal` gives a plain
            rank-r adapter whose start changes the function.
        adapter_name: name of the adapter in PEFT.
        dropout: probability of LoRA dropout, in [0, 1).
        generator: source of the random start; default a new one with seed 0.

    Returns:
        One pair for each adapted layer, in the order of `model.named_modules()`.

    Raises:
        ConfigError: a value is out of range, a name matches no layer or an unsupported one, the
            layer already carries an adapter, or the rank is larger than a layer allows.
    """
    with_anchor = _check_settings(rank, init, alpha, anchored, dropout)
    layers = resolve_targets(model, target_modules, adapter_name)
    ranks = _layer_ranks(layers, rank, with_anchor)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    width = 2 if with_anchor else 1
    uneven = {f"^{re.escape(name)}": width * own for name, own in ranks.items() if own != rank}
    config = LoraConfig(
        r=width * rank,
        lora_alpha=width * rank,
        rank_pattern=dict(uneven),
        alpha_pattern=dict(uneven),
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        lora_dropout=dropout,
        init_lora_weights={"default": True, "gaussian": "gaussian"}.get(init, False),
    )
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with contextlib.ExitStack() as undo:
        undo.callback(put_back, model, layers, adapter_name, trainable_flags(model))
        with seeded(model, seed):
            inject(model, config, adapter_name)
        pairs = lora_pairs(model, adapter_name)
        if sorted(pair.name for pair in pairs) != sorted(layers):
            raise ConfigError(
                f"PEFT adapted {len(pairs)} layers where {len(layers)} match {target_modules!r}; "
                "name the layers by their full paths."
            )
        for pair in pairs:
            # PEFT builds the dropout in train mode even inside a model in eval mode.
            pair.module.train(layers[pair.name].training)
        if init not in ("default", "gaussian"):
            for index, pair in enumerate(pairs):
                _set_start(pair, ranks[pair.name], init, alpha, generator, seed + index)
        undo.pop_all()
    if init == "orthonormal" and not with_anchor:
        _log.warning("start without anchor: the function of the model changes at step 0")
    return pairs


def _check_settings(
    rank: int, init: str, alpha: float | None, anchored: bool | None, dropout: float
) -> bool:
    """Check the plain values; returns whether the layout has an anchor."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank must be a whole number of at least 1, got {rank!r}.")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout must lie in [0, 1), got {dropout!r}.")
    if alpha is not None and not (math.isfinite(alpha) and alpha != 0.0):
        raise ConfigError(f"alpha must be finite and not zero, got {alpha!r}.")
    if alpha is not None and init != "orthonormal":
        raise ConfigError(f"alpha is the size of the orthonormal start; {init!r} has its own.")
    if init == "orthogonal" and rank % 2:
        raise ConfigError(f"init 'orthogonal' splits the rank in two halves; {rank} is odd.")
    if init in _ZERO_STARTS:
        if anchored:
            raise ConfigError(f"start {init!r} is zero, so it needs and allows no anchor.")
        return False
    if init == "orthonormal":
        return anchored is not False
    if not re.fullmatch(r"olora|pissa|pissa_niter_\d+", init):
        raise ConfigError(
            f"init {init!r} is not supported here; allowed: {_ALLOWED}. PEFT's starts that need "
            "data or a quantized base (eva, corda, lora_ga, loftq) are set up with PEFT itself; "
            "lora_pairs then finds the result."
        )
    if anchored is False:
        raise ConfigError(
            f"init {init!r} without an anchor would need a changed base weight, which is never "
            "written here. Leave `anchored` out."
        )
    return True


def resolve_targets(
    model: nn.Module, targets: Sequence[str] | str, adapter_name: str = "default"
) -> dict[str, nn.Module]:
    """Find the layers that the targets name, by PEFT's own rule; every mismatch is an error.

    Args:
        model: a model without an adapter of this name.
        targets: see `attach_lora`.
        adapter_name: name that the new adapter would get.

    Returns:
        Path of each layer and the layer, in the order of the targets.

    Raises:
        ConfigError: a target names nothing, something unsupported or adapted, or the same twice.
    """
    if isinstance(model, PeftModel):
        raise ConfigError(
            "the model is already a PeftModel: read its adapter with dreamrie.lora_pairs(model), "
            "or pass the plain model."
        )
    if adapter_name in getattr(model, "peft_config", {}):
        raise ConfigError(f"the model already has an adapter named {adapter_name!r}.")
    names = [targets] if isinstance(targets, str) else list(targets)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"target_modules must name at least one layer, got {targets!r}; "
            f"layers that can be adapted: {candidate_names(model)}."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"target_modules names {twice} more than once.")

    def matches(target: str, name: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(target, name) is not None
        return name == target or name.endswith(f".{target}")

    found: dict[str, nn.Module] = {}
    for target in names:
        hits = {name: module for name, module in adaptable_modules(model) if matches(target, name)}
        if not hits:
            raise ConfigError(_no_match(model, target))
        for name, module in hits.items():
            check_layer(model, name, module)
        overlap = sorted(set(hits) & set(found))
        if overlap:
            raise ConfigError(f"layer {overlap[0]!r} is named by more than one of {names}.")
        found.update(hits)
    return found


def _no_match(model: nn.Module, target: str) -> str:
    """Message for a target that names nothing, with the nearest existing names."""
    known = {part for name, _ in adaptable_modules(model) for part in (name, name.split(".")[-1])}
    near = difflib.get_close_matches(target, sorted(known - {""}), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"target_modules: no layer is named {target!r}.{hint} "
        f"Layers that can be adapted: {candidate_names(model)}."
    )


def _layer_ranks(layers: dict[str, nn.Module], rank: int, with_anchor: bool) -> dict[str, int]:
    """Rank of every layer: the asked one, or half of the smaller side where 2r does not fit."""
    ranks: dict[str, int] = {}
    for name, module in layers.items():
        shape = matrix_shape(module)
        smaller = min(shape)
        least = 2 if with_anchor else 1
        if rank > smaller or smaller < least:
            raise ConfigError(
                f"rank {rank} does not fit layer {name!r}: its weight is {shape[0]} x {shape[1]}; "
                f"allowed is 1 to {smaller}, on layers whose smaller side is at least {least}. "
                "Lower the rank or leave the layer out of target_modules."
            )
        ranks[name] = min(rank, smaller // 2) if with_anchor else rank
        if ranks[name] != rank:
            _log.warning(
                "layer %s (%d x %d): rank lowered from %d to %d, point and anchor share %d columns",
                name, *shape, rank, ranks[name], smaller,
            )  # fmt: skip
    return ranks


def _set_start(
    pair: LoraPair,
    rank: int,
    init: str,
    alpha: float | None,
    generator: torch.Generator,
    seed: int,
) -> None:
    """Write the start of one layer: random orthonormal, or what PEFT computes on a twin of it."""
    dtype = torch.float64 if pair.left.dtype == torch.float64 else torch.float32
    if init == "orthogonal":
        made = _peft_start(pair, rank, init, seed)
        left, right = made.left_matrix().detach().to(dtype), made.right_matrix().detach().to(dtype)
        # PEFT draws in fp32, so the product vanishes to 1e-8 only; this makes it vanish in fp64 too.
        basis, values, rows = torch.linalg.svd(right, full_matrices=False)
        basis, values, rows = basis[:, : rank // 2], values[: rank // 2], rows[: rank // 2]
        pair.left_matrix().data.copy_(left - (left @ basis) @ basis.T)
        pair.right_matrix().data.copy_((basis * values) @ rows)
        return
    if init == "orthonormal":
        size = abs(alpha) if alpha is not None else 0.1 / math.sqrt(rank)
        drawn = random_point(pair.out, pair.in_, rank, generator=generator, dtype=dtype)
        start = Point(drawn.u, torch.full_like(drawn.s, size), drawn.v)
    else:
        made = _peft_start(pair, rank, init, seed)
        left, right = made.left_matrix().detach().to(dtype), made.right_matrix().detach().to(dtype)
        start = point_from_factors(left, right.T, made.scaling)
    with_anchor = pair.left.shape[1] == 2 * rank
    if with_anchor:
        layer: Any = pair.module
        setattr(layer.lora_B[pair.adapter_name], ANCHOR_MARK, rank)
        pair.rank = pair.anchor_rank = rank
    device = pair.left.device
    on_device = Point(start.u.to(device), start.s.to(device), start.v.to(device))
    pair.set_start(on_device, anchored=with_anchor)


def _peft_start(pair: LoraPair, rank: int, init: str, seed: int) -> LoraPair:
    """The pair that PEFT's named start makes on a throw-away Linear twin of the layer.

    A Linear twin of the matrix view lets PEFT treat convolutions and fp64 layers like any other.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["twin"], init_lora_weights=init)
    with seeded(pair.module, seed):
        twin = nn.Linear(pair.in_, pair.out, bias=False, device=pair.base_weight.device)
        twin.weight.data = pair.as_matrix(pair.base_weight.detach()).float().clone()
        holder = nn.ModuleDict({"twin": twin})
        inject_adapter_in_model(config, holder)
    (made,) = lora_pairs(holder)
    return made
