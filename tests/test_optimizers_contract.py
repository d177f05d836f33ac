"""What every optimizer of the table must do, whatever its formula: states, schedules, missing and broken gradients."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.optimizers import OPTIMIZERS, build_optimizer
from dreamrie.optimizers.pair_optimizer import PairOptimizer
from dreamrie.riemannion import Riemannion
from tests.margins import within
from tests.small_task import SmallTask
from tests.strategies import ANCHORED, F32, LAYERS, Quadratic, make_pairs, run

NAMES = sorted(OPTIMIZERS)
# Ours: they claim what follows for layers with missing or broken gradients.
OWN = sorted(name for name, entry in OPTIMIZERS.items() if entry.anchor == "frozen")
NEW = sorted(set(OWN) - {"riemannion"})
# PEFT's: LoRA-FA reads the gradient of every layer, the preconditioner writes into them. See docs/optimizers.md.
NEEDS_ALL_GRADIENTS, WRITES_GRADIENTS = {"lorafa"}, {"rprec_adamw"}
LR = 0.02


def small(name: str, **options: Any) -> tuple[SmallTask, Optimizer]:
    """A task with a start that the optimizer can leave, both factors different from zero, and the optimizer."""
    task = SmallTask(init="orthonormal" if OPTIMIZERS[name].needs_rank else "default")
    if not OPTIMIZERS[name].needs_rank:
        with torch.no_grad():
            for number, pair in enumerate(task.pairs):
                generator = torch.Generator().manual_seed(number)
                pair.left.copy_(torch.randn(pair.left.shape, generator=generator) / 3)
    return task, build_optimizer(name, task.pairs, **{"lr": LR, **options})


def advance(task: SmallTask, optimizer: Optimizer, first: int, last: int) -> None:
    for t in range(first, last + 1):
        task.loss(task.batch(t, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()


def put(task: SmallTask, factors: list[torch.Tensor]) -> None:
    parameters = [p for pair in task.pairs for p in (pair.left, pair.right)]
    with torch.no_grad():
        for parameter, value in zip(parameters, factors, strict=True):
            parameter.copy_(value)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_continues_to_the_bit(name: str) -> None:
    """Saved as a file that holds no code, loaded into a fresh optimizer with other settings before its first step."""
    task, optimizer = small(name, weight_decay=0.1)
    advance(task, optimizer, 1, 3)
    file, factors = io.BytesIO(), task.factors()
    torch.save(optimizer.state_dict(), file)
    advance(task, optimizer, 4, 6)
    again, other = small(name, lr=0.7)
    put(again, factors)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert not all(map(torch.equal, again.factors(), task.factors()))
    advance(again, other, 4, 6)
    assert all(map(torch.equal, again.factors(), task.factors()))


@pytest.mark.parametrize("name", NAMES)
def test_without_gradient_nothing_moves(name: str) -> None:
    """Zero gradients, no momentum and no decay leave every byte; so do gradients that are not there."""
    task, optimizer = small(name)
    before = task.factors()
    for pair in task.pairs:
        for p in (pair.left, pair.right):
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(map(torch.equal, task.factors(), before))
    if name not in NEEDS_ALL_GRADIENTS:
        advance(task, optimizer, 1, 2)
        before = task.factors()
        optimizer.step()
        assert all(map(torch.equal, task.factors(), before))


@pytest.mark.parametrize("name", sorted(set(NAMES) - NEEDS_ALL_GRADIENTS))
def test_a_layer_without_gradient_is_left_alone(name: str) -> None:
    """And the others step as they would with it."""
    task, optimizer = small(name)
    twin, other = small(name)
    for each in (task, twin):
        each.loss(each.batch(1, 0)).backward()
    task.pairs[1].left.grad = task.pairs[1].right.grad = None
    before = task.factors()
    optimizer.step()
    other.step()
    assert all(map(torch.equal, task.factors()[2:], before[2:]))
    assert all(map(torch.equal, task.factors()[:2], twin.factors()[:2]))
    assert not torch.equal(task.factors()[0], before[0])


@pytest.mark.parametrize("name", sorted(set(NAMES) - WRITES_GRADIENTS))
def test_gradients_are_read_only(name: str) -> None:
    task, optimizer = small(name, weight_decay=0.1)
    task.loss(task.batch(1, 0)).backward()
    parameters = [p for pair in task.pairs for p in (pair.left, pair.right) if p.grad is not None]
    kept = [p.grad.clone() for p in parameters if p.grad is not None]
    optimizer.step()
    assert len(kept) == 2 * OPTIMIZERS[name].trained_factors
    assert all(
        p.grad is not None and torch.equal(p.grad, g) for p, g in zip(parameters, kept, strict=True)
    )
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_works_through_the_groups(name: str) -> None:
    """Learning rate zero moves nothing; torch's schedulers set it; steps after that are of the new length."""
    task, optimizer = small(name, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: float(done > 0))
    before = task.deltas()
    advance(task, optimizer, 1, 1)
    for old, new in zip(before, task.deltas(), strict=True):
        within(f"schedule {name}", (new - old).norm(), 1e-14)
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} <= {LR, 16 * LR}
    advance(task, optimizer, 2, 2)
    assert float((task.deltas()[0] - before[0]).norm()) > 1e-4


