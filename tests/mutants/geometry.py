"""Wrong geometry: what a retraction, projection or transport looks like when one term is missing or misread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dreamrie.fixed_rank as real
from dreamrie.fixed_rank import Factors, Point, Tangent
from tests.mutants import Law, Mutant, each, replaced
from tests.properties import test_fixed_rank_retraction_laws as retraction_laws
from tests.properties import test_fixed_rank_tangent_laws as tangent_laws
from tests.strategies import POINTS, TAME

_qr = torch.linalg.qr


def _common(point: Point, tangent: Tangent, step: float, flip: bool = False) -> Point:
    """A correct retraction in another form, the base of some mutants."""
    rank = point.s.shape[-1]
    left = torch.cat([point.u, step * tangent.d_left], dim=-1)
    right = torch.cat([point.v * point.s.unsqueeze(-2) + step * tangent.d_right, point.v], dim=-1)
    q_left, r_left = _qr(left)
    q_right, r_right = _qr(right)
    core_left, values, core_right_t = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return Point(
        q_left @ core_left[..., :rank], values[..., :rank], q_right @ core_right_t.mT[..., :rank]
    )


def project_core_transposed(point: Point, z_times_v: Tensor, zt_times_u: Tensor) -> Tangent:
    tangent = real.Tangent(real.remove_component(point.u, z_times_v), zt_times_u)
    core = point.v.mT @ tangent.d_right
    return Tangent(tangent.d_left, tangent.d_right - point.v @ core + point.v @ core.mT)


def project_obliquely(point: Point, z_times_v: Tensor, zt_times_u: Tensor) -> Tangent:
    """A projection along a direction that is not the normal one."""
    lean = point.u + 0.3 * real.remove_component(point.u, point.u.roll(1, dims=-2))
    return Tangent(z_times_v - point.u @ (lean.mT @ z_times_v), zt_times_u)


def project_without_left_complement(point: Point, z_times_v: Tensor, zt_times_u: Tensor) -> Tangent:
    return Tangent(z_times_v, zt_times_u)


def project_without_right_complement(
    point: Point, z_times_v: Tensor, zt_times_u: Tensor
) -> Tangent:
    right = zt_times_u - point.v @ (point.v.mT @ zt_times_u)
    return Tangent(real.remove_component(point.u, z_times_v), right)


def project_without_left_part(point: Point, z_times_v: Tensor, zt_times_u: Tensor) -> Tangent:
    """u u^T Z: what Z - (I - u u^T) Z (I - v v^T) becomes without its last factor."""
    return Tangent(torch.zeros_like(z_times_v), zt_times_u)


def project_in_bf16(point: Point, z_times_v: Tensor, zt_times_u: Tensor) -> Tangent:
    left, right = (part.bfloat16().to(part.dtype) for part in (z_times_v, zt_times_u))
    return Tangent(real.remove_component(point.u, left), right)


def project_half_core(point: Point, z_times_v: Tensor, zt_times_u: Tensor) -> Tangent:
    core = point.v @ (point.v.mT @ zt_times_u)
    return Tangent(real.remove_component(point.u, z_times_v), zt_times_u - 0.5 * core)


def project_low_rank_with_right_frame(point: Point, left: Tensor, right: Tensor) -> Tangent:
    """Alg. 2 as printed, A_R read as B_R; it has a shape at out = in only."""
    wrong = point.v
    return Tangent(
        (left - wrong @ (wrong.mT @ left)) @ (right.mT @ point.v), right @ (left.mT @ point.u)
    )


def retract_nowhere(point: Point, tangent: Tangent, step: float = 1.0) -> Point:
    return point


def retract_twice_as_far(point: Point, tangent: Tangent, step: float = 1.0) -> Point:
    return _common(point, tangent, 2 * step)


def retract_backwards(point: Point, tangent: Tangent, step: float = 1.0) -> Point:
    return _common(point, tangent, -step)


def retract_without_left(point: Point, tangent: Tangent, step: float = 1.0) -> Point:
    return _common(point, Tangent(torch.zeros_like(tangent.d_left), tangent.d_right), step)


def retract_without_core(point: Point, tangent: Tangent, step: float = 1.0) -> Point:
    right = tangent.d_right - point.v @ (point.v.mT @ tangent.d_right)
    return _common(point, Tangent(tangent.d_left, right), step)


def retract_of_frame(point: Point, tangent: Tangent, step: float = 1.0) -> Point:
    """The point dropped from the right factor: B_R where B = B_R diag(s) belongs."""
    return _common(Point(point.u, torch.ones_like(point.s), point.v), tangent, step)


def retract_with_residual_qr(point: Point, tangent: Tangent, step: float = 1.0) -> Point:
    """QR of d_left alone, the pair [u, Q] taken for orthonormal."""
    u, s, v = point
    rank = s.shape[-1]
    right = tangent.d_right - v @ (v.mT @ tangent.d_right)
    q_left, r_left = _qr(tangent.d_left)
    q_right, r_right = _qr(right)
    core = torch.zeros(2 * rank, 2 * rank, dtype=u.dtype)
    core[:rank, :rank] = torch.diag(s) + step * (v.mT @ tangent.d_right).mT
    core[rank:, :rank] = step * r_left
    core[:rank, rank:] = step * r_right.mT
    left, values, right_t = torch.linalg.svd(core)
    return Point(
        torch.cat([u, q_left], dim=-1) @ left[:, :rank],
        values[:rank],
        torch.cat([v, q_right], dim=-1) @ right_t.mT[:, :rank],
    )


def retract_without_check(point: Point, tangent: Tangent, step: float = 1.0) -> Point:
    return _common(point, Tangent(*(torch.nan_to_num(part) for part in tangent)), step)


def retract_two_decompositions(point: Point, tangent: Tangent, step: float = 1.0) -> Point:
    """u and v from different SVDs: their signs do not match."""
    new = _common(point, tangent, step)
    flip = torch.ones_like(new.s)
    flip[..., 0] = -1
    return Point(new.u * flip.unsqueeze(-2), new.s, new.v)


def retract_from_oriented_left(point: Point, tangent: Tangent, step: float = 1.0) -> Point:
    """Signs fixed for u alone, as a QR of one factor by itself fixes them."""
    signs = torch.where(point.u[..., :1, :] < 0, -1.0, 1.0).to(point.u.dtype)
    return _common(Point(point.u * signs, point.s, point.v), tangent, step)


def transport_identity(old_point: Point, tangent: Tangent, new_point: Point) -> Tangent:
    """Old coordinates in new frames."""
    return tangent


def transport_left_only(old_point: Point, tangent: Tangent, new_point: Point) -> Tangent:
    return Tangent(real.remove_component(new_point.u, tangent.d_left), tangent.d_right)


def transport_swapped(old_point: Point, tangent: Tangent, new_point: Point) -> Tangent:
    """Pairing [d_left, u] with [d_right, v]."""
    left = torch.cat([tangent.d_left, old_point.u], dim=-1)
    right = torch.cat([tangent.d_right, old_point.v], dim=-1)
    return real.project_low_rank(new_point, left, right)


def inner_product_doubled(a: Tangent, b: Tangent) -> Tensor:
    return (a.d_left * b.d_left).sum(dim=(-2, -1)) + 2 * (a.d_right * b.d_right).sum(dim=(-2, -1))


def inner_product_of_left(a: Tangent, b: Tangent) -> Tensor:
    return (a.d_left * b.d_left).sum(dim=(-2, -1))


def msign_unmasked(core: Tensor, tol: float | None = None) -> Tensor:
    left, _, right_t = torch.linalg.svd(core, full_matrices=False)
    return left @ right_t


def msign_farthest(core: Tensor, tol: float | None = None) -> Tensor:
    """Eq. (2) as printed: arg max of the distance."""
    left, _, right_t = torch.linalg.svd(core, full_matrices=False)
    return -left @ right_t


def msign_with_wrong_pairing(point: Point, tangent: Tangent, tol: float | None = None) -> Factors:
    """Alg. 1 with [u, d_left] paired to [v, d_right]."""
    q_left, r_left = _qr(torch.cat([point.u, tangent.d_left], dim=-1))
    q_right, r_right = _qr(torch.cat([point.v, tangent.d_right], dim=-1))
    return Factors(q_left @ real.masked_msign(r_left @ r_right.mT), q_right)


def msign_with_transposed_qr(point: Point, tangent: Tangent, tol: float | None = None) -> Factors:
    """Alg. 1 line 1 as printed: qr([d_right, v]^T)."""
    q_left, r_left = _qr(torch.cat([point.u, tangent.d_left], dim=-1))
    q_right, r_right = _qr(torch.cat([point.v, tangent.d_right], dim=-1).mT)
    return Factors(q_left @ real.masked_msign(r_left @ r_right.mT), q_right)


def factors_without_scale(left: Tensor, right: Tensor, scale: float = 1.0) -> Point:
    return _point(left, right)


def _point(left: Tensor, right: Tensor) -> Point:
    u, s, v_t = torch.linalg.svd(left @ right.mT, full_matrices=False)
    rank = left.shape[-1]
    return Point(u[..., :rank], s[..., :rank], v_t.mT[..., :rank])


def factors_of_two_svds(left: Tensor, right: Tensor, scale: float = 1.0) -> Point:
    """u from one decomposition and v from another."""
    point = _point(scale * left, right)
    u = torch.linalg.svd(scale * right @ left.mT, full_matrices=False)[2].mT[..., : left.shape[-1]]
    return Point(-u, point.s, point.v)


def geometry(name: str, law: Law, why: str, raises: Any = AssertionError, **wrong: Any) -> Mutant:
    return Mutant(name, law, lambda: replaced(real, **wrong), why, (raises,))


# The printed Alg. 2 has a shape at out = in only.
SQUARE = next(point for point in POINTS if point.out == point.in_)

M1 = each(tangent_laws.law_m1_projection_is_idempotent, POINTS)
M2 = each(tangent_laws.law_m2_projection_is_self_adjoint, POINTS)
M3 = each(tangent_laws.law_m3_projection_is_the_closest_tangent, POINTS)
M4 = each(tangent_laws.law_m4_projection_is_factored_and_normal, POINTS)
SQUARE_M4 = each(tangent_laws.law_m4_projection_is_factored_and_normal, (SQUARE,))
FP32 = each(tangent_laws.law_m1_m4_in_fp32, POINTS)
M5 = each(retraction_laws.law_m5_retraction_is_of_second_order, TAME)
FP32_M5 = each(retraction_laws.law_m5_in_fp32, TAME)
M6 = each(retraction_laws.law_m6_retraction_is_the_truncated_svd, TAME)
M7 = each(retraction_laws.law_m7_gradient_predicts_the_change, TAME)
M8 = each(tangent_laws.law_m8_transport_is_a_projection, POINTS)
M9 = each(tangent_laws.law_m9_inner_products_equal_dense, POINTS)
M12 = each(retraction_laws.law_m12_only_the_matrix_matters, TAME)
MSIGN = each(tangent_laws.law_msign_equals_dense, POINTS)
ENTRY = each(retraction_laws.law_point_depends_on_the_product, TAME)

MUTANTS = [
    geometry(
        "projection along another direction",
        M2,
        "idempotent but not self-adjoint",
        project=project_obliquely,
    ),
    geometry(
        "core transposed",
        M1,
        "K and K^T differ unless K is symmetric",
        project=project_core_transposed,
    ),
    geometry(
        "I - u u^T missing",
        M4,
        "d_left keeps the core: it is counted twice",
        project=project_without_left_complement,
    ),
    geometry(
        "I - u u^T missing: not idempotent",
        M1,
        "the core doubles at each projection",
        project=project_without_left_complement,
    ),
    geometry(
        "core removed by I - v v^T",
        M3,
        "the projection misses u u^T Z v v^T",
        project=project_without_right_complement,
    ),
    geometry(
        "I - v v^T missing",
        M4,
        "u u^T Z is no projection on the whole tangent space",
        project=project_without_left_part,
    ),
    geometry(
        "projection in bf16", FP32, "fp32 keeps seven digits, bf16 two", project=project_in_bf16
    ),
    geometry("half of the core", M1, "0.5 twice is 0.25", project=project_half_core),
    geometry(
        "Alg. 2 with A_R read as B_R",
        SQUARE_M4,
        "differs from Eq. (6) even at out = in",
        project_low_rank=project_low_rank_with_right_frame,
    ),
    geometry("retraction returns X", M5, "slope 1, not 2", retract=retract_nowhere),
    geometry("retraction moves by 2 xi", M5, "slope 1", retract=retract_twice_as_far),
    geometry(
        "retraction moves by -xi", M7, "f changes with the wrong sign", retract=retract_backwards
    ),
    geometry("retraction moves by 2 xi: fp32", FP32_M5, "slope 1", retract=retract_twice_as_far),
    geometry(
        "signs of u fixed by themselves",
        M12,
        "u diag(s) v^T keeps its signs only if both frames turn together",
        retract=retract_from_oriented_left,
    ),
    geometry("retraction drops d_left", M5, "slope 1", retract=retract_without_left),
    geometry(
        "retraction drops the core",
        M6,
        "differs from the truncated SVD",
        retract=retract_without_core,
    ),
    geometry(
        "retraction of the frame instead of the point", M6, "R(0) = u v^T", retract=retract_of_frame
    ),
    geometry(
        "QR of d_left alone",
        retraction_laws.law_m10_frames_stay_orthonormal,
        "null columns of d_left give a basis that is not orthogonal to u",
        retract=retract_with_residual_qr,
    ),
    geometry(
        "NaN swallowed by the retraction",
        retraction_laws.law_m11_degenerate_input_is_survived_or_named,
        "a NaN must be named",
        retract=retract_without_check,
    ),
    geometry(
        "u and v of two decompositions", M6, "one sign is wrong", retract=retract_two_decompositions
    ),
    geometry(
        "transport is the identity",
        M8,
        "old coordinates in new frames",
        transport=transport_identity,
    ),
    geometry(
        "transport projects one side",
        M8,
        "d_right still belongs to the old frame",
        transport=transport_left_only,
    ),
    geometry(
        "transport pairs [d_left, u] with [d_right, v]",
        M8,
        "another matrix",
        transport=transport_swapped,
    ),
    geometry(
        "inner product doubles the core",
        M9,
        "differs from the Frobenius product",
        inner_product=inner_product_doubled,
    ),
    geometry(
        "inner product of the left part",
        M9,
        "half of the vector is missing",
        inner_product=inner_product_of_left,
    ),
    geometry(
        "msign without a mask",
        MSIGN,
        "null directions become noise of size one",
        masked_msign=msign_unmasked,
    ),
    geometry(
        "Eq. (2) with arg max",
        MSIGN,
        "the farthest isometry is minus the nearest",
        masked_msign=msign_farthest,
    ),
    geometry(
        "Alg. 1 with the wrong pairing",
        MSIGN,
        "error 0.33 in a matrix of unit singular values",
        msign=msign_with_wrong_pairing,
    ),
    geometry(
        "Alg. 1 with qr([Ḃ, B_R]^T)",
        MSIGN,
        "the shapes do not fit",
        RuntimeError,
        msign=msign_with_transposed_qr,
    ),
    geometry(
        "scale of the factors forgotten",
        ENTRY,
        "c is part of X",
        point_from_factors=factors_without_scale,
    ),
    geometry(
        "factors read by two SVDs",
        ENTRY,
        "the signs of u and v do not match",
        point_from_factors=factors_of_two_svds,
    ),
]
