"""Wrong updates: the paper's printed-but-wrong formulas, and every tempting shortcut in decay, guards and batches."""

from __future__ import annotations

import torch
from torch import Tensor

import dreamrie.riemannion_step as step
from dreamrie.fixed_rank import Factors
from dreamrie.riemannion_step import FusedState, StepOptions, StepResult
from tests.mutants.broken_optimizers import DECAY, DENSE, MOVE, wrong_path, wrong_step
from tests.properties import test_riemannion_direction_laws as direction_laws
from tests.properties import test_riemannion_path_laws as path_laws
from tests.properties import test_riemannion_step_laws as step_laws

_fused_step = step.fused_step
_combine = step.combine


# ------------------------------------------------------------------------------------------------- point and decay


def combine_printed_in_alg_4(
    r_left: Tensor,
    r_right: Tensor,
    s: Tensor,
    direction: Tensor,
    options: StepOptions,
    anchored: bool,
) -> Tensor:
    """Alg. 4 line 5: [B_R, -lr (D + wd B_R)], the point itself is gone from the right factor."""
    rank = s.shape[-1]
    here = r_left[..., :rank] @ r_right[..., :rank].mT
    return here * 0.0 - options.lr * (direction + options.weight_decay * here)


def combine_with_frame(
    r_left: Tensor,
    r_right: Tensor,
    s: Tensor,
    direction: Tensor,
    options: StepOptions,
    anchored: bool,
) -> Tensor:
    """wd B_R where wd B belongs: decay of A_L B_R^T."""
    rank = s.shape[-1]
    frame = r_left[..., :rank] @ r_right[..., :rank].mT
    here = (r_left[..., :rank] * s.unsqueeze(-2)) @ r_right[..., :rank].mT
    return here - options.lr * (direction + options.weight_decay * frame)


def combine_upwards(
    r_left: Tensor,
    r_right: Tensor,
    s: Tensor,
    direction: Tensor,
    options: StepOptions,
    anchored: bool,
) -> Tensor:
    return _combine(r_left, r_right, s, -direction, options, anchored)


def combine_twice(
    r_left: Tensor,
    r_right: Tensor,
    s: Tensor,
    direction: Tensor,
    options: StepOptions,
    anchored: bool,
) -> Tensor:
    return _combine(r_left, r_right, s, 2 * direction, options, anchored)


def combine_coupled_decay(
    r_left: Tensor,
    r_right: Tensor,
    s: Tensor,
    direction: Tensor,
    options: StepOptions,
    anchored: bool,
) -> Tensor:
    """Decay without the factor lr."""
    rank = s.shape[-1]
    here = (r_left[..., :rank] * s.unsqueeze(-2)) @ r_right[..., :rank].mT
    return (1 - options.weight_decay) * here - options.lr * direction


def combine_to_zero(
    r_left: Tensor,
    r_right: Tensor,
    s: Tensor,
    direction: Tensor,
    options: StepOptions,
    anchored: bool,
) -> Tensor:
    return _combine(r_left, r_right, s, direction, options, False)


def combine_away_from_anchor(
    r_left: Tensor,
    r_right: Tensor,
    s: Tensor,
    direction: Tensor,
    options: StepOptions,
    anchored: bool,
) -> Tensor:
    """The sign of the anchor's factors taken for the anchor: X + X0."""
    if anchored:
        r_left = r_left.clone()
        r_left[..., 2 * s.shape[-1] :] *= -1
    return _combine(r_left, r_right, s, direction, options, anchored)


# ------------------------------------------------------------------------------------------------- guards and batches


def step_without_guard(
    state: FusedState,
    gradient_v: Tensor,
    gradient_t_u: Tensor,
    options: StepOptions,
    anchor: Factors | None = None,
) -> StepResult:
    """NaN replaced by zero and stepped on."""
    clean = [
        torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0).clamp(-1e15, 1e15)
        for g in (gradient_v, gradient_t_u)
    ]
    return _fused_step(state, *clean, options, anchor)


