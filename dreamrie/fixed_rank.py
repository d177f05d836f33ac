"""Geometry of matrices of one fixed rank: points, tangent vectors, projection, retraction, transport.

A point is a thin SVD `(u, s, v)` and stands for the (out, in) matrix X = u diag(s) v^T of rank exactly r. A tangent
vector at it is a pair `(d_left, d_right)` and stands for xi = d_left v^T + u d_right^T, rank at most 2r, Eq. (5). The
gauge u^T d_left = 0 makes the pair unique; the core u^T Z v of a projected matrix Z lives inside `d_right` only. X
itself is a tangent vector: (0, v diag(s)).

Every function is pure, takes leading batch dimensions, forms no (out, in) matrix unless its name says `dense`, and
computes in fp32 at least: torch has no QR or SVD for bf16 and fp16, so such inputs come back as fp32.

Sources: arXiv:2507.12142 (equation numbers refer to it); N. Boumal, An Introduction to Optimization on Smooth
Manifolds, section 7.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dreamrie.errors import NumericalError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float


class Point(NamedTuple):
    """X = u diag(s) v^T: u (*, out, r) and v (*, in, r) orthonormal, s (*, r) descending and > 0."""

    u: Float[Tensor, "*batch out r"]
    s: Float[Tensor, "*batch r"]
    v: Float[Tensor, "*batch in_ r"]


class Tangent(NamedTuple):
    """xi = d_left v^T + u d_right^T at a point: d_left (*, out, r) with u^T d_left = 0, d_right (*, in, r)."""

    d_left: Float[Tensor, "*batch out r"]
    d_right: Float[Tensor, "*batch in_ r"]


class Factors(NamedTuple):
    """The matrix left right^T: left (*, out, k), right (*, in, k), nothing assumed about the columns."""

    left: Float[Tensor, "*batch out k"]
    right: Float[Tensor, "*batch in_ k"]


# ------------------------------------------------------------------------------------------- precision and checks


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that geometry runs in: fp64 for fp64, fp32 for everything below."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _raised(tensor: Tensor) -> Tensor:
    """Bring a tensor to its working dtype."""
    return tensor.to(working_dtype(tensor.dtype))


def _require_finite(where: str, names: str, tensors: Sequence[Tensor]) -> None:
    """Raise NumericalError when one of the tensors holds NaN or Inf."""
    for name, tensor in zip(names.split(), tensors, strict=True):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NumericalError(
                f"{where}: {name} holds {bad} non-finite of {tensor.numel()} numbers; finite input is needed. "
                "Look for an overflow in the loss, or lower the learning rate."
            )


def thin_svd(
    matrix: Float[Tensor, "*batch a b"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (left, values, right) with matrix = left diag(values) right^T; `right` is not transposed.

    Args:
        matrix: (*, a, b), small on the hot path.

    Returns:
        left (*, a, k), values (*, k) descending, right (*, b, k), k = min(a, b).

    Raises:
        NumericalError: the decomposition did not converge.
    """
    try:
        left, values, right_t = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError(
            f"SVD of a {tuple(matrix.shape)} tensor did not converge: {error}. Check for overflow."
        ) from error
    return left, values, right_t.mT


def check_point(point: Point, tolerance: float = 1e-5) -> None:
    """Check that a point is what it claims to be.

    Args:
        point: see `Point`.
        tolerance: largest allowed entry of u^T u - I and v^T v - I.

    Raises:
        NumericalError: shapes do not fit, a number is not finite, s is not descending and positive, or a frame is
            not orthonormal. The message says which.
    """
    u, s, v = point
    rank = s.shape[-1]
    if u.shape[-1] != rank or v.shape[-1] != rank or rank > min(u.shape[-2], v.shape[-2]):
        raise NumericalError(
            f"point: u {tuple(u.shape)}, s {tuple(s.shape)}, v {tuple(v.shape)} do not fit; needed are (*, out, r), "
            "(*, r), (*, in, r) with r <= min(out, in)."
        )
    _require_finite("point", "u s v", point)
    if not bool((s > 0).all()) or not bool((s.diff(dim=-1) <= 0).all()):
        raise NumericalError(f"point: s must be positive and descending, got {s.tolist()}.")
    for name, frame in (("u", u), ("v", v)):
        identity = torch.eye(rank, dtype=frame.dtype, device=frame.device)
        defect = float((frame.mT @ frame - identity).abs().max())
        if defect > tolerance:
            raise NumericalError(
                f"point: columns of {name} are not orthonormal, defect {defect:.1e} > {tolerance:.1e}."
            )


