"""SD2's layout without its weights: every adapted layer by its real name, at a quarter of the width or less."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from dreamrie.lora import LowRank
from tests.reference.loader_models import Shapes

TEXT_LAYER = "text_encoder.text_model.encoder.layers.1"


def sd2_unet(widths: tuple[int, ...] = (40, 80, 160, 160)) -> Any:
    """SD2's U-Net of full depth without weights; a quarter of its heads' width, unless said otherwise."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64,
            block_out_channels=widths,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            layers_per_block=2,
            norm_num_groups=8,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )


@cache
def sd2_shapes() -> Shapes:
    """All 192 layers of SD2's transformers, and a layer of its text encoder, with (out, in)."""
    found = {
        name: (module.out_features, module.in_features)
        for name, module in sd2_unet().named_modules()
        if isinstance(module, nn.Linear) and ".attentions." in name
    }
    for part in ("q", "k", "v", "out"):
        found[f"{TEXT_LAYER}.self_attn.{part}_proj"] = (64, 64)
    return {**found, f"{TEXT_LAYER}.mlp.fc1": (96, 64)}


def sd2_changes(seed: int = 0) -> dict[str, LowRank]:
    """Unbalanced, of ranks 2 to 4, out != in for half of the layers."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for number, (layer, (out, in_)) in enumerate(sd2_shapes().items()):
        rank = 2 + number % 3
        left = 7.0 * torch.randn(out, rank, generator=generator)
        changes[layer] = LowRank(left, 0.01 * torch.randn(rank, in_, generator=generator))
    return changes
