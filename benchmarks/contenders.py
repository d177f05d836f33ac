"""What the optimizer step is compared with, over factors of given shapes and without a model.

riemannion   dreamrie.Riemannion: all layers of a shape in one batch
adamw        torch.optim.AdamW(fused=True) on both factors of each layer
literal      Alg. 4 of the paper as corrected in docs/method.md 4.1, line by line, one layer after the other
muon         torch.optim.Muon on each factor by itself
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreamrie.riemannion import Riemannion

Shape = tuple[int, int, int]

SD2_SHAPES: tuple[Shape, ...] = (
    (1280, 1280, 36),
    (320, 320, 30),
    (640, 640, 30),
    (1280, 1024, 12),
    (320, 1024, 10),
    (640, 1024, 10),
)
"""(out, in, layers): what ATTENTION_TARGETS adapts in the U-Net of Stable Diffusion 2, 128 layers."""

LR = 1e-3
MOMENTUM = 0.9
CONDITION = 100.0
"""Of the made-up gradients: largest over smallest singular value of each."""


@dataclass(eq=False)
class Pair:
    """The smallest thing that Riemannion accepts as a LoRA layer."""

    name: str
    left: nn.Parameter
    right: nn.Parameter
    scaling: float
    rank: int
    anchor_rank: int = 0


def make_pairs(
    shapes: Sequence[Shape], rank: int, device: torch.device, seed: int = 0
) -> list[Pair]:
    """Make layers that start at orthonormal frames, singular values 0.1, with gradients.

    Args:
        shapes: see `SD2_SHAPES`.
        rank: of all layers.
        device: of all factors.
        seed: of frames and gradients.

    Returns:
        Layers whose factors have dense gradients with a spread spectrum.
    """
    generator = torch.Generator(device).manual_seed(seed)
    fall = torch.logspace(0, -torch.tensor(CONDITION).log10().item(), rank, device=device)
    pairs = []

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, rank, generator=generator, device=device)

    for out, in_, count in shapes:
        for number in range(count):
            # Gram-Schmidt is not timed here; one batched QR for each shape would do as well.
            left, right = (torch.linalg.qr(normal(rows)).Q * 0.1**0.5 for rows in (out, in_))
            pair = Pair(
                f"{out}x{in_}.{number}",
                nn.Parameter(left.contiguous()),
                nn.Parameter(right.mT.contiguous()),
                1.0,
                rank,
            )
            mix = torch.linalg.qr(normal(rank)).Q
            pair.left.grad = 1e-3 * (normal(out) * fall) @ mix
            pair.right.grad = (1e-3 * (normal(in_) * fall) @ mix).mT.contiguous()
            pairs.append(pair)
    return pairs


def factors_of(pairs: Sequence[Pair]) -> list[nn.Parameter]:
    """Both factors of each layer."""
    return [factor for pair in pairs for factor in (pair.left, pair.right)]


class LiteralRiemannion:
    """Corrected Alg. 4, one layer after the other: one QR to read the point, two for Ortho, two for the retraction.

    A layer is X = A_L B^T, with `left` = A_L orthonormal and `right` = B^T / c; letters are the paper's.

    Args:
        pairs: layers without anchor; their left factors become orthonormal.
        lr: spectral norm of a step.
        momentum: heavy-ball factor.
    """

    def __init__(self, pairs: Sequence[Pair], lr: float = LR, momentum: float = MOMENTUM) -> None:
        self.pairs, self.lr, self.momentum = pairs, lr, momentum
        self.state: list[tuple[Tensor, Tensor, Tensor, Tensor] | None] = [None] * len(pairs)
        with torch.no_grad():
            for pair in pairs:
                q, r = torch.linalg.qr(pair.left)
                pair.left.copy_(q)
                pair.right.copy_(r @ pair.right)

    @torch.no_grad()
    def step(self) -> None:
        """One step of each layer from the gradients of its factors."""
        for index, pair in enumerate(self.pairs):
            assert pair.left.grad is not None
            assert pair.right.grad is not None
            a_l, b = pair.left.detach(), pair.scaling * pair.right.detach().mT
            b_r, g = torch.linalg.qr(b)
            # d loss / d left = G B, d loss / d right = c A_L^T G.
            gradient_b_r = torch.linalg.solve_triangular(g, pair.left.grad, upper=True, left=False)
            d_left = gradient_b_r - a_l @ (a_l.mT @ gradient_b_r)
            d_right = pair.right.grad.mT / pair.scaling
            before = self.state[index]
            if before is not None:
                m_left, m_right = transport_literally(before, a_l, b_r)
                d_left, d_right = self.momentum * m_left + d_left, self.momentum * m_right + d_right
            self.state[index] = (a_l.clone(), b_r, d_left, d_right)
            step_left, step_right = project_literally(a_l, b_r, *ortho(a_l, b_r, d_left, d_right))
            a_l, b = retract_literally(a_l, b, -self.lr * step_left, -self.lr * step_right, b_r)
            pair.left.copy_(a_l)
            pair.right.copy_(b.mT / pair.scaling)


def project_literally(
    a_l: Tensor, b_r: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Alg. 2: coordinates at A_L, B_R of the projected matrix left right^T."""
    product = left @ (right.mT @ b_r)
    return product - a_l @ (a_l.mT @ product), right @ (left.mT @ a_l)


