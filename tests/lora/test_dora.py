"""DoRA: the layer is its formula, starts at the base, resumes, and is refused by what moves the product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import dreamrie
from dreamrie.errors import ConfigError
from dreamrie.init_table import INITS
from dreamrie.lora import LoraPair, attach_lora, dora, lora_pairs
from dreamrie.optimizers import OPTIMIZERS, build_optimizer, libraries, trained_numbers
from dreamrie.trainer import loop
from tests.margins import within
from tests.properties.test_resume_laws import folders, leg
from tests.reference import nets
from tests.small_task import SmallTask
from tests.strategies import F64, noise

LAYERS = ["first", "second"]
ABLE = [name for name, entry in OPTIMIZERS.items() if not entry.no_dora]
ZERO = [name for name, entry in INITS.items() if not entry.anchored and entry.needs == "nothing"]


def attached(
    init: str = "default", dtype: torch.dtype = F64, **options: Any
) -> tuple[nn.Module, list[LoraPair]]:
    model = nets.net(dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    pairs = attach_lora(model, 4, LAYERS, init=init, use_dora=True, generator=generator, **options)
    return model, pairs


def moved(pairs: list[LoraPair]) -> None:
    """Away from the start, magnitudes too."""
    with torch.no_grad():
        for number, pair in enumerate(pairs):
            for part, parameter in enumerate(pair.parameters):
                step = noise(10 * number + part, *parameter.shape, dtype=parameter.dtype)
                parameter += 0.3 * step


def by_hand(weight: Tensor, left: Tensor, right: Tensor, scaling: float, m: Tensor) -> Tensor:
    """Row by row, from the paper's formula."""
    rows = []
    for i in range(weight.shape[0]):
        row = weight[i] + scaling * sum(left[i, k] * right[k] for k in range(right.shape[0]))
        rows.append(m[i] * row / row.square().sum().sqrt())
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------------------- layer


def law_a_dora_layer_is_its_formula(impl: Any) -> None:
    """PEFT's layer computes with m (W + s B A) / ||W + s B A|| row by row, and so does `dora_weight`."""
    _, pairs = attached(use_rslora=True)
    moved(pairs)
    for pair in pairs:
        assert pair.scaling == 2.0
        assert pair.out != pair.in_
        assert pair.magnitude is not None
        layer: Any = pair.module
        base = pair.base_weight.detach()
        parts = [part.detach() for part in pair.parameters]
        wanted = by_hand(base, parts[0], parts[1], pair.scaling, parts[2])
        seen = (layer(torch.eye(pair.in_, dtype=F64)) - layer.base_layer.bias).T.detach()
        within("dora layer of PEFT", nets.relative(seen, wanted), 1e-14)  # measured 4e-16
        found = impl.dora_weight(base, pair.delta(), pair.magnitude.detach())
        within("dora weight", nets.relative(found, wanted), 1e-14)
        assert nets.relative(wanted, base) > 0.1


def test_a_dora_layer_is_its_formula() -> None:
    law_a_dora_layer_is_its_formula(dora)


def law_a_start_computes_what_the_base_does(impl: Any) -> None:
    """Magnitudes are the norms of the rows in fp32, also over a base in bf16 and where a start wrote factors later."""
    for init in ZERO:
        for dtype in (F64, torch.bfloat16):
            _, pairs = attached(init, dtype)
            for pair in pairs:
                assert pair.magnitude is not None
                assert pair.magnitude.dtype == (F64 if dtype == F64 else torch.float32)
                rows = (pair.base_weight.detach().double() + pair.delta().double()).norm(dim=1)
                exact = pair.base_weight.detach().double().norm(dim=1)
                within("product of a start", nets.relative(rows, exact), 1e-6)
                apart = nets.relative(pair.magnitude.detach().double(), rows)
                within("magnitudes of a start", apart, 1e-14 if dtype == F64 else 1e-7)


def test_a_start_computes_what_the_base_does() -> None:
    law_a_start_computes_what_the_base_does(None)


@pytest.mark.parametrize("init", ZERO)
def test_the_output_is_that_of_the_base(init: str) -> None:
    pictures = nets.batches(1)[0][0]
    before = nets.net().eval()(pictures).detach()
    model, pairs = attached(init)
    within("dora step 0", nets.relative(model.eval()(pictures).detach(), before), 1e-14)
    moved(pairs)
    assert nets.relative(model(pictures).detach(), before) > 0.05


# -------------------------------------------------------------------------------------------------------- optimizers


