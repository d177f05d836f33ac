"""The table of optimizers: what `--optimizer` offers, and what settings and logs need to know of each.

This file imports nothing, so that `--help` need not load PEFT. To add an optimizer, write one file with a function that
builds it and one line here; docs/optimizers.md shows both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

# Of an anchored adapter: "frozen" trains the first r columns alone, "trained" all 2r, "refused" takes none.
Anchor = Literal["frozen", "trained", "refused"]

SPECTRAL = "spectral norm of a step of X"
PRODUCT = "it moves the product of the factors, and with magnitudes the change of a layer is no longer that product"
FACTOR = "size of the entries of a step of each factor"
GRADIENT = "multiple of the gradient"
# Of methods that orthogonalize their steps. Riemannion's paper has 0.9, torch and the papers of the others have 0.95;
# docs/optimizers.md measures all of them.
SPECTRAL_MOMENTUM = 0.5

# Keys of dreamrie.core_maps.CORE_MAPS, which needs torch.
CORE_MAP_NAMES = (
    "msign",
    "newton_schulz",
    "polar_express",
    "soft_clip",
    "frobenius",
    "namo",
    "alternating",
)


@dataclass(frozen=True)
class Entry:
    """One optimizer.

    Attributes:
        builder: "module:function"; called as `function(pairs, lr=..., weight_decay=...)`, with `momentum=...` where
            the entry has one and with every name of `options`.
        summary: what a step is, in a few words.
        source: library or paper.
        lr_unit: what the learning rate measures; X is the change of a layer.
        learning_rate: default peak.
        state: numbers kept per layer with factors (m, r) and (r, n).
        gauge_invariant: whether the path of X is the same for the factors (B R, R^-1 A).
        anchor: what becomes of the frozen half of an anchored adapter.
        momentum: default, None where it is not a setting.
        max_grad_norm: default limit of the gradient norm, 0: not clipped.
        needs_rank: cannot start where the product of the factors has a rank below r.
        bounded_step: a step has about spectral norm lr.
        retracts: a step of the product is cut back to the rank, so that a start may be small beside it; other bounded
            steps are added to the factors, and the product of both halves is small only beside a larger start.
        start_steps: singular values of the starts loi and orthonormal in learning rates, for bounded steps.
        trained_factors: how many of the two factors are trained.
        no_dora: why it cannot train DoRA's magnitudes too, to follow "because"; "": it can.
        options: the optimizer's own switches with their defaults.
    """

    builder: str
    summary: str
    source: str
    lr_unit: str
    learning_rate: float
    state: str
    gauge_invariant: bool = False
    anchor: Anchor = "trained"
    momentum: float | None = None
    max_grad_norm: float = 1.0
    needs_rank: bool = False
    bounded_step: bool = False
    retracts: bool = False
    start_steps: float = 1.0
    trained_factors: int = 2
    no_dora: str = "it was not made for them"
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


OPTIMIZERS: dict[str, Entry] = {
    "riemannion": Entry(
        "dreamrie.optimizers.riemannian:riemannion",
        "Muon on the manifold of rank-r matrices",
        "own, arXiv:2507.12142",
        SPECTRAL,
        1e-3,
        "2 (m + n) r + r",
        gauge_invariant=True,
        no_dora=PRODUCT,
        anchor="frozen",
        momentum=SPECTRAL_MOMENTUM,
        max_grad_norm=0.0,
        needs_rank=True,
        bounded_step=True,
        retracts=True,
        # docs/optimizers.md measures more and less.
        start_steps=0.1,
        options={"core_map": "msign"},
    ),
    "riemann_sgd": Entry(
        "dreamrie.optimizers.riemannian:riemann_sgd",
        "gradient descent with momentum on the same manifold",
        "own, arXiv:2507.12142 Alg. 6",
        GRADIENT,
        0.1,
        "2 (m + n) r + r",
        gauge_invariant=True,
        no_dora=PRODUCT,
        anchor="frozen",
        momentum=0.9,
        needs_rank=True,
    ),
    "riemann_adam": Entry(
        "dreamrie.optimizers.riemannian:riemann_adam",
        "the same with one second moment for each of the two blocks of the tangent space",
        "own, arXiv:2507.12142 Alg. 6, corrected",
        "Frobenius norm of each block of a step of X",
        2e-3,
        "2 (m + n) r + r + 3",
        gauge_invariant=True,
        no_dora=PRODUCT,
        anchor="frozen",
        momentum=0.9,
        max_grad_norm=0.0,
        needs_rank=True,
        bounded_step=True,
        retracts=True,
        options={"bias_correction": True},
    ),
    "imuon": Entry(
        "dreamrie.optimizers.imuon:imuon",
        "intrinsic Muon: the joint momentum of both factors, orthogonalized on either side",
        "own, arXiv:2605.09238",
        "spectral norm of each half of a step of X",
        1e-3,
        "(m + n) r",
        gauge_invariant=True,
        no_dora=PRODUCT,
        anchor="frozen",
        momentum=SPECTRAL_MOMENTUM,
        max_grad_norm=0.0,
        needs_rank=True,
        bounded_step=True,
    ),
    "lora_muon": Entry(
        "dreamrie.optimizers.lora_muon:lora_muon",
        "whitened momentum of each factor, orthogonalized",
        "own, arXiv:2606.12921",
        "twice the spectral norm of each half of a step of X",
        1e-3,
        "(m + n) r",
        gauge_invariant=True,
        no_dora=PRODUCT,
        anchor="frozen",
        momentum=SPECTRAL_MOMENTUM,
        max_grad_norm=0.0,
        needs_rank=True,
        bounded_step=True,
    ),
    "lora_rite": Entry(
        "dreamrie.optimizers.lora_rite:lora_rite",
        "adaptive, with an r x r second moment in the frame of the other factor",
        "own, arXiv:2410.20625",
        "largest spectral norm of each half of a step of X",
        1e-3,
        "2 (m + n) r + 2 r r + 2",
        gauge_invariant=True,
        no_dora=PRODUCT,
        anchor="frozen",
        momentum=0.9,
        max_grad_norm=0.0,
        bounded_step=True,
    ),
    "adamw": Entry(
        "dreamrie.optimizers.libraries:adamw",
        "decoupled Adam on the factors",
        "torch.optim.AdamW",
        FACTOR,
        1e-4,
        "2 (m + n) r + 2",
        no_dora="",
    ),
    "sgd": Entry(
        "dreamrie.optimizers.libraries:sgd",
        "gradient descent with momentum on the factors",
        "torch.optim.SGD",
        GRADIENT,
        0.1,
        "(m + n) r",
        momentum=0.9,
        no_dora="",
    ),
    "muon": Entry(
        "dreamrie.optimizers.libraries:muon",
        "Muon on each factor by itself",
        "torch.optim.Muon",
        "spectral norm of a step of lora_A; of lora_B sqrt(m / r) times that",
        1e-3,
        "(m + n) r",
        momentum=SPECTRAL_MOMENTUM,
        max_grad_norm=0.0,
        no_dora="torch's Muon takes matrices only, and a magnitude is a vector",
    ),
    "loraplus": Entry(
        "dreamrie.optimizers.libraries:loraplus",
        "AdamW with a 16 times larger learning rate for lora_B",
        "peft.optimizers, arXiv:2402.12354",
        FACTOR + "; lora_B 16 times that",
        1e-4,
        "2 (m + n) r + 2",
        no_dora="",
    ),
    "lorafa": Entry(
        "dreamrie.optimizers.libraries:lorafa",
        "lora_A is frozen; AdamW on the projected gradient of lora_B",
        "peft.optimizers, arXiv:2308.03303",
        FACTOR,
        1e-4,
        "2 m r + 1",
        anchor="refused",
        trained_factors=1,
        no_dora="its projected gradient is that of the plain product, and PEFT's implementation knows no third part",
    ),
    "rprec_adamw": Entry(
        "dreamrie.optimizers.libraries:rprec_adamw",
        "AdamW after division by the damped Gram matrix of the other factor",
        'peft.optimizers (there "Riemannian"; no retraction, no transport), arXiv:2402.02347',
        FACTOR,
        1e-4,
        "2 (m + n) r + 2",
        no_dora="",
    ),
}
