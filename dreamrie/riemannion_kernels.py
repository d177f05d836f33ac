# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,import-untyped"
"""Small dense factorizations for many matrices at once on a GPU, without a word to the host.

cuSOLVER's batched SVD and Cholesky ask the host whether they converged, which stalls a training and cannot be recorded
in a CUDA graph. The matrices of a Riemannion step are 2r x 2r and r x r; here each is the work of one thread block, in
fp64. Triton comes with torch for Linux; whoever imports this module must be ready for an ImportError.

Sources: one-sided Jacobi, Golub and Van Loan, Matrix Computations, 4th ed., 8.6.3; the order of its pairs is the circle
method of round-robin tournaments, ibid. 8.5.5; QR with pivots before it, Drmac and Veselic, SIAM J. Matrix Anal. Appl.
29 (2008).
"""

from __future__ import annotations

from subprocess import SubprocessError
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

FAILURES = (TritonError, SubprocessError, RuntimeError, OSError)
"""What Triton raises where it cannot compile or start a kernel."""

# A sweep that met no larger cosine between two rows leaves none above its square.
_CONVERGED = tl.constexpr(1e-8)
# Cosines up to this one are rounding.
_PARALLEL = tl.constexpr(1e-15)
# Rows below this share of the longest are left alone: nobody asks for such singular vectors.
_NEGLIGIBLE = tl.constexpr(1e-12)
_SWEEPS = tl.constexpr(16)
# Numbers of a tile that a thread holds, for singular values and for Cholesky factors; measured.
_FEW, _MANY = 2, 32
# Matrices up to this size are one tile; of larger ones so many columns at a time stay in the registers.
_WHOLE, _PART = 32, 16


@triton.jit
def _squares(rows, size: tl.constexpr, block: tl.constexpr, width: tl.constexpr):
    """Squared lengths of all rows, -1 for the padding."""
    line = tl.arange(0, block)
    found = tl.zeros((block,), dtype=tl.float64)
    for start in range(0, size, width):
        column = start + tl.arange(0, width)
        inside = (line[:, None] < size) & (column[None, :] < size)
        tile = tl.load(rows + line[:, None] * size + column[None, :], mask=inside, other=0.0)
        found += tl.sum(tile * tile, axis=1)
    return tl.where(line < size, found, -1.0)


@triton.jit
def _turn(matrix, columns, size: tl.constexpr, block: tl.constexpr, width: tl.constexpr):
    """Write the columns of a matrix as rows."""
    line = tl.arange(0, block)
    for start in range(0, size, width):
        column = start + tl.arange(0, width)
        inside = (line[:, None] < size) & (column[None, :] < size)
        tile = tl.load(matrix + column[None, :] * size + line[:, None], mask=inside, other=0.0)
        tl.store(columns + line[:, None] * size + column[None, :], tile, mask=inside)
    tl.debug_barrier()


@triton.jit
def _triangular_rows(columns, rows, size: tl.constexpr, block: tl.constexpr, width: tl.constexpr):
    """Write R of a QR with the largest column first at each step, columns in their old places.

    Its rows fall in length and are nearly normal to each other, so that rotations have little left to do: 5 to 9 sweeps
    for condition 1e6 where the columns themselves take 8 to more than 20. The columns are overwritten.
    """
    line = tl.arange(0, block)
    squares = _squares(columns, size, block, width)
    for step in range(size):
        largest = tl.max(squares, axis=0)
        chosen = tl.min(tl.where(squares == largest, line, size - 1), axis=0)
        length = tl.sqrt(tl.where(largest > 0, largest, 1.0))
        open_ = squares >= 0
        along = tl.zeros((block,), dtype=tl.float64)
        for start in range(0, size, width):
            column = start + tl.arange(0, width)
            inside = open_[:, None] & (column[None, :] < size)
            pivot = tl.load(columns + chosen * size + column, mask=column < size, other=0.0)
            at = columns + line[:, None] * size + column[None, :]
            along += tl.sum(tl.load(at, mask=inside, other=0.0) * pivot[None, :], axis=1)
        along = along / length
        tl.store(rows + step * size + line, along, mask=line < size)
        open_ = open_ & (line != chosen)
        left = tl.zeros((block,), dtype=tl.float64)
        for start in range(0, size, width):
            column = start + tl.arange(0, width)
            inside = open_[:, None] & (column[None, :] < size)
            pivot = tl.load(columns + chosen * size + column, mask=column < size, other=0.0)
            at = columns + line[:, None] * size + column[None, :]
            tile = tl.load(at, mask=inside, other=0.0)
            tile -= along[:, None] * (pivot / length)[None, :]
            tl.debug_barrier()
            tl.store(at, tile, mask=inside)
            left += tl.sum(tile * tile, axis=1)
        squares = tl.where(open_, left, -1.0)
        tl.debug_barrier()