# ------------------------------------------------------------------------------------------------- ours


@pytest.mark.parametrize("name", OWN)
def test_a_broken_gradient_leaves_its_layer_alone(name: str) -> None:
    """Parameters and state to the bit, the neighbours as without it; too often in a row is an error."""
    for bad in (float("nan"), 1e200):
        pairs, clean = make_pairs(LAYERS), make_pairs(LAYERS)
        optimizer, plain = (build_optimizer(name, each, lr=LR) for each in (pairs, clean))
        run(optimizer, Quadratic(pairs), 2)
        run(plain, Quadratic(clean), 2)
        for each in (pairs, clean):
            Quadratic(each).backward(2)
        clean[0].left.grad = clean[0].right.grad = None
        assert pairs[0].right.grad is not None
        pairs[0].right.grad[1, 2] = bad
        broken = (pairs[0].left, pairs[0].right)
        before = [p.detach().clone() for p in broken]
        state = copy.deepcopy([dict(optimizer.state[p]) for p in broken])
        optimizer.step()
        plain.step()
        assert isinstance(optimizer, PairOptimizer | Riemannion)
        assert optimizer.skipped_steps == 1
        for p, bytes_, kept in zip(broken, before, state, strict=True):
            assert torch.equal(p, bytes_)
            assert all(torch.equal(optimizer.state[p][key], kept[key]) for key in kept)
        for pair, other in zip(pairs[1:], clean[1:], strict=True):
            within(f"neighbours {name}", (pair.x - other.x).norm() / other.x.norm(), 1e-13)
        optimizer.param_groups[0]["max_consecutive_skips"] = 2
        with pytest.raises(NumericalError, match=r"max_consecutive_skips.*layer0"):
            optimizer.step()


@pytest.mark.parametrize("name", OWN)
def test_a_copy_and_a_pickle_step_alike(name: str) -> None:
    pairs = make_pairs(ANCHORED)
    optimizer = build_optimizer(name, pairs, lr=LR, weight_decay=0.1)
    run(optimizer, Quadratic(pairs), 2)
    copies = [copy.deepcopy((pairs, optimizer)), pickle.loads(pickle.dumps((pairs, optimizer)))]
    path = run(optimizer, Quadratic(pairs), 2, start=2)
    for twins, other in copies:
        found = run(other, Quadratic(twins), 2, start=2)
        assert all(map(torch.equal, found[1], path[1]))
        assert not any(map(torch.equal, found[1], path[0]))


@pytest.mark.parametrize("name", OWN)
def test_the_state_is_fp32_beside_bf16_factors(name: str) -> None:
    pairs = make_pairs(ANCHORED, dtype=torch.bfloat16)
    optimizer = build_optimizer(name, pairs, lr=LR)
    run(optimizer, Quadratic(pairs), 2)
    twins = make_pairs(ANCHORED, dtype=torch.bfloat16)
    other = build_optimizer(name, twins, lr=LR)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, other):
        values = [v for entry in each.state.values() for v in entry.values()]
        assert {v.dtype for v in values} == {F32}
    for p, q in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(p[key], q[key]) for key in p)


@pytest.mark.parametrize("name", NEW)
def test_another_optimizers_state_is_refused(name: str) -> None:
    """Of another method, or of another rank; nothing is changed."""
    pairs = make_pairs(LAYERS)
    optimizer = build_optimizer(name, pairs, lr=LR)
    run(optimizer, Quadratic(pairs), 1)
    kept = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(kept)
    for entry in wrong["state"].values():
        entry["exp_avg"] = entry.pop("momentum")
    with pytest.raises(ConfigError, match=rf"{name}: the saved state .* no 'momentum'"):
        optimizer.load_state_dict(wrong)
    wrong = copy.deepcopy(kept)
    wrong["state"][0]["momentum"] = torch.zeros(3, 3)
    with pytest.raises(ConfigError, match=rf"{name}: saved momentum of layer0"):
        optimizer.load_state_dict(wrong)
    wrong = copy.deepcopy(kept)
    wrong["param_groups"][0]["method"] = "sgd"
    with pytest.raises(ConfigError, match=rf"{name}: the state was saved by sgd"):
        optimizer.load_state_dict(wrong)
    with pytest.raises(ConfigError, match=rf"Riemannion: the state was saved by {name}"):
        Riemannion(pairs).load_state_dict(kept)
    now = optimizer.state_dict()
    for key, entry in kept["state"].items():
        assert all(torch.equal(now["state"][key][part], value) for part, value in entry.items())


