"""Points and tangent vectors as dense matrices in fp64, and the spectra that the laws draw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamrie.fixed_rank import Point, Tangent
from tests.strategies import F64

TAME = ("spread", "equal", "repeated")
ALL = (*TAME, "conditioned", "tiny")


def in_dtype(parts: Any, dtype: torch.dtype) -> Any:
    return type(parts)(*(part.to(dtype) for part in parts))


def ambient(point: Point, tangent: Tangent) -> Tensor:
    return (
        tangent.d_left.to(F64) @ point.v.to(F64).mT + point.u.to(F64) @ tangent.d_right.to(F64).mT
    )


def matrix(point: Point) -> Tensor:
    u, s, v = in_dtype(point, F64)
    return (u * s) @ v.mT


def orthonormality(frame_: Tensor) -> float:
    wide = frame_.to(F64)
    return float((wide.mT @ wide - torch.eye(wide.shape[-1], dtype=F64)).abs().max())