def step_skipping_the_batch(
    state: FusedState,
    gradient_v: Tensor,
    gradient_t_u: Tensor,
    options: StepOptions,
    anchor: Factors | None = None,
) -> StepResult:
    """One bad layer stops all of its shape."""
    result = _fused_step(state, gradient_v, gradient_t_u, options, anchor)
    if bool(result.ok.all()):
        return result
    return StepResult(state, result.ok & False, result.moved & False, result.floor_hits)


def step_mixing_layers(
    state: FusedState,
    gradient_v: Tensor,
    gradient_t_u: Tensor,
    options: StepOptions,
    anchor: Factors | None = None,
) -> StepResult:
    """Another layer's gradient."""
    return _fused_step(state, gradient_v.roll(1, 0), gradient_t_u.roll(1, 0), options, anchor)


def step_without_floor(
    state: FusedState,
    gradient_v: Tensor,
    gradient_t_u: Tensor,
    options: StepOptions,
    anchor: Factors | None = None,
) -> StepResult:
    return _fused_step(
        state, gradient_v, gradient_t_u, options._replace(sigma_floor=1e-300), anchor
    )


# ------------------------------------------------------------------------------------------------- registry


MUTANTS = [
    wrong_step(
        "Alg. 4 line 5 as printed",
        DENSE,
        "the norm collapses in one step",
        combine=combine_printed_in_alg_4,
    ),
    wrong_path(
        "Alg. 4 line 5 as printed: path",
        path_laws.law_o5_path_equals_dense,
        "the point is dropped from the right factor",
        combine=combine_printed_in_alg_4,
    ),
    wrong_step(
        "decay of the frame",
        DECAY,
        "A_L B_R^T is not the point unless s = 1",
        combine=combine_with_frame,
    ),
    wrong_step(
        "ascent",
        step_laws.law_o13_first_step_descends,
        "plus signs, as in Alg. 6 line 14",
        combine=combine_upwards,
    ),
    wrong_path(
        "ascent on a quadratic",
        path_laws.law_o13_quadratic_of_rank_r_is_solved,
        "the loss rises",
        combine=combine_upwards,
    ),
    wrong_step(
        "step of twice the length", MOVE, "lr is not the spectral norm", combine=combine_twice
    ),
    wrong_step(
        "step of twice the length: cosine",
        direction_laws.law_22_small_points_bend_the_step,
        "the table is over |alpha| / lr",
        combine=combine_twice,
    ),
    wrong_path(
        "step of twice the length: by hand",
        path_laws.law_o4_example_by_hand,
        "another matrix on paper",
        combine=combine_twice,
    ),
    wrong_step(
        "decay without lr",
        DECAY,
        "decoupled decay is multiplied by lr",
        combine=combine_coupled_decay,
    ),
    wrong_step(
        "decay to zero where the anchor is asked",
        DECAY,
        "X0 is no fixed point",
        combine=combine_to_zero,
    ),
    wrong_step(
        "decay to zero shrinks X, not X - X0",
        step_laws.law_16_anchored_decay_shrinks_the_change,
        "the change grows",
        combine=combine_to_zero,
    ),
    wrong_step(
        "anchor with the sign of its factors",
        DECAY,
        "pulls to -X0",
        combine=combine_away_from_anchor,
    ),
    wrong_step(
        "NaN replaced by zero",
        step_laws.law_11_non_finite_layers_are_left_alone,
        "the layer moves on noise",
        fused_step=step_without_guard,
    ),
    wrong_step(
        "one bad layer stops its batch",
        step_laws.law_11_non_finite_layers_are_left_alone,
        "the others must go on",
        fused_step=step_skipping_the_batch,
    ),
    wrong_step(
        "another layer's gradient",
        step_laws.law_4_batched_equals_one_by_one,
        "layers mix",
        fused_step=step_mixing_layers,
    ),
    wrong_step(
        "no floor under s",
        step_laws.law_floor_keeps_rank,
        "the point leaves the manifold",
        fused_step=step_without_floor,
    ),
]
