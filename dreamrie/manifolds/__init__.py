"""Muon on other manifolds, in the words of `fixed_rank`: SPD, Stiefel and Grassmann.

    basis = torch.nn.Parameter(random_frame(64, 8))
    optimizer = IntrinsicMuon([basis], "grassmann", lr=0.1)

`intrinsic` holds the rule they share, one file each their closed forms. docs/manifolds.md tells what was checked.
"""

from dreamrie.manifolds.grassmann import Grassmann
from dreamrie.manifolds.intrinsic import (
    Manifold,
    direction,
    nuclear_norm,
    random_frame,
    spectral_norm,
)
from dreamrie.manifolds.optimizer import MANIFOLDS, IntrinsicMuon
from dreamrie.manifolds.spd import SPD
from dreamrie.manifolds.stiefel import Stiefel

__all__ = [
    "MANIFOLDS",
    "SPD",
    "Grassmann",
    "IntrinsicMuon",
    "Manifold",
    "Stiefel",
    "direction",
    "nuclear_norm",
    "random_frame",
    "spectral_norm",
]