def transport_literally(
    before: tuple[Tensor, Tensor, Tensor, Tensor], a_l: Tensor, b_r: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. (9): project the tangent vector of the point before."""
    old_a, old_b, d_left, d_right = before
    left, right = torch.cat([d_left, old_a], dim=-1), torch.cat([old_b, d_right], dim=-1)
    return project_literally(a_l, b_r, left, right)


def ortho(a_l: Tensor, b_r: Tensor, d_left: Tensor, d_right: Tensor) -> tuple[Tensor, Tensor]:
    """Alg. 1 with null directions masked: factors of U V^T."""
    rank = a_l.shape[-1]
    q_left, r_left = torch.linalg.qr(torch.cat([a_l, d_left], dim=-1))
    q_right, r_right = torch.linalg.qr(torch.cat([b_r, d_right], dim=-1))
    core = r_left[:, :rank] @ r_right[:, rank:].mT + r_left[:, rank:] @ r_right[:, :rank].mT
    left, values, right_t = torch.linalg.svd(core)
    keep = values > (1e-10 if core.dtype == torch.float64 else 1e-6) * values[:1]
    return q_left @ (left * keep), q_right @ right_t.mT


def retract_literally(
    a_l: Tensor, b: Tensor, d_left: Tensor, d_right: Tensor, b_r: Tensor
) -> tuple[Tensor, Tensor]:
    """Eqs. (8), (11): the truncated SVD of [A_L, d_left] [B + d_right, B_R]^T."""
    rank = a_l.shape[-1]
    q_left, r_left = torch.linalg.qr(torch.cat([a_l, d_left], dim=-1))
    q_right, r_right = torch.linalg.qr(torch.cat([b + d_right, b_r], dim=-1))
    left, values, right_t = torch.linalg.svd(r_left @ r_right.mT)
    return q_left @ left[:, :rank], q_right @ (right_t[:rank].mT * values[:rank])


def contenders(
    names: Sequence[str], shapes: Sequence[Shape], rank: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Steps of the optimizers, each over layers of its own.

    Args:
        names: which; see the module.
        shapes: see `SD2_SHAPES`.
        rank: of all layers.
        device: of all factors.

    Returns:
        By name, a function that takes one step.
    """
    found: dict[str, Callable[[], object]] = {}
    for name in names:
        pairs = make_pairs(shapes, rank, device)
        if name == "riemannion":
            found[name] = Riemannion(pairs, lr=LR, momentum=MOMENTUM).step
        elif name == "adamw":
            found[name] = torch.optim.AdamW(factors_of(pairs), lr=LR, fused=True).step
        elif name == "muon":
            found[name] = torch.optim.Muon(factors_of(pairs), lr=LR, weight_decay=0.0).step
        else:
            found[name] = LiteralRiemannion(pairs).step
    return found
