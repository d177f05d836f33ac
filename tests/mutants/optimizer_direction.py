"""Wrong directions: the core, its orthogonal factor and the momentum misread, as printed or by a shortcut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dreamrie.fixed_rank as fixed_rank
import dreamrie.riemannion_step as step
from dreamrie.fixed_rank import Factors
from dreamrie.riemannion_step import FusedState, StepOptions, StepResult
from tests.mutants.broken_optimizers import DENSE, MOVE, SPECTRUM, wrong_path, wrong_step
from tests.properties import test_riemannion_direction_laws as direction_laws
from tests.properties import test_riemannion_path_laws as path_laws
from tests.properties import test_riemannion_step_laws as step_laws
from tests.properties import test_riemannion_symmetry_laws as symmetry_laws

_fused_step = step.fused_step
_accumulate = step.accumulate
_masked_msign = step.masked_msign
_zero = step.zero_normal_block


# ------------------------------------------------------------------------------------------------- core and msign


def keep_normal_block(core: Tensor, rank: int) -> Tensor:
    return core


def zero_upper_left_block(core: Tensor, rank: int) -> Tensor:
    mask = torch.ones(core.shape[-2:], dtype=core.dtype)
    mask[:rank, :rank] = 0
    return core * mask


def msign_unmasked(core: Tensor, tol: float | None = None) -> Tensor:
    left, _, right_t = torch.linalg.svd(core, full_matrices=False)
    return left @ right_t


def msign_by_gram(core: Tensor, tol: float | None = None) -> Tensor:
    values, vectors = torch.linalg.eigh(core.mT @ core)
    return core @ (vectors * values.clamp_min(1e-30).rsqrt().unsqueeze(-2)) @ vectors.mT


def msign_newton_schulz(core: Tensor, tol: float | None = None) -> Tensor:
    """Muon's quintic, five iterations: singular values near one by design, not one."""
    x = core / (torch.linalg.matrix_norm(core)[..., None, None] + 1e-30)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def direction_is_momentum(core: Tensor, rank: int, options: StepOptions) -> Tensor:
    """Riemannian SGD with momentum instead of its orthogonal factor."""
    return core


# ------------------------------------------------------------------------------------------------- momentum


