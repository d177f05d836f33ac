"""Arithmetic on adapters equals the same on dense matrices, and forms none of them."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dreamrie.commands import diff
from dreamrie.commands import merge as merging
from dreamrie.errors import ConfigError, NumericalError
from dreamrie.lora import LowRank, comparing
from tests.margins import within
from tests.mutants.summary import FIGURE
from tests.strategies import F64, frame, noise

# Looked up at each call, so that a mutant of any of the modules is seen.
REAL = SimpleNamespace(
    truncate=lambda *a: comparing.truncate(*a),
    effective_rank=lambda *a: comparing.effective_rank(*a),
    rank_for_energy=lambda *a: comparing.rank_for_energy(*a),
    principal_angles=lambda *a: comparing.principal_angles(*a),
    distance=lambda *a: comparing.distance(*a),
    decompose=lambda *a: comparing.decompose(*a),
    frames=lambda *a: comparing.frames(*a),
    compare=lambda *a: diff.compare_changes(*a),
    merge=lambda *a: merging.merge(*a),
)
SHAPES = ((11, 7), (6, 13))
KERNEL = (3, 2)


def change(seed: int, out: int, in_: int, rank: int, dtype: torch.dtype = F64) -> LowRank:
    """Unbalanced factors with a falling spectrum."""
    left = noise(seed, out, rank) * torch.logspace(0.5, -1, rank, dtype=F64)
    return LowRank((3 * left).to(dtype), noise(seed + 1, rank, in_).to(dtype))


def convolution(seed: int, rank: int) -> LowRank:
    return LowRank(noise(seed, 5, rank, 1, 1), noise(seed + 1, rank, 4, *KERNEL))


def dense(found: LowRank) -> Tensor:
    """(out, in * kh * kw) in fp64, by other means than the code."""
    left, right = found.left.double(), found.right.double()
    if left.ndim == 2:
        return left @ right
    return torch.einsum("orxy,rikl->oikl", left, right).reshape(len(left), -1)


def dense_truncation(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def law_truncation_equals_dense_svd(impl: Any) -> None:
    """The truncated factors are the truncated SVD of the dense matrix, in fp64, from fp32 files, for convolutions."""
    for dtype, bar in ((F64, 1e-12), (torch.float32, 1e-6)):
        for out, in_ in SHAPES:
            for rank in (1, 2, 4):
                given = change(3, out, in_, 5, dtype)
                wanted = dense_truncation(dense(given), rank)
                assert apart(wanted, dense(given)) > 1e-3
                found = impl.truncate(given, rank)
                assert found.left.shape == (out, rank)
                # Factors of fp32 are exact numbers: the bar is for what a file in fp32 rounds.
                rounded = LowRank(found.left.to(dtype), found.right.to(dtype))
                within(f"truncate {dtype}", apart(dense(rounded), wanted), bar)
    given = convolution(8, 4)
    found = impl.truncate(given, 2)
    assert (found.left.shape, found.right.shape) == ((5, 2, 1, 1), (2, 4, *KERNEL))
    within("truncate conv", apart(dense(found), dense_truncation(dense(given), 2)), 1e-12)


def law_more_rank_than_there_is_changes_nothing(impl: Any) -> None:
    """A rank above the stored one, or above the sides of the matrix, gives the matrix itself."""
    for given in (change(4, 11, 7, 3), change(5, 6, 4, 9), convolution(6, 3)):
        found = impl.truncate(given, 12)
        assert found.left.shape[1] <= min(given.left.shape[1], *dense(given).shape)
        within("truncate above", apart(dense(found), dense(given)), 1e-13)


def law_numbers_of_the_spectrum(impl: Any) -> None:
    """k equal singular values have effective rank k; the rank for an energy is the first that a search finds."""
    for k in (1, 3, 7):
        values = torch.cat([torch.full((k,), 0.3), torch.zeros(2)])
        assert abs(impl.effective_rank(values) - k) < 1e-6
    assert impl.effective_rank(torch.zeros(3)) == 0.0
    uneven = torch.tensor([2.0, 1.0], dtype=F64)
    wanted = math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    assert abs(impl.effective_rank(uneven) - wanted) < 1e-12
    spectra = [impl.decompose(change(seed, 11, 7, 2 + seed)).s for seed in (1, 3, 5)]
    total = sum(float((s**2).sum()) for s in spectra)
    found = []
    for share in (0.3, 0.9, 0.97, 0.999, 1.0):
        kept = [sum(float((s[:k] ** 2).sum()) for s in spectra) / total for k in range(1, 8)]
        first = next(k for k, energy in enumerate(kept, 1) if energy >= share - 1e-14)
        assert impl.rank_for_energy(spectra, share) == first
        found.append(first)
    assert len(set(found)) >= 4


def law_distance_and_cosine_equal_dense(impl: Any) -> None:
    """Norms, distance and cosine of two changes are those of the matrices; nearly equal ones keep their digits."""
    pairs = [(change(1, o, i, 3), change(7, o, i, 5, torch.float32)) for o, i in SHAPES]
    for a, b in [*pairs, (convolution(2, 2), convolution(9, 3))]:
        one, other = dense(a), dense(b)
        found = impl.compare(a, b)
        cosine = float((one * other).sum() / (one.norm() * other.norm()))
        assert 1e-3 < abs(cosine) < 0.9
        within("cosine", abs(found["cosine"] - cosine), 1e-13)
        within("norm", abs(found["norm_a"] / float(one.norm()) - 1), 1e-13)
        within("norm", abs(found["norm_b"] / float(other.norm()) - 1), 1e-13)
        within("distance", abs(found["distance"] / float((one - other).norm()) - 1), 1e-13)
        both = math.hypot(float(one.norm()), float(other.norm()))
        within(
            "distance",
            abs(found["relative_distance"] - float((one - other).norm()) / both),
            1e-13,
        )
    a = change(1, 11, 7, 3)
    near = LowRank(a.left + 1e-9 * noise(5, 11, 3), a.right)
    wanted = 1e-9 * float((noise(5, 11, 3) @ a.right).norm())
    within("distance of near ones", abs(impl.distance(a, near) / wanted - 1), 1e-5)


def dense_angles(first: Tensor, second: Tensor) -> Tensor:
    """From the SVD of full projections: cosines of P1 P2, and sines of (I - P1) P2 for the small angles."""
    one, other = (m @ torch.linalg.pinv(m) for m in (first, second))
    count = min(first.shape[1], second.shape[1])
    cosines = torch.linalg.svdvals(one @ other)[:count].clamp(max=1)
    smaller, larger = (one, other) if first.shape[1] < second.shape[1] else (other, one)
    rest = torch.linalg.svdvals(smaller - larger @ smaller)[:count]
    by_sine = torch.rad2deg(torch.asin(rest.flip(0).clamp(max=1)))
    by_cosine = torch.rad2deg(torch.acos(cosines))
    return torch.where(by_cosine < 45, by_sine, by_cosine)


def law_principal_angles_equal_dense(impl: Any) -> None:
    """Angles are those of the projections, also for unequal ranks, tiny angles, shared and orthogonal directions."""
    a, b = frame(1, 12, 3), frame(2, 12, 5)
    found = impl.principal_angles(a, b)
    assert float(found[-1] - found[0]) > 10
    assert found.shape == (3,)
    for one, other in ((a, b), (b, a), (a, frame(4, 12, 3))):
        wanted = dense_angles(one, other)
        within("angles", (impl.principal_angles(one, other) - wanted).abs().max(), 1e-11)
    # One direction shared, one turned by a billionth, one by a billionth less than a right angle.
    axes = torch.eye(12, dtype=F64)
    turned = torch.stack([axes[0], axes[1] + 1e-9 * axes[7], axes[8] + 1e-9 * axes[2]], 1)
    found = torch.deg2rad(impl.principal_angles(axes[:, :3], turned))
    wanted = torch.tensor([0, 1e-9, math.pi / 2 - 1e-9], dtype=F64)
    within("angles, small", (found - wanted).abs().max(), 1e-14)
    # Through the factors of two changes, with directions of zero that are none.
    first = LowRank(torch.cat([noise(1, 11, 2), torch.zeros(11, 2)], 1), noise(2, 4, 7))
    second = change(5, 11, 7, 3)
    found = impl.compare(first, second)
    for key, one, other in (
        ("column_angles", first.left[:, :2], second.left),
        ("row_angles", first.right[:2].T, second.right.T),
    ):
        wanted = dense_angles(one, other)
        within("angles", abs(found[key]["smallest"] - float(wanted.min())), 1e-10)
        within("angles", abs(found[key]["mean"] - float(wanted.mean())), 1e-10)
        within("angles", abs(found[key]["largest"] - float(wanted.max())), 1e-10)


def layers(seed: int, dtype: torch.dtype = F64) -> dict[str, LowRank]:
    return {
        "a": change(seed, 11, 7, 3, dtype),
        "b": change(seed + 20, 6, 13, 2, dtype),
        "c": convolution(seed + 40, 2),
    }


def law_equal_halves_are_the_adapter(impl: Any) -> None:
    """0.5 A + 0.5 A is A, of A's own rank."""
    part = layers(1, torch.float32)
    merged = impl.merge([part, part], [0.5, 0.5], None)
    for layer, given in part.items():
        found = merged.changes[layer]
        assert found.left.shape == given.left.shape
        within("halves", apart(dense(found), dense(given)), 1e-13)
    assert merged.exact_rank == 3


