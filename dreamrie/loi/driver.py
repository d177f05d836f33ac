"""`locally_optimal_init`: estimate, write the start, check what was promised, report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.fixed_rank import Point, random_point, working_dtype
from dreamrie.loi.complement import Complement, complements
from dreamrie.loi.estimators import Loss, backprop_rsvd, evaluate, mean_gradient, sketch
from dreamrie.loi.points import LeadingSvd, split_point
from dreamrie.loi.session import (
    LoiPair,
    RandomState,
    digest,
    exchanged,
    undisturbed,
    without_change,
)
from dreamrie.team import ALONE, Team

_log = logging.getLogger(__name__)

Estimator = Literal["mean_gradient", "sketch", "backprop_rsvd"]

# Steps of the factors of size lr have a product of size lr^2 / alpha (docs/method.md 5.4).
_ALPHA_PER_LR = 1.0
_SIGMA_FLOOR = 1e-8


@dataclass(frozen=True)
class LayerReport:
    """What LOI found in one layer. Energies are in the square of the unit of the gradient.

    Attributes:
        name: layer.
        rank: r.
        alpha: size of the start, singular values |alpha|.
        energy: |P_X(G)|_F^2 of the estimated gradient at the start that was written.
        optimum: the most that any rank-r start can hold, sum of the first 2r sigma^2.
        share: energy over |G|_F^2, where the full gradient is known; else nan. With directions to avoid,
            G here and above is what is left of the gradient without them.
        gap: sigma_2r / sigma_2r+1.
    """

    name: str
    rank: int
    alpha: float
    energy: float
    optimum: float
    share: float
    gap: float

    @property
    def captured(self) -> float:
        """Energy over optimum; 1 for a layer without gradient, where every start is optimal."""
        return self.energy / self.optimum if self.optimum > 0.0 else 1.0


@dataclass(frozen=True)
class LoiReport:
    """Outcome of `locally_optimal_init`.

    Attributes:
        layers: one report per pair, in the order of the pairs.
        estimator: which of the three.
        batches: number of batches seen.
        seconds: wall time.
        loss_change: relative change of the first batch's loss by the adapter at step 0; nan if the
            loss does not repeat under equal random streams, so that it could not be compared.
    """

    layers: tuple[LayerReport, ...]
    estimator: str
    batches: int
    seconds: float
    loss_change: float

    @property
    def captured(self) -> float:
        """Projected gradient energy over the optimum, all layers together."""
        optimum = sum(layer.optimum for layer in self.layers)
        return sum(layer.energy for layer in self.layers) / optimum if optimum > 0.0 else 1.0

    def summary(self) -> str:
        """Two lines for a log."""
        shares = [layer.share for layer in self.layers if math.isfinite(layer.share)]
        share = f", {sum(shares) / len(shares):.3f} of the whole gradient" if shares else ""
        worst = min(self.layers, key=lambda layer: layer.captured)
        step_zero = (
            "step 0 unchanged per layer; the loss does not repeat, so it was not compared"
            if math.isnan(self.loss_change)
            else f"step 0 unchanged (loss differs by {self.loss_change:.1e})"
        )
        return (
            f"LOI ({self.estimator}, {self.batches} batches, {self.seconds:.1f} s): projected "
            f"gradient energy {self.captured:.4f} of the optimum{share}, {len(self.layers)} layers\n"
            f"    worst layer {worst.name} {worst.captured:.4f}; {step_zero}"
        )


def locally_optimal_init(
    model: nn.Module,
    pairs: Sequence[LoiPair],
    loss: Loss,
    batches: Iterable[Any],
    *,
    alpha: float | None = None,
    estimator: Estimator = "mean_gradient",
    lr: float | None = None,
    oversample: int | None = None,
    power: int | None = None,
    generator: torch.Generator | None = None,
    avoid: Sequence[Tensor | None] | None = None,
    team: Team = ALONE,
) -> LoiReport:
    """Write the locally optimal start X0 = alpha U_1 V_2^T into anchored pairs.

    Source: arXiv:2507.12142, Theorem 5.1 and Alg. 3 as corrected in docs/method.md 5.1. The
    gradient is taken at the base weight, in eval mode (dropout off). Random streams, train/eval
    modes, gradient flags and every `.grad` are as before afterwards; the base is never written. If
    a check fails, the factors are put back.

    Args:
        model: holds the pairs.
        pairs: from `dreamrie.attach_lora`; each has a frozen anchor.
        loss: loss(model, batch) -> one number; the training loss.
        batches: finite iterable; different pictures, noise and timesteps average the noise away. The same on every
            process of a team: each evaluates its share of them.
        alpha: signed size of the start; default 0.1 / sqrt(r).
        estimator: `mean_gradient`, `sketch` or `backprop_rsvd`; see `loi.estimators`.
        lr: largest learning rate of an optimizer that adds its steps to the factors, as imuon and lora_muon do, in the
            spectral norm of a step; |alpha| must not be below it. Riemannion needs no such limit.
        oversample: p of `backprop_rsvd`; default r.
        power: q of `backprop_rsvd`; default 1.
        generator: source of test matrices; default a new one with seed 0.
        avoid: for each pair, orthonormal V (in, q) of input directions that its start must not respond to, or None:
            X0 V = 0, and X0 is the best of those starts, from the gradient G (I - V V^T). See `dreamrie.lora.apart`.
        team: the processes that train together, see `Team.here`. The start is that of one process with all batches,
            up to rounding, and all processes must call this.

    Returns:
        Energies per layer; also logged.

    Raises:
        ConfigError: a setting cannot work, a pair has no anchor, a weight is tied or quantized, no
            layer has a gradient, or `avoid` leaves a layer too few directions.
        NumericalError: something is not finite, or a promise is broken: the energy is not the
            optimum, step 0 changed, the base was written.
    """
    started = time.perf_counter()
    sizes = _check(model, pairs, alpha, lr, estimator, oversample, power)
    random = generator if generator is not None else torch.Generator().manual_seed(0)
    before = [digest(pair.base_weight) for pair in pairs]
    own = [(pair.left.detach().clone(), pair.right.detach().clone()) for pair in pairs]
    rooms = complements(pairs, avoid)
    limits: dict[str, Any] = {} if avoid is None else {"avoid": avoid}
    if team.size > 1:
        limits["team"] = team
    kept: list[Any] = []
    done = False
    with undisturbed(model):
        seen = team.share(_keep_first(batches, kept))
        if estimator == "backprop_rsvd":
            found, count = backprop_rsvd(
                model, pairs, loss, seen, random,
                oversample=oversample, power=1 if power is None else power, **limits,
            )  # fmt: skip
        else:
            run = sketch if estimator == "sketch" else mean_gradient
            found, count = run(model, pairs, loss, seen, random, **limits)
        try:
            starts = _starts(pairs, rooms, found, sizes, random)
            for pair, start in zip(pairs, starts, strict=True):
                pair.set_start(start, anchored=True)
            layers = tuple(
                _check_layer(pair, room, svd, size)
                for pair, room, svd, size in zip(pairs, rooms, found, sizes, strict=True)
            )
            change = _loss_change(model, pairs, loss, kept[0])
            for pair, old in zip(pairs, before, strict=True):
                if digest(pair.base_weight) != old:
                    raise NumericalError(f"layer {pair.name!r}: LOI changed the base weight.")
            done = True
        finally:
            if not done:
                _put_back(pairs, own)
    report = LoiReport(layers, estimator, count, time.perf_counter() - started, change)
    _warn_about_gaps(report)
    _log.info("%s", report.summary())
    return report


def _check(
    model: nn.Module,
    pairs: Sequence[LoiPair],
    alpha: float | None,
    lr: float | None,
    estimator: str,
    oversample: int | None,
    power: int | None,
) -> list[float]:
    """Check the settings; returns alpha of every layer."""
    if estimator not in ("mean_gradient", "sketch", "backprop_rsvd"):
        raise ConfigError(
            f"estimator {estimator!r} is unknown; allowed: mean_gradient, sketch, backprop_rsvd."
        )
    if estimator != "backprop_rsvd" and (oversample is not None or power is not None):
        raise ConfigError(f"oversample and power belong to backprop_rsvd, not to {estimator!r}.")
    for name, value in (("oversample", oversample), ("power", power)):
        if value is not None and value < 0:
            raise ConfigError(f"{name} must not be negative, got {value}.")
    if not pairs:
        raise ConfigError("there is no LoRA pair to initialize; see dreamrie.attach_lora.")
    if alpha is not None and not (math.isfinite(alpha) and alpha != 0.0):
        raise ConfigError(f"alpha must be finite and not zero, got {alpha!r}.")
    if lr is not None and not (math.isfinite(lr) and lr >= 0.0):
        raise ConfigError(f"lr must be finite and not negative, got {lr!r}.")
    sizes: list[float] = []
    for pair in pairs:
        if pair.anchor_rank != pair.rank:
            raise ConfigError(
                f"layer {pair.name!r} has no anchor, so a start that is not zero would change the "
                "model at step 0. Attach with dreamrie.attach_lora(model, rank, target_modules)."
            )
        sizes.append(alpha if alpha is not None else 0.1 / math.sqrt(pair.rank))
        if lr is not None and abs(sizes[-1]) < _ALPHA_PER_LR * lr * (1 - 1e-9):
            raise ConfigError(
                f"layer {pair.name!r}: |alpha| = {abs(sizes[-1]):.3g} is below lr = "
                f"{_ALPHA_PER_LR * lr:.3g}, so the product of the steps of both factors would not be small beside "
                f"their sum. Raise alpha to at least {_ALPHA_PER_LR * lr:.3g} or lower the lr."
            )
    return sizes


def _keep_first(batches: Iterable[Any], kept: list[Any]) -> Iterator[Any]:
    """Pass the batches on and remember the first."""
    for batch in batches:
        if not kept:
            kept.append(batch)
        yield batch


def _starts(
    pairs: Sequence[LoiPair],
    rooms: Sequence[Complement],
    found: Sequence[LeadingSvd],
    sizes: Sequence[float],
    generator: torch.Generator,
) -> list[Point]:
    """The start of every layer; a random one of the same size where there is no gradient."""
    silent = [
        pair.name for pair, svd in zip(pairs, found, strict=True) if not float(svd.values[0]) > 0.0
    ]
    if len(silent) == len(pairs):
        raise ConfigError(
            "no adapted layer has a gradient: the loss does not depend on them (adapters disabled, "
            "another model, or a forward under torch.no_grad())."
        )
    if silent:
        _log.warning(
            "LOI: no gradient reaches %d of %d layers (%s, ...); they start at a random point",
            len(silent), len(pairs), silent[0],
        )  # fmt: skip
    starts: list[Point] = []
    for pair, room, svd, size in zip(pairs, rooms, found, sizes, strict=True):
        if pair.name in silent:
            dtype = working_dtype(pair.left.dtype)
            drawn = random_point(pair.out, room.size, pair.rank, generator=generator, dtype=dtype)
            drawn = Point(*(part.to(pair.right.device) for part in drawn))
            start = Point(drawn.u, torch.full_like(drawn.s, abs(size)), drawn.v)
        else:
            start = split_point(svd, pair.rank, size)
        starts.append(room.lift_point(start))
    return starts


def _check_layer(pair: LoiPair, room: Complement, svd: LeadingSvd, alpha: float) -> LayerReport:
    """Read the start back from the factors and hold it to what LOI promises."""
    exact = working_dtype(pair.left.dtype) == pair.left.dtype
    point = pair.point()
    floor = max(_SIGMA_FLOOR, 0.5 * abs(alpha))
    if not all(bool(part.isfinite().all()) for part in point) or float(point.s.min()) < floor:
        raise NumericalError(
            f"layer {pair.name!r}: the start has singular values {point.s.tolist()}, wanted "
            f"{abs(alpha):.3g}; the parameters are {pair.left.dtype}."
        )
    rest = float(torch.linalg.matrix_norm(pair.delta()))
    if not rest <= 1e-5 * abs(alpha) * math.sqrt(pair.rank):
        raise NumericalError(
            f"layer {pair.name!r}: point and anchor differ by {rest:.1e} at step 0, so the function "
            "of the model would change."
        )
    inside = room.restrict_point(point)
    along = room.share_outside(point)
    if along > (1e-5 if exact else 2e-2):
        raise NumericalError(
            f"layer {pair.name!r}: a share {along:.1e} of the start lies along the directions to avoid."
        )
    energy, optimum = svd.energy(inside), svd.optimum(pair.rank)
    if energy < (1.0 - (1e-3 if exact else 2e-2)) * optimum:
        raise NumericalError(
            f"layer {pair.name!r}: the start holds {energy / optimum:.4f} of the optimal gradient "
            "energy, not 1. For backprop_rsvd raise oversample or power; for others report it."
        )
    total = float((svd.matrix**2).sum()) if svd.matrix is not None else math.nan
    share = energy / total if total > 0.0 else math.nan
    return LayerReport(
        pair.name, pair.rank, alpha, energy, optimum, share, svd.gap(pair.rank)
    )  # fmt: skip


def _loss_change(model: nn.Module, pairs: Sequence[LoiPair], loss: Loss, batch: Any) -> float:
    """Relative change of the loss by the adapter; nan if the loss does not repeat by itself.

    Raises:
        NumericalError: it changes although it repeats.
    """
    replay = RandomState()
    values: list[float] = []
    with torch.no_grad():
        for _ in range(2):
            replay.restore()
            values.append(float(evaluate(loss, model, batch, 1)))
        with exchanged(model, pairs, *without_change(pairs)):
            replay.restore()
            values.append(float(evaluate(loss, model, batch, 1)))
    size = max(abs(values[0]), 1e-12)
    if abs(values[1] - values[0]) > 1e-7 * size:
        return math.nan
    change = abs(values[2] - values[0]) / size
    full = all(w.dtype == working_dtype(w.dtype) for w in (p.base_weight for p in pairs))
    if change > (1e-5 if full else 2e-2):
        raise NumericalError(
            f"the adapter changes the loss at step 0 from {values[2]:.6g} to {values[0]:.6g}."
        )
    return change


def _put_back(pairs: Sequence[LoiPair], own: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Undo `set_start`."""
    with torch.no_grad():
        for pair, (left, right) in zip(pairs, own, strict=True):
            pair.left.copy_(left)
            pair.right.copy_(right)


def _warn_about_gaps(report: LoiReport) -> None:
    """Say when the 2r-th and the next singular value are so close that the start is arbitrary."""
    close = [layer.name for layer in report.layers if layer.gap < 1.01]
    if close:
        _log.warning(
            "LOI: sigma_2r / sigma_2r+1 < 1.01 in %d of %d layers (first %s): the start there is "
            "one of several equally good ones",
            len(close), len(report.layers), close[0],
        )  # fmt: skip