@triton.jit
def _rotate_rows(rows, turn, floor, size: tl.constexpr, pairs: tl.constexpr, width: tl.constexpr):
    """Make the rows of each pair of a round normal to each other; returns the cosines between them before."""
    match = tl.arange(0, pairs)
    # One row keeps its place, the others move round a circle.
    one = tl.where(match == 0, size - 1, (turn + match) % (size - 1))
    two = tl.where(match == 0, turn, (turn + size - 1 - match) % (size - 1))
    xx = tl.zeros((pairs,), dtype=tl.float64)
    yy = tl.zeros((pairs,), dtype=tl.float64)
    xy = tl.zeros((pairs,), dtype=tl.float64)
    for start in range(0, size, width):
        column = start + tl.arange(0, width)
        inside = (match[:, None] < size // 2) & (column[None, :] < size)
        x = tl.load(rows + one[:, None] * size + column[None, :], mask=inside, other=0.0)
        y = tl.load(rows + two[:, None] * size + column[None, :], mask=inside, other=0.0)
        xx += tl.sum(x * x, axis=1)
        yy += tl.sum(y * y, axis=1)
        xy += tl.sum(x * y, axis=1)
    length = tl.sqrt(xx * yy)
    matters = (tl.minimum(xx, yy) > floor) & (tl.abs(xy) > _PARALLEL * length)
    ratio = (yy - xx) / (2.0 * tl.where(matters, xy, 1.0))
    tangent = 1.0 / (tl.abs(ratio) + tl.sqrt(1.0 + ratio * ratio))
    tangent = tl.where(matters, tl.where(ratio < 0, -tangent, tangent), 0.0)
    cos = 1.0 / tl.sqrt(1.0 + tangent * tangent)
    sin = cos * tangent
    for start in range(0, size, width):
        column = start + tl.arange(0, width)
        inside = (match[:, None] < size // 2) & (column[None, :] < size)
        at_one = rows + one[:, None] * size + column[None, :]
        at_two = rows + two[:, None] * size + column[None, :]
        x = tl.load(at_one, mask=inside, other=0.0)
        y = tl.load(at_two, mask=inside, other=0.0)
        # Where threads hold the same numbers, none may write before all have read.
        tl.debug_barrier()
        tl.store(at_one, cos[:, None] * x - sin[:, None] * y, mask=inside)
        tl.store(at_two, sin[:, None] * x + cos[:, None] * y, mask=inside)
    tl.debug_barrier()
    return tl.where(matters, tl.abs(xy) / tl.where(matters, length, 1.0), 0.0)


@triton.jit
def _decompose(
    matrices,
    rows_of_all,
    vectors_of_all,
    values,
    size: tl.constexpr,
    pairs: tl.constexpr,
    block: tl.constexpr,
    width: tl.constexpr,
):
    """Rotate the rows of R of one matrix until all are normal to each other; sorted, and divided by their lengths."""
    number = tl.program_id(0).to(tl.int64)
    rows = rows_of_all + number * size * size
    vectors = vectors_of_all + number * size * size
    _turn(matrices + number * size * size, vectors, size, block, width)
    _triangular_rows(vectors, rows, size, block, width)
    floor = tl.max(_squares(rows, size, block, width), axis=0) * _NEGLIGIBLE * _NEGLIGIBLE
    sweep = 0
    worst = floor * 0.0 + 1.0
    while (sweep < _SWEEPS) & (worst > _CONVERGED):
        seen = tl.zeros((pairs,), dtype=tl.float64)
        for turn in range(size - 1):
            seen = tl.maximum(seen, _rotate_rows(rows, turn, floor, size, pairs, width))
        worst = tl.max(seen, axis=0)
        sweep += 1
    line = tl.arange(0, block)
    squares = _squares(rows, size, block, width)
    first = squares[None, :] > squares[:, None]
    first = first | ((squares[None, :] == squares[:, None]) & (line[None, :] < line[:, None]))
    place = tl.sum(first.to(tl.int32), axis=1)
    lengths = tl.sqrt(tl.maximum(squares, 0.0))
    tl.store(values + number * size + place, lengths, mask=line < size)
    for start in range(0, size, width):
        column = start + tl.arange(0, width)
        inside = (line[:, None] < size) & (column[None, :] < size)
        tile = tl.load(rows + line[:, None] * size + column[None, :], mask=inside, other=0.0)
        unit = tile / tl.where(lengths > 0, lengths, 1.0)[:, None]
        tl.store(vectors + place[:, None] * size + column[None, :], unit, mask=inside)


@triton.jit
def _factorize(grams, lowers, inverses, failures, size: tl.constexpr, block: tl.constexpr):
    """Cholesky factor L of one matrix and its inverse, column by column, the matrix in registers."""
    matrix = tl.program_id(0).to(tl.int64)
    line = tl.arange(0, block)
    row, column = line[:, None], line[None, :]
    inside = (row < size) & (column < size)
    places = matrix * size * size + row * size + column
    rest = tl.load(grams + places, mask=inside, other=0.0)
    inverse = tl.where(row == column, 1.0, 0.0).to(tl.float64)
    lower = tl.zeros((block, block), dtype=tl.float64)
    failed = matrix * 0
    for step in range(size):
        here = tl.sum(tl.where(column == step, rest, 0.0), axis=1)
        across = tl.sum(tl.where(row == step, rest, 0.0), axis=0)
        pivot = tl.sum(tl.where(line == step, here, 0.0), axis=0)
        sound = pivot > 0
        failed += tl.where(sound, 0, 1)
        scale = tl.where(sound, 1.0 / tl.sqrt(tl.where(sound, pivot, 1.0)), 0.0)
        down = tl.where(line >= step, here * scale, 0.0)
        right = tl.where(line >= step, across * scale, 0.0)
        lower = tl.where(column == step, down[:, None], lower)
        rest -= down[:, None] * right[None, :]
        solved = tl.sum(tl.where(row == step, inverse, 0.0), axis=0) * scale
        below = inverse - down[:, None] * solved[None, :]
        inverse = tl.where(row == step, solved[None, :], tl.where(row > step, below, inverse))
    tl.store(lowers + places, lower, mask=inside)
    tl.store(inverses + places, inverse, mask=inside)
    tl.store(failures + matrix, failed)


def values_and_right(matrix: Float[Tensor, "batch k k"]) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors of square matrices, k even.

    Args:
        matrix: fp64, finite; left as it is.

    Returns:
        values (batch, k), descending, and V^T (batch, k, k). Rows of V^T to values below 1e-12 of the largest are not
        normal to the others, and zero where the value is.
    """
    count, size = matrix.shape[0], matrix.shape[-1]
    matrix = matrix.contiguous()
    rows, vectors = torch.empty_like(matrix), torch.empty_like(matrix)
    values = matrix.new_empty(count, size)
    block = triton.next_power_of_2(size)
    pairs, width = block // 2, block if block <= _WHOLE else _PART
    warps = _warps(pairs * width, _FEW)
    # Triton launches on the current device.
    with torch.cuda.device_of(matrix):
        _decompose[(count,)](
            matrix, rows, vectors, values, size, pairs, block, width, num_warps=warps
        )
    return values, vectors


def cholesky_and_inverse(
    gram: Float[Tensor, "batch k k"],
) -> tuple[Tensor, Tensor, Bool[Tensor, " batch"]]:
    """L and L^-1 of L L^T = gram, and where there is no L.

    Args:
        gram: symmetric, fp64.

    Returns:
        L and L^-1, (batch, k, k), lower; where a pivot was not positive, True in the last and nothing of use in them.
    """
    count, size = gram.shape[0], gram.shape[-1]
    gram = gram.contiguous()
    lower, inverse = torch.empty_like(gram), torch.empty_like(gram)
    failed = torch.empty(count, dtype=torch.int64, device=gram.device)
    block = triton.next_power_of_2(size)
    warps = _warps(block * block, _MANY)
    with torch.cuda.device_of(gram):
        _factorize[(count,)](gram, lower, inverse, failed, size, block, num_warps=warps)
    return lower, inverse, failed != 0


def _warps(numbers: int, per_thread: int) -> int:
    """Warps of a thread block whose threads hold so many numbers of a tile each."""
    return min(32, max(1, numbers // (32 * per_thread)))
