"""Kohya's flat names without a model: every layer of the U-Nets comes back, and nothing else is guessed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from dreamrie import adapter_flat
from dreamrie.adapter_universal import kohya_name
from dreamrie.diffusion.components import load_components
from tests.small_models import small_unet

REAL = SimpleNamespace(layer_of_flat=lambda name: adapter_flat.layer_of_flat(name))
SD15: dict[str, Any] = {"cross_attention_dim": 768}
SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "attention_head_dim": (5, 10, 20, 20),
}


def layers_of(unet: Any) -> list[str]:
    return [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def law_flat_names_come_back(impl: Any) -> None:
    """For each layer that can carry a LoRA in SD1.5, SD2 and small U-Nets: the flat name gives its path."""
    for settings in (SD15, SD2):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**settings)
        layers = layers_of(unet)
        assert len(layers) == 282
        assert {n: impl.layer_of_flat(kohya_name(n)) for n in layers} == {n: n for n in layers}
    for kind in ("sd15", "sd2-v"):
        layers = layers_of(small_unet(kind))
        assert {n: impl.layer_of_flat(kohya_name(n)) for n in layers} == {n: n for n in layers}


def test_law() -> None:
    law_flat_names_come_back(REAL)


def test_the_embedded_model_follows_the_rule() -> None:
    layers = layers_of(load_components().unet)
    assert len(layers) > 80
    assert {adapter_flat.layer_of_flat(kohya_name(n)) for n in layers} == set(layers)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k",
        "lora_unet_down_blocks_attentions_0_proj_in",
        "lora_unet_down_blocks_0_attentions_0_proj_in_0",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn3_to_q",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out",
        "lora_unet_mix",
        "lora_unet_",
    ],
)
def test_names_that_follow_no_rule_are_not_guessed(name: str) -> None:
    """SDXL's first spelling, missing and additional parts."""
    assert adapter_flat.layer_of_flat(name) is None
