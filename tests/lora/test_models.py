"""dreamrie.lora on the real classes of diffusers, transformers and PEFT."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import dreamrie
from dreamrie.errors import ConfigError
from dreamrie.lora import attach_lora, base_fingerprint, export_factors, lora_pairs, resolve_targets
from tests.margins import within
from tests.reference import nets
from tests.small_models import small_unet
from tests.strategies import noise

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
    report = dreamrie.locally_optimal_init(model, pairs, loss, [batch])
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


def test_no_lora_lists_candidates() -> None:
    with pytest.raises(ConfigError, match=r"no LoRA layer.*conv \(1x\), first \(1x\)"):
        lora_pairs(nets.net())
    with pytest.raises(ConfigError, match=r"to_k \(8x\), to_out\.0 \(8x\)"):
        lora_pairs(unet())
