"""Laws of Tensorion, against torch's Muon and against unfoldings written out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreamrie import tensorion
from tests.margins import within
from tests.strategies import F32, noise

OPTIONS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


def _muon(start: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """Path of torch.optim.Muon in the scale that matches AdamW."""
    parameter = nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([parameter], adjust_lr_fn="match_rms_adamw", **OPTIONS)
    path = []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        path.append(parameter.detach().clone())
    return path


def _tensorion(impl: Any, start: Tensor, gradients: list[Tensor], unfolding: str) -> list[Tensor]:
    parameter = nn.Parameter(start.clone())
    optimizer = impl.Tensorion([parameter], unfolding=unfolding, **OPTIONS)
    path = []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, gradient)
        path.append(parameter.detach().clone())
    return path


def law_t1_a_matrix_takes_the_steps_of_torch_muon_to_the_bit(impl: Any) -> None:
    """Order 2 is Muon: equal bytes after each of five steps with momentum and decay, wide, tall and square."""
    for shape in ((6, 4), (4, 6), (5, 5)):
        start = noise(1, *shape, dtype=F32)
        gradients = [noise(2 + step, *shape, dtype=F32) for step in range(5)]
        wanted = _muon(start, gradients)
        assert len({path.sum().item() for path in wanted}) == 5
        for unfolding in ("square", "nuclear"):
            found = _tensorion(impl, start, gradients, unfolding)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def _by_hand(tensor: Tensor) -> Tensor:
    """Entry (a, b, i, j) of a (6, 4, 3, 3) kernel in row 3 a + i and column 3 b + j."""
    matrix = torch.empty(18, 12, dtype=tensor.dtype)
    for a, b, i, j in itertools.product(range(6), range(4), range(3), range(3)):
        matrix[3 * a + i, 3 * b + j] = tensor[a, b, i, j]
    return matrix


def law_t2_a_kernel_takes_the_steps_of_its_most_square_matrix(impl: Any) -> None:
    """A (6, 4, 3, 3) kernel moves as Muon moves the 18 x 12 matrix of its entries, to the bit."""
    start = noise(11, 6, 4, 3, 3, dtype=F32)
    gradients = [noise(12 + step, 6, 4, 3, 3, dtype=F32) for step in range(4)]
    wanted = _muon(_by_hand(start), [_by_hand(gradient) for gradient in gradients])
    found = _tensorion(impl, start, gradients, "square")
    for kernel, matrix in zip(found, wanted, strict=True):
        assert torch.equal(_by_hand(kernel), matrix)


def law_t3_no_unfolding_is_more_square(impl: Any) -> None:
    """The smaller side is the largest over all ways to part the dimensions."""
    shapes = (
        (16, 8, 3, 3),
        (8, 16, 3, 3),
        (64, 2, 7, 7),
        (5, 1, 3),
        (3, 4, 5, 6, 2),
        (9, 4),
        (7, 1, 1, 1),
    )
    for shape in shapes:
        sizes = []
        for mask in range(1, 2 ** len(shape) - 1):
            rows = math.prod(n for bit, n in enumerate(shape) if mask >> bit & 1)
            sizes.append(min(rows, math.prod(shape) // rows))
        chosen = impl.most_square(torch.Size(shape))
        assert sorted((*chosen.rows, *chosen.columns)) == list(range(len(shape)))
        matrix = chosen.unfold(torch.zeros(shape))
        assert min(matrix.shape) == max(sizes)
    assert impl.most_square(torch.Size((16, 8, 3, 3))) == ((0, 2), (1, 3))


def law_t4_no_unfolding_has_a_larger_nuclear_norm(impl: Any) -> None:
    """The linear gain of an orthogonal step is largest, and not always in the most square unfolding."""
    differs = 0
    for seed in range(6):
        shape = (4, 3, 2, 5)
        # A product of two matrices has rank 1 in the most square unfolding, 12 x 10, and full rank in others.
        product = torch.einsum("ab,cd->abcd", noise(40 + seed, 4, 3), noise(60 + seed, 2, 5))
        tensor = (product + 0.1 * noise(90 + seed, *shape)).to(F32)
        tensor = tensor.transpose(0, seed % 4).contiguous()
        dims = range(4)
        norms = {}
        for rows in itertools.chain(*(itertools.combinations(dims, k) for k in (1, 2, 3))):
            columns = [dim for dim in dims if dim not in rows]
            array = np.transpose(tensor.double().numpy(), (*rows, *columns))
            array = array.reshape(math.prod(tensor.shape[dim] for dim in rows), -1)
            norms[rows] = float(np.linalg.svd(array, compute_uv=False).sum())
        chosen = impl.largest_nuclear_norm(tensor)
        # Measured: 2e-16; fp32 could tie.
        within("T4 nuclear", 1 - norms[chosen.rows] / max(norms.values()), 1e-6)
        differs += chosen != impl.most_square(tensor.shape)
    assert differs > 0


def law_t5_folding_undoes_unfolding(impl: Any) -> None:
    """Each entry stands where its indices say, and comes back."""
    tensor = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    found = list(impl.unfoldings(4))
    assert len(found) == len(set(found)) == 7
    for unfolding in found:
        matrix = unfolding.unfold(tensor)
        rows = [tensor.shape[dim] for dim in unfolding.rows]
        columns = [tensor.shape[dim] for dim in unfolding.columns]
        assert matrix.shape == (math.prod(rows), math.prod(columns))
        for index in ((0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 3)):
            row = int(np.ravel_multi_index([index[dim] for dim in unfolding.rows], rows))
            column = int(np.ravel_multi_index([index[dim] for dim in unfolding.columns], columns))
            assert matrix[row, column] == tensor[index]
        assert torch.equal(unfolding.fold(matrix, tensor.shape), tensor)


def test_t1() -> None:
    law_t1_a_matrix_takes_the_steps_of_torch_muon_to_the_bit(tensorion)


def test_t2() -> None:
    law_t2_a_kernel_takes_the_steps_of_its_most_square_matrix(tensorion)


def test_t3() -> None:
    law_t3_no_unfolding_is_more_square(tensorion)


def test_t4() -> None:
    law_t4_no_unfolding_has_a_larger_nuclear_norm(tensorion)


def test_t5() -> None:
    law_t5_folding_undoes_unfolding(tensorion)
