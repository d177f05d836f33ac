"""Riemannion as a torch optimizer: steps, what they report, and what one may allocate (O7, N7)."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode

from dreamrie import riemannion, riemannion_rows
from dreamrie.riemannion import Riemannion
from tests.small_optimizer import stepped
from tests.strategies import (
    ANCHORED,
    F64,
    LAYERS,
    Layer,
    Pair,
    Quadratic,
    make_pair,
    make_pairs,
    run,
)

# ------------------------------------------------------------------------------------------------- torch's contract


def test_overridden_methods_keep_names_and_kinds() -> None:
    """A renamed argument of `load_state_dict` once broke every distributed resume elsewhere."""
    for name, method in vars(Riemannion).items():
        base = getattr(torch.optim.Optimizer, name, None)
        if base is None or not inspect.isfunction(method) or name == "__init__":
            continue
        mine, theirs = inspect.signature(method).parameters, inspect.signature(base).parameters
        assert [(p.name, p.kind) for p in mine.values()] == [
            (p.name, p.kind) for p in theirs.values()
        ], name


def test_closure_is_evaluated_once_with_gradients() -> None:
    """`step(closure)` returns its loss and uses its gradients."""
    pairs, other = make_pairs(), make_pairs()
    optimizer, plain = Riemannion(pairs, lr=0.02), Riemannion(other, lr=0.02)
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append(1)
        Quadratic(pairs).backward(0)
        return 1.25

    assert optimizer.step(closure) == 1.25
    Quadratic(other).backward(0)
    assert plain.step() is None
    assert calls == [1]
    assert all(torch.equal(a.x, b.x) for a, b in zip(pairs, other, strict=True))


def test_tensor_lr_and_schedulers() -> None:
    """A tensor lr equals the float; torch's schedulers drive lr, and OneCycleLR the momentum too."""
    paths = []
    for lr in (0.02, torch.tensor(0.02, dtype=F64)):
        pairs = make_pairs()
        optimizer = Riemannion(pairs, lr=lr)
        scheduler = LambdaLR(optimizer, lambda t: 1 / (1 + t))
        path = []
        for t in range(4):
            Quadratic(pairs).backward(t)
            optimizer.step()
            scheduler.step()
            path.append([pair.x for pair in pairs])
        paths.append(path)
    for a, b in zip(*paths, strict=True):
        assert all(float((x - y).norm()) < 1e-14 for x, y in zip(a, b, strict=True))
    pairs = make_pairs()
    optimizer = Riemannion(pairs, lr=0.02)
    cycle = OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    start = optimizer.param_groups[0]["momentum"]
    for t in range(4):
        Quadratic(pairs).backward(t)
        optimizer.step()
        cycle.step()
    assert optimizer.param_groups[0]["momentum"] < start
    pairs = make_pairs()
    optimizer = Riemannion(pairs, lr=0.02)
    cosine = CosineAnnealingLR(optimizer, 3)
    for t in range(3):
        before = [pair.x for pair in pairs]
        Quadratic(pairs).backward(t)
        optimizer.step()
        cosine.step()
    assert abs(float(optimizer.param_groups[0]["lr"])) < 1e-12
    before = [pair.x for pair in pairs]
    Quadratic(pairs).backward(3)
    optimizer.step()
    assert all(float((a - p.x).norm()) < 1e-13 for a, p in zip(before, pairs, strict=True))


def test_hooks_run() -> None:
    """Step hooks are called around every step."""
    optimizer, pairs = stepped()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    Quadratic(pairs).backward(2)
    optimizer.step()
    assert seen == ["before", "after"]


@pytest.mark.parametrize("rank", [32, 128])
def test_sound_bf16_adapters_of_high_rank_are_points(rank: int) -> None:
    """Columns closer to each other than bf16 resolves are still independent; a step is taken."""
    left = torch.randn(160, rank, generator=torch.Generator().manual_seed(1))
    pair = make_pair(Layer(160, 150, rank, 0.5), 0, torch.bfloat16, 1.0)
    with torch.no_grad():
        pair.left[:, :rank] = left.to(torch.bfloat16)
    before = pair.left.detach().clone()
    pair.left.grad, pair.right.grad = torch.ones_like(pair.left), torch.ones_like(pair.right)
    optimizer = Riemannion([pair], lr=1.0)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert (pair.left.float() - before.float()).abs().max() > 0.1


