"""Starting and training orthogonal to given adapters (docs/method.md 5.1): the best there is, and it stays there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dreamrie.loi as loi
import tests.reference.theorem as theorem
from dreamrie.lora import LoraPair, LowRank, apart, attach_lora
from dreamrie.riemannion import Riemannion
from tests.margins import within
from tests.properties.test_loi_optimum_laws import gradient
from tests.reference import nets
from tests.reference.theorem import matrix
from tests.strategies import F64, frame, noise, regauge

real = SimpleNamespace(loi=loi, apart=apart)
ESTIMATORS = ("mean_gradient", "sketch", "backprop_rsvd")
# out, in, rank, directions to avoid: square, wide, tall, and 2r above the 3 that are left.
SHAPES = ((13, 13, 2, 4), (17, 23, 3, 6), (23, 17, 4, 5), (21, 13, 2, 10))


def law_apart_start_is_the_best_orthogonal_one(impl: Any) -> None:
    """X0 V = 0, and no start with X0 V = 0 holds more of the gradient: the dense optimum of G (I - V V^T)."""
    for out, in_, rank, count in SHAPES:
        g, avoid = gradient(out, in_), frame(7, in_, count)
        projected = g - g @ avoid @ avoid.T
        best = theorem.optimum(projected, rank)
        # The best start of all would lie along V for a good part.
        assert nets.relative(projected, g) > 0.2
        for estimator in ESTIMATORS:
            model = nets.prescribed(out, in_)
            pairs = attach_lora(model, rank, ["layer"])
            exact = {"oversample": in_, "power": 12} if estimator == "backprop_rsvd" else {}
            report = impl.loi.locally_optimal_init(
                model, pairs, nets.prescribed_loss, [g], estimator=estimator, avoid=[avoid], **exact
            )
            x = matrix(pairs[0].point())
            within("apart start", (x @ avoid).norm() / x.norm(), 1e-12)
            share = theorem.energy(x, rank, projected) / best
            within(f"apart optimum {estimator}", abs(share - 1), 1e-8)
            within("apart report", abs(report.layers[0].optimum / best - 1), 1e-8)


def law_apart_start_on_a_net(impl: Any) -> None:
    """Convolution and linear layers of one net, with a layer that is free and a scaling that is not 1."""
    data = nets.batches(2)
    truth = nets.dense_gradients(nets.net(), nets.squares, data)
    avoid = [frame(3, 27, 5), None, frame(4, 21, 6)]
    for estimator in ("mean_gradient", "sketch"):
        model = nets.net()
        pairs = nets.with_scaling(model, 0.625, rank=2, target_modules=nets.TARGETS)
        impl.loi.locally_optimal_init(
            model, pairs, nets.squares, data, estimator=estimator, avoid=avoid
        )
        for pair, basis in zip(pairs, avoid, strict=True):
            g, x = truth[pair.name], matrix(pair.point())
            if basis is not None:
                within("apart net", (x @ basis).norm() / x.norm(), 1e-12)
                g = g - g @ basis @ basis.T
            share = theorem.energy(x, pair.rank, g) / theorem.optimum(g, pair.rank)
            within(f"apart net {estimator}", abs(share - 1), 1e-9)


def law_apart_row_space_is_whole_and_orthonormal(impl: Any) -> None:
    """V^T V = I and D V V^T = D for each change; directions that two share count once, those that a file pads never."""
    first = LowRank(noise(0, 9, 3), 5.0 * noise(1, 3, 14))
    second = LowRank(noise(2, 9, 2), torch.cat([first.right[:1], noise(3, 1, 14)]))
    padded = LowRank(torch.cat([noise(4, 9, 1), torch.zeros(9, 2, dtype=F64)], 1), noise(5, 3, 14))
    for changes, size in (([first], 3), ([first, second], 4), ([first, second, padded], 5)):
        basis = impl.apart.row_space(changes)
        assert basis.shape == (14, size)
        within("row space", (basis.T @ basis - torch.eye(size, dtype=F64)).abs().max(), 1e-12)
        for change in changes:
            dense = change.dense()
            within("row space whole", nets.relative(dense @ basis @ basis.T, dense), 1e-12)


# ---------------------------------------------------------------------------------------------------- training


def other_changes(pairs: list[LoraPair], rank: int = 3) -> dict[str, LowRank]:
    """Another adapter on the same layers; rows of a convolution in four dimensions."""
    found = {}
    for number, pair in enumerate(pairs):
        left = noise(50 + number, pair.out, rank, dtype=pair.left.dtype)
        right = noise(70 + number, rank, pair.in_, dtype=pair.left.dtype)
        found[pair.name] = LowRank(
            left.reshape(-1, rank, *pair.left.shape[2:]),
            right.reshape(rank, *pair.right.shape[1:]),
        )
    return found


def along(change: Tensor, other: LowRank) -> float:
    """|D V| / |D| with V from a dense SVD of the other change."""
    rank = other.right.shape[0]
    dense = other.left.flatten(1).double() @ other.right.flatten(1).double()
    v = torch.linalg.svd(dense).Vh[:rank].T
    return float((change.double() @ v).norm() / change.double().norm())


def law_apart_training_stays_orthogonal(impl: Any) -> None:
    """50 steps with decay, fp32 and fp64: point and change respond to no input direction of the other adapter."""
    for dtype, bar in ((torch.float32, 1e-5), (F64, 1e-12)):
        model = nets.net(dtype=dtype).eval()
        pairs = attach_lora(model, 2, nets.TARGETS)
        others = other_changes(pairs)
        impl.apart.keep_apart(pairs, [others])
        data = nets.batches(3, dtype=dtype)
        impl.loi.locally_optimal_init(
            model, pairs, nets.squares, data, alpha=0.2, avoid=impl.apart.avoided(pairs)
        )
        optimizer = Riemannion(pairs, lr=0.02, weight_decay=0.1)
        start = [pair.point() for pair in pairs]
        for step in range(50):
            optimizer.zero_grad()
            nets.squares(model, data[step % 3]).backward()
            optimizer.step()
        for pair, before in zip(pairs, start, strict=True):
            x = matrix(pair.point())
            assert nets.relative(x, matrix(before)) > 0.5
            within(f"apart point {dtype}", along(x, others[pair.name]), bar)
            within(f"apart change {dtype}", along(pair.delta(), others[pair.name]), bar)


class Restricted(nn.Module):
    """y = tanh(W x + change z) for z = N^T x: the problem without the directions that are avoided."""

    def __init__(self, weight: Tensor, inside: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(inside.shape[1], weight.shape[0], bias=False).to(F64)
        self.layer.weight = nn.Parameter(weight @ inside)
        self.register_buffer("inside", inside)
        self.register_buffer("rest", weight - weight @ inside @ inside.T)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x @ self.inside) + x @ self.rest.T)


def kept_path(impl: Any, turn: float | None = None) -> tuple[list[Tensor], Tensor]:
    """Points of 20 steps on the whole layer, kept orthogonal, maybe with factors turned on the way; and N."""
    whole = frame(11, 12, 12)
    avoid, inside = whole[:, :5], whole[:, 5:]
    model = Restricted(noise(1, 9, 12), torch.eye(12, dtype=F64))
    pairs = attach_lora(model, 2, ["layer"])
    pairs[0].set_start(_start(inside), anchored=True)
    impl.apart.keep_apart(pairs, [{"layer": LowRank(noise(2, 9, 5), noise(3, 5, 5) @ avoid.T)}])
    return _steps(model, pairs, turn), inside


def _start(inside: Tensor) -> Any:
    s = torch.tensor([0.3, 0.2], dtype=F64)
    return loi.points.Point(frame(5, 9, 2), s, inside @ frame(6, 7, 2))


def _steps(model: nn.Module, pairs: list[LoraPair], turn: float | None = None) -> list[Tensor]:
    optimizer, path = Riemannion(pairs, lr=0.01), []
    for step in range(20):
        if turn is not None and step in (0, 10):
            regauge(pairs[0], turn, seed=step)  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss = (model(noise(30 + step, 8, 12)) - noise(60, 8, 9)).square().mean()
        loss.backward()
        optimizer.step()
        path.append(matrix(pairs[0].point()))
    return path


def law_apart_path_is_that_of_the_smaller_problem(impl: Any) -> None:
    """The kept path equals Riemannion on the problem that has only the other directions, lifted by N."""
    path, inside = kept_path(impl)
    model = Restricted(noise(1, 9, 12), inside)
    pairs = attach_lora(model, 2, ["layer"])
    pairs[0].set_start(_start(torch.eye(7, dtype=F64)), anchored=True)
    small = [x @ inside.T for x in _steps(model, pairs)]
    assert nets.relative(path[-1], path[0]) > 0.2
    within("apart path", max(map(nets.relative, path, small)), 1e-10)


def law_apart_gauge(impl: Any) -> None:
    """Factors turned at the start and in mid-run: the same kept path, as without others."""
    path, _ = kept_path(impl)
    turned, _ = kept_path(impl, turn=30.0)
    within("apart gauge", max(map(nets.relative, turned, path)), 1e-10)


LAWS = [value for name, value in sorted(globals().items()) if name.startswith("law_")]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    """Every law of this file on the real implementation."""
    law(real)


def test_a_start_alone_does_not_keep_the_training_apart() -> None:
    """Why there is a hook: from an orthogonal start, free steps leave the complement at once."""
    model = nets.net().eval()
    pairs = attach_lora(model, 2, nets.TARGETS)
    others = other_changes(pairs)
    avoid = [apart.row_space([others[pair.name]]) for pair in pairs]
    data = nets.batches(3)
    loi.locally_optimal_init(model, pairs, nets.squares, data, alpha=0.2, avoid=avoid)
    optimizer = Riemannion(pairs, lr=0.02)
    for step in range(50):
        optimizer.zero_grad()
        nets.squares(model, data[step % 3]).backward()
        optimizer.step()
    assert min(along(pair.delta(), others[pair.name]) for pair in pairs) > 0.1
