"""One step of Riemannion as a pure function on tensors.

For every layer the state is the point X = u diag(s) v^T and the raw momentum M = m_left v^T + u m_right^T. With the
Riemannian gradient added to M, one step is

    X  <-  SVD_r( (1 - lr * weight_decay) X - lr * P(msign(M)) ),        M  <-  P(M) at the new X

and everything after two QR factorizations happens in a core of size 2r x 2r (docs/method.md 4.3):

    1 guard      a layer with a non-finite gradient keeps its state
    2 recover    g_left = (I - u u^T) G v,  g_right = G^T u           from the gradients of the factors, see `recover`
    3 momentum   m <- momentum * m + g                                stored raw, before msign; Eq. (10)
    4 bases      Q_left R_left = qr([u, m_left]),  Q_right R_right = qr([v, m_right])
    5 core       K = R_left1 R_right2^T + R_left2 R_right1^T          M = Q_left K Q_right^T
    6 msign      O = U V^T of the SVD of K, null directions masked    Eq. (12)
    7 project    lower-right block of O <- 0                          exactly P, Lemma D.1, in these bases
    8 combine    C = (1 - lr * weight_decay) R_left1 diag(s) R_right1^T - lr * O
    9 retract    a s b^T = SVD_r(C),  u = Q_left a,  v = Q_right b,  s >= sigma_floor
   10 transport  m_left = Q_left (K b - a a^T K b),  m_right = Q_right K^T a
   11 commit     only where the guard agreed

Source: arXiv:2507.12142, Alg. 4 as corrected in docs/method.md 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dreamrie.fixed_rank import Factors, cross_core, masked_msign, remove_component, thin_svd

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class FusedState(NamedTuple):
    """Point and momentum of a batch of layers of one shape: frames (*, out, r) and (*, in, r), s (*, r)."""

    u: Float[Tensor, "*batch out r"]
    s: Float[Tensor, "*batch r"]
    v: Float[Tensor, "*batch in_ r"]
    m_left: Float[Tensor, "*batch out r"]
    m_right: Float[Tensor, "*batch in_ r"]


class StepOptions(NamedTuple):
    """Numbers of one step, equal for the whole batch.

    `lr` is the spectral norm of the change per step up to a factor in [1, 1.155]; `weight_decay` is multiplied by it.
    """

    lr: float | Tensor
    momentum: float = 0.5
    weight_decay: float = 0.0
    sigma_floor: float = 1e-8
    exact_norm: bool = False
    inner_iters: int = 1


Direction = Callable[[Tensor, Tensor, int], Tensor]
"""From R_left, R_right and r to the core of a tangent direction."""


class StepResult(NamedTuple):
    """New state and what happened to each layer of the batch."""

    state: FusedState
    ok: Bool[Tensor, "*batch"]
    """False: a number was not finite and the layer is as before."""
    moved: Bool[Tensor, "*batch"]
    """False: nothing acted on the point (zero momentum, no decay, or not ok), its bytes are as before."""
    floor_hits: Int[Tensor, "*batch"]
    """How many singular values were lifted to sigma_floor."""


def balanced_factors(
    frame: Float[Tensor, "*batch n r"], s: Float[Tensor, "*batch r"], scaling: Tensor | float
) -> Float[Tensor, "*batch n r"]:
    """Return frame * sqrt(s / scaling), the factor of the SVD gauge with scaling * left right^T = X."""
    return frame * (s / scaling).sqrt().unsqueeze(-2)


def recover(
    factor_gradient: Float[Tensor, "*batch n r"],
    s: Float[Tensor, "*batch r"],
    scaling: Tensor | float,
) -> Float[Tensor, "*batch n r"]:
    """Return G v (or G^T u) from the loss gradient of the left (or transposed right) balanced factor.

    d loss / d left = scaling * G right = G v sqrt(scaling * s), column by column. Dividing columns is exact up to
    the exponent, so tiny singular values cost no digits. Source: docs/method.md 2.
    """
    return factor_gradient / (scaling * s).sqrt().unsqueeze(-2)


def accumulate(
    state: FusedState, gradient_v: Tensor, gradient_t_u: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Add the Riemannian gradient to the raw momentum; returns the new m_left, m_right at the old point."""
    m_left = momentum * state.m_left + remove_component(state.u, gradient_v)
    return m_left, momentum * state.m_right + gradient_t_u


def zero_normal_block(core: Float[Tensor, "*batch a b"], rank: int) -> Float[Tensor, "*batch a b"]:
    """Zero the lower-right block: the tangent projection in bases that begin with u and v (Lemma D.1)."""
    mask = torch.ones(core.shape[-2:], dtype=core.dtype, device=core.device)
    mask[rank:, rank:] = 0
    return core * mask


def tangent_direction(
    core: Float[Tensor, "*batch a b"], rank: int, options: StepOptions
) -> Float[Tensor, "*batch a b"]:
    """Return the core of P(msign(M)), repeated `inner_iters` times (Eq. (13)), of norm 1 if `exact_norm`."""
    for _ in range(options.inner_iters):
        core = zero_normal_block(masked_msign(core), rank)
    if options.exact_norm:
        size = torch.linalg.svdvals(core)[..., :1].unsqueeze(-1)
        core = core / torch.where(size > 0, size, 1.0)
    return core


