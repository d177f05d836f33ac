"""Random-weight networks of timm and open_clip, put into the same architectures of transformers."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from eval.encoders.tiny_clip import text_state

_VIT_PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _renamed(target: nn.Module, pairs: dict[str, Tensor]) -> None:
    """Load tensors into parameters whose names end as given; every parameter must be met exactly once."""
    state = target.state_dict()
    free = dict(pairs)
    for name in state:
        hits = [end for end in free if name == end or name.endswith(f".{end}")]
        assert len(hits) == 1, (name, hits)
        state[name] = free.pop(hits[0])
    assert not free, sorted(free)
    target.load_state_dict(state)


def vision_transformer_twin(model: nn.Module) -> ViTModel:
    """A ViTModel with the weights of a timm ViT-S/16."""
    config = ViTConfig(
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        layer_norm_eps=1e-6,
        image_size=224,
        patch_size=16,
    )
    twin = ViTModel(config, add_pooling_layer=False).eval()
    source = model.state_dict()
    pairs = {
        "embeddings.cls_token": source["cls_token"],
        "embeddings.position_embeddings": source["pos_embed"],
        "patch_embeddings.projection.weight": source["patch_embed.proj.weight"],
        "patch_embeddings.projection.bias": source["patch_embed.proj.bias"],
        "layernorm.weight": source["norm.weight"],
        "layernorm.bias": source["norm.bias"],
    }
    for layer in range(12):
        for kind in ("weight", "bias"):
            rows = source[f"blocks.{layer}.attn.qkv.{kind}"].chunk(3)
            for part, row in zip("qkv", rows, strict=True):
                pairs[f"layers.{layer}.attention.{part}_proj.{kind}"] = row
            for ours, theirs in _VIT_PARTS.items():
                pairs[f"layers.{layer}.{theirs}.{kind}"] = source[f"blocks.{layer}.{ours}.{kind}"]
    _renamed(twin, pairs)
    return twin


def clip_twin(model: nn.Module) -> CLIPModel:
    """A CLIPModel with the weights of an open_clip ViT-B/32 with QuickGELU."""
    twin = CLIPModel(CLIPConfig()).eval()
    source = model.state_dict()
    pairs = {f"text_model.{name}": value for name, value in _flip(source, 12, "").items()}
    vision = _flip(source, 12, "visual.")
    pairs |= {f"vision_model.{name}": value for name, value in vision.items()}
    pairs |= {
        "logit_scale": source["logit_scale"],
        "text_projection.weight": source["text_projection"].T,
        "visual_projection.weight": source["visual.proj"].T,
        "vision_model.embeddings.class_embedding": source["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": source["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": source["visual.positional_embedding"],
        "vision_model.pre_layrnorm.weight": source["visual.ln_pre.weight"],
        "vision_model.pre_layrnorm.bias": source["visual.ln_pre.bias"],
        "vision_model.post_layernorm.weight": source["visual.ln_post.weight"],
        "vision_model.post_layernorm.bias": source["visual.ln_post.bias"],
        "text_model.embeddings.token_embedding.weight": source["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": source["positional_embedding"],
        "text_model.final_layer_norm.weight": source["ln_final.weight"],
        "text_model.final_layer_norm.bias": source["ln_final.bias"],
    }
    _renamed(twin, pairs)
    return twin


def _flip(source: dict[str, Tensor], layers: int, prefix: str) -> dict[str, Tensor]:
    """Layers of an open_clip tower under transformers' names."""
    parts = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    state = {}
    for layer in range(layers):
        old, new = f"{prefix}transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            rows = source[f"{old}attn.in_proj_{kind}"].chunk(3)
            for part, row in zip("qkv", rows, strict=True):
                state[f"{new}self_attn.{part}_proj.{kind}"] = row
            for ours, theirs in parts.items():
                state[f"{new}{theirs}.{kind}"] = source[f"{old}{ours}.{kind}"]
    return state


def round_trip(twin: CLIPModel) -> dict[str, Tensor]:
    """The text tower of a CLIPModel under open_clip's names, by the code that loads the embedded one."""
    return text_state(dict(twin.text_model.state_dict()), 12)


def vision_transformer(architecture: str) -> nn.Module:
    """The timm network of a DINO encoder with random weights: class token out, 224 pixels in."""
    return timm.create_model(architecture, pretrained=False, num_classes=0, img_size=224)


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """Noise on every parameter, so that no bias is zero and no norm is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
