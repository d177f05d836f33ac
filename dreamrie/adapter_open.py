"""Open an adapter file without its model: every layer's change, or a reason why not.

dreamrie's own files, plain LoRA files of diffusers, kohya and PEFT, and PEFT's folders are read. Without a model nobody
says which layers there are, so

* names with dots are taken as they stand, but for those of CLIP's text encoder, of which there are two layouts: every
  layer gets the name that begins with `text_encoder.text_model.`;
* kohya's flat names are resolved by the list of layers in a file of dreamrie, else by the rules by which diffusers
  names the layers of U-Nets of Stable Diffusion 1 and 2, and of CLIP (`dreamrie.adapter_flat`); any other name is an
  error;
* both factors of a layer must multiply, but nobody knows the shape of the layer.

All other checks of `dreamrie.adapter_reading` hold: the account of bytes, the digest, layers that are missing, alpha,
values that are not finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dreamrie.adapter_container import (
    Container,
    check_digest,
    check_format,
    check_layers,
    open_container,
)
from dreamrie.adapter_file import BASE_KEY, LAYERS_KEY, TEXT_ENCODER
from dreamrie.adapter_flat import layer_of_flat
from dreamrie.adapter_magnitudes import MAGNITUDE, check_shape, refuse_dora
from dreamrie.adapter_names import Places, grouped
from dreamrie.adapter_peft import PEFT_PREFIX
from dreamrie.adapter_scaling import foreign_scalings
from dreamrie.adapter_spelling import PREFIXES, SECOND_PREFIXES, one_name, parted
from dreamrie.adapter_universal import TEXT_PREFIX, UNET_PREFIX, kohya_name
from dreamrie.errors import AdapterError
from dreamrie.lora import LowRank

NO_MODEL = "whether its layers fit the base model (no model was loaded)"

# Parts of names that only other kinds of adapters have.
_KINDS = {
    "lora_mid": "LoCon with a Tucker core",
    "dora_scale": "DoRA",
    "hada_w": "LoHa",
    "hada_t": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "ia3_": "IA3",
    "lora_embedding_": "a LoRA of an embedding",
    "lora_B.bias": "a LoRA with a bias",
    "bundle_emb": "a textual inversion",
}
_TAILS = {"on_input": "IA3", "diff": "a full change of weights", "diff_b": "a change of biases"}


@dataclass(frozen=True)
class OpenAdapter:
    """What a file holds.

    Attributes:
        path: the file with the weights.
        style: how it names its tensors: "diffusers", "older diffusers", "PEFT", "kohya" or "plain".
        changes: path of each layer in the U-Net, or "text_encoder.text_model. ...", to its change, sorted; scaling 1,
            in the type of the file where the file's own scaling is 1, else in fp64.
        facts: text of its header.
        unchecked: what the file gave no means to check, in words.
        has_digest: the contents are those that dreamrie wrote.
        dtypes: types of the factors in the file.
        magnitudes: of DoRA, (out,) by layer; empty for a plain LoRA. The changes are then products of factors alone.
    """

    path: Path
    style: str
    changes: dict[str, LowRank]
    facts: dict[str, str]
    unchecked: tuple[str, ...]
    has_digest: bool
    dtypes: tuple[str, ...]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank_stored(self) -> int:
        """Largest number of columns of a factor."""
        return max(int(change.right.shape[0]) for change in self.changes.values())


def open_adapter(path: Path | str, *, use_dora: bool = False) -> OpenAdapter:
    """Read an adapter file.

    Args:
        path: the file; the folder of a training run; or PEFT's folder with `adapter_config.json`.
        use_dora: read a DoRA adapter too; the caller must not forget its magnitudes.

    Returns:
        The change of every layer, and what is known about it.

    Raises:
        AdapterError: the file is missing, damaged, changed, incomplete, not finite, or no plain LoRA.
    """
    container = open_container(path)
    _refuse_other_kinds(container, use_dora=use_dora)
    has_digest = check_format(container)
    places = _arranged(container)
    if has_digest:
        check_layers(container, places.factors)
    _check_shapes(container, places)
    tensors = container.tensors()
    if has_digest:
        check_digest(container, tensors)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise AdapterError(
                f"the adapter {container.path} holds values that are not finite (NaN or infinity): {name}. Train again."
            )
    scalings, unknown = foreign_scalings(container, places, tensors)
    changes = {
        layer: _folded(LowRank(tensors[up], tensors[down]), scalings[layer])
        for layer, (up, down) in places.factors.items()
    }
    return OpenAdapter(
        path=container.path,
        style=_style(container, places),
        changes=changes,
        facts=container.facts,
        unchecked=_unchecked(container.facts, has_digest, unknown),
        has_digest=has_digest,
        dtypes=_dtypes(container, places),
        magnitudes={layer: tensors[name] for layer, name in places.magnitudes.items()},
    )


def _dtypes(container: Container, places: Places) -> tuple[str, ...]:
    """Of the factors; alphas may have others."""
    names = {name for factors in places.factors.values() for name in factors}
    found = {str(container.entries[name].dtype).removeprefix("torch.") for name in names}
    return tuple(sorted(found))


def _folded(change: LowRank, scaling: float) -> LowRank:
    """Scaling 1. Half precision has no room for another factor, so what is scaled becomes fp64."""
    return change if scaling == 1.0 else LowRank(scaling * change.left.double(), change.right)


def _unchecked(
    facts: Mapping[str, str], has_digest: bool, unknown: tuple[str, ...]
) -> tuple[str, ...]:
    """The words of `adapter_reading`, and that there was no model."""
    found: tuple[str, ...] = (NO_MODEL,)
    if not has_digest:
        found += ("whether the file is whole and unchanged (it has no digest of dreamrie)",)
        # A file of dreamrie says its strength by its format, also where it bears no alpha.
        found += unknown
    if not any(key.startswith(BASE_KEY) for key in facts):
        found += ("which base weights it was trained on (it names none)",)
    return found


# ----------------------------------------------------------------------------------------------------------- names


def _arranged(container: Container) -> Places:
    """The layers that the names of a file stand for."""
    listed = {layer for layer in container.facts.get(LAYERS_KEY, "").split("\n") if layer}
    flat = {kohya_name(layer): one_name(layer) for layer in listed}

    places = {}
    for name in container.entries:
        stem, part = _taken_apart(container, name)
        if stem.startswith((UNET_PREFIX, TEXT_PREFIX)):
            layer = flat.get(stem) or _resolved(container, name, stem)
        elif stem.startswith(TEXT_ENCODER):
            layer = one_name(stem)
        else:
            path = stem.removeprefix(next(p for p in PREFIXES if stem.startswith(p)))
            # PEFT's file of a text encoder says by the names of its layers alone what it is of.
            layer = path if path in listed else one_name(path)
        places[name] = layer, part
    return grouped(container, places)


def _taken_apart(container: Container, name: str) -> tuple[str, str]:
    """Stem and part of a tensor's name, in the spelling of the file."""
    if name.startswith(SECOND_PREFIXES):
        raise AdapterError(
            f"the adapter {container.path} is for a model of two text encoders, such as Stable Diffusion XL: it holds "
            f"{name}. Models of one are read here."
        )
    found = parted(name)
    if found is None:
        raise AdapterError(
            f"the adapter {container.path} holds {name}, which is no part of a LoRA. Allowed are names such as "
            "LAYER.lora_A.weight, LAYER.lora_down.weight and LAYER.alpha."
        )
    return found


