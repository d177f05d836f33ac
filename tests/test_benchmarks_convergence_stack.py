"""Trainings in a stack are those that run alone: layers, optimizers, and the whole cell on the embedded model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.convergence import pool
from benchmarks.convergence.plan import Budget, Cell
from benchmarks.convergence.records import Records, read_records
from benchmarks.convergence.scoring import Judge
from benchmarks.convergence.stacked import Bank, StackedLinear, run_on_graph, twin
from benchmarks.convergence.subjects import Shelf, Subjects, generator_of
from benchmarks.convergence.training import Learning, Rates
from dreamrie.diffusion.components import load_components
from dreamrie.diffusion.images import contact_sheet
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS, sample
from dreamrie.init_table import INITS
from dreamrie.lora import LoraPair, attach_lora, start_pairs
from dreamrie.lora.inits import Data, Loi
from dreamrie.optimizer_table import OPTIMIZERS
from dreamrie.optimizers import build_optimizer
from dreamrie.trainer.control import schedule_factor

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two layers, (n, 3, 6) to (n, 3, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def _net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def _adapters(net: nn.Module, count: int, init: str, layer: str = "") -> list[list[LoraPair]]:
    return [
        attach_lora(
            twin(net),
            2,
            ["first", "last"],
            init=init,
            generator=torch.Generator().manual_seed(run),
            use_dora=layer == "dora",
            use_rslora=layer == "rslora",
        )
        for run in range(count)
    ]


def _rows(step: int, run: int) -> Tensor:
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(100 * step + run))


def test_a_stacked_layer_gives_each_part_of_the_rows_its_own_adapter() -> None:
    layer, generator = nn.Linear(4, 3), torch.Generator().manual_seed(0)
    left, right = (
        nn.Parameter(torch.randn(2, *shape, generator=generator)) for shape in ((3, 2), (2, 4))
    )
    x = torch.randn(6, 5, 4, generator=generator)
    y = StackedLinear(layer, left, right, 0.5)(x)
    for run in range(2):
        part = x[3 * run : 3 * run + 3]
        expected = layer(part) + 0.5 * part @ (left[run] @ right[run]).T
        assert torch.allclose(y[3 * run : 3 * run + 3], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layer"),
    [*((name, "") for name in sorted(OPTIMIZERS)), ("adamw", "dora"), ("loraplus", "rslora")],
)
def test_a_training_in_a_stack_is_the_training_alone(name: str, layer: str) -> None:
    """Three trainings with other starts and rows, two steps: the same factors as one by one with PEFT's layers."""
    init, lr = "orthonormal" if OPTIMIZERS[name].needs_rank else "default", 0.01
    net = _net()
    alone, stacked = (_adapters(net, 3, init, layer) for _ in range(2))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    bank = Bank(net, stacked, CPU)
    rates = Rates([build_optimizer(name, pairs, lr=lr) for pairs in stacked], steps=30)
    own = [build_optimizer(name, pairs, lr=lr) for pairs in alone]
    peaks = [[group["lr"] for group in one.param_groups] for one in own]
    for step in range(1, 3):
        bank.gradients.zero_()
        output = bank.unet(torch.cat([_rows(step, run) for run in range(3)]))
        output.square().flatten(1).mean(1).sum().backward()
        rates.step(step - 1)
        bank.check_in_place()
        for run, (pairs, one) in enumerate(zip(alone, own, strict=True)):
            single = twin(net)
            for pair in pairs:
                single.set_submodule(pair.name, pair.module)
            single(_rows(step, run)).square().flatten(1).mean(1).sum().backward()
            factor = schedule_factor("cosine", step - 1, 30, 3)
            for group, peak in zip(one.param_groups, peaks[run], strict=True):
                group["lr"] = peak * factor
            one.step()
            one.zero_grad()
    for mine, theirs in zip(stacked, alone, strict=True):
        for pair, other in zip(mine, theirs, strict=True):
            scale = float(other.delta().abs().max())
            assert scale > 0
            assert torch.allclose(pair.delta(), other.delta(), atol=1e-3 * scale)
            if layer == "dora":
                assert pair.magnitude is not None
                assert other.magnitude is not None
                moved = pair.magnitude - torch.linalg.vector_norm(pair.base_weight, dim=1)
                assert float(moved.detach().abs().max()) > lr / 2
                assert torch.allclose(pair.magnitude, other.magnitude, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_factors_may_live_beside_the_model() -> None:
    """With a home of its own the model sees a step only after the push, and gradients arrive with the pull."""
    net = _net()
    stacked = _adapters(net, 2, "default")
    bank = Bank(net, stacked, torch.device("cpu", 0))
    assert bank.is_apart
    bank.unet(_rows(1, 0)).square().mean().backward()
    pair = stacked[1][0]
    assert pair.left.grad is not None
    assert not pair.left.grad.any()
    bank.pull()
    assert pair.left.grad.any()
    before = bank.values.clone()
    with torch.no_grad():
        pair.left.add_(1.0)
    assert torch.equal(bank.values, before)
    bank.push()
    assert int((bank.values - before == 1.0).sum()) == pair.left.numel()


def test_an_optimizer_that_leaves_the_bank_is_noticed() -> None:
    stacked = _adapters(_net(), 2, "default")
    bank = Bank(_net(), stacked, CPU)
    bank.check_in_place()
    stacked[0][1].right.data = stacked[0][1].right.data.clone()
    with pytest.raises(SystemExit, match="in place"):
        bank.check_in_place()


def test_a_broken_training_does_not_stop_the_others() -> None:
    """The second optimizer gives up; the first goes on."""
    stacked = _adapters(_net(), 2, "orthonormal")
    bank = Bank(_net(), stacked, CPU)
    options = [build_optimizer("riemannion", pairs, lr=0.02) for pairs in stacked]
    for group in options[1].param_groups:
        group["max_consecutive_skips"] = 1
    rates = Rates(options, steps=10)
    before = stacked[1][0].left.detach().clone()
    for step in range(2):
        bank.gradients.fill_(0.1)
        for pair in stacked[1]:
            assert pair.left.grad is not None
            pair.left.grad.fill_(math.nan)
        moved = stacked[0][0].left.detach().clone()
        rates.step(step)
        assert not torch.equal(stacked[0][0].left, moved)
    assert torch.equal(stacked[1][0].left, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph needs a GPU")
def test_a_recorded_step_is_the_step() -> None:
    """Gradients of a replay on new rows and new factors are those of a plain backward, and reach the home."""
    net = _net().cuda()
    stacked = _adapters(net, 2, "orthonormal")
    bank = Bank(net, stacked, CPU)
    rows = torch.zeros(8, 3, 6, device="cuda")

    def step() -> None:
        bank.gradients.zero_()
        bank.unet(rows).square().flatten(1).mean(1).sum().backward()

    replay = run_on_graph(step, rows.device, wanted=True)
    for number in range(3):
        rows.copy_(torch.cat([_rows(number, 0), _rows(number, 1)]))
        with torch.no_grad():
            stacked[1][0].left.add_(0.1)
        bank.push()
        replay()
        bank.pull()
        found = stacked[1][0].left.grad
        assert found is not None
        recorded = found.clone()
        step()
        bank.pull()
        assert float(found.abs().max()) > 0
        assert torch.allclose(recorded, found, rtol=1e-4)


@pytest.mark.slow
def test_gradients_and_pictures_are_those_of_the_library(tmp_path: Path) -> None:
    """One stack of two concepts on the embedded model: losses as the task has them, pictures as `sample` draws them."""
    components = load_components()
    subjects = Subjects(components, Shelf(tmp_path), Budget(2, batch=8))
    concepts = ["robot", "teapot"]
    stacked, alone = (
        [subjects.pairs(name, 1, 2, "loi", 0.3, batches=1) for name in concepts] for _ in range(2)
    )
    bank = Bank(components.unet, stacked, CPU)
    learn = Learning(bank, [subjects.rows(name, 1) for name in concepts], graphs=True)
    for step in (1, 2):
        learn(step)
        for name, mine, pairs in zip(concepts, stacked, alone, strict=True):
            single = twin(components.unet)
            for pair in pairs:
                single.set_submodule(pair.name, pair.module)
            task = subjects.task(single, pairs, name, 1)
            task.loss(task.batch(step, 0)).backward()
            for pair, other in zip(mine, pairs, strict=True):
                assert pair.left.grad is not None
                assert other.left.grad is not None
                scale = float(other.left.grad.abs().max())
                assert torch.allclose(pair.left.grad, other.left.grad, atol=1e-3 * scale)
                other.left.grad = other.right.grad = None
    judge = Judge(components, concepts, 2)
    (drawn,) = judge.draw(components.unet, ["robot"])
    assert drawn is not None
    expected = sample(
        components,
        judge.prompts("robot"),
        [judge.seed(0), judge.seed(1)],
        steps=10,
        guidance_scale=4.0,
    )
    both = [torch.tensor(list(contact_sheet(p, columns=2).tobytes())) for p in (drawn, expected)]
    assert int((both[0] - both[1]).abs().max()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("init", ["corda", "eva", "lora_ga", "loi"])
def test_a_start_from_batches_is_that_of_the_library(tmp_path: Path, init: str) -> None:
    """The shelf gives back what the library writes; that of loi comes in the size that is asked for."""
    components = load_components()
    subjects = Subjects(components, Shelf(tmp_path), Budget(2, batch=8))
    once, again = (subjects.pairs("robot", 1, 2, init, 0.3, batches=2) for _ in range(2))
    unet = twin(components.unet)
    random = generator_of(1)
    pairs = attach_lora(unet, 2, ATTENTION_TARGETS, init=INITS[init].layout, generator=random)
    task = subjects.task(unet, pairs, "robot", 1)
    data = Data(task.model_loss, task.loi_batches(2), task.used_places)
    start_pairs(init, unet, pairs, data, loi=Loi(alpha=1.0), generator=generator_of(1))
    size = 0.3**0.5 if init == "loi" else 1.0
    for mine, second, pair in zip(once, again, pairs, strict=True):
        assert torch.equal(mine.left, size * pair.left)
        assert torch.equal(mine.right, size * pair.right)
        assert torch.equal(mine.right, second.right)
        if init == "loi":
            assert mine.point().s.tolist() == pytest.approx([0.3, 0.3], rel=1e-5)
        assert float(pair.right.detach().abs().max()) > 0


@pytest.mark.slow
def test_a_small_plan_from_end_to_end(tmp_path: Path) -> None:
    """Two steps, one picture: everything lands in the file, and the same command finds nothing left to do."""
    path = tmp_path / "convergence.json"
    cells = [Cell("adamw", 2, 1e-3, 0), Cell("riemannion+loi", 2, 1e-2, 0, "batches=1")]
    task = pool.Task(cells, ("robot", "teapot"), Budget(2, 8, 2, is_curve=True))
    records = Records()
    assert pool.run(task, records, path)
    found = read_records([path])
    assert found == records
    assert sorted(found.base) == ["robot", "teapot"]
    assert {cell: sorted(scores) for cell, scores in found.cells.items()} == {
        cell: ["robot", "teapot"] for cell in cells
    }
    assert all(len(one) == 3 * 2 + 1 for scores in found.cells.values() for one in scores.values())
    before = path.stat().st_mtime_ns
    assert pool.run(task, found, path)
    assert path.stat().st_mtime_ns == before
