"""What the numbers of the paper mean that docstrings cite (arXiv:2507.12142, version 2), and where it is misprinted.

`tests/contracts/test_citations.py` holds the docstrings to this list: a number that is not here is a slip of the pen.
"""

from __future__ import annotations

SYMBOLS = {
    "Eq. (2)": "Ortho: the nearest matrix with orthonormal columns; printed as arg max of the distance",
    "Eq. (3)": "U V^T maximizes <M, S> over |S|_2 <= 1; code `masked_msign`, null directions masked",
    "Eq. (5)": "tangent space: xi = d_left v^T + u d_right^T with u^T d_left = 0; code `Tangent`",
    "Eq. (6)": "tangent projection; code `project`",
    "Eq. (8)": "retraction by truncated SVD of X + xi; code `retract`",
    "Eq. (9)": "vector transport by projection at the new point; code `transport`",
    "Eq. (10)": "heavy-ball momentum of transported Riemannian gradients; code `accumulate`, `move_momentum`",
    "Eq. (11)": "step: retraction along minus lr times the direction; code `combine`",
    "Eq. (12)": "direction P(Ortho(M)); code `tangent_direction`",
    "Eq. (13)": "direction by repeated Ortho and projection; option `inner_iters`",
    "Eq. (17)": "the whole set of locally optimal points; printed without a transpose; `theorem.optimal_family`",
    "Alg. 1": "OrthoLR; printed with qr of a transpose and without a mask; code `msign`",
    "Alg. 2": "ProjectLR; printed with A_R for A_L; code `project_low_rank`",
    "Alg. 3": "BackPropRSVD; printed with a transpose inside qr and no end of the loop; code `backprop_rsvd`",
    "Alg. 4": "one step of Riemannion; printed without the point in the right factor; code `fused_step`",
    "Alg. 6": "RiemannSGD with LOI and simulate_Adam; lines 7, 8, 12, 14 misprinted; `tests/reference/alg6.py`",
    "Lemma D.1": "P(Z) in bases that begin with u and v zeroes the lower-right block; code `zero_normal_block`",
    "Theorem 5.1": "the locally optimal start alpha U_1 V_2^T; code `split_point`",
}
