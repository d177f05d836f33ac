"""Examples and errors of dreamrie.lora, on the real classes of diffusers, transformers and PEFT."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import dreamrie
from dreamrie.errors import ConfigError, NumericalError
from dreamrie.fixed_rank import Point
from dreamrie.lora import (
    LowRank,
    attach_lora,
    balance,
    balanced_factors,
    base_fingerprint,
    combine,
    export_factors,
    lora_pairs,
    mask_anchor_gradients_,
    resolve_targets,
)
from tests.margins import within
from tests.reference import nets
from tests.small_models import small_unet
from tests.strategies import F64, noise

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _fixed_weights() -> Any:
    """Random models draw from the global stream; give each test the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def unet() -> Any:
    return small_unet("sd2-eps").eval()


def run_unet(model: Any) -> Tensor:
    sample, text = noise(1, 2, 4, 8, 8).float(), noise(2, 2, 5, 16).float()
    return model(sample, torch.tensor([3, 700]), text).sample.detach()


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def clip() -> Any:
    config = CLIPTextConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=9,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModel(config).eval()


TOKENS = torch.tensor([[1, 5, 9, 30, 2], [1, 7, 7, 3, 2]])


# ------------------------------------------------------------------------------------------------ A13: drop-in


MODELS = {
    "unet": (unet, ATTENTION, run_unet, 32),
    "unet, convolutions too": (unet, [*ATTENTION, "conv1", "conv2"], run_unet, 32 + 16),
    "llama": (llama, LLAMA, lambda model: model(TOKENS).logits.detach(), 14),
    "clip": (
        clip,
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        lambda model: model(TOKENS).last_hidden_state.detach(),
        12,
    ),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_drop_in_on_real_models(name: str) -> None:
    """Attach, find, LOI, train one step, export onto the untouched base: all on library models."""
    make, targets, run, count = MODELS[name]
    model = make()
    plain, before, digest = copy.deepcopy(model), run(model), base_fingerprint(model)
    pairs = attach_lora(model, 3, targets)
    assert len(pairs) == count
    assert [pair.name for pair in lora_pairs(model)] == [pair.name for pair in pairs]
    assert base_fingerprint(model) == digest
    size = before.abs().max()
    # Some thirty layers and norms stretch the rounding of one (L3: 1e-6); measured 7e-7, times 5.
    within("A13 step 0", (run(model) - before).abs().max() / size, 3.5e-6)

    def loss(net: Any, batch: Tensor) -> Tensor:
        if "unet" in name:
            text = noise(2, 2, 5, 16).float()
            return (net(batch, torch.tensor([3, 700]), text).sample - batch).square().mean()
        out = net(batch)
        return (out.logits if name == "llama" else out.last_hidden_state).square().mean()

    batch = noise(4, 2, 4, 8, 8).float() if "unet" in name else TOKENS
    report = dreamrie.locally_optimal_init(model, pairs, loss, [batch], lr=1e-3)
    assert report.captured > 0.999
    within("A13 LOI step 0", (run(model) - before).abs().max() / size, 3.5e-6)
    optimizer = dreamrie.Riemannion(pairs, lr=0.005)
    first = loss(model, batch)
    first.backward()
    optimizer.step()
    assert float(loss(model, batch).detach()) < float(first.detach())
    truth = run(model)
    assert float((truth - before).abs().max() / size) > 1e-4
    for layer, change in export_factors(pairs).items():
        weight = plain.get_submodule(layer).weight
        weight.data += change.left.flatten(1).matmul(change.right.flatten(1)).reshape(weight.shape)
    within("A13 export", (run(plain) - truth).abs().max() / size, 2e-5)
    assert base_fingerprint(model) == digest


def test_diffusers_keeps_its_books() -> None:
    """The adapter is known to diffusers: state dict, disabling, unloading, deletion."""
    model = unet()
    before, digest = run_unet(model), base_fingerprint(model)
    pairs = attach_lora(model, 3, ATTENTION, adapter_name="concept")
    assert model.peft_config["concept"].r == 6
    assert len(get_peft_model_state_dict(model, adapter_name="concept")) == 2 * len(pairs)
    nets.disturb(pairs, 0.3)
    assert not torch.equal(run_unet(model), before)
    model.disable_adapters()
    assert torch.equal(run_unet(model), before)
    model.enable_adapters()
    model.delete_adapters("concept")
    assert base_fingerprint(model) == digest
    # The mark of the anchor went with the adapter: a plain one of the same name is plain.
    assert {pair.anchor_rank for pair in attach_lora(unet(), 3, ATTENTION, init="default")} == {0}


def test_diffusers_loads_the_exported_factors() -> None:
    """A file of balanced factors in diffusers' own names reproduces the trained model on the base."""
    model = unet()
    stock = copy.deepcopy(model)
    pairs = attach_lora(model, 3, ATTENTION)
    nets.disturb(pairs, 0.1)
    state: dict[str, Tensor] = {}
    for name, change in export_factors(pairs).items():
        state[f"unet.{name}.lora_A.weight"] = change.right.float()
        state[f"unet.{name}.lora_B.weight"] = change.left.float()
    before = run_unet(stock)
    stock.load_lora_adapter(state, prefix="unet")
    truth = run_unet(model)
    assert nets.relative(before, truth) > 1e-2
    within("A4 diffusers", nets.relative(run_unet(stock), truth), 2e-6)
    loaded = lora_pairs(stock)
    assert {pair.anchor_rank for pair in loaded} == {0}
    for ours, theirs in zip(pairs, loaded, strict=True):
        within("A4 delta", nets.relative(theirs.delta(), ours.delta()), 2e-6)


def test_counts_are_frozen_for_sd2_and_a_language_model() -> None:
    """A5: SD2's U-Net has 128 attention projections of 6 shapes, 7 matrices in a llama block."""
    with torch.device("meta"):
        sd2 = UNet2DConditionModel(
            sample_size=64,
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
    found = resolve_targets(sd2, ATTENTION)
    assert len(found) == 128
    shapes = [tuple(layer.weight.shape) for layer in found.values()]
    assert {shape: shapes.count(shape) for shape in shapes} == {
        (1280, 1280): 36, (320, 320): 30, (640, 640): 30,
        (1280, 1024): 12, (320, 1024): 10, (640, 1024): 10,
    }  # fmt: skip
    assert len(resolve_targets(llama(), LLAMA)) == 14


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_pairs_of_a_peft_model_and_any_adapter_name() -> None:
    """get_peft_model and inject_adapter_in_model give the same names; the scaling is PEFT's."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], use_rslora=True)
    wrapped = get_peft_model(llama(), config, adapter_name="poet")
    pairs = lora_pairs(wrapped)
    assert pairs[0].name == "model.layers.0.self_attn.q_proj"
    assert pairs[0].adapter_name == "poet"
    assert pairs[0].scaling == pytest.approx(5 / math.sqrt(3))
    assert (pairs[0].rank, pairs[0].anchor_rank, pairs[0].anchor()) == (3, 0, None)
    with pytest.raises(ConfigError, match="already a PeftModel"):
        attach_lora(wrapped, 2, ["o_proj"])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_two_adapters_need_a_name() -> None:
    model = nets.net()
    for name, layer in (("one", "first"), ("two", "second")):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=[layer]), model, name)
    with pytest.raises(ConfigError, match=r"several adapters \['one', 'two'\]"):
        lora_pairs(model)
    assert [pair.name for pair in lora_pairs(model, "two")] == ["second"]
    with pytest.raises(ConfigError, match="no adapter named 'three'"):
        lora_pairs(model, "three")


def test_copies_and_pickles_stay_anchored() -> None:
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = lora_pairs(twin)
        assert [pair.anchor_rank for pair in again] == [2, 2, 2]
        assert torch.equal(again[0].left, pairs[0].left)
        assert again[0].left is not pairs[0].left


def test_starts_are_reproducible_and_differ_between_layers() -> None:
    for init in ("orthonormal", "gaussian", "default", "orthogonal", "pissa_niter_4"):
        made = []
        for seed in (1, 1, 2):
            torch.manual_seed(100 * len(made))
            state = torch.get_rng_state()
            generator = torch.Generator().manual_seed(seed)
            model = nn.ModuleDict({"a": nn.Linear(9, 8), "b": nn.Linear(9, 8)}).double()
            model["b"].weight.data.copy_(model["a"].weight)
            model["a"].weight.data.copy_(noise(0, 8, 9))
            model["b"].weight.data.copy_(noise(0, 8, 9))
            state = torch.get_rng_state()
            pairs = attach_lora(model, 2, ["a", "b"], init=init, generator=generator)
            assert torch.equal(torch.get_rng_state(), state), init
            made.append([pair.right.detach().clone() for pair in pairs])
        assert torch.equal(made[0][0], made[1][0]), init
        if init != "pissa_niter_4":
            assert not torch.equal(made[0][0], made[2][0]), init
            assert not torch.equal(made[0][0], made[0][1]), init


def test_pissa_start_is_the_leading_part_of_the_weight() -> None:
    model = nets.net()
    weight = model.first.weight.detach().clone()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    pair = attach_lora(model, 3, ["first"], init="pissa")[0]
    point = pair.point()
    truth = (u[:, :3] * s[:3]) @ vh[:3]
    # PEFT decomposes in fp32.
    within("pissa start", nets.relative((point.u * point.s) @ point.v.T, truth), 1e-5)
    assert torch.equal(pair.base_weight, weight)


def test_orthonormal_start_has_the_asked_size() -> None:
    pairs = attach_lora(nets.net(), 4, ["first"])
    within("default alpha", (pairs[0].point().s - 0.05).abs().max(), 1e-14)
    pairs = attach_lora(nets.net(), 4, ["first"], alpha=-0.3)
    within("asked alpha", (pairs[0].point().s - 0.3).abs().max(), 1e-14)


def test_without_anchor_the_function_moves_and_is_said_to(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nets.net().eval()
    before = model(nets.batches(1)[0][0]).detach()
    pairs = attach_lora(model, 2, nets.TARGETS, anchored=False)
    assert [pair.anchor_rank for pair in pairs] == [0, 0, 0]
    assert [pair.left.shape[1] for pair in pairs] == [2, 2, 2]
    assert not torch.equal(model(nets.batches(1)[0][0]).detach(), before)
    assert "changes at step 0" in caplog.text
    assert pairs[0].point().s.shape == (2,)


def test_gpt2_weights_are_stored_transposed() -> None:
    """Conv1D keeps (in, out): lora_pairs reads such an adapter, and LOI turns its gradient."""
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=37, n_positions=9, n_embd=24, n_layer=1, n_head=2)
    )
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["c_fc"], fan_in_fan_out=True)
    inject_adapter_in_model(config, model)
    (pair,) = lora_pairs(model)
    pair.left.data.copy_(noise(0, *pair.left.shape))
    assert pair.transposed
    assert (pair.out, pair.in_) == (96, 24)
    assert pair.as_matrix(pair.base_weight).shape == (96, 24)
    truth = nets.measured_change(pair.module, 24, 96)
    within("transposed", nets.relative(pair.delta(), truth), 2e-6)


# -------------------------------------------------------------------------------------------------------- errors


def injected(**options: Any) -> nn.Module:
    model = nn.ModuleDict(
        {"word": nn.Embedding(11, 8), "mix": nn.Linear(8, 6), "group": nn.Conv2d(4, 6, 3, groups=2)}
    )
    inject_adapter_in_model(LoraConfig(**{"r": 2, "target_modules": ["mix"], **options}), model)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"layer 'mix'.*DoRA.*use_dora=False"),
        ({"target_modules": ["word"]}, r"layer 'word'.*Embedding.*Linear and Conv2d"),
        ({"target_modules": ["group"]}, r"layer 'group'.*grouped convolution"),
        ({"lora_bias": True}, r"layer 'mix'.*bias.*lora_bias=False"),
        ({"lora_alpha": 0}, r"layer 'mix'.*scaling must be positive.*lora_alpha"),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer:UserWarning")
def test_what_has_no_matrix_form_is_named_with_a_remedy(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        lora_pairs(injected(**options))


def test_a_merged_adapter_is_named() -> None:
    model: Any = injected()
    model["mix"].merge()
    with pytest.raises(ConfigError, match=r"layer 'mix'.*merged.*Unmerge"):
        lora_pairs(model)


def test_no_lora_lists_candidates() -> None:
    with pytest.raises(ConfigError, match=r"no LoRA layer.*conv \(1x\), first \(1x\)"):
        lora_pairs(nets.net())
    with pytest.raises(ConfigError, match=r"to_k \(8x\), to_out\.0 \(8x\)"):
        lora_pairs(unet())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"alpha": 0.0}, "alpha must be finite and not zero"),
        ({"alpha": math.inf}, "alpha must be finite"),
        ({"alpha": 0.1, "init": "pissa"}, "'pissa' has its own"),
        ({"init": "eva"}, "'eva' is not supported here; allowed: orthonormal, default"),
        ({"init": "pisa"}, "allowed: orthonormal"),
        ({"init": "default", "anchored": True}, "needs and allows no anchor"),
        ({"init": "olora", "anchored": False}, "never written"),
        ({"init": "orthogonal", "rank": 3}, "two halves; 3 is odd"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    model = nets.net()
    with pytest.raises(ConfigError, match=message):
        attach_lora(model, **{"rank": 2, "target_modules": ["first"], **options})
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_layer_of_one_row_cannot_hold_point_and_anchor() -> None:
    model = nn.ModuleDict({"score": nn.Linear(8, 1)})
    with pytest.raises(ConfigError, match=r"layer 'score': its weight is 1 x 8.*at least 2"):
        attach_lora(model, 1, ["score"])
    assert attach_lora(model, 1, ["score"], init="default")[0].rank == 1


def test_set_start_refuses_a_wrong_point() -> None:
    pair = attach_lora(nets.net(), 2, ["first"])[0]
    good = pair.point()
    with pytest.raises(ConfigError, match="anchored=False"):
        pair.set_start(good, anchored=False)
    with pytest.raises(ConfigError, match=r"layer 'first': start has shapes"):
        pair.set_start(Point(good.v, good.s, good.u), anchored=True)
    for bad in (0.0, math.nan):
        with pytest.raises(NumericalError, match="layer 'first'"):
            pair.set_start(good._replace(s=good.s * torch.tensor([1.0, bad])), anchored=True)
    assert torch.equal(pair.point().s, good.s)


def test_factors_that_are_not_finite_are_named() -> None:
    pair = attach_lora(nets.net(), 2, ["first"])[0]
    pair.left.data[3, 1] = math.nan
    with pytest.raises(NumericalError, match="layer 'first'"):
        pair.point()


def test_channels_last_factors_are_named() -> None:
    model = nets.net()
    pair = attach_lora(model, 2, ["conv"])[0]
    model.to(memory_format=torch.channels_last)
    with pytest.raises(ConfigError, match=r"layer 'conv'.*not contiguous"):
        pair.right_matrix()


def test_low_rank_arithmetic_refuses_what_does_not_fit() -> None:
    a, b = LowRank(noise(0, 5, 2), noise(1, 2, 4)), LowRank(noise(0, 5, 2), noise(1, 2, 3))
    with pytest.raises(ConfigError, match="cannot add 2 changes"):
        combine([a, b])
    with pytest.raises(ConfigError, match="cannot add 0 changes"):
        combine([])
    with pytest.raises(ConfigError, match="with 1 weights"):
        combine([a, a], [1.0])
    with pytest.raises(ConfigError, match="do not multiply"):
        balance(LowRank(a.left, noise(0, 3, 4)))
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        balance(a, rank=0)
    with pytest.raises(ConfigError, match="no LoRA pair to export"):
        export_factors([])


class _WithoutDouble(Tensor):
    """A tensor on a device that has no fp64, like Apple's; its CPU copy is an ordinary one."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = (*args, *(kwargs or {}).values())
        if func is Tensor.double or any(value is torch.float64 for value in named):
            raise TypeError("this device has no float64")
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(Tensor) if func is Tensor.cpu else result


def test_export_computes_on_the_cpu() -> None:
    """Factors on a device without fp64 export the same numbers as on one that has it."""
    left, right = noise(0, 7, 4).float(), noise(1, 4, 6).float()
    with pytest.raises(TypeError, match="no float64"):
        left.as_subclass(_WithoutDouble).double()

    def factors(kind: type[Tensor]) -> LowRank:
        pair = SimpleNamespace(
            name="x",
            scaling=0.625,
            left_matrix=lambda: left.as_subclass(kind),
            right_matrix=lambda: right.as_subclass(kind),
        )
        return balanced_factors(pair)

    for part, wanted in zip(factors(_WithoutDouble), factors(Tensor), strict=True):
        assert type(part) is Tensor
        assert part.dtype == F64
        assert torch.equal(part, wanted)


def test_an_untrained_pair_exports_zero() -> None:
    pairs = attach_lora(nets.net(), 2, nets.TARGETS)
    for change in export_factors(pairs).values():
        assert bool(change.left.isfinite().all())
        within("zero export", (change.left.flatten(1) @ change.right.flatten(1)).norm(), 1e-14)
    kept = export_factors(pairs, drop_below=1e-7)
    assert all(1 <= change.left.shape[1] <= 4 for change in kept.values())


def test_mask_takes_missing_gradients_and_plain_pairs() -> None:
    model = nets.net()
    pairs = attach_lora(model, 2, ["first"])
    mask_anchor_gradients_(pairs)
    assert pairs[0].left.grad is None
    plain = attach_lora(nets.net(), 2, ["first"], init="gaussian")
    plain[0].left.grad = torch.ones_like(plain[0].left)
    mask_anchor_gradients_(plain)
    assert bool((plain[0].left.grad == 1).all())


def test_fingerprint_sees_every_base_byte_and_no_adapter() -> None:
    model: Any = nn.ModuleDict({"norm": nn.BatchNorm1d(4), "mix": nn.Linear(4, 6)}).to(F64)
    before = base_fingerprint(model)
    pairs = attach_lora(model, 2, ["mix"])
    nets.disturb(pairs)
    assert base_fingerprint(model) == before
    model["norm"].running_mean[1] += 1e-9
    assert base_fingerprint(model) != before
    model["norm"].running_mean[1] = 0
    assert base_fingerprint(model) == before
    model["mix"].get_base_layer().bias.data[2].neg_()
    assert base_fingerprint(model) != before
