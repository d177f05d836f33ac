"""Faults of the arithmetic on adapters: truncated, compared and added without their model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dreamrie.commands import diff
from dreamrie.commands import merge as merging
from dreamrie.fixed_rank import Point
from dreamrie.lora import LowRank, comparing
from tests.mutants import Law, Mutant, replaced
from tests.properties import test_lora_arithmetic_laws as laws

# Faults that cannot even be evaluated on some examples.
_RAISES = (RuntimeError, KeyError)


def of(law: Law, *faults: tuple[str, Any, str, Any]) -> list[Mutant]:
    """Mutants of one law.

    Args:
        law: calls `laws.REAL`, which looks everything up.
        faults: name, module, and the attribute of it that is replaced by a function, whose docstring says why it is
            wrong.

    Returns:
        One mutant for each fault.
    """
    return [_mutant(law, *fault) for fault in faults]


def _mutant(law: Law, name: str, owner: Any, attribute: str, wrong: Any) -> Mutant:
    @contextlib.contextmanager
    def broken() -> Iterator[Any]:
        with replaced(owner, **{attribute: wrong}):
            yield laws.REAL

    return Mutant(name, law, broken, wrong.__doc__, _RAISES)


# ------------------------------------------------------------------------------------------------------ truncation

good_terms, good_svd, good_matrix = comparing.first_terms, comparing.decompose, comparing.as_matrix


def first_columns(change: LowRank, rank: int) -> LowRank:
    """Columns are not singular vectors."""
    return LowRank(change.left[:, :rank].double(), change.right[:rank].double())


def last_terms(point: Point, rank: int) -> LowRank:
    """The largest singular values matter."""
    return good_terms(Point(point.u.flip(1), point.s.flip(0), point.v.flip(1)), rank)


def terms_in_fp32(point: Point, rank: int) -> LowRank:
    """Balanced in fp64, cast afterwards."""
    return good_terms(Point(*(part.float().double() for part in point)), rank)


def terms_with_the_values_twice(point: Point, rank: int) -> LowRank:
    """U sqrt(S) sqrt(S) V^T."""
    found = good_terms(point, rank)
    return LowRank(found.left * point.s[:rank].sqrt(), found.right)


def kernel_in_other_order(change: LowRank) -> LowRank:
    """(k, in, kh, kw) is flattened as it stands."""
    if change.right.ndim == 4:
        change = LowRank(change.left, change.right.permute(0, 2, 3, 1))
    return good_matrix(change)


def padded_svd(change: LowRank) -> Point:
    """No matrix has more rank than sides."""
    point = good_svd(change)
    short = change.left.shape[1] - len(point.s)
    pad = torch.nn.functional.pad
    return Point(pad(point.u, (0, short)), pad(point.s, (0, short)), pad(point.v, (0, short)))


def dense_svd(change: LowRank) -> Point:
    """1280 x 1280 for each layer."""
    flat = good_matrix(change)
    u, s, vh = torch.linalg.svd(flat.left @ flat.right, full_matrices=False)
    count = min(flat.left.shape[1], len(s))
    return Point(u[:, :count], s[:count], vh[:count].T)


# --------------------------------------------------------------------------------------------------------- spectra


def entropy_of_values(singular_values: Tensor) -> float:
    """The entropy is of the energies."""
    shares = singular_values[singular_values > 0].double()
    if not len(shares):
        return 0.0
    shares = shares / shares.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def rank_above(spectra: Any, share: float) -> int:
    """The smallest rank is asked for."""
    return good_rank(spectra, share) + 1


def worst_layers_rank(spectra: Any, share: float) -> int:
    """The share is of all layers together."""
    return max(good_rank([spectrum], share) for spectrum in spectra)


def rank_by_values(spectra: Any, share: float) -> int:
    """Energy is the sum of squares."""
    return good_rank([spectrum.sqrt() for spectrum in spectra], share)


good_rank = comparing.rank_for_energy


# ------------------------------------------------------------------------------------------------------- comparing


def distance_by_squares(first: LowRank, second: LowRank) -> float:
    """Half of the digits cancel."""
    a, b = comparing.change_norm(first), comparing.change_norm(second)
    return max(0.0, a * a + b * b - 2 * comparing.inner(first, second)) ** 0.5


def sum_instead_of_difference(first: LowRank, second: LowRank) -> float:
    """The second has weight -1."""
    return good_distance(LowRank(-first.left, first.right), second)


def norm_of_factors(change: LowRank) -> float:
    """The product of norms only bounds the norm."""
    return float(change.left.double().norm() * change.right.double().norm())


def product_of_left_factors(first: LowRank, second: LowRank) -> float:
    """Both factors enter."""
    a, b = good_matrix(first), good_matrix(second)
    return float((a.left.T @ b.left).sum())


def angles_by_cosine(first: Tensor, second: Tensor) -> Tensor:
    """Small angles have no digits in it."""
    return torch.rad2deg(torch.acos(torch.linalg.svdvals(first.T @ second).clamp(max=1)))


def angles_by_sine(first: Tensor, second: Tensor) -> Tensor:
    """Angles near 90 have no digits in it."""
    if second.shape[1] > first.shape[1]:
        first, second = second, first
    rest = torch.linalg.svdvals(second - first @ (first.T @ second)).flip(0)
    return torch.rad2deg(torch.asin(rest.clamp(max=1)))


def sines_in_reverse(first: Tensor, second: Tensor) -> Tensor:
    """The smallest sine belongs to the largest cosine."""
    if second.shape[1] > first.shape[1]:
        first, second = second, first
    inside = first.T @ second
    sines = torch.linalg.svdvals(second - first @ inside)
    return torch.rad2deg(torch.atan2(sines, torch.linalg.svdvals(inside)))


def frames_with_dust(point: Point) -> tuple[Tensor, Tensor]:
    """Directions of zero are arbitrary."""
    return point.u, point.v


def rows_for_columns(point: Point) -> tuple[Tensor, Tensor]:
    """U spans the columns."""
    u, v = good_frames(point)
    return v, u


good_distance, good_frames = comparing.distance, comparing.frames


# --------------------------------------------------------------------------------------------------------- merging

good_merge, good_combine = merging.merge, merging.combine


def unsorted_merge(parts: Any, weights: Any, rank: int | None) -> Any:
    """Rounding depends on the order."""

    class Kept(list[Any]):
        def sort(self, **_: Any) -> None:
            """Leave it."""

    with replaced(merging, combine=good_combine):
        point = {}
        for layer in sorted({layer for part in parts for layer in part}):
            having = Kept([(p[layer], w) for p, w in zip(parts, weights, strict=True)])
            flat = [good_matrix(change) for change, _ in having]
            total = good_svd(good_combine(flat, [w for _, w in having]))
            kept = len(total.s) if rank is None else rank
            point[layer] = comparing.shaped_like(good_terms(total, kept), having[0][0])
    return merging.Merged(point, 0.0, 0)


def parts_truncated_first(
    parts: Sequence[Mapping[str, LowRank]], weights: Sequence[float], rank: int | None
) -> Any:
    """The sum is what is projected."""
    if rank is not None:
        parts = [{n: comparing.truncate(c, rank) for n, c in part.items()} for part in parts]
    return good_merge(parts, weights, rank)


def weights_in_both_factors(changes: Any, weights: Any) -> LowRank:
    """W^2 instead of w."""
    scaled = [LowRank(c.left, w * c.right) for c, w in zip(changes, weights, strict=True)]
    return good_combine(scaled, weights)


def weights_without_sign(changes: Any, weights: Any) -> LowRank:
    """Negative weights subtract."""
    return good_combine(changes, [abs(weight) for weight in weights])


def weights_as_shares(changes: Any, weights: Any) -> LowRank:
    """Weights are taken as given."""
    return good_combine(changes, [weight / sum(weights) for weight in weights])


def factors_added(changes: Any, weights: Any) -> LowRank:
    """Sums of factors are not sums of products."""
    rank = min(change.left.shape[1] for change in changes)
    left = sum(w * c.left[:, :rank] for c, w in zip(changes, weights, strict=True))
    right = sum(w * c.right[:rank] for c, w in zip(changes, weights, strict=True))
    return LowRank(left, right)


def common_layers_only(parts: Any, weights: Any, rank: int | None) -> Any:
    """A missing layer is a zero change."""
    common = set.intersection(*(set(part) for part in parts))
    return good_merge([{n: p[n] for n in common} for p in parts], weights, rank)


def dust_kept(parts: Any, weights: Any, rank: int | None) -> Any:
    """The rank of A + A is that of A."""
    with replaced(merging, _DUST=-1.0):
        return good_merge(parts, weights, rank)


MUTANTS = [
    *of(
        laws.law_truncation_equals_dense_svd,
        ("truncation of the stored columns", comparing, "truncate", first_columns),
        ("truncation keeps the last terms", comparing, "first_terms", last_terms),
        ("truncation in fp32", comparing, "first_terms", terms_in_fp32),
        ("singular values in both factors", comparing, "first_terms", terms_with_the_values_twice),
        ("kernel flattened in another order", comparing, "as_matrix", kernel_in_other_order),
    ),
    *of(
        laws.law_more_rank_than_there_is_changes_nothing,
        ("stored rank above the sides is believed", comparing, "decompose", padded_svd),
    ),
    *of(
        laws.law_no_dense_matrix_is_formed,
        ("truncation by dense SVD", comparing, "decompose", dense_svd),
    ),
    *of(
        laws.law_numbers_of_the_spectrum,
        ("effective rank of the values", comparing, "effective_rank", entropy_of_values),
        ("one rank too many for an energy", comparing, "rank_for_energy", rank_above),
        ("energy of every layer alone", comparing, "rank_for_energy", worst_layers_rank),
        ("energy from unsquared values", comparing, "rank_for_energy", rank_by_values),
    ),
    *of(
        laws.law_distance_and_cosine_equal_dense,
        ("distance by subtraction of squares", comparing, "distance", distance_by_squares),
        ("distance of the sum", diff, "distance", sum_instead_of_difference),
        ("norm of the factors", diff, "change_norm", norm_of_factors),
        ("inner product of the left factors", diff, "inner", product_of_left_factors),
    ),
    *of(
        laws.law_principal_angles_equal_dense,
        ("angles by their cosine alone", comparing, "principal_angles", angles_by_cosine),
        ("angles by their sine alone", comparing, "principal_angles", angles_by_sine),
        ("sines paired in reverse", comparing, "principal_angles", sines_in_reverse),
        ("angles of null directions", diff, "frames", frames_with_dust),
        ("rows taken for columns", diff, "frames", rows_for_columns),
    ),
    *of(
        laws.law_equal_halves_are_the_adapter,
        ("null directions of a sum are kept", merging, "merge", dust_kept),
    ),
    *of(
        laws.law_merging_is_permutation_invariant,
        ("sum in the order of the files", merging, "merge", unsorted_merge),
    ),
    *of(
        laws.law_weights_enter_linearly,
        ("weights in both factors", merging, "combine", weights_in_both_factors),
        ("weights without sign", merging, "combine", weights_without_sign),
        ("weights normalized", merging, "combine", weights_as_shares),
        ("factors averaged", merging, "combine", factors_added),
        ("parts truncated before the sum", merging, "merge", parts_truncated_first),
    ),
    *of(
        laws.law_layers_of_one_file_are_kept,
        ("only common layers merged", merging, "merge", common_layers_only),
    ),
]
