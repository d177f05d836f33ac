"""Adapters on attention and MLP projections, whatever the layers are called."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from dreamrie.errors import ConfigError
from dreamrie.llm import targets as real
from dreamrie.lora import attach_lora
from tests.llm import small

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def law_ll6_every_projection_and_nothing_else(impl: Any, kind: str) -> None:
    """All linear layers of the decoder, seven a layer, and neither the embedding nor the output layer."""
    network = small.model(kind)
    assert set(impl.target_modules(network, ["attention"])) == ATTENTION
    assert set(impl.target_modules(network, ["mlp"])) == MLP
    names = impl.target_modules(network, ["attention", "mlp"])
    linear = {n for n, module in network.named_modules() if isinstance(module, nn.Linear)}
    pairs = attach_lora(network, 2, names)
    assert {pair.name for pair in pairs} == linear - {"lm_head"}
    assert len(pairs) == 7 * network.config.num_hidden_layers


@pytest.mark.parametrize("kind", sorted(small.KINDS))
def test_ll6(kind: str) -> None:
    law_ll6_every_projection_and_nothing_else(real, kind)


def test_joined_projections_are_found_too() -> None:
    config = Phi3Config(**{**small.SIZES, "num_key_value_heads": 4})
    names = real.target_modules(Phi3ForCausalLM(config), ["mlp", "attention"])
    assert names == ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"]


def test_a_name_stands_for_itself() -> None:
    assert real.target_modules(small.model(), ["q_proj"]) == ["q_proj"]


def test_a_model_without_such_layers_is_one_message() -> None:
    network = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="no mlp layers of a known name") as caught:
        real.target_modules(network, ["mlp"])
    assert "--target_modules mlp" in str(caught.value)
    network = LlamaForCausalLM(LlamaConfig(**small.SIZES))
    with pytest.raises(ConfigError, match=r"no layer is named 'q_prj'.*Did you mean"):
        attach_lora(network, 2, real.target_modules(network, ["q_prj"]))