def law_magnitudes_take_plain_steps(impl: Any) -> None:
    """Their rate is the plain one, of LoRA+ too; without a gradient they keep their bytes whatever the decay is."""
    for name in ("adamw", "loraplus"):
        _, pairs = attached()
        moved(pairs)
        optimizer = getattr(impl, name)(pairs, lr=1e-3, weight_decay=0.1)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        before = [[part.detach().clone() for part in pair.parameters] for pair in pairs]
        for pair in pairs:
            assert pair.magnitude is not None
            assert rates[id(pair.magnitude)] == 1e-3
            for part in pair.parameters:
                part.grad = torch.zeros_like(part)
        optimizer.step()
        for pair, old in zip(pairs, before, strict=True):
            assert not torch.equal(pair.left, old[0])  # factors decay
            assert torch.equal(pair.parameters[2], old[2])


def test_magnitudes_take_plain_steps() -> None:
    law_magnitudes_take_plain_steps(libraries)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_trains_all_parts_or_says_why_not(name: str) -> None:
    """After two steps every part has moved, by a loss that goes down; or nothing was built."""
    model, pairs = attached()
    reason = OPTIMIZERS[name].no_dora
    if reason:
        with pytest.raises(ConfigError) as caught:
            build_optimizer(name, pairs, lr=1e-3)
        assert f"because {reason}" in str(caught.value)
        assert ", ".join(ABLE) in str(caught.value)
        return
    assert trained_numbers(name, pairs) == sum(p.numel() for q in pairs for p in q.parameters)
    optimizer = build_optimizer(name, pairs, lr=1e-3)
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(given) == sorted(id(part) for pair in pairs for part in pair.parameters)
    before = [part.detach().clone() for pair in pairs for part in pair.parameters]
    losses = []
    for _ in range(3):
        loss = nets.squares(model.eval(), nets.batches(1)[0])
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    after = [part.detach() for pair in pairs for part in pair.parameters]
    assert not any(map(torch.equal, before, after))


def test_those_that_move_the_product_refuse_a_pair_with_a_magnitude() -> None:
    """Built by hand too: with a magnitude the change of the weight is not the product."""
    _, pairs = attached()
    moved(pairs)
    with pytest.raises(ConfigError, match=r"Riemannion: first has a magnitude \(DoRA\).*product"):
        dreamrie.Riemannion(pairs, lr=1e-3)
    for name in ("imuon", "lora_muon", "lora_rite", "riemann_sgd", "riemann_adam", "riemannion"):
        assert "product" in OPTIMIZERS[name].no_dora
    assert {"adamw", "sgd", "loraplus", "rprec_adamw"} == set(ABLE)


# ------------------------------------------------------------------------------------------------------------ resume


class DoraTask(SmallTask):
    """The small task with magnitudes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(init="default", use_dora=True, **settings)


def law_dora_resumes(impl: Any) -> None:
    """Killed and gone on: factors, magnitudes and state are those of the training that was not, to the bit."""
    with folders() as (straight, folder):
        wanted = leg(impl, straight, "adamw", kind=DoraTask).tensors()
        start = DoraTask(batch_size=3).factors()
        assert not any(torch.equal(one, other) for one, other in zip(wanted, start, strict=False))
        with pytest.raises(InterruptedError):
            leg(impl, folder, "adamw", stop_after=3, kind=DoraTask)
        again = leg(impl, folder, "adamw", resume="latest", kind=DoraTask)
        assert all(map(torch.equal, again.tensors(), wanted))


def test_dora_resumes() -> None:
    law_dora_resumes(loop)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("init", ["loi", "orthonormal", "pissa", "stiefel_both"])
def test_anchored_starts_are_refused(init: str) -> None:
    options = {"anchored": False} if init == "orthonormal" else {}
    with pytest.raises(ConfigError, match=r"start|product is zero"):
        attached(init, **options)


def test_a_refusal_leaves_the_model_alone() -> None:
    model = nets.net()
    with pytest.raises(ConfigError, match=r"layer 'conv' is a Conv2d; DoRA here takes Linear"):
        attach_lora(model, 4, nets.TARGETS, init="default", use_dora=True)
    assert type(model.first) is nn.Linear
    model = nets.net(dtype=torch.float64)
    inject_adapter_in_model(LoraConfig(r=2, use_dora=True, target_modules=["conv"]), model)
    with pytest.raises(ConfigError, match=r"DoRA on a convolution"):
        lora_pairs(model, use_dora=True)


def test_pairs_with_a_magnitude_are_given_to_those_who_ask() -> None:
    """Who does not ask could forget it, and would compute with another weight."""
    model, pairs = attached()
    with pytest.raises(ConfigError, match=r"layer 'first'.*DoRA.*use_dora=False"):
        lora_pairs(model)
    again = lora_pairs(model, use_dora=True)
    assert [id(pair.magnitude) for pair in again] == [id(pair.magnitude) for pair in pairs]
    assert all(len(pair.parameters) == 3 for pair in again)


def test_a_row_of_zeros_has_no_direction() -> None:
    """Its magnitude would divide nothing by nothing in the first step."""
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1].zero_()
    with pytest.raises(ConfigError, match="'0' has 1 rows of zeros"):
        attach_lora(model, 1, ["0"], init="default", use_dora=True)
