"""Wrong optimizers: the paper's printed-but-wrong formulas, and every tempting shortcut in a step or its contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

import dreamrie.fixed_rank as fixed_rank
import dreamrie.riemannion as riemannion
import dreamrie.riemannion_layers as layers
import dreamrie.riemannion_step as step
from dreamrie.fixed_rank import Factors
from dreamrie.riemannion_step import FusedState, StepOptions, StepResult
from tests.mutants import Law, Mutant, each, replaced
from tests.properties import test_riemannion_laws as path_laws
from tests.properties import test_riemannion_step_laws as step_laws

_fused_step = step.fused_step
_combine = step.combine
_accumulate = step.accumulate
_masked_msign = step.masked_msign
_recover = step.recover
_balanced = step.balanced_factors
_zero = step.zero_normal_block


@contextmanager
def broken_step(**wrong: Any) -> Iterator[Any]:
    """Yield the step module with wrong pieces, in place wherever the optimizer imported them."""
    with ExitStack() as stack:
        for module in (step, layers, riemannion):
            here = {name: value for name, value in wrong.items() if hasattr(module, name)}
            if here:
                stack.enter_context(replaced(module, **here))
        yield step


@contextmanager
def broken_optimizer(**wrong: Any) -> Iterator[Any]:
    """Yield the optimizer's module on top of a broken step."""
    with broken_step(**wrong):
        yield riemannion


@contextmanager
def other_class(wrong: type[Any]) -> Iterator[Any]:
    """Yield the optimizer's module with a wrong subclass in the place of Riemannion."""
    with replaced(riemannion, Riemannion=wrong):
        yield riemannion


# ------------------------------------------------------------------------------------------------- pieces of the step


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


def recover_without_scaling(factor_gradient: Tensor, s: Tensor, scaling: Any) -> Tensor:
    return factor_gradient / s.sqrt().unsqueeze(-2)


def recover_nothing(factor_gradient: Tensor, s: Tensor, scaling: Any) -> Tensor:
    """The factor gradient itself: no division by sqrt(c s)."""
    return factor_gradient


def recover_damped(factor_gradient: Tensor, s: Tensor, scaling: Any) -> Tensor:
    return factor_gradient / ((scaling * s).sqrt() + 1e-6).unsqueeze(-2)


def balanced_without_scaling(frame: Tensor, s: Tensor, scaling: Any) -> Tensor:
    return frame * s.sqrt().unsqueeze(-2)


def balanced_all_on_one_side(frame: Tensor, s: Tensor, scaling: Any) -> Tensor:
    return frame * (s / scaling).unsqueeze(-2)


# ------------------------------------------------------------------------------------------------- contract


class GradientWriting(riemannion.Riemannion):
    """Turns a missing gradient into zeros and momentum into p.grad, as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return super().step(closure)


class GradientScaling(riemannion.Riemannion):
    """Normalizes p.grad in place."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= parameter.grad.norm() + 1e-12
        return super().step(closure)


class SteppingTwice(riemannion.Riemannion):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step()


class ParameterDtypeState(riemannion.Riemannion):
    """State in the dtype of the parameters, as torch's own load_state_dict leaves it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.optim.Optimizer.load_state_dict(self, state_dict)


class Bf16State(riemannion.Riemannion):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for parameter, entry in self.state.items():
            for value in entry.values():
                value.copy_(value.to(parameter.dtype))
        for group in self.param_groups:
            for layer in layers.layers_of(group):
                entries = [self.state[f.parameter] for f in layer.factors]
                s = entries[0]["singular_values"]
                for factor, entry in zip(layer.factors, entries, strict=True):
                    factor.write_(_balanced(entry["basis"], s, layer.scaling))
        return result


class LazyState(riemannion.Riemannion):
    """Loads options and forgets the state: it will be made at the first step anyway."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.state.clear()


class AliasedState(riemannion.Riemannion):
    """Keeps the tensors of the argument."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            self.state[parameter] = state_dict["state"][index]


class HiddenMomentum(riemannion.Riemannion):
    """Keeps a buffer that no checkpoint sees."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self._velocity = [entry["momentum"].clone() for entry in self.state.values()]
        return result


class ClaimingToUnscale(riemannion.Riemannion):
    """Tells GradScaler that it handles the loss scale itself, and does not."""

    _step_supports_amp_scaling = True


class OptionsOfTheFirstGroup(riemannion.Riemannion):
    """Groups without options of their own."""

    def step(self, closure: Any = None) -> Any:
        first = self.param_groups[0]
        for group in self.param_groups[1:]:
            group.update({name: first[name] for name in ("lr", "momentum", "weight_decay")})
        return super().step(closure)


