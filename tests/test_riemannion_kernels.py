"""Kernels for GPUs against LAPACK in fp64; without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton import language  # type: ignore[import-untyped]

from dreamrie import riemannion_kernels as kernels
from dreamrie.riemannion_fast import fast_steps
from dreamrie.riemannion_small import decompose, triangles
from dreamrie.riemannion_step import FusedState, StepOptions, Work, fused_step
from tests.properties.test_riemannion_fast_laws import compare, in_fp64, work
from tests.strategies import F64, noise

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels need a GPU"),
]


def matrices(size: int, condition: float) -> Tensor:
    """Singular values from 1 to 1 / condition; one with a zero row and equal columns, one zero matrix."""
    frames = [torch.linalg.qr(noise(seed, 4, size, size)).Q for seed in (1, 2)]
    fall = torch.logspace(0, -float(torch.tensor(condition).log10()), size, dtype=F64)
    found = (frames[0] * fall) @ frames[1]
    found[2, 0], found[2, :, -1] = 0, found[2, :, 0]
    found[3] = 0
    return found


def defects(given: Tensor, values: Tensor, right_t: Tensor) -> dict[str, float]:
    """How far from an SVD: values beside the largest, and both frames where values are above 1e-7 of it."""
    wanted = torch.linalg.svdvals(given)
    largest = torch.where(wanted[:, :1] > 0, wanted[:, :1], 1.0)
    keep = (wanted > 1e-7 * wanted[:, :1]).to(F64)
    left = given @ right_t.mT / torch.where(values > 0, values, 1.0).unsqueeze(-2)
    eye = torch.eye(given.shape[-1], dtype=F64)
    both = keep.unsqueeze(-1) * keep.unsqueeze(-2)
    return {
        "values": float(((values - wanted).abs() / largest).max()),
        "right": float(((right_t @ right_t.mT - eye) * both).abs().max()),
        "left": float(((left.mT @ left - eye) * both).abs().max()),
    }


INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the kernels are compiled, see below"
)
BARS = {"values": 1e-13, "right": 1e-13, "left": 1e-8}


@INTERPRETED
@pytest.mark.parametrize("size", [2, 6, 8])
@pytest.mark.parametrize("condition", [2.0, 1e4, 1e6])
def test_singular_values_and_vectors(size: int, condition: float) -> None:
    given = matrices(size, condition)
    before = given.clone()
    values, right_t = kernels.values_and_right(given)
    found = defects(given, values, right_t)
    assert all(found[name] < bar for name, bar in BARS.items()), found
    assert bool((values.diff(dim=-1) <= 0).all()), "not descending"
    assert torch.equal(given, before)


@INTERPRETED
def test_too_few_sweeps_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SWEEPS", language.constexpr(2))
    given = matrices(8, 1e4)
    assert defects(given, *kernels.values_and_right(given))["right"] > BARS["right"]


@INTERPRETED
@pytest.mark.parametrize("size", [1, 4, 6])
def test_cholesky_factors(size: int) -> None:
    tall = noise(3, 3, size, 2 * size)
    gram = tall @ tall.mT
    gram[1] = -gram[1]
    lower, inverse, failed = kernels.cholesky_and_inverse(gram)
    assert failed.tolist() == [False, True, False]
    for row in (0, 2):
        torch.testing.assert_close(lower[row], torch.linalg.cholesky(gram[row]), rtol=0, atol=1e-13)
        torch.testing.assert_close(
            inverse[row] @ lower[row], torch.eye(size, dtype=F64), rtol=0, atol=1e-12
        )


class TestOnGpu:
    """The same compiled, and what takes their place where matrices are large."""

    pytestmark = GPU

    @pytest.mark.parametrize("size", [2, 8, 24, 32, 64, 128])
    def test_decompose(self, size: int) -> None:
        given = matrices(size, 1e4)
        left, values, right = (part.cpu() for part in decompose(given.cuda()))
        found = defects(given, values, right.mT)
        assert all(found[name] < max(bar, 1e-11) for name, bar in BARS.items()), found
        rebuilt = (left * values.unsqueeze(-2)) @ right.mT
        torch.testing.assert_close(rebuilt, given, rtol=0, atol=1e-8)

    @pytest.mark.parametrize("size", [1, 4, 16, 64, 96])
    def test_triangles(self, size: int) -> None:
        tall = noise(3, 3, size, 2 * size)
        gram = tall @ tall.mT
        lower, inverse, failed = (part.cpu() for part in triangles(gram.cuda()))
        assert not bool(failed.any())
        torch.testing.assert_close(lower, torch.linalg.cholesky(gram), rtol=0, atol=1e-11)
        torch.testing.assert_close(
            lower.mT @ inverse, torch.eye(size, dtype=F64).expand(3, -1, -1), rtol=0, atol=1e-10
        )

    @pytest.mark.parametrize("rank", [2, 4, 16, 32, 64])
    def test_fast_step(self, rank: int) -> None:
        """The law of the CPU, with a bar for condition 100."""
        given = work((4 * rank + 8, 3 * rank + 8, rank), 100.0, StepOptions(1e-2))
        state = FusedState(*(part.cuda() for part in given.state))
        there = Work(state, given.gradient_v.cuda(), given.gradient_t_u.cuda(), given.options)
        got = fast_steps([there])[0]
        here = got._replace(state=FusedState(*(part.cpu() for part in got.state)))
        compare("on a GPU", given, here, fused_step(*in_fp64(given)), 2e-6)
