"""The text side as transformers and diffusers want it: CLIPTokenizer with CLIP's vocabulary, CLIPTextModel from the tiny CLIP."""

from __future__ import annotations

import gzip
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.pretrain_tiny import clip

_MERGES = 48_894


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's own vocabulary of 49,408 entries from the file inside open_clip; pads with `!` as Stable Diffusion 2 does."""
    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.open(path, "rt", encoding="utf-8").read().split("\n")[1 : _MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    base = list(open_clip.tokenizer.bytes_to_unicode().values())
    tokens = [*base, *(f"{symbol}</w>" for symbol in base), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token="!")
    if len(tokenizer) != 49_408:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries instead of 49408")
    return tokenizer


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Ids (n, 77), padded and cut as StableDiffusionPipeline does."""
    encoded = tokenizer(captions, padding="max_length", max_length=77, truncation=True)
    return torch.tensor(encoded["input_ids"])


def build_text_model(model: open_clip.CLIP) -> CLIPTextModel:
    """The text tower of an open_clip model as a CLIPTextModel; equal outputs are checked by `check`."""
    width, layers = clip.TEXT["width"], clip.TEXT["layers"]
    config = CLIPTextConfig(
        vocab_size=49_408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=clip.EMBED_DIM,
        num_hidden_layers=layers,
        num_attention_heads=clip.TEXT["heads"],
        max_position_embeddings=clip.CONTEXT,
        hidden_act="gelu",
        bos_token_id=49_406,
        eos_token_id=49_407,
        pad_token_id=0,
    )
    target = CLIPTextModel(config).eval()
    source = model.state_dict()
    state = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    for layer in range(layers):
        old, new = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = source[f"{old}attn.in_proj_{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                state[f"{new}self_attn.{name}_proj.{kind}"] = part
            state[f"{new}self_attn.out_proj.{kind}"] = source[f"{old}attn.out_proj.{kind}"]
            state[f"{new}layer_norm1.{kind}"] = source[f"{old}ln_1.{kind}"]
            state[f"{new}layer_norm2.{kind}"] = source[f"{old}ln_2.{kind}"]
            state[f"{new}mlp.fc1.{kind}"] = source[f"{old}mlp.c_fc.{kind}"]
            state[f"{new}mlp.fc2.{kind}"] = source[f"{old}mlp.c_proj.{kind}"]
    prefix = "text_model." if any(k.startswith("text_model.") for k in target.state_dict()) else ""
    missing = target.load_state_dict({prefix + k: v for k, v in state.items()}, strict=False)
    if missing.unexpected_keys or [k for k in missing.missing_keys if "position_ids" not in k]:
        raise ValueError(f"text towers do not match: {missing}")
    return target


@torch.no_grad()
def check(model: open_clip.CLIP, target: CLIPTextModel, tokenizer: CLIPTokenizer) -> float:
    """Largest difference of pooled outputs between the two implementations over a few captions."""
    captions = ["a red apple on a blue background", "two bells", "a photo of sks toy in the snow"]
    ids = token_ids(tokenizer, captions)
    expected = model.encode_text(open_clip.SimpleTokenizer(context_length=77)(captions))
    pooled = target(ids).pooler_output @ model.text_projection
    return float((pooled - expected).abs().max())


def load(work: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Text model (fp32, eval) and tokenizer; the two implementations must agree."""
    model = clip.load(work)
    target, tokenizer = build_text_model(model), build_tokenizer()
    difference = check(model, target, tokenizer)
    if difference > 1e-4:
        raise ValueError(f"CLIPTextModel differs from open_clip by {difference:.2e}")
    return target, tokenizer