def law_merging_is_permutation_invariant(impl: Any) -> None:
    """The order of the files does not show, to the last bit; a different sum shows."""
    parts, weights = [layers(1), layers(2), layers(3)], [0.8, 0.6, -0.3]
    for rank in (None, 2):
        first = impl.merge(parts, weights, rank).changes
        second = impl.merge(parts[::-1], weights[::-1], rank).changes
        other = impl.merge(parts, weights[::-1], rank).changes
        for layer in first:
            assert torch.equal(first[layer].left, second[layer].left)
            assert torch.equal(first[layer].right, second[layer].right)
            assert apart(dense(other[layer]), dense(first[layer])) > 0.1


def law_weights_enter_linearly(impl: Any) -> None:
    """The merged change is sum w_i D_i, negative weights too; with a rank it is that matrix truncated."""
    parts, weights = [layers(1), layers(2), layers(3)], [0.8, 0.6, -0.3]
    exact, cut = impl.merge(parts, weights, None), impl.merge(parts, weights, 2)
    lost, total = 0.0, 0.0
    for layer in parts[0]:
        wanted = sum(w * dense(p[layer]) for p, w in zip(parts, weights, strict=True))
        assert isinstance(wanted, Tensor)
        within("merge", apart(dense(exact.changes[layer]), wanted), 1e-13)
        nearest = dense_truncation(wanted, 2)
        assert apart(nearest, wanted) > 1e-2
        within("merge to a rank", apart(dense(cut.changes[layer]), nearest), 1e-12)
        assert cut.changes[layer].left.shape[1] == 2
        lost += float((wanted - nearest).norm() ** 2)
        total += float(wanted.norm() ** 2)
    assert exact.discarded == 0.0
    within("merge, discarded", abs(cut.discarded - lost / total), 1e-12)