# ------------------------------------------------------------------------------------------------ points and matrices


def point_from_factors(
    left: Float[Tensor, "*batch out r"],
    right: Float[Tensor, "*batch in_ r"],
    scale: float = 1.0,
) -> Point:
    """Read the point scale * left right^T from arbitrary factors.

    The result depends on the product alone: u, s, v come from one SVD of R_left R_right^T, so the signs of u and v
    match. No floor is put under s.

    Args:
        left: (*, out, r).
        right: (*, in, r).
        scale: positive factor in front of the product, e.g. the LoRA scaling.

    Returns:
        Point of rank r; s may hold zeros when the product has a lower rank.

    Raises:
        NumericalError: an input is not finite, or r > min(out, in).

    Cost: O((out + in) r^2 + r^3).
    """
    left, right = _raised(left), _raised(right)
    _require_finite("point_from_factors", "left right", (left, right))
    rank = left.shape[-1]
    if rank > min(left.shape[-2], right.shape[-2]):
        raise NumericalError(
            f"point_from_factors: rank {rank} in a {left.shape[-2]} x {right.shape[-2]} matrix; at most "
            f"{min(left.shape[-2], right.shape[-2])} is possible. Lower the rank."
        )
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right)
    core_left, values, core_right = thin_svd(scale * (r_left @ r_right.mT))
    return Point(q_left @ core_left, values, q_right @ core_right)


