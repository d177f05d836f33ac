"""A1, A2, A5, A9-A13 and laws 12, 15, 19 (docs/method.md 10): the bridge to PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import dreamrie.lora as real
from dreamrie import riemannion_step
from dreamrie.errors import ConfigError, NumericalError
from dreamrie.fixed_rank import Point
from dreamrie.lora import LowRank
from dreamrie.riemannion import Riemannion
from tests.margins import within
from tests.reference import nets
from tests.strategies import F64, frame, noise

ANCHORED = ("orthonormal", "pissa", "pissa_niter_8", "olora")
PLAIN = ("default", "gaussian", "orthogonal")


def outputs(model: nn.Module, dtype: torch.dtype = F64) -> Tensor:
    return model(nets.batches(1, seed=40, dtype=dtype)[0][0]).detach()


def law_a1_attach_changes_nothing(impl: Any) -> None:
    """Every start leaves the output (L3 bars), the base bytes and the train mode; only adapters train."""
    for dtype, bar in ((F64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-3)):
        for init in (*ANCHORED, *PLAIN):
            model = nets.net(dtype=dtype).eval()
            before, bytes_before = outputs(model, dtype), impl.base_fingerprint(model)
            pairs = impl.attach_lora(model, 2, nets.TARGETS, init=init, dropout=0.5)
            change = (outputs(model, dtype) - before).abs().max()
            # PEFT computes its starts in fp32; start and anchor still cancel in the working dtype.
            within(f"A1 {dtype}", change / before.abs().max(), bar)
            assert impl.base_fingerprint(model) == bytes_before, init
            assert not any(module.training for module in model.modules()), init
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            assert len(trained) == 6, init
            assert all("lora_" in name for name in trained), init
            if init in ANCHORED:
                assert all(float(pair.left.detach().norm()) > 1e-3 for pair in pairs)
                assert all(pair.rank == pair.anchor_rank == 2 for pair in pairs)
            nets.disturb(pairs, 0.3)
            moved = (outputs(model, dtype) - before).abs().max() / before.abs().max()
            assert float(moved) > 100 * bar, init


def law_a2_merged_equals_factored(impl: Any) -> None:
    """W + delta in a plain net gives the outputs of the net with the adapter; c is not 1."""
    for dtype, bar in ((F64, 1e-12), (torch.float32, 2e-6)):
        plain = nets.net(dtype=dtype).eval()
        model = copy.deepcopy(plain)
        pairs = nets.with_scaling(
            model, 0.625, rank=3, target_modules=nets.TARGETS, alpha=0.4, dropout=0.3
        )
        nets.disturb(pairs, 0.2)
        before = outputs(plain, dtype)
        with torch.no_grad():
            for pair in impl.lora_pairs(model):
                weight = getattr(plain, pair.name).weight
                weight += pair.delta().reshape(weight.shape)
        truth = outputs(model, dtype)
        assert nets.relative(before, truth) > 1e-2
        within(f"A2 {dtype}", nets.relative(outputs(plain, dtype), truth), bar)


def law_a9_delta_is_what_the_layer_does(impl: Any) -> None:
    """delta() equals the change seen from outside, layer by layer, also between layers of one shape."""
    model = nn.ModuleDict({name: nn.Linear(7, 7) for name in "abc"}).to(F64)
    model["wide"] = nn.Linear(11, 6).double()
    model["conv"] = nn.Conv2d(2, 5, 3).double()
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["a", "b", "c", "wide", "conv"])
    inject_adapter_in_model(config, model)
    for n, pair in enumerate(real.lora_pairs(model)):
        pair.left.data.copy_(noise(n, *pair.left.shape))
    pairs = impl.lora_pairs(model)
    assert len(pairs) == 5
    for pair in pairs:
        base = model[pair.name].get_base_layer().weight.flatten(1)
        truth = nets.measured_change(model[pair.name], base.shape[1], base.shape[0])
        assert pair.delta().shape == truth.shape
        within("A9 delta", nets.relative(pair.delta(), truth), 1e-12)


def law_a9_gauge_there_and_back(impl: Any) -> None:
    """(B, A, c) to (u, s, v) and back keeps the product; (B C, C^-1 A) is the same point."""
    for scaling in (1.0, 0.625, 7 / 8**0.5):
        model = nets.net()
        nets.with_scaling(model, scaling, rank=3, target_modules=nets.TARGETS, alpha=0.8)
        pairs = impl.lora_pairs(model)
        assert all(abs(float(value) - 0.8) < 1e-12 for pair in pairs for value in pair.point().s)
        nets.disturb(pairs, 0.3)
        for pair in pairs:
            left = pair.left_matrix().detach()[:, :3].clone()
            right = pair.right_matrix().detach()[:3].clone()
            x = scaling * left @ right
            point = pair.point()
            within("A9 point", nets.relative((point.u * point.s) @ point.v.T, x), 1e-12)
            mix = noise(3, 3, 3) + 2 * torch.eye(3, dtype=F64)
            with torch.no_grad():
                pair.left_matrix()[:, :3] = left @ mix
                pair.right_matrix()[:3] = torch.linalg.inv(mix) @ right
            within("A9 mixed", (pair.point().s - point.s).abs().max(), 1e-12)
            pair.set_start(point, anchored=True)
            within("A9 there and back", nets.relative(scaling * (
                pair.left_matrix().detach()[:, :3] @ pair.right_matrix().detach()[:3]), x), 1e-12)  # fmt: skip
            anchor = pair.anchor()
            within("A9 anchor", nets.relative((anchor.u * anchor.s) @ anchor.v.T, x), 1e-12)


def law_12_recovered_products(impl: Any) -> None:
    """lora_B.grad / sqrt(c s) by columns is G v and lora_A.grad^T / sqrt(c s) is G^T u, s down to 1e-10."""
    bars = {F64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2e-2}
    for dtype, bar in bars.items():
        for scaling in (1.0, 0.625, 7 / 8**0.5):
            model = nets.net(dtype=dtype).eval()
            data = nets.batches(1, dtype=dtype)
            truth = nets.dense_gradients(model, nets.squares, data)
            pairs = nets.with_scaling(model, scaling, rank=3, target_modules=nets.TARGETS)
            for n, pair in enumerate(pairs):
                wide = F64 if dtype == F64 else torch.float32
                s = torch.tensor([0.5, 1e-3, 1e-10], dtype=wide)
                u, v = frame(2 * n, pair.out, 3).to(wide), frame(2 * n + 1, pair.in_, 3).to(wide)
                pair.set_start(Point(u, s, v), anchored=True)
            nets.squares(model, data[0]).backward()
            for n, pair in enumerate(pairs):
                u, v = frame(2 * n, pair.out, 3), frame(2 * n + 1, pair.in_, 3)
                s = torch.tensor([0.5, 1e-3, 1e-10], dtype=F64)
                g = truth[pair.name].double()
                left = pair.left.grad.flatten(1)[:, :3].double()
                right = pair.right.grad.flatten(1)[:3].T.double()
                found = impl.recover(left, s, scaling), impl.recover(right, s, scaling)
                for value, product in zip(found, (g @ v, g.T @ u), strict=True):
                    error = (value - product).norm(dim=0) / product.norm(dim=0)
                    within(f"12 {dtype}", error.max(), bar)


def train(pairs: Any, model: nn.Module, optimizer: Any, mask: Any, steps: int = 50) -> None:
    """Training as the loop does it: backward, anchor out of the norm, global clip, step."""
    factors = [factor for pair in pairs for factor in (pair.left, pair.right)]
    for batch in nets.batches(steps):
        optimizer.zero_grad()
        nets.squares(model, batch).backward()
        mask(pairs)
        nn.utils.clip_grad_norm_(factors, 0.5)
        optimizer.step()


def law_a10_anchor_keeps_its_bytes(impl: Any) -> None:
    """50 steps with decay, momentum and clipping leave the frozen half as it was, and move the rest."""
    model = nets.net()
    pairs = nets.with_scaling(model, 0.625, rank=3, target_modules=nets.TARGETS, alpha=0.3)
    halves = (
        [pair.left.detach().clone() for pair in pairs],
        [pair.right.detach().clone() for pair in pairs],
    )
    optimizer = impl.Riemannion(impl.lora_pairs(model), lr=0.02, momentum=0.9, weight_decay=0.5)
    train(pairs, model, optimizer, impl.mask_anchor_gradients_)
    for pair, left, right in zip(pairs, *halves, strict=True):
        assert torch.equal(pair.left[:, 3:], left[:, 3:]), pair.name
        assert torch.equal(pair.right[3:], right[3:]), pair.name
        assert float((pair.left[:, :3] - left[:, :3]).detach().norm()) > 1e-2
        assert float(pair.delta().norm()) > 1e-2


def law_a10_anchor_is_not_in_the_norm(impl: Any) -> None:
    """At step 0 the masked gradient norm is the plain rank-r one; unmasked it is sqrt(2) times that."""
    model = nets.net().eval()
    pairs = real.attach_lora(model, 2, nets.TARGETS)
    nets.squares(model, nets.batches(1)[0]).backward()
    factors = [factor for pair in pairs for factor in (pair.left, pair.right)]
    trained = [part for pair in pairs for part in (pair.left.grad[:, :2], pair.right.grad[:2])]
    truth = torch.stack([part.norm() for part in trained]).norm()
    raw = nn.utils.get_total_norm([factor.grad for factor in factors])
    within("A10 unmasked", abs(float(raw / truth) - 2**0.5), 1e-12)
    impl.mask_anchor_gradients_(pairs)
    masked = nn.utils.get_total_norm([factor.grad for factor in factors])
    within("A10 masked", abs(float(masked / truth) - 1), 1e-12)


def trained_net(dtype: torch.dtype, scaling: float = 0.625, size: float = 0.02) -> tuple[Any, ...]:
    """A plain net, its trained twin and the pairs: |alpha| = 0.5, so the halves nearly cancel (docs/method.md 9)."""
    plain = nets.net(dtype=dtype).eval()
    model = copy.deepcopy(plain)
    pairs = nets.with_scaling(model, scaling, rank=3, target_modules=nets.TARGETS, alpha=0.5)
    nets.disturb(pairs, size)
    return plain, model, pairs


def law_a11_export_on_the_untouched_base(impl: Any) -> None:
    """Exported factors on the base give the trained outputs: fp64 1e-11, fp32 2e-6."""
    for dtype, bar in ((F64, 1e-11), (torch.float32, 2e-6)):
        plain, model, pairs = trained_net(dtype, size=0.1)
        before, truth = outputs(plain, dtype), outputs(model, dtype)
        assert nets.relative(before, truth) > 1e-2
        exported = impl.export_factors(pairs)
        config = LoraConfig(r=6, lora_alpha=6, target_modules=nets.TARGETS)
        inject_adapter_in_model(config, plain)
        for pair in real.lora_pairs(plain):
            assert exported[pair.name].left.shape == pair.left.shape
            assert exported[pair.name].right.shape == pair.right.shape
            pair.left.data.copy_(exported[pair.name].left)
            pair.right.data.copy_(exported[pair.name].right)
        within(f"A11 {dtype}", nets.relative(outputs(plain, dtype), truth), bar)


def law_a11_export_survives_fp16(impl: Any) -> None:
    """Balanced, then cast to fp16: 1e-3 relative in the change itself; cast first it is over 1.5e-3."""
    for size in (0.02, 0.002):
        _, _, pairs = trained_net(torch.float32, size=size)
        for pair in pairs:
            d = (
                pair.scaling
                * pair.left_matrix().detach().double()
                @ (pair.right_matrix().detach().double())
            )
            left, right = impl.balanced_factors(pair)
            half = left.half().double() @ right.half().double()
            within("A11 fp16", nets.relative(half, d), 1e-3)
            raw = pair.left_matrix().detach().half().double() @ (
                pair.right_matrix().detach().half().double()
            )
            assert nets.relative(pair.scaling * raw, d) > 1.5e-3
            within("A11 balance", (left.norm(dim=0) - right.norm(dim=1)).abs().max(), 1e-10)


def law_a12_arithmetic_is_dense_arithmetic(impl: Any) -> None:
    """Weighted sums, differences, balance and truncation equal those of the dense matrices."""
    changes = [LowRank(noise(n, 13, n + 2), noise(n + 9, n + 2, 11)) for n in range(3)]
    weights = (0.3, -1.0, 2.0)
    dense = sum(w * c.left @ c.right for w, c in zip(weights, changes, strict=True))
    total = impl.combine(changes, weights)
    within("A12 sum", nets.relative(total.dense(), dense), 1e-12)
    minus = impl.combine(changes[:2], (1, -1)).dense()
    truth = changes[0].dense() - changes[1].dense()
    within("A12 difference", nets.relative(minus, truth), 1e-12)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    for rank in (1, 4, 9):
        short = impl.balance(total, rank=rank)
        assert short.left.shape == (13, rank)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        within("A12 truncation", nets.relative(short.dense(), best), 1e-12)
        kept = float((s[:rank] ** 2).sum() / (s**2).sum())
        within("A12 kept energy", abs(impl.kept_energy(s, rank) - kept), 1e-12)
    dusty = impl.combine([changes[0], changes[1], changes[1]], (1.0, 1.0, -1.0))
    assert impl.balance(dusty).left.shape[1] == 8
    clean = impl.balance(dusty, drop_below=1e-7)
    assert clean.left.shape[1] == 2
    within("A12 dust", nets.relative(clean.dense(), changes[0].dense()), 1e-12)


def law_a13_a_zero_product_is_no_point(impl: Any) -> None:
    """PEFT's starts with a vanishing product give an error that names layer, cause and remedy."""
    for init in PLAIN:
        model = nets.net()
        real.attach_lora(model, 2, nets.TARGETS, init=init)
        for pair in impl.lora_pairs(model):
            with pytest.raises(ConfigError, match=rf"layer '{pair.name}'.*rank below.*attach_lora"):
                pair.point()