class ForgettingCounters(riemannion.Riemannion):
    def _count_skips(self, skipped: Any) -> None:
        return None


class NormWithAnchor(riemannion.Riemannion):
    """The norm over whole factors counts the frozen half too."""

    def tangent_grad_norm(self) -> Tensor:
        squares = [
            p.grad.square().sum()
            for g in self.param_groups
            for p in g["params"]
            if p.grad is not None
        ]
        return torch.stack(squares).sum().sqrt()


def stale_point(known: Any, state: Any) -> list[bool]:
    """The stored point is believed whatever the parameters say."""
    return layers.have_state(known, state)


def write_everything_(self: Any, columns: Tensor) -> None:
    """The anchor is decayed along with the point."""
    parameter = self.parameter.detach()
    rank = columns.shape[-1]
    if self.is_right:
        parameter[rank:].mul_(1 - 1e-3)
        parameter[:rank].copy_(columns.mT.reshape(parameter[:rank].shape))
    else:
        parameter[:, rank:].mul_(1 - 1e-3)
        parameter[:, :rank].copy_(columns.reshape(parameter[:, :rank].shape))


def columns_channels_last(self: Any, tensor: Tensor, start: int, stop: int) -> Tensor:
    """Kernel positions before input channels, while they are written the other way round."""
    matrix = tensor.detach()
    matrix = (matrix.permute(0, 2, 3, 1) if matrix.ndim == 4 else matrix).flatten(1)
    return matrix[start:stop].mT if self.is_right else matrix[:, start:stop]


def momentum_lost_on_entry(old_point: Any, tangent: Any, new_point: Any) -> Any:
    return fixed_rank.Tangent(torch.zeros_like(tangent.d_left), torch.zeros_like(tangent.d_right))


def entry_by_division(group_layers: Any, state: Any) -> Any:
    """Foreign factors taken for balanced ones: columns divided where an r x r system has to be solved."""
    point = layers.enter_point(group_layers)
    scaling = layers.scaling_of(group_layers, point.u.dtype)
    tall, short = (g.to(point.u.dtype) for g in layers.stack_gradients(group_layers))
    nil = torch.zeros_like(point.u), torch.zeros_like(point.v)
    target = fixed_rank.working_dtype(group_layers[0].tall.parameter.dtype)
    return layers.Batch(
        group_layers,
        FusedState(*(part.to(target) for part in (*point, *nil))),
        _recover(tall, point.s, scaling).to(target),
        _recover(short, point.s, scaling).to(target),
        torch.zeros(len(group_layers), dtype=torch.long),
    )


# ------------------------------------------------------------------------------------------------- registry


def wrong_step(name: str, law: Law, why: str, **wrong: Any) -> Mutant:
    return Mutant(name, law, lambda: broken_step(**wrong), why)


def wrong_path(name: str, law: Law, why: str, **wrong: Any) -> Mutant:
    return Mutant(name, law, lambda: broken_optimizer(**wrong), why)


def wrong_class(name: str, law: Law, why: str, wrong: type[Any]) -> Mutant:
    return Mutant(name, law, lambda: other_class(wrong), why)


