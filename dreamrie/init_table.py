"""The table of starts: what `--init` offers, and what settings and logs need to know of each.

This file imports nothing heavy, so that `--help` need not load PEFT. To add a start, write one file with a function
that writes it and one line here; docs/inits.md shows both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What a start is computed from, beside random numbers; batches may use the base weights too.
Needs = Literal["nothing", "weights", "batches"]


@dataclass(frozen=True)
class Init:
    """One start of an adapter. None of them changes the function of the model or its base weights.

    Attributes:
        begin: "module:function"; called with a `dreamrie.lora.inits.Request`, writes the start of each pair.
        summary: what it is, in a few words.
        source: library or paper.
        needs: what it is computed from.
        anchored: the start is a point of rank r with a frozen copy of itself that is subtracted, and up to rank 2r is
            exported; else one factor is zero (or the product is), and rank r is exported.
    """

    begin: str
    summary: str
    source: str
    needs: Needs = "nothing"
    anchored: bool = True

    @property
    def layout(self) -> str:
        """Start to attach an adapter with: this one waits for batches, and needs its layout until then."""
        return "orthonormal" if self.anchored else "default"


_PACKAGE = "dreamrie.lora.inits"

INITS: dict[str, Init] = {
    "loi": Init(
        f"{_PACKAGE}.loi:begin",
        "locally optimal: the tangent space holds the most of the gradient",
        "own, arXiv:2507.12142 section 5",
        needs="batches",
    ),
    "orthonormal": Init(
        f"{_PACKAGE}.stiefel:orthonormal",
        "random orthonormal u and v, equal singular values of --start_scale",
        "own",
    ),
    "stiefel_a": Init(
        f"{_PACKAGE}.stiefel:stiefel_a",
        "random orthonormal lora_B (A of the paper), zero lora_A",
        "own, arXiv:2507.12142 Table 7",
        anchored=False,
    ),
    "stiefel_b": Init(
        f"{_PACKAGE}.stiefel:stiefel_b",
        "random orthonormal lora_A (B of the paper), zero lora_B",
        "own, arXiv:2507.12142 Table 7",
        anchored=False,
    ),
    "stiefel_both": Init(
        f"{_PACKAGE}.stiefel:stiefel_both",
        "both factors random and orthonormal, singular values 1",
        "own, arXiv:2507.12142 Table 7",
    ),
    "pissa": Init(
        f"{_PACKAGE}.spectral:from_peft",
        "the r largest singular triples of the base weight",
        "PEFT, arXiv:2404.02948",
        needs="weights",
    ),
    "milora": Init(
        f"{_PACKAGE}.spectral:milora",
        "the r smallest singular triples of the base weight",
        "own, arXiv:2406.09044",
        needs="weights",
    ),
    "olora": Init(
        f"{_PACKAGE}.spectral:from_peft",
        "the first r columns and rows of a QR decomposition of the base weight",
        "PEFT, arXiv:2406.01775",
        needs="weights",
    ),
    "corda": Init(
        f"{_PACKAGE}.corda:begin",
        "leading triples of the base weight times the covariance of its inputs",
        "as in PEFT, own in fp64, arXiv:2406.05223",
        needs="batches",
    ),
    "lora_ga": Init(
        f"{_PACKAGE}.lora_ga:begin",
        "singular vectors 1 to r (input) and r + 1 to 2r (output) of the gradient",
        "PEFT, arXiv:2407.05000",
        needs="batches",
    ),
    "eva": Init(
        f"{_PACKAGE}.eva:begin",
        "lora_A: the r principal components of the inputs, zero lora_B",
        "PEFT, arXiv:2410.07170",
        needs="batches",
        anchored=False,
    ),
    "default": Init(
        f"{_PACKAGE}.zero:from_peft",
        "uniform random lora_A, zero lora_B: the usual LoRA",
        "PEFT",
        anchored=False,
    ),
    "gaussian": Init(
        f"{_PACKAGE}.zero:from_peft",
        "normal random lora_A, zero lora_B",
        "PEFT",
        anchored=False,
    ),
    "orthogonal": Init(
        f"{_PACKAGE}.zero:orthogonal",
        "two random factors that meet in orthogonal subspaces, so that the product is zero; r even",
        "PEFT",
        anchored=False,
    ),
}