def law_layers_of_one_file_are_kept(impl: Any) -> None:
    """A layer that one adapter lacks counts as zero there."""
    first, second = layers(1), layers(2)
    del first["b"]
    merged = impl.merge([first, second], [0.8, 0.6], None).changes
    assert set(merged) == {"a", "b", "c"}
    within("kept", apart(dense(merged["b"]), 0.6 * dense(second["b"])), 1e-13)
    within(
        "kept", apart(dense(merged["a"]), 0.8 * dense(first["a"]) + 0.6 * dense(second["a"])), 1e-13
    )


class Spy(TorchDispatchMode):
    """Record the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.sizes.append(value.shape)
        return result


def law_no_dense_matrix_is_formed(impl: Any) -> None:
    """Truncation, merging and comparison allocate nothing of the size of a layer."""
    out, in_, rank = 70, 50, 3
    a, b = change(1, out, in_, rank), change(9, out, in_, rank + 1)
    with Spy() as spy:
        impl.truncate(a, 2)
        impl.merge([{"x": a}, {"x": b}], [0.5, 0.7], 2)
        impl.compare(a, b)
    assert len(spy.sizes) > 50
    assert max(size.numel() for size in spy.sizes) <= out * (2 * rank + 1)
    assert out * (2 * rank + 1) < out * in_ / 5


LAWS = (
    law_truncation_equals_dense_svd,
    law_more_rank_than_there_is_changes_nothing,
    law_numbers_of_the_spectrum,
    law_distance_and_cosine_equal_dense,
    law_principal_angles_equal_dense,
    law_equal_halves_are_the_adapter,
    law_merging_is_permutation_invariant,
    law_weights_enter_linearly,
    law_layers_of_one_file_are_kept,
    law_no_dense_matrix_is_formed,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    law(REAL)


def test_what_cannot_be_computed_is_refused() -> None:
    a = change(1, 11, 7, 3)
    with pytest.raises(ConfigError, match="rank must be at least 1, got 0"):
        comparing.truncate(a, 0)
    with pytest.raises(ConfigError, match=r"\(11, 3\) and \(2, 7\) do not multiply"):
        comparing.truncate(LowRank(a.left, a.right[:2]), 1)
    with pytest.raises(NumericalError, match="not finite"):
        comparing.change_norm(LowRank(a.left * math.nan, a.right))
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match=f"got {share}"):
            comparing.rank_for_energy([torch.ones(2)], share)
    with pytest.raises(ConfigError, match="energy"):
        comparing.rank_for_energy([], 0.5)


def sd2_keys() -> list[tuple[int, int]]:
    """(out, in) of the 128 attention projections of SD2's U-Net: 16 blocks, self and cross, four each."""
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    cross = [(w, w) if part in "qo" else (w, 1024) for w in widths for part in "qkvo"]
    return [(w, w) for w in widths for _ in range(4)] + cross


@pytest.mark.slow
def test_truncation_is_twenty_times_faster_than_dense(record_property: Any) -> None:
    """On SD2's shapes, an adapter of rank 8 (16 as it is stored) to rank 4; dense SVDs in the same precision."""
    keys = sd2_keys()
    assert len(keys) == 128
    given = [change(k, out, in_, 16) for k, (out, in_) in enumerate(keys)]
    start = time.perf_counter()
    found = [comparing.truncate(one, 4) for one in given]
    thin = time.perf_counter() - start
    start = time.perf_counter()
    # fp32 would give the dense way half of the digits, and still be slow.
    wanted = [dense_truncation(dense(one), 4) for one in given]
    full = time.perf_counter() - start
    worst = max(apart(dense(a), b) for a, b in zip(found, wanted, strict=True))
    figure = f"truncation of 128 layers of SD2: {thin:.2f} s, dense {full:.1f} s, error {worst:.0e}"
    record_property(FIGURE, figure)
    assert worst < 1e-12
    assert full > 20 * thin
