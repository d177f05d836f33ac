"""Put LoRA layers on a model with PEFT's own injection, and give them a start.

Without LOI the anchored start is a random orthonormal point of size |alpha|; `locally_optimal_init`
replaces it. The other starts are those of `dreamrie.init_table` that need no batches; `start_pairs`
writes the rest afterwards.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from dreamrie.errors import ConfigError
from dreamrie.lora.dora import check_dora, reset_magnitudes_
from dreamrie.lora.inits.request import Loi, Request
from dreamrie.lora.inits.start import builder, find_init
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
    keep_in_fp32,
    lora_pairs,
)

_log = logging.getLogger(__name__)

# Starts that PEFT's own injection writes.
_INJECTED: Mapping[str, bool | str] = {"default": True, "gaussian": "gaussian"}


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
    use_rslora: bool = False,
    use_dora: bool = False,
    generator: torch.Generator | None = None,
) -> list[LoraPair]:
    """Add a LoRA to every matching layer; the output does not change, except with `anchored=False`.

    An anchored layer is one PEFT LoRA of rank 2r. If 2r exceeds the smaller side of a layer, its r
    is lowered to half of that side (logged), so that the layout fits. The scaling is 1.

    Args:
        model: a diffusers, transformers or plain torch model. Afterwards only adapter parameters
            require gradients.
        rank: r, at least 1 and at most the smaller side of every layer.
        target_modules: name endings as PEFT takes them (`["to_q", "to_out.0"]`), or one regular
            expression for the whole name. Each ending must match at least one layer.
        init: a start of `dreamrie.init_table` that needs no batches, such as `orthonormal` (random orthonormal u,
            v) or `pissa`.
        alpha: size of the `orthonormal` start, singular values |alpha|; default 0.1 / sqrt(r).
        anchored: default True for starts that are not zero. False with `orthonormal` gives a plain
            rank-r adapter whose start changes the function.
        adapter_name: name of the adapter in PEFT.
        dropout: probability of LoRA dropout, in [0, 1).
        use_rslora: scaling sqrt(r) instead of 1, which is PEFT's switch of that name with alpha = r. Optimizers of
            factors then take larger steps at larger ranks; those that move the change itself do not see it.
        use_dora: train the norms of the rows of each weight too, as PEFT's DoRA does (`dreamrie.lora.dora`); for starts
            without anchor, on Linear layers, and optimizers of the factors.
        generator: source of the random start; default a new one with seed 0.

    Returns:
        One pair for each adapted layer, in the order of `model.named_modules()`.

    Raises:
        ConfigError: a value is out of range, a name matches no layer or an unsupported one, the
            layer already carries an adapter, or the rank is larger than a layer allows.
    """
    with_anchor = _check_settings(rank, init, alpha, anchored, dropout)
    layers = resolve_targets(model, target_modules, adapter_name)
    if use_dora:
        check_dora(init, layers)
    ranks = _layer_ranks(layers, rank, with_anchor)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    width = 2 if with_anchor else 1
    uneven = {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank}
    # PEFT divides by the width, or by its root: what is left is 1, or the root of r.
    per_rank = math.sqrt(width) if use_rslora else width
    config = LoraConfig(
        r=width * rank,
        lora_alpha=per_rank * rank,
        rank_pattern={key: width * own for key, own in uneven.items()},
        alpha_pattern={key: per_rank * own for key, own in uneven.items()},
        use_rslora=use_rslora,
        use_dora=use_dora,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        lora_dropout=dropout,
        init_lora_weights=_INJECTED.get(init, False),
    )
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with contextlib.ExitStack() as undo:
        undo.callback(put_back, model, layers, adapter_name, trainable_flags(model))
        with seeded(model, seed):
            inject(model, config, adapter_name)
        pairs = lora_pairs(model, adapter_name, use_dora=use_dora)
        if sorted(pair.name for pair in pairs) != sorted(layers):
            raise ConfigError(
                f"PEFT adapted {len(pairs)} layers where {len(layers)} match {target_modules!r}; "
                "name the layers by their full paths."
            )
        keep_in_fp32(pairs)
        for pair in pairs:
            # PEFT builds the dropout in train mode even inside a model in eval mode.
            pair.module.train(layers[pair.name].training)
            if with_anchor:
                _mark_anchor(pair, ranks[pair.name])
        if init not in _INJECTED:
            builder(find_init(init))(
                Request(init, model, pairs, generator, seed, loi=Loi(alpha=alpha))
            )
        reset_magnitudes_(pairs)
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
    entry = find_init(init)
    if entry.needs == "batches":
        raise ConfigError(
            f"init {init!r} is computed from batches: attach with init={entry.layout!r}, then call "
            f"dreamrie.lora.start_pairs({init!r}, model, pairs, data)."
        )
    if not entry.anchored:
        if anchored:
            raise ConfigError(f"start {init!r} is zero, so it needs and allows no anchor.")
        return False
    if init == "orthonormal":
        return anchored is not False
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


def _mark_anchor(pair: LoraPair, rank: int) -> None:
    """The last columns and rows of the pair are the frozen half."""
    layer: Any = pair.module
    setattr(layer.lora_B[pair.adapter_name], ANCHOR_MARK, rank)
    pair.rank = pair.anchor_rank = rank