def accumulate_unprojected(
    state: FusedState, gradient_v: Tensor, gradient_t_u: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """G v without (I - u u^T): the core is counted twice."""
    return momentum * state.m_left + gradient_v, momentum * state.m_right + gradient_t_u


def accumulate_nothing(
    state: FusedState, gradient_v: Tensor, gradient_t_u: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    return _accumulate(state, gradient_v, gradient_t_u, 0.0)


def accumulate_entrywise(
    state: FusedState, gradient_v: Tensor, gradient_t_u: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Signs of entries, as Adam's first step takes them: they depend on the axes."""
    return _accumulate(state, gradient_v.sign(), gradient_t_u.sign(), momentum)


def accumulate_by_blocks(
    state: FusedState, gradient_v: Tensor, gradient_t_u: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Each block of the gradient divided by its own norm; the core lies in the right one alone."""
    normal = fixed_rank.remove_component(state.u, gradient_v)
    left, right = (
        block / torch.linalg.vector_norm(block, dim=(-2, -1), keepdim=True)
        for block in (normal, gradient_t_u)
    )
    return _accumulate(state, left, right, momentum)


def keep_old_coordinates(
    core: Tensor, q_left: Tensor, q_right: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Tangent coordinates of the old point in the new frames, no projection."""
    rank = left.shape[-1]
    new_left, new_right = q_left @ core[..., :rank], q_right @ core.mT[..., :rank]
    return new_left, new_right


def move_without_normal_part(
    core: Tensor, q_left: Tensor, q_right: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """m_left keeps its component along u."""
    return q_left @ (core @ right), q_right @ (core.mT @ left)


def step_storing_msign(
    state: FusedState,
    gradient_v: Tensor,
    gradient_t_u: Tensor,
    options: StepOptions,
    anchor: Factors | None = None,
) -> StepResult:
    """Alg. 4 line 6: momentum stored after orthogonalization."""
    result = _fused_step(state, gradient_v, gradient_t_u, options, anchor)
    new = result.state
    rank = new.s.shape[-1]
    q_left, r_left = torch.linalg.qr(torch.cat([new.u, new.m_left], dim=-1))
    q_right, r_right = torch.linalg.qr(torch.cat([new.v, new.m_right], dim=-1))
    ortho = _zero(_masked_msign(step.cross_core(r_left, r_right, rank)), rank)
    a, b = q_left.mT @ new.u, q_right.mT @ new.v
    m_left = q_left @ fixed_rank.remove_component(a, ortho @ b)
    return result._replace(state=new._replace(m_left=m_left, m_right=q_right @ (ortho.mT @ a)))


def step_with_residual_qr(
    state: FusedState,
    gradient_v: Tensor,
    gradient_t_u: Tensor,
    options: StepOptions,
    anchor: Factors | None = None,
) -> StepResult:
    """QR of m_left alone, [u, Q] taken for orthonormal."""
    u, s, v = state.u, state.s, state.v
    rank = s.shape[-1]
    m_left, m_right = _accumulate(state, gradient_v, gradient_t_u, options.momentum)
    normal = m_right - v @ (v.mT @ m_right)
    q_left, r_left = torch.linalg.qr(m_left)
    q_right, r_right = torch.linalg.qr(normal)
    zero = torch.zeros_like(r_left)
    core = torch.cat(
        [torch.cat([m_right.mT @ v, r_right.mT], dim=-1), torch.cat([r_left, zero], dim=-1)], dim=-2
    )
    direction = step.tangent_direction(core, rank, options)
    point = torch.zeros_like(core)
    point[..., :rank, :rank] = torch.diag_embed(s)
    left, values, right_t = torch.linalg.svd(point - options.lr * direction)
    a, b = left[..., :rank], right_t.mT[..., :rank]
    base_left, base_right = torch.cat([u, q_left], dim=-1), torch.cat([v, q_right], dim=-1)
    new_left = base_left @ fixed_rank.remove_component(a, core @ b)
    new = FusedState(
        base_left @ a, values[..., :rank], base_right @ b, new_left, base_right @ (core.mT @ a)
    )
    ok = torch.ones(s.shape[:-1], dtype=torch.bool)
    return StepResult(new, ok, ok, ok.long())


def every_step_storing_msign(works: Any) -> list[StepResult]:
    return [step_storing_msign(*work[:5]) for work in works]


# ------------------------------------------------------------------------------------------------- registry


MUTANTS = [
    wrong_step(
        "lower-right block kept",
        DENSE,
        "the direction is not tangent",
        zero_normal_block=keep_normal_block,
    ),
    wrong_step(
        "lower-right block kept: spectrum",
        SPECTRUM,
        "all singular values one, <M, D> still right",
        zero_normal_block=keep_normal_block,
    ),
    wrong_step(
        "upper-left block zeroed",
        SPECTRUM,
        "<M, D> loses the core",
        zero_normal_block=zero_upper_left_block,
    ),
    wrong_step(
        "upper-left block zeroed: masked momentum",
        direction_laws.law_9_bounds_hold_with_masks,
        "<M, D> loses the core, null directions or not",
        zero_normal_block=zero_upper_left_block,
    ),
    wrong_step(
        "null directions lifted to one",
        direction_laws.law_o14_null_directions_are_masked,
        "noise of size lr",
        masked_msign=msign_unmasked,
    ),
    wrong_step(
        "msign by the Gram matrix", DENSE, "half of the digits are lost", masked_msign=msign_by_gram
    ),
    wrong_step(
        "Newton-Schulz in the place of msign",
        SPECTRUM,
        "singular values 0.7 to 1.2",
        masked_msign=msign_newton_schulz,
    ),
    wrong_step(
        "no orthogonalization",
        MOVE,
        "the step is the momentum itself",
        tangent_direction=direction_is_momentum,
    ),
    wrong_step(
        "gradient not projected", DENSE, "the core enters twice", accumulate=accumulate_unprojected
    ),
    wrong_step(
        "momentum forgotten", DENSE, "every step is the first", accumulate=accumulate_nothing
    ),
    wrong_step(
        "momentum not transported",
        DENSE,
        "old coordinates in new frames",
        move_momentum=keep_old_coordinates,
    ),
    wrong_path(
        "momentum not transported: path",
        path_laws.law_o5_path_equals_dense,
        "off by 12 to 15 % after 20 steps",
        move_momentum=keep_old_coordinates,
    ),
    wrong_step(
        "transport leaves u in m_left",
        DENSE,
        "the core enters twice",
        move_momentum=move_without_normal_part,
    ),
    wrong_step(
        "transport leaves u in m_left: frames",
        step_laws.law_2_frames_stay_orthonormal_in_fp64,
        "u^T m_left is not zero",
        move_momentum=move_without_normal_part,
    ),
    wrong_path(
        "signs of entries",
        symmetry_laws.law_o2_orthogonal_equivariance,
        "the path depends on the axes",
        accumulate=accumulate_entrywise,
    ),
    wrong_path(
        "blocks normalized one by one",
        symmetry_laws.law_o3_transposition,
        "the core counts as part of the right block only",
        accumulate=accumulate_by_blocks,
    ),
    wrong_path(
        "momentum stored after msign: average",
        path_laws.law_8_average_equals_heavy_ball,
        "a fresh gradient is added to a buffer of norm one",
        fast_steps=every_step_storing_msign,
    ),
    wrong_path(
        "momentum stored after msign",
        symmetry_laws.law_o16_loss_scale,
        "small gradients freeze the direction",
        fast_steps=every_step_storing_msign,
    ),
    wrong_path(
        "momentum stored after msign: path",
        path_laws.law_o5_path_equals_dense,
        "Alg. 4 line 6",
        fast_steps=every_step_storing_msign,
    ),
    wrong_step(
        "QR of m_left alone",
        step_laws.law_2_frames_stay_orthonormal,
        "null columns are not orthogonal to u",
        fused_step=step_with_residual_qr,
    ),
]