def combine(
    r_left: Tensor,
    r_right: Tensor,
    s: Tensor,
    direction: Tensor,
    options: StepOptions,
    anchored: bool,
) -> Tensor:
    """Return the core of the moved matrix before truncation, with decoupled decay of the point.

    Anchored: decay towards X0 = left0 right0^T, whose triangles are the trailing blocks, as the tangent vector
    weight_decay * P(X - X0); otherwise X is multiplied by 1 - lr * weight_decay. Source: docs/method.md 4.3, 4.7.
    """
    rank = s.shape[-1]
    here = (r_left[..., :rank] * s.unsqueeze(-2)) @ r_right[..., :rank].mT
    decay = options.weight_decay
    if not anchored:
        return (1 - options.lr * decay) * here - options.lr * direction
    there = r_left[..., 2 * rank :] @ r_right[..., 2 * rank :].mT
    return here - options.lr * (direction + decay * zero_normal_block(here - there, rank))


def move_momentum(
    core: Tensor, q_left: Tensor, q_right: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Project the momentum Q_left K Q_right^T on the tangent space of the new frames Q_left a, Q_right b."""
    return (
        q_left @ remove_component(left, core @ right),
        q_right @ (core.mT @ left),
    )


class Work(NamedTuple):
    """What `fused_step` takes, for one batch of several."""

    state: FusedState
    gradient_v: Float[Tensor, "*batch out r"]
    gradient_t_u: Float[Tensor, "*batch in_ r"]
    options: StepOptions
    anchor: Factors | None = None
    core_direction: Direction | None = None


def fused_step(
    state: FusedState,
    gradient_v: Float[Tensor, "*batch out r"],
    gradient_t_u: Float[Tensor, "*batch in_ r"],
    options: StepOptions,
    anchor: Factors | None = None,
    core_direction: Direction | None = None,
) -> StepResult:
    """Take one Riemannion step for a batch of layers of one shape.

    Args:
        state: points and raw momenta, fp32 or fp64, u^T m_left = 0; see `FusedState`.
        gradient_v: G v, with G the (out, in) loss gradient of the layer's change; see `recover`.
        gradient_t_u: G^T u.
        options: see `StepOptions`.
        anchor: X0 = left right^T, (*, out, k) and (*, in, k): decay pulls towards it; None: towards zero.
        core_direction: in the place of steps 5 to 7, from R_left, R_right and r to a core without lower-right block.

    Returns:
        New state; without `ok` a layer keeps all of it to the bit, without `moved` it keeps its point to the bit.

    Raises:
        NumericalError: an SVD did not converge.

    Cost: O((out + in) r^2 + r^3) per layer, no (out, in) matrix, no host synchronization of its own.
    """
    rank = state.s.shape[-1]
    m_left, m_right = accumulate(state, gradient_v, gradient_t_u, options.momentum)
    # Squares, because QR forms them: a finite number can overflow there, and one Inf makes a batched SVD fail for
    # every layer.
    ok = torch.isfinite(m_left.square().sum(dim=(-2, -1)) + m_right.square().sum(dim=(-2, -1)))
    good = ok[..., None, None]
    m_left, m_right = torch.where(good, m_left, 0.0), torch.where(good, m_right, 0.0)

    decays = options.weight_decay != 0
    anchored = anchor is not None and decays
    lefts, rights = [state.u, m_left], [state.v, m_right]
    if anchor is not None and decays:
        lefts, rights = [*lefts, anchor.left], [*rights, anchor.right]
    q_left, r_left = torch.linalg.qr(torch.cat(lefts, dim=-1))
    q_right, r_right = torch.linalg.qr(torch.cat(rights, dim=-1))

    core = cross_core(r_left, r_right, rank)
    if core_direction is None:
        direction = tangent_direction(core, rank, options)
    else:
        direction = core_direction(r_left, r_right, rank)
    left, values, right = thin_svd(combine(r_left, r_right, state.s, direction, options, anchored))
    left, values, right = left[..., :rank], values[..., :rank], right[..., :rank]
    new_m_left, new_m_right = move_momentum(core, q_left, q_right, left, right)
    new = FusedState(
        q_left @ left,
        values.clamp_min(options.sigma_floor),
        q_right @ right,
        new_m_left,
        new_m_right,
    )

    acts = torch.ones_like(ok) if decays else (core != 0).any(dim=-1).any(dim=-1)
    moved = ok & acts
    write = moved[..., None, None]
    kept = FusedState(
        torch.where(write, new.u, state.u),
        torch.where(moved[..., None], new.s, state.s),
        torch.where(write, new.v, state.v),
        torch.where(good, new.m_left, state.m_left),
        torch.where(good, new.m_right, state.m_right),
    )
    hits = ((values < options.sigma_floor) & moved[..., None]).sum(dim=-1)
    return StepResult(kept, ok, moved, hits)
