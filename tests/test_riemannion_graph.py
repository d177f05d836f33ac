"""The recorded step does what the step without graphs does, to the bit; here its program runs without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import Pair
from dreamrie import riemannion_graph
from dreamrie.errors import ConfigError
from dreamrie.riemannion import Riemannion
from tests.strategies import noise

SHAPES = ((24, 16), (24, 16), (20, 20), (16, 28), (16, 28))
RANK, ANCHOR = 4, 4


@pytest.fixture(autouse=True)
def _record_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(riemannion_graph, "RECORDS_ON", ("cpu",))


def make_pairs(
    anchor: int = ANCHOR,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    device: str = "cpu",
) -> list[Pair]:
    """Layers of three shapes, whose last columns are an anchor."""
    pairs = []
    for number, (out, in_) in enumerate(shapes):
        left = noise(number, out, RANK + anchor).to(device, dtype)
        right = noise(50 + number, RANK + anchor, in_).to(device, dtype)
        factors = (torch.nn.Parameter(left), torch.nn.Parameter(right))
        pairs.append(Pair(f"layer{number}", *factors, 0.5, RANK, anchor))
    return pairs


def give_gradients(pairs: list[Pair], step: int, scale: float = 1.0) -> None:
    for number, pair in enumerate(pairs):
        dense = scale * noise(1000 * step + number, pair.left.shape[0], pair.right.shape[1])
        dense = dense.to(pair.left)
        pair.left.grad = pair.scaling * dense @ pair.right.detach().mT
        pair.right.grad = pair.scaling * pair.left.detach().mT @ dense


Change = Callable[[Riemannion, list[Pair], int], None]


def nothing(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    """A training that nobody disturbs."""


def schedule(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * (10 - step) / 10


def load_factors(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    if step in (4, 6):
        with torch.no_grad():
            pairs[1].left.add_(0.01 * noise(7, *pairs[1].left.shape).to(pairs[1].left))
        give_gradients(pairs, step)


def write_behind_the_back(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    """Leaves no trace in a version counter."""
    if step == 5:
        pairs[2].right.data.mul_(1.5)
        give_gradients(pairs, step)


def break_a_gradient(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    if step in (4, 5):
        assert pairs[3].left.grad is not None
        pairs[3].left.grad[2, 1] = float("nan")


def gradients_of_rank_one(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    """The Gram matrices do not do; the exact step is needed."""
    pair = pairs[2]
    ends = noise(step, pair.left.shape[0], 1), noise(step + 99, 1, pair.right.shape[1])
    dense = (ends[0] @ ends[1]).to(pair.left)
    pair.left.grad = dense @ pair.right.detach().mT
    pair.right.grad = pair.left.detach().mT @ dense


def freeze_a_layer(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    if step > 5:
        pairs[0].left.grad = pairs[0].right.grad = None


def no_gradient_at_all(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    """Zero momentum: nothing acts, and factors keep their bytes."""
    give_gradients(pairs, step, 0.0)


def change_momentum(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    for group in optimizer.param_groups:
        group["momentum"] = 0.9 if step > 4 else 0.5


def reload(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    if step == 5:
        optimizer.load_state_dict(optimizer.state_dict())


def move_parameters(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    """As `model.to` does."""
    if step == 5:
        pairs[4].left.data = pairs[4].left.data.clone()


def clip(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    """Gradients change between norm and step."""
    factors = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grads_with_norm_(factors, 0.5, optimizer.tangent_grad_norm(for_step=True))


def look_and_write_behind_the_back(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
    """A norm that is only looked at keeps nothing for the step."""
    optimizer.tangent_grad_norm()
    if step == 5:
        pairs[2].right.data.mul_(1.5)
        for pair in pairs:
            assert pair.left.grad is not None
            pair.left.grad.data.mul_(0.5)


CHANGES: list[Change] = [
    nothing, schedule, load_factors, write_behind_the_back, break_a_gradient, gradients_of_rank_one, freeze_a_layer,
    no_gradient_at_all, change_momentum, reload, move_parameters, clip,
    look_and_write_behind_the_back,
]  # fmt: skip


class Trained(NamedTuple):
    """All factors and state after each step, all points, all norms, and the optimizer."""

    trace: list[Tensor]
    points: list[Tensor]
    norms: list[float]
    optimizer: Riemannion


# Without graphs the state then lies in memory row after row, and BLAS sums in another order.
TURNED = (break_a_gradient, reload)


def train(
    change: Change,
    anchor: int = ANCHOR,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    device: str = "cpu",
) -> Trained:
    """Eight steps."""
    pairs = make_pairs(anchor, dtype, shapes, device)
    groups: list[dict[str, Any]] = [{"pairs": pairs[:3]}]
    groups.append({"pairs": pairs[3:], "momentum": 0.9, "weight_decay": 0.1})
    optimizer = Riemannion(groups, lr=1e-2, decay_to="zero")
    trace: list[Tensor] = []
    points: list[Tensor] = []
    norms: list[float] = []
    for step in range(1, 9):
        give_gradients(pairs, step)
        change(optimizer, pairs, step)
        norms.append(float(optimizer.tangent_grad_norm(for_step=True)))
        optimizer.step()
        parameters = [factor for pair in pairs for factor in (pair.left, pair.right)]
        trace += [factor.detach().clone() for factor in parameters]
        trace += [value.clone() for p in parameters for value in optimizer.state[p].values()]
        points += [p.left.detach()[:, :RANK] @ p.right.detach()[:RANK] for p in pairs]
    return Trained(trace, points, norms, optimizer)


def _are_near(points: list[Tensor], others: list[Tensor]) -> None:
    """Compared with a step of 1e-2: msign enlarges the rounding of small singular values."""
    for point, other in zip(points, others, strict=True):
        assert float(torch.linalg.matrix_norm(point - other, 2)) < 1e-5


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("anchor", [0, ANCHOR])
def test_recorded_steps_are_the_same_bytes(
    change: Change, anchor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, points, norms, recorded = train(change, anchor)
    assert recorded._recordings, "nothing was recorded"
    monkeypatch.setattr(riemannion_graph, "RECORDS_ON", ())
    wanted, plain_points, plain_norms, plain = train(change, anchor)
    assert not plain._recordings
    if change in TURNED:
        _are_near(points, plain_points)
    else:
        assert str(norms) == str(plain_norms)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert recorded.skipped_steps == plain.skipped_steps == (change is break_a_gradient) * 2
    for ours, theirs in zip(recorded.param_groups, plain.param_groups, strict=True):
        for key in ("skipped", "skipped_in_a_row", "floor_hits"):
            assert ours[key] == theirs[key]


def test_lifted_singular_values_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def small_points(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
        for group in optimizer.param_groups:
            group["sigma_floor"] = 10.0

    got, _, _, recorded = train(small_points)
    monkeypatch.setattr(riemannion_graph, "RECORDS_ON", ())
    wanted, _, _, plain = train(small_points)
    assert recorded.floor_hits == plain.floor_hits > 0
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_bf16_parameters_hold_the_rounded_state() -> None:
    optimizer = train(nothing, dtype=torch.bfloat16).optimizer
    assert optimizer._recordings == 1
    for parameter in optimizer.param_groups[0]["params"]:
        assert optimizer.state[parameter]["basis"].dtype == torch.float32


@pytest.mark.parametrize("change", [nothing, schedule, break_a_gradient, clip])
def test_one_recording_lasts(change: Change) -> None:
    assert train(change).optimizer._recordings == 1


def test_layers_that_come_and_go_end_in_steps_without_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flicker(optimizer: Riemannion, pairs: list[Pair], step: int) -> None:
        if step % 2:
            pairs[0].left.grad = pairs[0].right.grad = None

    got, _, _, recorded = train(flicker)
    assert recorded._recordings == riemannion_graph.MOST_RECORDINGS
    monkeypatch.setattr(riemannion_graph, "RECORDS_ON", ())
    assert all(torch.equal(a, b) for a, b in zip(got, train(flicker).trace, strict=True))


def test_one_gradient_of_two_is_refused() -> None:
    pairs = make_pairs()
    optimizer = Riemannion(pairs, lr=1e-2)
    for step in range(3):
        give_gradients(pairs, step)
        optimizer.step()
    give_gradients(pairs, 3)
    before = [pair.left.detach().clone() for pair in pairs]
    pairs[1].right.grad = None
    with pytest.raises(ConfigError, match="layer1 has a gradient for one factor"):
        optimizer.step()
    assert all(torch.equal(old, pair.left) for old, pair in zip(before, pairs, strict=True))


def test_layers_of_one_shape_and_its_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((24, 16), (16, 24), (24, 16), (16, 24), (20, 20))
    _, points, norms, recorded = train(nothing, shapes=shapes)
    assert recorded._recordings == 1
    monkeypatch.setattr(riemannion_graph, "RECORDS_ON", ())
    _, plain_points, plain_norms, _ = train(nothing, shapes=shapes)
    assert norms == pytest.approx(plain_norms, rel=1e-3)
    _are_near(points, plain_points)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph needs a GPU")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_graphs_on_a_gpu_do_what_steps_without_them_do(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(riemannion_graph, "RECORDS_ON", ("cuda",))
    _, points, norms, recorded = train(change, device="cuda")
    assert recorded._recordings
    monkeypatch.setattr(riemannion_graph, "RECORDS_ON", ())
    _, plain_points, plain_norms, _ = train(change, device="cuda")
    assert norms == pytest.approx(plain_norms, rel=1e-3, nan_ok=True)
    _are_near(points, plain_points)


def test_a_step_that_cannot_be_recorded_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the memory of the GPU is used up; what the rehearsal wrote is taken back."""

    def write_some_and_fail(self: riemannion_graph.Recording) -> None:
        usual(self)
        raise torch.OutOfMemoryError("no memory left")

    usual = riemannion_graph.Recording._write
    monkeypatch.setattr(riemannion_graph.Recording, "_write", write_some_and_fail)
    got = train(nothing)
    assert "cannot be recorded as CUDA graphs and is slower: no memory left" in caplog.text
    monkeypatch.setattr(riemannion_graph, "RECORDS_ON", ())
    _are_near(got.points, train(nothing).points)


def test_a_norm_that_is_only_looked_at_writes_nothing() -> None:
    """Graphs are recorded by a rehearsal that writes into the factors and takes it back."""
    pairs = make_pairs()
    optimizer = Riemannion(pairs, lr=1e-2)
    give_gradients(pairs, 1)
    optimizer.step()
    give_gradients(pairs, 2)
    before = [pair.left._version for pair in pairs]
    optimizer.tangent_grad_norm()
    assert [pair.left._version for pair in pairs] == before
