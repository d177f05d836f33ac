"""The embedded tiny CLIP: the pipeline's text encoder and the image tower beside it, as one open_clip model."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file

from dreamrie.diffusion.source import embedded_directory

_PARTS = (
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
_TABLES = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def directory() -> Path:
    """The folder of the image tower; its config names the text tower."""
    return embedded_directory().parent / "tiny-clip"


def text_state(source: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Text tower of a `CLIPTextModel` under open_clip's names, in fp32.

    Args:
        source: state of a CLIPTextModel, with or without the `text_model.` level.
        layers: of the transformer.

    Returns:
        Names and tensors for open_clip.
    """
    source = {name.removeprefix("text_model."): value.float() for name, value in source.items()}
    state = {new: source[old] for new, old in _TABLES.items()}
    for layer in range(layers):
        new, old = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            rows = [source[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{new}attn.in_proj_{kind}"] = torch.cat(rows)
            for ours, theirs in _PARTS:
                state[f"{new}{ours}.{kind}"] = source[f"{old}{theirs}.{kind}"]
    return state


def load() -> open_clip.CLIP:
    """The whole tiny CLIP in fp32."""
    folder = directory()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text, vision = config["text_cfg"], config["vision_cfg"]
    model = open_clip.CLIP(embed_dim=config["embed_dim"], vision_cfg=vision, text_cfg=text)
    tower = load_file((folder / config["text_tower"] / "model.safetensors").resolve())
    images = {
        name: value.float() for name, value in load_file(folder / "model.safetensors").items()
    }
    state = {**images, **text_state(tower, text["layers"])}
    if "attn_mask" in model.state_dict():
        state["attn_mask"] = model.state_dict()["attn_mask"]
    model.load_state_dict(state)
    return model


def tokenize(texts: list[str]) -> torch.Tensor:
    """Ids (n, 77) of CLIP's vocabulary."""
    return open_clip.SimpleTokenizer(context_length=77)(texts)