DENSE = each(step_laws.law_o5_step_equals_dense, step_laws.STEP_POINTS)
SPECTRUM = each(step_laws.law_o6_direction_has_the_closed_form_spectrum, step_laws.STEP_POINTS)
MOVE = each(step_laws.law_o6_first_order_move, step_laws.STEP_POINTS)
DECAY = each(step_laws.law_o18_decay_acts_on_the_point, step_laws.STEP_POINTS)

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
        step_laws.law_9_bounds_hold_with_masks,
        "<M, D> loses the core, null directions or not",
        zero_normal_block=zero_upper_left_block,
    ),
    wrong_step(
        "null directions lifted to one",
        step_laws.law_o14_null_directions_are_masked,
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
        step_laws.law_22_small_points_bend_the_step,
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
        path_laws.law_o2_orthogonal_equivariance,
        "the path depends on the axes",
        accumulate=accumulate_entrywise,
    ),
    wrong_path(
        "blocks normalized one by one",
        path_laws.law_o3_transposition,
        "the core counts as part of the right block only",
        accumulate=accumulate_by_blocks,
    ),
    wrong_path(
        "momentum stored after msign: average",
        path_laws.law_8_average_equals_heavy_ball,
        "a fresh gradient is added to a buffer of norm one",
        fused_step=step_storing_msign,
    ),
    wrong_path(
        "momentum stored after msign",
        path_laws.law_o16_loss_scale,
        "small gradients freeze the direction",
        fused_step=step_storing_msign,
    ),
    wrong_path(
        "momentum stored after msign: path",
        path_laws.law_o5_path_equals_dense,
        "Alg. 4 line 6",
        fused_step=step_storing_msign,
    ),
    wrong_step(
        "QR of m_left alone",
        step_laws.law_2_frames_stay_orthonormal,
        "null columns are not orthogonal to u",
        fused_step=step_with_residual_qr,
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
    wrong_step(
        "scaling left out of the recovery",
        step_laws.law_12_recovered_products_equal_the_gradient,
        "c is part of X",
        recover=recover_without_scaling,
    ),
    wrong_step(
        "no division by sqrt(c s)",
        step_laws.law_12_recovered_products_equal_the_gradient,
        "factor gradients are not G v",
        recover=recover_nothing,
    ),
    wrong_step(
        "damped recovery",
        step_laws.law_12_recovered_products_equal_the_gradient,
        "tiny s lose their gradient",
        recover=recover_damped,
    ),
    wrong_path(
        "no division by sqrt(c s): gauge",
        path_laws.law_o5_path_equals_dense,
        "another direction",
        recover=recover_nothing,
    ),
    wrong_path(
        "scaling left out of the factors",
        path_laws.law_o4_example_by_hand,
        "X is c times too large",
        balanced_factors=balanced_without_scaling,
    ),
    wrong_path(
        "s in both factors",
        path_laws.law_o4_example_by_hand,
        "the product holds s twice",
        balanced_factors=balanced_all_on_one_side,
    ),
    wrong_path(
        "foreign factors taken for balanced ones",
        path_laws.law_o1_gauge,
        "the first gradient is read wrongly",
        _enter=entry_by_division,
    ),
    wrong_path(
        "momentum lost when factors are read again",
        path_laws.law_o1_gauge_in_mid_run,
        "the path jumps",
        transport=momentum_lost_on_entry,
    ),
    wrong_path(
        "stale master written back",
        path_laws.law_o15_foreign_factors_are_read_again,
        "an adapter loaded in mid-run vanishes",
        are_own=stale_point,
    ),
    Mutant(
        "anchor decays with the point",
        path_laws.law_a10_anchor_is_frozen,
        lambda: _factor_attributes(write_=write_everything_),
        "the start moves under the change",
    ),
    wrong_class(
        "missing gradients become zeros",
        path_laws.law_o7_gradients_are_read_only,
        "momentum moves a frozen layer",
        GradientWriting,
    ),
    wrong_class(
        "p.grad normalized in place",
        path_laws.law_o7_gradients_are_read_only,
        "p.grad belongs to the caller",
        GradientScaling,
    ),
    Mutant(
        "convolution read channels-last, written channels-first",
        path_laws.law_convolutions_are_matrices,
        lambda: _factor_attributes(columns=columns_channels_last),
        "kernel positions and input channels change places",
    ),
    wrong_class(
        "momentum outside of the state",
        path_laws.law_o17_all_state_is_in_the_state,
        "a checkpoint would miss it",
        HiddenMomentum,
    ),
    wrong_class(
        "loss scale left to the optimizer",
        path_laws.law_o12_grad_scaler,
        "an overflow must leave every layer",
        ClaimingToUnscale,
    ),
    wrong_class(
        "options of the first group for all",
        path_laws.law_groups_and_layers_do_not_mix,
        "each group has its own lr",
        OptionsOfTheFirstGroup,
    ),
    wrong_class("step twice", path_laws.law_o4_example_by_hand, "two steps for one", SteppingTwice),
    wrong_class(
        "state rounded when loaded",
        path_laws.law_o8_state_is_fp32,
        "torch casts state to the parameters' dtype",
        ParameterDtypeState,
    ),
    wrong_class(
        "bf16 state",
        path_laws.law_bf16_masters_do_not_stall,
        "steps below the resolution vanish",
        Bf16State,
    ),
    wrong_class(
        "lazy state",
        path_laws.law_o9_18_state_round_trip,
        "momentum is lost before the first step",
        LazyState,
    ),
    wrong_class(
        "state aliased when loaded",
        path_laws.law_o9_18_state_round_trip,
        "two optimizers share memory",
        AliasedState,
    ),
    wrong_class(
        "skips not counted",
        path_laws.law_o11_non_finite_gradients_are_skipped,
        "a run of NaN goes unseen",
        ForgettingCounters,
    ),
    wrong_class(
        "anchor counted in the tangent norm",
        path_laws.law_tangent_norm_counts_the_point_alone,
        "sqrt(2) too large at step 0",
        NormWithAnchor,
    ),
]


@contextmanager
def _factor_attributes(**wrong: Any) -> Iterator[Any]:
    with replaced(layers.Factor, **wrong):
        yield riemannion