def law_a5_every_target_must_match(impl: Any) -> None:
    """A name that matches nothing, twice, or what cannot be adapted is an error that lists candidates."""
    cases = (
        (["attention"], r"'attention'.*conv \(1x\), first \(1x\), head \(1x\), second \(1x\)"),
        (["first", "secnd"], r"Did you mean 'second'"),
        (["first", "first"], "more than once"),
        (["drop"], "is a Dropout"),
        ([], "at least one layer"),
        ("fir.*|nothing", None),
        ("nothing.*", "no layer is named"),
    )
    for targets, message in cases:
        model = nets.net()
        if message is None:
            assert [pair.name for pair in impl.attach_lora(model, 2, targets)] == ["first"]
            continue
        with pytest.raises(ConfigError, match=message):
            impl.attach_lora(model, 2, targets)
        assert not any("lora" in name for name, _ in model.named_parameters())
    model = nets.net()
    impl.attach_lora(model, 2, ["first"])
    with pytest.raises(ConfigError, match=r"layer 'first' already carries.*conv \(1x\)"):
        impl.attach_lora(model, 2, ["first"], adapter_name="other")
    with pytest.raises(ConfigError, match="already has an adapter named 'default'"):
        impl.attach_lora(model, 2, ["second"])


def law_a5_rank_must_fit(impl: Any) -> None:
    """A rank above a layer's smaller side names layer, rank and limit; 2r above it lowers r, logged."""
    for rank in (6, 20):
        model = nets.net()
        with pytest.raises(ConfigError, match=rf"rank {rank} does not fit layer 'head'.*1 to 5"):
            impl.attach_lora(model, rank, ["first", "head"])
        assert not any("lora" in name for name, _ in model.named_parameters())
    model = nets.net()
    before = outputs(model.eval())
    pairs = impl.attach_lora(model, 5, ["first", "head"])
    assert [(pair.name, pair.rank, pair.left.shape[1]) for pair in pairs] == [
        ("first", 5, 10),
        ("head", 2, 4),
    ]
    assert all(pair.scaling == 1.0 for pair in pairs)
    within("A5 capped", (outputs(model) - before).abs().max(), 1e-13)


