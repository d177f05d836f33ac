"""Models of four loaders of LoRA files, as far as it decides whether a file arrives: names, scaling, hiding, failing.

Written from observed behaviour alone, not from anybody's code. The facts, by the numbers that the tests cite:

D1   ComfyUI knows kohya's flat names and the old `attn1.processor.to_q`, not today's `attn1.to_q`; it loads the rest
D2   A1111 knows kohya's flat names, and nothing of diffusers
D4   A1111 fuses a text encoder's attention and fails on one adapted in part; it knows `lora_te_text_model_` only
D5   A1111 and Forge show a file for SD2 only if its header says ss_v2 = "True", to the letter
D7   diffusers gives all attention layers of a kohya file the alpha that is most frequent in it, over their own ranks
D8   diffusers refuses alphas beside `lora_adapter_metadata`
D9   ComfyUI ignores an alpha that stands only in the header
D10  ComfyUI does not know `text_encoder.encoder`, as transformers from 5.6 on spells it; diffusers does

Forge's names are taken to be ComfyUI's, of which it is a relative: the one assumption here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

TEXT = "text_encoder.text_model."
Shapes = Mapping[str, tuple[int, int]]


@dataclass
class Arrived:
    """What a loader made of a file.

    Attributes:
        changes: path of each layer to its dense change (out, in).
        unmatched: names that the loader left out, with a warning at most.
        hidden: why the file is not even offered to the user.
        failed: why loading stopped.
    """

    changes: dict[str, Tensor] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    hidden: str | None = None
    failed: str | None = None

    @property
    def usable(self) -> bool:
        """The user sees the file, and it loads without a word."""
        return self.hidden is None and self.failed is None and not self.unmatched


Loader = Callable[[Mapping[str, Tensor], Mapping[str, str], Shapes], Arrived]

_KOHYA = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"}
_PEFT = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
_ATTENTION = re.compile(r"\.(attn[12])\.(to_[qkv]|to_out)(\.0)?$")


def comfyui(tensors: Mapping[str, Tensor], header: Mapping[str, str], model: Shapes) -> Arrived:
    """Every name it knows is loaded, every other one is a line in a log (D1, D9, D10)."""
    known: dict[str, str] = {}
    for layer in model:
        if layer.startswith(TEXT):
            known[f"lora_te_{_flat(layer.removeprefix('text_encoder.'))}"] = layer
            known[layer] = layer
        else:
            known |= {f"lora_unet_{_flat(layer)}": layer, f"lycoris_{_flat(layer)}": layer}
            old = _ATTENTION.sub(r".\1.processor.\2", layer)
            known[f"unet.{old}"] = layer
    return _assemble(tensors, model, known, (_KOHYA, _PEFT))


def forge(tensors: Mapping[str, Tensor], header: Mapping[str, str], model: Shapes) -> Arrived:
    """Names like ComfyUI's, behind a list that shows what its header calls SD2 (D5)."""
    return _hidden(header, "Unknown") or comfyui(tensors, header, model)


def a1111(tensors: Mapping[str, Tensor], header: Mapping[str, str], model: Shapes) -> Arrived:
    """Kohya's names only, and a text encoder's attention as a whole (D2, D4, D5)."""
    hidden = _hidden(header, "SD1")
    if hidden:
        return hidden
    known = {}
    for layer in model:
        inside = layer.removeprefix("text_encoder.")
        known[f"lora_{'te' if layer.startswith(TEXT) else 'unet'}_{_flat(inside)}"] = layer
    found = _assemble(tensors, model, known, (_KOHYA,))
    fused: dict[str, set[str]] = {}
    for layer in found.changes:
        match = re.match(rf"{re.escape(TEXT)}(.*self_attn)\.(\w+)_proj$", layer)
        if match:
            fused.setdefault(match[1], set()).add(match[2])
    partial = [place for place, parts in fused.items() if parts != {"q", "k", "v", "out"}]
    return Arrived(failed=f"{partial[0]} is adapted in part") if partial else found