def random_point(
    out: int,
    in_: int,
    rank: int,
    *,
    batch: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Point:
    """Draw a point with Haar-distributed frames and singular values uniform in [1, 2].

    Args:
        out: rows of the matrix.
        in_: columns of the matrix.
        rank: r.
        batch: leading dimensions.
        generator: source of randomness; also decides the device.
        dtype: fp32 or fp64.

    Returns:
        Random point; equal generators give equal bytes.

    Raises:
        NumericalError: rank is not in 1..min(out, in).
    """
    if not 1 <= rank <= min(out, in_):
        raise NumericalError(f"random_point: rank {rank} is not in 1..{min(out, in_)}.")
    device = generator.device if generator is not None else torch.device("cpu")

    def frame(rows: int) -> Tensor:
        normal = torch.randn(*batch, rows, rank, generator=generator, dtype=dtype, device=device)
        q, r = torch.linalg.qr(normal)
        # LAPACK fixes no sign; the sign of R's diagonal makes the frame Haar-distributed.
        signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(dtype)
        oriented: Tensor = q * signs.unsqueeze(-2)
        return oriented

    u, v = frame(out), frame(in_)
    values = 1 + torch.rand(*batch, rank, generator=generator, dtype=dtype, device=device)
    return Point(u, values.sort(dim=-1, descending=True).values, v)


def dense(point: Point) -> Float[Tensor, "*batch out in_"]:
    """Return X = u diag(s) v^T as an (*, out, in) matrix; for inspection and tests."""
    return (point.u * point.s.unsqueeze(-2)) @ point.v.mT


def dense_tangent(point: Point, tangent: Tangent) -> Float[Tensor, "*batch out in_"]:
    """Return xi = d_left v^T + u d_right^T, Eq. (5), as an (*, out, in) matrix; for inspection and tests."""
    return tangent.d_left @ point.v.mT + point.u @ tangent.d_right.mT


# --------------------------------------------------------------------------------------------------- tangent space


def remove_component(frame: Tensor, block: Tensor) -> Tensor:
    """Return (I - frame frame^T) block; twice, because once leaves a rounding error relative to the block."""
    for _ in range(2):
        core = frame.mT @ block
        if block.ndim == 3 and frame.ndim == 3 and block.dtype == frame.dtype:
            block = torch.baddbmm(block, frame, core, alpha=-1)
        else:
            block = block - frame @ core
    return block


def project(
    point: Point,
    z_times_v: Float[Tensor, "*batch out r"],
    zt_times_u: Float[Tensor, "*batch in_ r"],
) -> Tangent:
    """Project an ambient matrix Z, known by the products Z v and Z^T u, on the tangent space.

    Source: Eq. (6), Lemma D.1: P(Z) = Z - (I - u u^T) Z (I - v v^T).

    Args:
        point: where; see `Point`.
        z_times_v: Z v.
        zt_times_u: Z^T u.

    Returns:
        d_left = (I - u u^T) Z v, d_right = Z^T u.

    Raises:
        NumericalError: a product is not finite.
    """
    z_times_v, zt_times_u = _raised(z_times_v), _raised(zt_times_u)
    _require_finite("project", "z_times_v zt_times_u", (z_times_v, zt_times_u))
    return Tangent(remove_component(point.u, z_times_v), zt_times_u)


def project_dense(point: Point, z: Float[Tensor, "*batch out in_"]) -> Tangent:
    """Project an explicit (*, out, in) matrix z on the tangent space; see `project`."""
    return project(point, z @ point.v, z.mT @ point.u)


def project_low_rank(
    point: Point,
    left: Float[Tensor, "*batch out k"],
    right: Float[Tensor, "*batch in_ k"],
) -> Tangent:
    """Project Z = left right^T on the tangent space without forming it; Alg. 2 with A_L in its line 1."""
    return project(point, left @ (right.mT @ point.v), right @ (left.mT @ point.u))


def inner_product(a: Tangent, b: Tangent) -> Float[Tensor, "*batch"]:
    """Return the Frobenius inner product of two tangent vectors at one point, (*,)."""
    left = (a.d_left * b.d_left).sum(dim=(-2, -1))
    return left + (a.d_right * b.d_right).sum(dim=(-2, -1))


def norm(a: Tangent) -> Float[Tensor, "*batch"]:
    """Return the Frobenius norm of a tangent vector, (*,)."""
    return inner_product(a, a).sqrt()


# ------------------------------------------------------------------------------------------------- moving along it


def retract(point: Point, tangent: Tangent, step: float = 1.0) -> Point:
    """Move from `point` along `tangent` and come back to rank r.

    Source: Eq. (8), the truncated SVD of X + step * xi, in the common bases of docs/method.md 4.3. QR of [u, d_left],
    not of d_left alone, keeps the frames orthonormal in fp32 (Boumal, section 7.5).

    Args:
        point: X = u diag(s) v^T; u (*, out, r), s (*, r) descending and > 0, v (*, in, r); u, v orthonormal.
        tangent: xi = d_left v^T + u d_right^T; d_left (*, out, r) with u^T d_left = 0, d_right (*, in, r).
        step: dimensionless; may be negative.

    Returns:
        Best rank-r approximation of X + step * xi. Entries of u^T u - I within 1e-5 in fp32; s descending and > 0.

    Raises:
        NumericalError: an input is not finite, or the result has numerical rank below r.

    Cost: O((out + in) r^2 + r^3), no (out, in) matrix. Error of order step^2.
    """
    _require_finite("retract", "u s v d_left d_right", (*point, *tangent))
    u, s, v = map(_raised, point)
    rank = s.shape[-1]
    q_left, r_left = torch.linalg.qr(torch.cat([u, _raised(tangent.d_left)], dim=-1))
    q_right, r_right = torch.linalg.qr(torch.cat([v, _raised(tangent.d_right)], dim=-1))
    core = (r_left[..., :rank] * s.unsqueeze(-2)) @ r_right[..., :rank].mT
    core = core + step * cross_core(r_left, r_right, rank)
    left, values, right = thin_svd(core)
    smallest, largest = values[..., rank - 1], values[..., 0]
    if bool((smallest <= torch.finfo(values.dtype).eps * largest).any()):
        raise NumericalError(
            f"retract: the step leaves the manifold, singular value {rank} is {float(smallest.min()):.1e} beside a "
            f"largest of {float(largest.max()):.1e}; rank {rank} is needed. Take a shorter step or a lower rank."
        )
    return Point(q_left @ left[..., :rank], values[..., :rank], q_right @ right[..., :rank])


def transport(old_point: Point, tangent: Tangent, new_point: Point) -> Tangent:
    """Carry a tangent vector from one point to another by orthogonal projection, Eq. (9).

    Args:
        old_point: where `tangent` lives.
        tangent: vector to carry.
        new_point: where the result lives.

    Returns:
        Coordinates at `new_point` of P(xi); never longer than xi; linear in xi.

    Raises:
        NumericalError: an input is not finite.
    """
    left = torch.cat([tangent.d_left, old_point.u], dim=-1)
    right = torch.cat([old_point.v, tangent.d_right], dim=-1)
    return project_low_rank(new_point, _raised(left), _raised(right))


# ------------------------------------------------------------------------------------------------- orthogonal factor


def cross_core(
    r_left: Float[Tensor, "*batch a cols"], r_right: Float[Tensor, "*batch b cols"], rank: int
) -> Float[Tensor, "*batch a b"]:
    """Return K with xi = Q_left K Q_right^T, from the triangles of qr([u, d_left]) and qr([v, d_right])."""
    first, second = slice(0, rank), slice(rank, 2 * rank)
    straight = r_left[..., first] @ r_right[..., second].mT
    return straight + r_left[..., second] @ r_right[..., first].mT


def masked_msign(
    core: Float[Tensor, "*batch a b"], tol: float | None = None
) -> Float[Tensor, "*batch a b"]:
    """Return sum of U_i V_i^T over the singular triples with S_i > tol * S_1; zero for a zero matrix.

    Source: Eqs. (2), (3) with null directions masked: the sign of a rounding error is noise of size one.

    Args:
        core: small (*, a, b) matrix.
        tol: relative; 1e-6 in fp32 and 1e-10 in fp64 when None. The comparison is strict.

    Returns:
        Partial isometry of the rank of `core`.
    """
    if tol is None:
        tol = 1e-10 if core.dtype == torch.float64 else 1e-6
    # msign ignores scale; dividing first keeps the SVD away from overflow and denormals.
    scale = core.abs().amax(dim=(-2, -1), keepdim=True)
    left, values, right = thin_svd(core / torch.where(scale > 0, scale, 1.0))
    keep = (values > tol * values[..., :1]).to(core.dtype)
    return (left * keep.unsqueeze(-2)) @ right.mT


def msign(point: Point, tangent: Tangent, tol: float | None = None) -> Factors:
    """Orthogonalize the ambient matrix of a tangent vector: U V^T of its thin SVD.

    Source: Alg. 1 as corrected in docs/method.md 4.1. The result is in general not tangent; project it to get the
    direction of Eq. (12).

    Args:
        point: where `tangent` lives.
        tangent: vector to orthogonalize.
        tol: see `masked_msign`.

    Returns:
        Factors of msign(xi), (*, out, k) and (*, in, k) with k <= 2r.

    Raises:
        NumericalError: an input is not finite.
    """
    _require_finite("msign", "u s v d_left d_right", (*point, *tangent))
    rank = point.s.shape[-1]
    q_left, r_left = torch.linalg.qr(torch.cat([point.u, tangent.d_left], dim=-1))
    q_right, r_right = torch.linalg.qr(torch.cat([point.v, tangent.d_right], dim=-1))
    return Factors(q_left @ masked_msign(cross_core(r_left, r_right, rank), tol), q_right)
