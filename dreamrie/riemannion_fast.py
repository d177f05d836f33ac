"""The fused step for fp32 states: two products with tall matrices for each side, everything else small and in fp64.

`riemannion_step.fused_step` is exact in the precision of its state, and spends its time on QR of tall matrices and on
many passes over them. For fp32 states the same step can be had from Gram matrices in fp64. With Z = [u, momentum m + g]
of one side, (n, 2r), and its Gram matrix Z^T Z, all of steps 2 to 10 of the fused step are operations on the
coefficients of tall matrices in Z:

    projection, bases, core, msign, retraction, transport      2r x 2r
    u_new = Z c_u,  m_new = Z c_m

A Gram matrix squares the condition number, and fp64 has more than twice the digits of fp32: what is left of them is
what the data had. Layers where that is not enough take the exact step: columns of m depend on each other up to rounding
(gradients of low rank), or the r-th singular value of the new point vanishes beside the first.

The small matrices of all shapes share a batch, in which no layer sees the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dreamrie.fixed_rank import cross_core
from dreamrie.riemannion_small import decompose, triangles
from dreamrie.riemannion_step import (
    FusedState,
    StepOptions,
    StepResult,
    Work,
    combine,
    fused_step,
    move_momentum,
    zero_normal_block,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# As for fp32 in `fixed_rank.masked_msign`, since that is what the data are.
_MASK = 1e-6
# Smallest part of a column of m, of length one, that is normal to the others: rounding of a Gram matrix in fp64 beside
# its square is what the new frames miss in orthonormality.
_NORMAL = 1e-5
# Smallest over largest singular value of a new point that can be trusted.
_SMALLEST = 1e-6
# Above this rank products in fp64 cost a CPU more than QR in fp32; measured, see docs/performance.md.
_LARGEST_ON_CPU = 32


class Side(NamedTuple):
    """Coefficients in Z of one side: [u, m] = Q R, Q = Z mix, where m on the left side is normal to u."""

    mix: Float[Tensor, "batch k k"]
    triangle: Float[Tensor, "batch k k"]
    good: Bool[Tensor, " batch"]
    """False: the columns depend on each other, Q is not orthonormal."""


def fast_steps(works: Sequence[Work]) -> list[StepResult]:
    """Take one step for several batches.

    Args:
        works: batches of one shape each, see `riemannion_step.fused_step`.

    Returns:
        One result for each, as `fused_step` returns it up to rounding. A layer's does not depend on what else is
        stepped with it.

    Raises:
        NumericalError: an SVD of the exact step did not converge.
    """
    results: list[Any] = [None if can_be_fast(work) else fused_step(*work) for work in works]
    fast = [number for number, result in enumerate(results) if result is None]
    begun = begin_steps([works[number] for number in fast])
    # One look for all of them.
    trusted = [one.small.trusted.all().to(begun[0].work.state.s.device) for one in begun]
    all_trusted = not trusted or bool(torch.stack(trusted).all())
    for number, one in zip(fast, begun, strict=True):
        result = finish_step(one)
        doubtful = ~one.small.trusted
        results[number] = result if all_trusted else _exact_where(doubtful, one.work, result)
    return results


class Begun(NamedTuple):
    """A batch after all small matrices: what is left are tall products."""

    work: Work
    left: Tensor
    right: Tensor
    small: Small


def begin_steps(works: Sequence[Work]) -> list[Begun]:
    """Do all of the step but its tall products, for batches that `can_be_fast`.

    Only what goes through `asking_the_host` waits for a GPU.

    Args:
        works: see `fast_steps`.

    Returns:
        One for each. Layers that `small.trusted` leaves out need the exact step.
    """
    found: list[Any] = [None] * len(works)
    alike: dict[Any, list[int]] = {}
    for number, work in enumerate(works):
        alike.setdefault(_key(work, number), []).append(number)
    for numbers in alike.values():
        for number, begun in zip(numbers, _begin([works[n] for n in numbers]), strict=True):
            found[number] = begun
    return found


def can_be_fast(work: Work) -> bool:
    """Tell whether a batch is of the kind this module is for: fp32, both sides tall, no anchored decay."""
    u, s, v = work.state[:3]
    return (
        s.dtype == torch.float32
        and s.device.type != "mps"
        and s.ndim == 2
        and (s.device.type != "cpu" or s.shape[-1] <= _LARGEST_ON_CPU)
        and min(u.shape[-2], v.shape[-2]) >= 2 * s.shape[-1]
        and (work.anchor is None or work.options.weight_decay == 0)
    )


def _key(work: Work, number: int) -> Any:
    """Equal for batches whose small matrices may share a batch.

    BLAS sums in an order that depends on where a matrix begins within 64 bytes. Small matrices that do not fill a
    multiple of that stay with their own shape, so that no layer sees which others there are.
    """
    rank = work.state.s.shape[-1]
    alone = number if rank % 4 or work.core_direction is not None else None
    lr, *others = work.options
    return (rank, work.state.s.device, id(lr) if isinstance(lr, Tensor) else lr, *others, alone)


def _begin(works: list[Work]) -> list[Begun]:
    """Begin batches whose small matrices share a batch."""
    counts = [len(work.state.s) for work in works]
    sides = []
    for w in works:
        beta, state = w.options.momentum, w.state
        left = _tall(state.u, state.m_left, w.gradient_v, beta)
        sides.append((left, _tall(state.v, state.m_right, w.gradient_t_u, beta)))
    grams = [torch.cat([z @ z.mT for z in column]) for column in zip(*sides, strict=True)]
    s = torch.cat([work.state.s for work in works])
    small = core_step(grams[0], grams[1], s, works[0].options, works[0].core_direction)
    parts = zip(works, sides, _split(small, counts), strict=True)
    return [Begun(work, *side, part) for work, side, part in parts]


def _tall(
    frame: Tensor, momentum: Tensor, gradient: Tensor, beta: float
) -> Float[Tensor, "batch k n"]:
    """Z^T, in fp64. Long rows are what BLAS is fast with, and blocks of them are copied as they lie."""
    total = torch.add(gradient.mT, momentum.mT, alpha=beta)
    return torch.cat([frame.mT, total], dim=-2).double()


class Small(NamedTuple):
    """What comes out of the small matrices, for each layer."""

    u: Tensor
    v: Tensor
    m_left: Tensor
    m_right: Tensor
    s: Tensor
    ok: Tensor
    acts: Tensor
    trusted: Tensor


def _split(small: Small, counts: list[int]) -> list[Small]:
    """Rows of each batch."""
    if len(counts) == 1:
        return [small]
    return [Small(*parts) for parts in zip(*(part.split(counts) for part in small), strict=True)]


def core_step(
    gram_left: Float[Tensor, "batch k k"],
    gram_right: Float[Tensor, "batch k k"],
    s: Float[Tensor, "batch r"],
    options: StepOptions,
    core_direction: Callable[[Tensor, Tensor, int], Tensor] | None = None,
) -> Small:
    """Steps 1 to 10 of the fused step on the coefficients in Z.

    Args:
        gram_left: Z^T Z of the left side, fp64.
        gram_right: of the right side.
        s: singular values of the points.
        options: see `StepOptions`.
        core_direction: see `fused_step`.

    Returns:
        Coefficients (2r, r) of the new frames and momenta in Z, new singular values, and flags.
    """
    rank = s.shape[-1]
    # The sum of squares must be finite in the precision of the state, as for the exact step.
    total = gram_left.diagonal(dim1=-2, dim2=-1).sum(-1) + gram_right.diagonal(
        dim1=-2, dim2=-1
    ).sum(-1)
    ok = torch.isfinite(total.to(s.dtype))
    still = torch.eye(2 * rank, dtype=gram_left.dtype, device=s.device)
    grams = [torch.where(ok[:, None, None], gram, still) for gram in (gram_left, gram_right)]
    left = side_of(grams[0], rank, projected=True)
    right = side_of(grams[1], rank, projected=False)
    core = cross_core(left.triangle, right.triangle, rank)
    if core_direction is None:
        direction = direction_of(core, rank, options)
    else:
        given = left.triangle.to(s.dtype), right.triangle.to(s.dtype)
        direction = core_direction(*given, rank).to(core.dtype)
    moved = combine(left.triangle, right.triangle, s.to(core.dtype), direction, options, False)
    a, values, b = decompose(moved)
    a, values, b = a[..., :rank], values[..., :rank], b[..., :rank]
    m_left, m_right = move_momentum(core, left.mix, right.mix, a, b)
    acts = (core != 0).any(dim=-1).any(dim=-1)
    trusted = left.good & right.good & (values[..., -1] > _SMALLEST * values[..., 0]) | ~ok
    return Small(
        left.mix @ a, right.mix @ b, m_left, m_right, values.to(s.dtype), ok, acts, trusted
    )


def side_of(gram: Float[Tensor, "batch k k"], rank: int, projected: bool) -> Side:
    """Make [u, m] orthonormal, in coefficients of Z = [u, total].

    Args:
        gram: Z^T Z.
        rank: r.
        projected: m is the part of the total that is normal to u, as on the left side; otherwise all of it.

    Returns:
        Q and R; the first r columns of Q span u.
    """
    frame, total = slice(0, rank), slice(rank, 2 * rank)
    lower, inverse, _ = triangles(gram[:, frame, frame])
    along = inverse @ (inverse.mT @ gram[:, frame, total])
    normal = torch.zeros_like(gram[..., total])
    normal[:, frame] = -along
    normal[:, total] = torch.eye(rank, dtype=gram.dtype, device=gram.device)
    upper, whitening, good = _orthonormal(normal.mT @ gram @ normal)
    mix, triangle = torch.zeros_like(gram), torch.zeros_like(gram)
    mix[:, frame, frame], mix[..., total] = inverse, normal @ whitening
    triangle[:, frame, frame], triangle[:, total, total] = lower.mT, upper
    if not projected:
        triangle[:, frame, total] = lower.mT @ along
    return Side(mix, triangle, good)


def _orthonormal(gram: Float[Tensor, "batch r r"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return R and its inverse with a = q R, q orthonormal, for a^T a = gram, and where that went well."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    lengths = torch.where(lengths > 0, lengths, 1.0)
    scaled = gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2))
    lower, inverse, failed = triangles(scaled)
    good = ~failed & (lower.diagonal(dim1=-2, dim2=-1).amin(dim=-1) > _NORMAL)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower, inverse = (torch.where(good[:, None, None], part, identity) for part in (lower, inverse))
    return lower.mT * lengths.unsqueeze(-2), inverse / lengths.unsqueeze(-1), good


def direction_of(core: Float[Tensor, "batch k k"], rank: int, options: StepOptions) -> Tensor:
    """`riemannion_step.tangent_direction`, with the mask of fp32."""
    for _ in range(options.inner_iters):
        left, values, right = decompose(core)
        keep = (values > _MASK * values[..., :1]).to(core.dtype)
        core = zero_normal_block((left * keep.unsqueeze(-2)) @ right.mT, rank)
    if options.exact_norm:
        size = decompose(core)[1][..., :1].unsqueeze(-1)
        core = core / torch.where(size > 0, size, 1.0)
    return core


def moved_and_hits(small: Small, options: StepOptions) -> tuple[Tensor, Tensor]:
    """Tell which layers move, and how many of their singular values are lifted to the floor."""
    moved = small.ok if options.weight_decay != 0 else small.ok & small.acts
    return moved, ((small.s < options.sigma_floor) & moved[..., None]).sum(dim=-1)


def finish_step(begun: Begun) -> StepResult:
    """Steps 9 to 11: the tall products."""
    state, options, small = begun.work.state, begun.work.options, begun.small
    moved, hits = moved_and_hits(small, options)
    u, m_left = _rows(small.u, small.m_left, begun.left, state.u)
    v, m_right = _rows(small.v, small.m_right, begun.right, state.v)
    kept = FusedState(
        _where(moved, u, state.u),
        _where(moved, small.s.clamp_min(options.sigma_floor), state.s),
        _where(moved, v, state.v),
        _where(small.ok, m_left, state.m_left),
        _where(small.ok, m_right, state.m_right),
    )
    return StepResult(kept, small.ok, moved, hits)


def _rows(frame: Tensor, momentum: Tensor, tall: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return Z frame and Z momentum in the precision of the state; their memory order is that of Z^T."""
    rank = frame.shape[-1]
    both = torch.cat([frame.mT, momentum.mT], dim=-2) @ tall
    return both[:, :rank].to(like.dtype).mT, both[:, rank:].to(like.dtype).mT


def _where(mask: Bool[Tensor, " batch"], new: Tensor, old: Tensor) -> Tensor:
    """Return new where the mask of layers holds, else old; on the CPU `new` itself if it holds everywhere."""
    if mask.device.type == "cpu" and bool(mask.all()):
        return new
    return torch.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _exact_where(doubtful: Tensor, work: Work, result: StepResult) -> StepResult:
    """Take the exact step for some layers."""
    if not bool(doubtful.any()):
        return result
    rows = doubtful.nonzero().squeeze(-1)
    if work.core_direction is None:
        few = FusedState(*(part[rows] for part in work.state))
        exact = fused_step(few, work.gradient_v[rows], work.gradient_t_u[rows], work.options)
    else:
        # A spectral map holds numbers of every layer of the batch, in its order.
        whole = fused_step(*work)
        state = FusedState(*(part[rows] for part in whole.state))
        exact = StepResult(state, *(part[rows] for part in whole[1:]))
    parts = [part.clone() for part in (*result.state, *result[1:])]
    for part, other in zip(parts, (*exact.state, *exact[1:]), strict=True):
        part[rows] = other
    return StepResult(FusedState(*parts[:5]), *parts[5:])