@pytest.mark.parametrize("name", NEW)
def test_half_a_gradient_is_refused(name: str) -> None:
    """Before anything is written, the layers before it included."""
    pairs = make_pairs(LAYERS)
    optimizer = build_optimizer(name, pairs, lr=LR)
    Quadratic(pairs).backward(0)
    pairs[2].left.grad = None
    before = [pair.left.detach().clone() for pair in pairs]
    with pytest.raises(ConfigError, match=r"layer layer20 has a gradient for one factor"):
        optimizer.step()
    assert all(torch.equal(pair.left, old) for pair, old in zip(pairs, before, strict=True))


@pytest.mark.parametrize("name", NEW)
def test_the_gradient_norm_does_not_count_the_anchor(name: str) -> None:
    """Of the Riemannian gradient on the manifold, else of the trained columns."""
    pairs = make_pairs(ANCHORED)
    optimizer = build_optimizer(name, pairs, lr=LR)
    Quadratic(pairs).backward(0)
    assert isinstance(optimizer, PairOptimizer)
    if name.startswith("riemann"):
        wanted = float(Riemannion(pairs).tangent_grad_norm())
    else:
        parts = [p.left.grad[:, : p.rank].square().sum() for p in pairs if p.left.grad is not None]
        parts += [p.right.grad[: p.rank].square().sum() for p in pairs if p.right.grad is not None]
        wanted = float(torch.stack(parts).sum().sqrt())
    within("norm", abs(float(optimizer.gradient_norm()) / wanted - 1), 1e-12)


@pytest.mark.parametrize("name", NEW)
def test_a_closure_and_a_tensor_for_the_rate(name: str) -> None:
    paths = []
    for lr in (LR, torch.tensor(LR, dtype=torch.float64)):
        pairs = make_pairs(LAYERS[:2])
        optimizer = build_optimizer(name, pairs, lr=lr, weight_decay=0.1)  # type: ignore[arg-type]
        problem = Quadratic(pairs)

        def closure(problem: Quadratic = problem) -> float:
            assert torch.is_grad_enabled()
            problem.backward(0)
            return 3.5

        assert optimizer.step(closure) == 3.5
        paths.append([pair.x for pair in pairs])
    for one, other in zip(*paths, strict=True):
        within("tensor rate", (one - other).norm(), 1e-14)


@pytest.mark.parametrize("name", ["imuon", "lora_muon", "riemann_sgd", "riemann_adam"])
def test_a_start_of_rank_zero_is_refused(name: str) -> None:
    task = SmallTask(init="default")
    optimizer = build_optimizer(name, task.pairs, lr=LR)
    task.loss(task.batch(1, 0)).backward()
    with pytest.raises(ConfigError, match=r"the LoRA product of layer 0 has a rank below 2"):
        optimizer.step()


def test_lora_rite_leaves_a_start_of_rank_zero() -> None:
    """The pseudo-inverse of lora_B = 0: its own gradient moves it, lora_A waits one step."""
    task = SmallTask(init="default")
    optimizer = build_optimizer("lora_rite", task.pairs, lr=LR, momentum=0.0)
    before = task.factors()
    advance(task, optimizer, 1, 1)
    assert all(map(torch.equal, task.factors()[1::2], before[1::2]))
    for pair in task.pairs:
        # The first direction is an isometry: (h h^T)^-1/2 h.
        values = torch.linalg.svdvals(pair.delta())[:2] / LR
        torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-9, atol=0)
    advance(task, optimizer, 2, 2)
    assert not torch.equal(task.factors()[1], before[1])


def test_bad_options_of_the_new_methods() -> None:
    pairs = make_pairs(LAYERS)
    for message, name, options in (
        ("lora_muon: lr must be a number", "lora_muon", {"lr": -1.0}),
        (r"imuon: momentum must be in \[0, 1\)", "imuon", {"lr": 0.1, "momentum": 1.0}),
        ("must be below 1", "lora_rite", {"lr": 0.5, "weight_decay": 2.0}),
        ("bias_correction must be a bool", "riemann_adam", {"lr": 0.1, "bias_correction": 3}),
        (
            "bias_correction is not a setting of imuon",
            "imuon",
            {"lr": 1.0, "bias_correction": True},
        ),
        ("core_map must be 'msign' or", "riemannion", {"lr": 0.1, "core_map": "sign"}),
        ("use one of riemannion$", "lora_muon", {"lr": 0.1, "core_map": "msign"}),
        ("nesterov is not a setting of muon; no optimizer", "muon", {"lr": 0.1, "nesterov": True}),
    ):
        with pytest.raises(ConfigError, match=message):
            build_optimizer(name, pairs, **options)
    with pytest.raises(ConfigError, match="Leave one of them out"):
        Riemannion(pairs, core_map="frobenius", inner_iters=3)
    with pytest.raises(ConfigError, match="imuon: no LoRA pairs"):
        build_optimizer("imuon", iter(()), lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="imuon: a factor of layer0 is given twice"):
        build_optimizer("imuon", [pairs[0], pairs[0]], lr=0.1)
