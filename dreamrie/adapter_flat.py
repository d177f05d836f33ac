"""Kohya's flat names of layers, resolved without a model.

`lora_unet_down_blocks_0_attentions_0_proj_in` has lost which of its underscores were dots. diffusers names the layers
of U-Nets of Stable Diffusion 1 and 2 by few words, and no sequence of these words and numbers is, flattened, also
another one, so that the dots come back by a rule. The rule knows no number of blocks: smaller U-Nets of the same
design, such as the embedded model, follow it. The layers of CLIP's text encoder follow one of their own.
"""

from __future__ import annotations

import re

from dreamrie.adapter_file import TEXT_ENCODER
from dreamrie.adapter_universal import TEXT_PREFIX, UNET_PREFIX

_ATTENTION = r"to_[qkv]|to_out_(?P<to_out>\d+)"
_TRANSFORMER = (
    r"proj_in|proj_out|"
    rf"transformer_blocks_(?P<block>\d+)_(?P<inside>attn[12]_(?:{_ATTENTION})|ff_net_\d+_proj|ff_net_\d+)"
)
_RESNET = r"conv1|conv2|conv_shortcut|time_emb_proj"
_PLACE = re.compile(
    r"(?P<top>(?:down_blocks|up_blocks)_\d+|mid_block)_"
    r"(?:"
    rf"attentions_(?P<attention>\d+)_(?P<transformer>{_TRANSFORMER})"
    rf"|resnets_(?P<resnet>\d+)_(?P<part>{_RESNET})"
    r"|(?P<sampler>downsamplers|upsamplers)_(?P<number>\d+)_conv"
    r")"
)
_TEXT = re.compile(
    r"(?:text_model_)?encoder_layers_(\d+)_(self_attn_(?:q|k|v|out)_proj|mlp_fc[12])"
)
_SINGLE = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "time_embedding_linear_1": "time_embedding.linear_1",
    "time_embedding_linear_2": "time_embedding.linear_2",
}


def layer_of_flat(name: str) -> str | None:
    """The layer that a flat name stands for.

    Args:
        name: with prefix, without the part of the tensor.

    Returns:
        Its path in the U-Net, or "text_encoder.text_model. ..." for a layer of CLIP's text encoder; None for a name
        that does not follow the rule.
    """
    if name.startswith(TEXT_PREFIX):
        return _text_layer(name.removeprefix(TEXT_PREFIX))
    short = name.removeprefix(UNET_PREFIX)
    if short in _SINGLE:
        return _SINGLE[short]
    found = _PLACE.fullmatch(short)
    if found is None:
        return None
    top = re.sub(r"_(\d+)$", r".\1", found["top"])
    if found["resnet"] is not None:
        return f"{top}.resnets.{found['resnet']}.{found['part']}"
    if found["sampler"] is not None:
        return f"{top}.{found['sampler']}.{found['number']}.conv"
    start = f"{top}.attentions.{found['attention']}"
    if found["block"] is None:
        return f"{start}.{found['transformer']}"
    # attn1_to_out_0, ff_net_0_proj: only the underscore inside to_q and its like is none of the dots.
    inside = re.sub(r"_(\d+)", r".\1", found["inside"]).replace("_to_", ".to_")
    inside = inside.replace("ff_net", "ff.net").replace("_proj", ".proj")
    return f"{start}.transformer_blocks.{found['block']}.{inside}"


def _text_layer(short: str) -> str | None:
    """self_attn_q_proj: the first underscore and the last are none of the dots."""
    found = _TEXT.fullmatch(short)
    if found is None:
        return None
    part = found[2].replace("self_attn_", "self_attn.").replace("mlp_", "mlp.")
    return f"{TEXT_ENCODER}text_model.encoder.layers.{found[1]}.{part}"