def diffusers(tensors: Mapping[str, Tensor], header: Mapping[str, str], model: Shapes) -> Arrived:
    """Own names and kohya's; settings in the header; one alpha for all attention (D6, D7, D8, D10)."""
    settings = header.get("lora_adapter_metadata")
    alphas = [float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")]
    if settings is not None and alphas:
        return Arrived(failed="both alphas and settings")
    known: dict[str, str] = {}
    for layer in model:
        if layer.startswith(TEXT):
            inside = layer.removeprefix(TEXT)
            for te in ("te", "te1"):
                known |= {
                    f"lora_{te}_{_flat(inside)}": layer,
                    f"lora_{te}_text_model_{_flat(inside)}": layer,
                }
            known |= {layer: layer, f"text_encoder.{inside}": layer}
        else:
            known |= {f"lora_unet_{_flat(layer)}": layer, f"unet.{layer}": layer}
    found = _assemble(tensors, model, known, (_KOHYA, _PEFT), scaled=False)
    ranks = _ranks(tensors, known)
    if settings is not None:
        said = {key.removeprefix("unet."): value for key, value in json.loads(settings).items()}
        scales = dict.fromkeys(ranks, said["lora_alpha"] / said["r"])
    elif alphas:
        common = Counter(alphas).most_common(1)[0][0]
        own = {
            known[name.removesuffix(".alpha")]: float(tensor)
            for name, tensor in tensors.items()
            if name.endswith(".alpha") and name.removesuffix(".alpha") in known
        }
        scales = {
            layer: (common if _ATTENTION.search(layer) else own[layer]) / rank
            for layer, rank in ranks.items()
        }
    else:
        scales = dict.fromkeys(ranks, 1.0)
    found.changes = {layer: scales[layer] * change for layer, change in found.changes.items()}
    return found


LOADERS: dict[str, Loader] = {
    "diffusers": diffusers,
    "ComfyUI": comfyui,
    "A1111": a1111,
    "Forge": forge,
}


def _flat(layer: str) -> str:
    return layer.replace(".", "_")


def _hidden(header: Mapping[str, str], otherwise: str) -> Arrived | None:
    """A value is parsed as JSON only if it begins with a brace, so "True" is a word and no truth value."""
    version = header.get("ss_v2", "")
    version = json.loads(version) if version.startswith("{") else version
    return None if version == "True" else Arrived(hidden=f"taken for {otherwise}")


def _ranks(tensors: Mapping[str, Tensor], known: Mapping[str, str]) -> dict[str, int]:
    found = {}
    for name, tensor in tensors.items():
        for ending in (_KOHYA["down"], _PEFT["down"]):
            if name.endswith(ending) and name.removesuffix(ending) in known:
                found[known[name.removesuffix(ending)]] = int(tensor.shape[0])
    return found


def _assemble(
    tensors: Mapping[str, Tensor],
    model: Shapes,
    known: Mapping[str, str],
    spellings: tuple[Mapping[str, str], ...],
    *,
    scaled: bool = True,
) -> Arrived:
    """Products of the factors that stand under known names, times alpha / rank where an alpha does."""
    found, used = Arrived(), set()
    for stem, layer in known.items():
        for spelling in spellings:
            names = {part: stem + ending for part, ending in spelling.items()}
            if not {names["down"], names["up"]} <= set(tensors):
                continue
            down, up = tensors[names["down"]].double(), tensors[names["up"]].double()
            change = up.flatten(1) @ down.flatten(1)
            if tuple(change.shape) != model[layer]:
                return Arrived(
                    failed=f"{layer} has shape {model[layer]}, not {tuple(change.shape)}"
                )
            alpha = tensors.get(names.get("alpha", ""))
            if scaled and alpha is not None:
                change = change * (float(alpha) / down.shape[0])
            used |= {name for name in names.values() if name in tensors}
            found.changes[layer] = change
    found.unmatched = sorted(set(tensors) - used)
    return found
