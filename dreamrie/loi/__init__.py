"""Locally optimal initialization: start where the tangent space holds most of the gradient."""

from __future__ import annotations

from dreamrie.loi.driver import LayerReport, LoiReport, locally_optimal_init
from dreamrie.loi.estimators import backprop_rsvd, mean_gradient, sketch
from dreamrie.loi.points import (
    LeadingSvd,
    captured_energy,
    leading_svd,
    optimal_point,
    sketch_svd,
    split_point,
)
from dreamrie.loi.session import LoiPair, RandomState, digest

__all__ = [
    "LayerReport",
    "LeadingSvd",
    "LoiPair",
    "LoiReport",
    "RandomState",
    "backprop_rsvd",
    "captured_energy",
    "digest",
    "leading_svd",
    "locally_optimal_init",
    "mean_gradient",
    "optimal_point",
    "sketch",
    "sketch_svd",
    "split_point",
]
