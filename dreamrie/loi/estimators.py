"""Three ways to see the gradient of the loss at the base weight (docs/method.md 5.2).

- `mean_gradient`: full gradients averaged over batches, then one SVD. The most of the mean gradient
  for a given number of backward passes; needs one fp32 copy of the adapted weights.
- `sketch`: two thin products per backward pass through a temporary wide adapter. Linear in the
  gradient, so batches add up; works on quantized bases.
- `backprop_rsvd`: Alg. 3 as corrected. Every pass must see the same objective, so the batches are
  kept and the random streams are replayed.

All three take `avoid`, one V (in, q) or None for each pair. Their triples are then those of G N, in coordinates of the
directions N that are left, see `dreamrie.loi.complement`.

With a `team` of several processes, `batches` are those of this process; what is summed over batches is summed over
processes too, before anything that is not linear in the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.fixed_rank import thin_svd, working_dtype
from dreamrie.loi.complement import Complement, complements
from dreamrie.loi.points import (
    LeadingSvd,
    gaussian,
    leading_svd,
    orthonormal,
    sketch_svd,
)
from dreamrie.loi.session import LoiPair, RandomState, exchanged, is_packed, without_change
from dreamrie.team import ALONE, Team

Loss = Callable[[nn.Module, Any], Tensor]


def evaluate(loss: Loss, model: nn.Module, batch: Any, number: int) -> Tensor:
    """The loss of one batch.

    Raises:
        ConfigError: it is not one number, or nothing can be differentiated.
        NumericalError: it is not finite; the message names the batch.
    """
    value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ConfigError(f"loss(model, batch) must return one number as a tensor, got {value!r}.")
    if not bool(value.isfinite()):
        raise NumericalError(f"the loss of LOI batch {number} is {float(value.detach())}.")
    if torch.is_grad_enabled() and not value.requires_grad:
        raise ConfigError(
            "the loss does not depend on the adapted layers: is it computed under torch.no_grad() "
            "or with another model?"
        )
    return value.reshape(())


def mean_gradient(
    model: nn.Module,
    pairs: Sequence[LoiPair],
    loss: Loss,
    batches: Iterable[Any],
    generator: torch.Generator,
    *,
    avoid: Sequence[Tensor | None] | None = None,
    team: Team = ALONE,
) -> tuple[list[LeadingSvd], int]:
    """Leading triples of the gradient averaged over all batches, accumulated in fp32 or fp64.

    Returns:
        One decomposition per pair and the number of batches, of all processes together.

    Raises:
        ConfigError: a base weight takes no gradient or is used in more than one place.
    """
    _require_own_weights(model, pairs)
    rooms = complements(pairs, avoid)
    weights = [pair.base_weight for pair in pairs]
    sums = [torch.zeros_like(w, dtype=working_dtype(w.dtype)) for w in weights]
    count = 0
    with exchanged(model, pairs, *without_change(pairs)) as temporary:
        for parameter in (half for both in temporary for half in both):
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            value = evaluate(loss, model, batch, 1 + team.number(count))
            count += 1
            for total, part in zip(
                sums, torch.autograd.grad(value, weights, allow_unused=True), strict=True
            ):
                if part is not None:
                    total += part
        for weight in weights:
            weight.requires_grad_(False)
    count = team.total(count, pairs[0].left.device)
    _require_batches(count)
    team.add_(sums)
    found: list[LeadingSvd] = []
    for pair, total, room in zip(pairs, sums, rooms, strict=True):
        _require_finite(pair, total)
        matrix = room.restrict(pair.as_matrix(total / count))
        found.append(leading_svd(matrix, 2 * pair.rank + 1, generator))
    return found, count


def sketch(
    model: nn.Module,
    pairs: Sequence[LoiPair],
    loss: Loss,
    batches: Iterable[Any],
    generator: torch.Generator,
    *,
    avoid: Sequence[Tensor | None] | None = None,
    team: Team = ALONE,
) -> tuple[list[LeadingSvd], int]:
    """Leading triples from one two-sided sketch: one backward pass per batch, no full gradient.

    The temporary adapter has left = [0 | Psi], right = [Omega^T ; 0]: its product is zero, and one
    backward pass gives c G Omega and c Psi^T G. Widths 16 r and 32 r, or the whole side. With directions to avoid,
    Omega is N Omega: both sketches are then those of G N.

    Returns:
        One decomposition per pair and the number of batches, of all processes together.
    """
    rooms = complements(pairs, avoid)
    tests = [_test_matrices(pair, room, generator) for pair, room in zip(pairs, rooms, strict=True)]
    lefts, rights = [], []
    for (omega, psi), pair, room in zip(tests, pairs, rooms, strict=True):
        lefts.append(torch.cat([psi.new_zeros(pair.out, omega.shape[1]), psi], dim=1))
        rights.append(torch.cat([room.lift(omega).T, omega.new_zeros(psi.shape[1], pair.in_)]))
    gradients, count, _ = _factor_gradients(model, pairs, loss, batches, lefts, rights, team)
    _require_batches(count)
    found: list[LeadingSvd] = []
    for pair, room, (omega, psi), (left, right) in zip(pairs, rooms, tests, gradients, strict=True):
        _require_finite(pair, left, right)
        width = omega.shape[1]
        scale = pair.scaling * count
        rows = room.restrict(right[width:] / scale)
        found.append(sketch_svd(left[:, :width] / scale, psi, rows))
    return found, count


def backprop_rsvd(
    model: nn.Module,
    pairs: Sequence[LoiPair],
    loss: Loss,
    batches: Iterable[Any],
    generator: torch.Generator,
    *,
    oversample: int | None = None,
    power: int = 1,
    avoid: Sequence[Tensor | None] | None = None,
    team: Team = ALONE,
) -> tuple[list[LeadingSvd], int]:
    """Leading triples by randomized SVD, each product one pass over all batches, all layers at once.

    Source: Alg. 3 as corrected: k = 2r + p; Q = qr(G Omega), q times P = qr(G^T Q), Q = qr(G P);
    SVD of Q^T G; left vectors Q U. 2 (q + 1) passes.

    Args:
        model: holds the pairs.
        pairs: the layers.
        loss: loss(model, batch).
        batches: kept in memory; the same ones serve every pass.
        generator: source of Omega.
        oversample: p; default the rank of each layer.
        power: q.
        avoid: V (in, q) of each pair, or None.
        team: the processes that share the batches.

    Returns:
        One decomposition per pair and the number of batches, of all processes together.

    Raises:
        NumericalError: the objective changes between passes although the random streams are
            replayed, so the products belong to different gradients.
    """
    kept = list(batches)
    total = team.total(len(kept), pairs[0].left.device)
    _require_batches(total)
    rooms = complements(pairs, avoid)
    replay = RandomState()
    first: list[float] = []

    def products(frames: list[Tensor], transposed: bool) -> list[Tensor]:
        replay.restore()
        if not transposed:
            frames = [room.lift(frame) for room, frame in zip(rooms, frames, strict=True)]
        zeros = [f.new_zeros(f.shape[1], p.in_ if transposed else p.out)
                 for f, p in zip(frames, pairs, strict=True)]  # fmt: skip
        lefts = frames if transposed else [zero.T for zero in zeros]
        rights = zeros if transposed else [frame.T for frame in frames]
        gradients, count, value = _factor_gradients(model, pairs, loss, kept, lefts, rights, team)
        first.append(value)
        if not math.isclose(value, first[0], rel_tol=1e-3, abs_tol=1e-12):
            raise NumericalError(
                f"backprop_rsvd: the loss over the same batches changed from {first[0]:.6g} to "
                f"{value:.6g} between passes, so the objective is not fixed. Draw noise from the "
                "global random streams or fix it per batch; or use estimator='mean_gradient'."
            )
        out: list[Tensor] = []
        for pair, room, (left, right) in zip(pairs, rooms, gradients, strict=True):
            _require_finite(pair, left, right)
            product = room.restrict(right).T if transposed else left
            out.append(product / (pair.scaling * count))
        return out

    starts: list[Tensor] = []
    for pair, room in zip(pairs, rooms, strict=True):
        width = 2 * pair.rank + (pair.rank if oversample is None else oversample)
        width = min(width, pair.out, room.size)
        starts.append(gaussian(pair.right, room.size, width, generator))
    bases = [orthonormal(part) for part in products(starts, False)]
    for _ in range(power):
        bases = [orthonormal(part) for part in products(bases, True)]
        bases = [orthonormal(part) for part in products(bases, False)]
    found: list[LeadingSvd] = []
    for basis, co_range in zip(bases, products(bases, True), strict=True):
        core, values, right = thin_svd(co_range.T)
        found.append(LeadingSvd(basis @ core, values, right))
    return found, total


def _factor_gradients(
    model: nn.Module,
    pairs: Sequence[LoiPair],
    loss: Loss,
    batches: Iterable[Any],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    team: Team,
) -> tuple[list[tuple[Tensor, Tensor]], int, float]:
    """Sums over all batches of the team of the factor gradients as matrices, their number, the mean loss."""
    sums = [
        (torch.zeros_like(left), torch.zeros_like(right))
        for left, right in zip(lefts, rights, strict=True)
    ]
    count, total = 0, 0.0
    with exchanged(model, pairs, lefts, rights) as temporary:
        wanted = [parameter for both in temporary for parameter in both]
        flat = [part for both in sums for part in both]
        for batch in batches:
            value = evaluate(loss, model, batch, 1 + team.number(count))
            count += 1
            total += float(value.detach())
            parts = torch.autograd.grad(value, wanted, allow_unused=True)
            for accumulated, part in zip(flat, parts, strict=True):
                if part is not None:
                    accumulated += part.reshape(accumulated.shape)
    facts = torch.tensor([count, total], dtype=torch.float32, device=pairs[0].left.device)
    team.add_([*flat, facts])
    return sums, int(facts[0]), float(facts[1] / facts[0].clamp_min(1))


def _test_matrices(
    pair: LoiPair, room: Complement, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Omega (size, k) and Psi (out, l); the identity where the width reaches the whole side."""
    width = min(16 * pair.rank, room.size, pair.out)
    co_width = min(32 * pair.rank, pair.out)
    dtype = working_dtype(pair.left.dtype)
    omega = gaussian(pair.right, room.size, width, generator)
    psi = gaussian(pair.left, pair.out, co_width, generator)
    if width == room.size:
        omega = torch.eye(width, dtype=dtype, device=pair.right.device)
    if co_width == pair.out:
        psi = torch.eye(co_width, dtype=dtype, device=pair.left.device)
    return omega, psi


def _require_own_weights(model: nn.Module, pairs: Sequence[LoiPair]) -> None:
    """Each base weight must take gradients and belong to one layer only."""
    uses: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    for pair in pairs:
        if is_packed(pair.base_weight):
            raise ConfigError(
                f"layer {pair.name!r}: its {pair.base_weight.dtype} base weight takes no gradient "
                "(quantized?). Use estimator='sketch', which needs gradients of the adapter only."
            )
        places = uses.get(id(pair.base_weight), [])
        if len(places) > 1:
            raise ConfigError(
                f"layer {pair.name!r}: its base weight is tied, it is also {places}. The gradient "
                "of a shared weight mixes its uses; use estimator='sketch', which separates them."
            )


def _require_batches(count: int) -> None:
    """LOI needs data."""
    if count == 0:
        raise ConfigError("LOI got no batch: `batches` is empty (an iterator already used up?).")


def _require_finite(pair: LoiPair, *gradients: Tensor) -> None:
    """Name the layer whose gradient is not finite."""
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise NumericalError(
            f"layer {pair.name!r}: its gradient at the base weight is not finite. Run the loss in "
            "bf16 or fp32, and look for an overflow."
        )
