"""A Stable Diffusion 2 folder with random weights: the classes, shapes and files of the real one, for timing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.unet import SIZES, make_unet
from dreamrie.diffusion.source import embedded_directory, quiet_libraries

# Of stable-diffusion-2-base, from the configurations in its folder; "small" has its classes at a size for a laptop.
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "full": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    "small": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
}
TEXTS: dict[str, dict[str, int]] = {
    "full": {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16},
    "small": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def write_folder(folder: Path, size: str, device: torch.device, dtype: torch.dtype) -> Path:
    """Write the pipeline in the layout of diffusers, unless it is there.

    Args:
        folder: gets unet/, vae/, text_encoder/, tokenizer/, scheduler/ and model_index.json.
        size: key of `benchmarks.unet.SIZES`.
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
        unet=make_unet(SIZES[size], device).to(dtype),
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