def _resolved(container: Container, name: str, stem: str) -> str:
    layer = layer_of_flat(stem)
    if layer is None:
        raise AdapterError(
            f"the adapter {container.path}: the layer of {name} is not known. Flat names can be read without the model "
            "for U-Nets of Stable Diffusion 1 and 2 as diffusers names their layers, and for CLIP's text encoder; this "
            "one is of another model. Load it onto that model with dreamrie.load_adapter."
        )
    return layer


def _refuse_other_kinds(container: Container, *, use_dora: bool) -> None:
    """Other adapters have another formula: read as LoRA they would be wrong, not merely unread."""
    for name in sorted(container.entries):
        if not use_dora and MAGNITUDE in name:
            refuse_dora(container.path, name, "what was asked for needs one")
        kind = next((kind for part, kind in _KINDS.items() if part in name), None)
        kind = kind or _TAILS.get(name.rsplit(".", 1)[-1])
        if kind is not None:
            raise AdapterError(
                f"the adapter {container.path} is not a plain LoRA but {kind}: it holds {name}. Only plain LoRA "
                "(lora_A, lora_B and alpha) can be read; use the program that made it, or train a plain LoRA."
            )


def _style(container: Container, places: Places) -> str:
    """By the names of the first layer's factors; files that mix spellings are of none."""
    styles = {_style_of(down) for _, down in places.factors.values()}
    return styles.pop() if len(styles) == 1 else "plain"


def _style_of(name: str) -> str:
    if name.startswith((UNET_PREFIX, TEXT_PREFIX)):
        return "kohya"
    if name.startswith(PEFT_PREFIX):
        return "PEFT"
    if name.startswith(("unet.", TEXT_ENCODER)):
        return "diffusers" if name.endswith(".lora_A.weight") else "older diffusers"
    return "plain"


def _check_shapes(container: Container, places: Places) -> None:
    for layer, (up, down) in places.factors.items():
        left, right = container.entries[up].shape, container.entries[down].shape
        flat = len(left) == len(right) == 2
        convolution = len(left) == len(right) == 4 and left[2:] == (1, 1)
        if not (flat or convolution) or left[1] != right[0]:
            raise AdapterError(
                f"the adapter {container.path}: the factors of layer {layer} do not multiply: {up} has shape {left}, "
                f"{down} has shape {right}. Needed are (out, r) and (r, in), or (out, r, 1, 1) and (r, in, kh, kw). "
                "Copy the file again."
            )
    for layer, name in places.magnitudes.items():
        left = container.entries[places.factors[layer][0]].shape
        check_shape(container.path, name, container.entries[name].shape, left)
