"""A Stable Diffusion 2 folder with random weights: the classes, shapes and files of the real one, for timing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreamrie.diffusion.source import embedded_directory, quiet_libraries

# Of stable-diffusion-2-base, from the configurations in its folder. "small" has its classes at a size for a laptop.
UNETS: dict[str, dict[str, Any]] = {
    "full": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "small": {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 64,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    },
}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "full": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    "small": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
}
TEXTS: dict[str, dict[str, int]] = {
    "full": {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16},
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
SIZES = tuple(UNETS)


def make_unet(size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """SD2's U-Net with random weights, made where it will be used.

    Args:
        size: "full" (865.9 M parameters) or "small".
        device: where.
        dtype: of the weights.

    Returns:
        The U-Net, `UNet2DConditionModel`.
    """
    with torch.device(device):
        return UNet2DConditionModel(**UNETS[size]).to(dtype)


def write_folder(folder: Path, size: str, device: torch.device, dtype: torch.dtype) -> Path:
    """Write the pipeline in the layout of diffusers, unless it is there.

    Args:
        folder: gets unet/, vae/, text_encoder/, tokenizer/, scheduler/ and model_index.json.
        size: see `make_unet`.
        device: where the random numbers are drawn.
        dtype: of the files.

    Returns:
        The folder.
    """
    if (folder / "model_index.json").is_file():
        return folder
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(embedded_directory() / "tokenizer")
    blocks = len(AUTOENCODERS[size]["block_out_channels"])
    text = TEXTS[size]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        intermediate_size=4 * text["hidden_size"],
        projection_dim=text["hidden_size"] // 2,
        hidden_act="gelu",
        **text,
    )
    with torch.device(device):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            latent_channels=4,
            **AUTOENCODERS[size],
        )
        encoder = CLIPTextModel(config)
    pipeline = StableDiffusionPipeline(
        vae=vae.to(dtype),
        text_encoder=encoder.to(dtype),
        tokenizer=tokenizer,
        unet=make_unet(size, device, dtype),
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            clip_sample=False, prediction_type="epsilon",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    half_written = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(half_written, ignore_errors=True)
    with quiet_libraries():
        pipeline.save_pretrained(half_written)
    half_written.rename(folder)
    return folder