LAWS = [value for name, value in sorted(globals().items()) if name.startswith("law_")]


class Everything:
    """The bridge with what training around it needs."""

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    Riemannion = Riemannion
    recover = staticmethod(riemannion_step.recover)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    """Every law of this file on the real implementation."""
    law(Everything())


def test_a10_a_zeroed_gradient_is_not_enough_for_adamw() -> None:
    """Control: AdamW moves the frozen half by decay, so on this layout it is a rank-2r baseline."""
    model = nets.net()
    pairs = real.attach_lora(model, 2, nets.TARGETS)
    before = pairs[0].left.detach().clone()
    factors = [factor for pair in pairs for factor in (pair.left, pair.right)]
    train(
        pairs,
        model,
        torch.optim.AdamW(factors, 1e-3, weight_decay=0.01),
        real.mask_anchor_gradients_,
    )
    assert float((pairs[0].left[:, 2:] - before[:, 2:]).detach().abs().max()) > 1e-6


def test_a11_truncation_states_the_energy(caplog: pytest.LogCaptureFixture) -> None:
    """Export at rank r keeps the best rank-r part and says how much that is; never by itself."""
    _, _, pairs = trained_net(F64, size=0.02)
    with caplog.at_level("INFO"):
        short = real.balanced_factors(pairs[1], rank=3)
    s = torch.linalg.svdvals(pairs[1].delta())
    kept = float((s[:3] ** 2).sum() / (s**2).sum())
    assert 0.3 < kept < 0.9
    assert f"{kept:.4f} of the energy kept" in caplog.text
    lost = (short.dense() - pairs[1].delta()).norm() ** 2 / pairs[1].delta().norm() ** 2
    within("A11 lost", abs(float(lost) - (1 - kept)), 1e-10)
    assert real.balanced_factors(pairs[1]).left.shape[1] == 6


def test_a11_nothing_not_finite_leaves() -> None:
    """A NaN in a factor stops the export and names the layer."""
    _, _, pairs = trained_net(torch.float32)
    pairs[2].right.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"layer 'second'.*not finite"):
        real.export_factors(pairs)