def test_zero_gradients_are_a_no_op() -> None:
    """Zero gradients and no momentum leave every byte, also of factors that were never in the optimizer's gauge."""
    pairs = make_pairs()
    with torch.no_grad():
        pairs[0].left.mul_(3)
    optimizer = Riemannion(pairs, lr=0.1)
    before = [p.detach().clone() for pair in pairs for p in (pair.left, pair.right)]
    for _ in range(2):
        for pair in pairs:
            pair.left.grad, pair.right.grad = (
                torch.zeros_like(pair.left),
                torch.zeros_like(pair.right),
            )
        optimizer.step()
    after = [p.detach() for pair in pairs for p in (pair.left, pair.right)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_non_contiguous_parameters() -> None:
    """Strided parameters and gradients take the path of contiguous ones."""
    plain = make_pairs()
    strided = []
    for pair in make_pairs():
        left = nn.Parameter(pair.left.detach().mT.contiguous().mT)
        right = nn.Parameter(pair.right.detach().repeat_interleave(2, dim=1)[:, ::2])
        assert not left.is_contiguous()
        assert not right.is_contiguous()
        strided.append(Pair(pair.name, left, right, pair.scaling, pair.rank))
    a = run(Riemannion(plain, lr=0.02), Quadratic(plain), 4)
    b = run(Riemannion(strided, lr=0.02), Quadratic(strided), 4)
    for first, second in zip(a, b, strict=True):
        assert all(float((x - y).norm()) < 1e-13 for x, y in zip(first, second, strict=True))


def test_layer_frozen_in_mid_run() -> None:
    """A layer frozen for some steps keeps its bytes and goes on from there."""
    optimizer, pairs = stepped(3, weight_decay=0.1)
    frozen = pairs[1]
    for p in (frozen.left, frozen.right):
        p.requires_grad_(False)
        p.grad = None
    kept = frozen.left.detach().clone()
    for t in range(3, 6):
        Quadratic(pairs).backward(t)
        frozen.left.grad = frozen.right.grad = None
        optimizer.step()
    assert torch.equal(frozen.left, kept)
    for p in (frozen.left, frozen.right):
        p.requires_grad_(True)
    run(optimizer, Quadratic(pairs), 1, start=6)
    assert not torch.equal(frozen.left, kept)


def test_group_added_in_mid_run() -> None:
    """A group added later starts with its first gradient and has its own options."""
    optimizer, _ = stepped()
    late = make_pairs(LAYERS[:1], seed=777)
    optimizer.add_param_group({"pairs": late, "lr": 0.5})
    start = late[0].x
    Quadratic(late).backward(0)
    optimizer.step()
    # s is at least 1 here: one step moves by lr to first order, at most by 2 * 1.155 * lr.
    assert 0.4 < float(torch.linalg.matrix_norm(late[0].x - start, 2)) < 2 * 1.155 * 0.5
    assert optimizer.param_groups[1]["names"] == [late[0].name]


# ------------------------------------------------------------------------------------------------- reports and cost


def test_spectra_and_floor_hits() -> None:
    """Spectra are copies of the true singular values, before and after steps; hits of the floor are counted."""
    pairs = make_pairs()
    optimizer = Riemannion(pairs, lr=0.02, sigma_floor=1e-3)
    for _ in range(2):
        with mock.patch.object(riemannion, "are_own", side_effect=riemannion.are_own) as asked:
            spectra = optimizer.spectra()
        assert asked.call_count == 1  # the device is waited for once, not once a layer
        assert list(spectra) == [pair.name for pair in pairs]
        for pair in pairs:
            wanted = torch.linalg.svdvals(pair.x)[: pair.rank]
            assert float((spectra[pair.name] - wanted).abs().max()) < 1e-12
            spectra[pair.name].zero_()
        run(optimizer, Quadratic(pairs), 2)
    assert optimizer.floor_hits == 0
    fresh = make_pairs()
    optimizer = Riemannion(fresh, lr=1.0, sigma_floor=1e-3)
    for pair in fresh:
        pair.set_gradient(
            pair.x
        )  # direction u v^T: every s falls by lr, and each smallest one is 1
    optimizer.step()
    assert optimizer.floor_hits == len(fresh)
    assert all(abs(float(values[-1]) - 1e-3) < 1e-12 for values in optimizer.spectra().values())


class Watch(TorchDispatchMode):
    """Record shapes of results and reads by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[torch.Size] = []
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.sizes.append(value.shape)
        return result


def test_no_dense_matrix_and_no_read_per_layer() -> None:
    """N7: a step allocates no (out, in) tensor, and what the host reads does not grow with the layers."""
    sizes: list[int] = []
    for count in (2, 12):
        pairs = [make_pair(Layer(40, 30, 3, 0.5, anchored=True), seed=10 * k) for k in range(count)]
        optimizer = Riemannion(pairs, lr=0.02, weight_decay=0.1)
        run(optimizer, Quadratic(pairs), 2)
        Quadratic(pairs).backward(2)
        with Watch() as watch:
            optimizer.step()
        assert all(sorted(size[-2:]) != [30, 40] for size in watch.sizes)
        assert max(size.numel() for size in watch.sizes) <= count * 40 * 9
        sizes.append(watch.reads)
    assert sizes[0] == sizes[1]


def test_layers_of_one_shape_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """(10, 6) and (6, 10) are one batch: three factorizations of bases for four layers of three shapes."""
    import dreamrie.riemannion as module

    pairs = make_pairs()
    optimizer = Riemannion(pairs, lr=0.02)
    batches: list[tuple[int, ...]] = []
    real = module.fast_steps

    def counted(works: Any) -> Any:
        batches.extend(tuple(work.state.u.shape) for work in works)
        return real(works)

    monkeypatch.setattr(module, "fast_steps", counted)
    run(optimizer, Quadratic(pairs), 1)
    assert sorted(batches) == [(1, 7, 4), (1, 9, 3), (2, 10, 2)]


def test_anchored_start_is_exact() -> None:
    """Anchored pairs begin at zero change and stay there without gradients under decay to the anchor."""
    pairs = make_pairs(ANCHORED)
    optimizer = Riemannion(pairs, lr=0.1, weight_decay=0.5)
    for _ in range(20):
        for pair in pairs:
            pair.left.grad, pair.right.grad = (
                torch.zeros_like(pair.left),
                torch.zeros_like(pair.right),
            )
        optimizer.step()
    assert all(float(pair.change.abs().max()) < 1e-12 for pair in pairs)


def test_factors_are_written_alike_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written whole, as on a GPU: the same bytes, those of the anchor included."""
    paths = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(riemannion_rows, "_COPY_WHOLE", devices)
        pairs = make_pairs(ANCHORED)
        anchors = [pair.left.detach()[:, pair.rank :].clone() for pair in pairs]
        run(Riemannion(pairs, lr=0.02, weight_decay=0.1), Quadratic(pairs), 3)
        for pair, anchor in zip(pairs, anchors, strict=True):
            assert torch.equal(pair.left.detach()[:, pair.rank :], anchor)
        paths.append([p.detach() for pair in pairs for p in (pair.left, pair.right)])
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))
    start = make_pairs(ANCHORED)
    assert float((paths[0][0] - start[0].left.detach()).norm()) > 1e-3


def test_the_state_is_not_copied_to_be_stacked() -> None:
    """After a step the state of a shape is rows of one tensor, in whatever order it was written."""
    pairs = [make_pair(Layer(40, 30, 4, 0.5), 10 * k, torch.float32) for k in range(3)]
    optimizer = Riemannion(pairs, lr=0.02)
    run(optimizer, Quadratic(pairs), 2)
    for key in ("basis", "momentum", "singular_values"):
        rows = [optimizer.state[pair.left][key] for pair in pairs]
        stacked = riemannion_rows.stack_rows(rows)
        assert stacked.data_ptr() == rows[0].data_ptr()
        assert all(torch.equal(a, b) for a, b in zip(stacked, rows, strict=True))
        other = riemannion_rows.stack_rows(rows[::-1])
        assert other.data_ptr() != rows[-1].data_ptr()
        assert all(torch.equal(a, b) for a, b in zip(other, rows[::-1], strict=True))
