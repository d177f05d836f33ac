"""How programs spell the tensors of a LoRA: a stem, which stands for a layer, and a part of that layer's LoRA.

unet.LAYER.lora_A.weight, .lora_B.weight                  diffusers and dreamrie
base_model.model.LAYER.lora_A.weight, .lora_B.weight      PEFT; these two also .lora_magnitude_vector, for DoRA
unet.LAYER.lora.down.weight, .lora.up.weight              older diffusers
unet.LAYER.lora_linear_layer.down.weight, .up.weight      still older diffusers
unet.PLACE.processor.to_q_lora.down.weight, .up.weight    oldest diffusers; text encoder: PLACE.to_q_lora. ...
lora_unet_LAYER_WITH_UNDERSCORES.lora_down.weight, .lora_up.weight, .alpha      kohya, and dreamrie's universal file

CLIP's text encoder has `text_encoder.` for `unet.` and `lora_te_` for `lora_unet_`. Its layers lie in
`text_model.encoder. ...`, but in transformers 5.6 and later in `encoder. ...`, and files have either. One name, that
with `text_model`, stands for both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from dreamrie.adapter_file import TEXT_ENCODER, canonical
from dreamrie.adapter_magnitudes import MAGNITUDE
from dreamrie.adapter_peft import PEFT_PREFIX
from dreamrie.adapter_universal import TEXT_PREFIX, kohya_name

PREFIXES = ("unet.", PEFT_PREFIX, "")
TEXT_PREFIXES = ("text_encoder", "lora_te")
# Two text encoders: Stable Diffusion XL and its relatives.
SECOND_PREFIXES = ("lora_te1_", "lora_te2_", "text_encoder_2.")

_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
    MAGNITUDE: "magnitude",
}
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
_CLIP_PROCESSOR = re.compile(r"\.self_attn\.to_([qkv]|out)_lora\.(down|up)\.weight$")
_TEXT_MODEL = "text_model."
_CLIP = re.compile(
    r"(?:text_model\.)?encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])"
)


def parted(name: str) -> tuple[str, str] | None:
    """Take a name apart.

    Args:
        name: of a tensor.

    Returns:
        The stem in the spelling of the file, and "down" (`lora_A`), "up" (`lora_B`), "alpha" or "magnitude"; None for a
        name that is no part of a LoRA.
    """
    old = _PROCESSOR.search(name)
    if old:
        return f"{name[: old.start()]}.{'to_out.0' if old[1] == 'to_out' else old[1]}", old[2]
    old = _CLIP_PROCESSOR.search(name)
    if old:
        return f"{name[: old.start()]}.self_attn.{old[1]}_proj", old[2]
    ending = next((end for end in _ENDINGS if name.endswith(end)), None)
    if ending is None or name == ending:
        return None
    return name.removesuffix(ending), _ENDINGS[ending]


def unprefixed(stem: str) -> Iterator[str]:
    """What a dotted stem may be in its model.

    Args:
        stem: see `parted`.

    Yields:
        The stem itself, as a model may have a child named like a prefix, and what follows a prefix.
    """
    yield stem
    for prefix in PREFIXES:
        if prefix and stem.startswith(prefix):
            yield stem.removeprefix(prefix)


def text_layer(name: str) -> str | None:
    """The one name of a layer of CLIP's text encoder.

    Args:
        name: path in the text encoder of any version of transformers, with or without the prefix of diffusers or PEFT.

    Returns:
        "text_encoder.text_model.encoder. ..."; None for another layer.
    """
    stem = name.removeprefix(TEXT_ENCODER)
    found = next((path for path in unprefixed(stem) if _CLIP.fullmatch(path)), None)
    return None if found is None else canonical(found)


def one_name(layer: str) -> str:
    """The name by which layers of files and models are compared.

    Args:
        layer: any.

    Returns:
        That of `text_layer`, where there is one; other layers of a text encoder have `text_model` too, and layers of
        other models are as they are.
    """
    found = text_layer(layer)
    return found or (canonical(layer) if layer.startswith(TEXT_ENCODER) else layer)


def place_in_text_encoder(stem: str, layers: Collection[str]) -> str | None:
    """The layer of a text encoder that a stem stands for, whichever of the two layouts it has.

    Args:
        stem: see `parted`.
        layers: paths in the text encoder.

    Returns:
        One of `layers`, or None.
    """
    if stem.startswith(TEXT_PREFIX):
        inside = stem.removeprefix(TEXT_PREFIX).removeprefix("text_model_")
        wanted = f"{TEXT_PREFIX}text_model_{inside}"
        return next((name for name in layers if kohya_name(TEXT_ENCODER + name) == wanted), None)
    for path in unprefixed(stem.removeprefix(TEXT_ENCODER)):
        inside = path.removeprefix(_TEXT_MODEL)
        is_text = stem.startswith(TEXT_ENCODER) or _CLIP.fullmatch(path)
        found = next((c for c in (inside, _TEXT_MODEL + inside) if c in layers), None)
        if is_text and found is not None:
            return found
    return None
