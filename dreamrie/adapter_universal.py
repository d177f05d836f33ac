"""Write the universal file: one `.safetensors` that diffusers, ComfyUI, A1111 and Forge load alike.

Those programs agree about kohya's names, one rank, and alpha = rank; about anything else at least one of them loads
something else than was written, mostly without a word (`tests/reference/loader_models.py`):

    lora_unet_LAYER.lora_down.weight, .lora_up.weight, .alpha     LAYER with underscores for dots
    lora_te_text_model_...                                        the same for a text encoder

The header has three groups: `ss_...`, by which A1111 and Forge tell SD2 from SD1; `modelspec. ...`, for people and
model browsers; `dreamrie. ...`, all facts that were given, and what the reader checks. `lora_adapter_metadata` is never
there: diffusers refuses a file that has both it and alphas.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dreamrie.adapter_file import (
    BASE_KEY,
    DIGEST_KEY,
    FORMAT,
    FORMAT_KEY,
    LAYERS_KEY,
    SPECTRA,
    SUFFIX,
    TEXT_ENCODER,
    balanced_changes,
    canonical,
    carried,
    content_digest,
    one_rank,
    rounded,
    stable_bytes,
    write_file,
)
from dreamrie.errors import AdapterError
from dreamrie.lora import LowRank

_log = logging.getLogger(__name__)

UNET_PREFIX = "lora_unet_"
TEXT_PREFIX = "lora_te_"
OWN = "dreamrie."
_PLAIN_NAMES = {
    "dreamrie.format": FORMAT_KEY,
    "dreamrie.layers": LAYERS_KEY,
    "dreamrie.digest": DIGEST_KEY,
    "dreamrie.version": "dreamrie_version",
}
_OF_OTHERS = ("ss_", "modelspec.")
_HEADER_NAMES = {plain: name for name, plain in _PLAIN_NAMES.items()}
_FINGERPRINT = "dreamrie.fingerprint."
_SELF_ATTENTION = re.compile(r"(.*\.self_attn)\.((?:q|k|v|out)_proj)$")
_FOUR = frozenset({"q_proj", "k_proj", "v_proj", "out_proj"})
# What the text's width says about the base: no other Stable Diffusion of one text encoder has these.
_SD1_TEXT, _SD2_TEXT = 768, 1024
# Half of the last bit of fp16 in both factors; more means that values were too small for it.
_ROUNDING = 1e-3


def universal_tensors(
    changes: Mapping[str, LowRank], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The tensors of the file: balanced in fp64, of one rank, alpha = rank, rounded last.

    Args:
        changes: path of each layer in the U-Net ("mid_block. ...") or in the text encoder ("text_encoder. ...") to its
            change, scaling 1; 4-d factors for convolutions.
        dtype: float32, float16 or bfloat16; of the factors, alphas are fp32.

    Returns:
        `lora_down` (k, in), `lora_up` (out, k) and `alpha` () for each layer, sorted by layer.

    Raises:
        AdapterError: there is no layer, every change is zero, a value is not finite or overflows `dtype`, two layers
            have one name in this spelling, or a text encoder's attention lacks one of its four projections.
    """
    return _stored(balanced_changes(changes), dtype)


def save_universal(
    path: Path,
    changes: Mapping[str, LowRank],
    facts: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write changes as the universal file; it appears whole or not at all.

    Args:
        path: the file, its name ending in `.safetensors`; its folder is made if missing.
        changes: path of each layer in the U-Net to its change, scaling 1; see `universal_tensors`.
        facts: as `dreamrie.adapter_reading.read_adapter` or `read_metadata` return them; text to text. All are kept,
            under `dreamrie.`; `prediction_type`, `resolution`, `instance_prompt`, `title`, `license` and `date` are
            also put where other programs look.
        dtype: float32, float16 or bfloat16.

    Returns:
        Path of the file.

    Raises:
        AdapterError: see `universal_tensors`; or a fact has a name that the header uses, or the file cannot be
            written. What lay there before is untouched.
    """
    if path.suffix != SUFFIX:
        raise AdapterError(
            f"the universal file {path} must end in {SUFFIX}: other programs look at no other file."
        )
    balanced = balanced_changes(changes)
    tensors = _stored(balanced, dtype)
    rank = max(int(change.left.shape[1]) for change in balanced.values())
    known = {
        "format": "pt",
        **_kohya_facts(path.stem, rank, balanced, facts),
        **_modelspec_facts(path.stem, balanced, facts),
        **_own_facts(balanced, facts, rank),
    }
    # Of the plain facts, as for all other files: the reader needs one digest only.
    known[DIGEST_KEY] = content_digest(tensors, known)
    header = {_header_name(key): value for key, value in known.items()}
    write_file(path, stable_bytes(tensors, header))
    _tell(path, balanced, rank, dtype)
    return path


def kohya_name(layer: str) -> str:
    """Name of a layer as kohya's trainer spells it.

    Args:
        layer: path in the U-Net, or "text_encoder. ..." .

    Returns:
        For example "lora_unet_mid_block_attentions_0_proj_in".
    """
    if layer.startswith(TEXT_ENCODER):
        return TEXT_PREFIX + canonical(layer).removeprefix(TEXT_ENCODER).replace(".", "_")
    return UNET_PREFIX + layer.replace(".", "_")


def plain_facts(header: Mapping[str, str]) -> dict[str, str]:
    """Facts under the names that they have in all other files of dreamrie.

    Args:
        header: of any adapter file.

    Returns:
        For a universal file, the group `dreamrie. ...` with the names of other files and the rest as it is; for
        others the header itself.

    Raises:
        ValueError: a universal header has a name that none has, so that it was changed. What is returned is therefore
            another dictionary for each header, and a digest of it is one of the header.
    """
    if not any(key.startswith(OWN) for key in header):
        return dict(header)
    found = {_plain_name(key): value for key, value in header.items()}
    if {_header_name(key): value for key, value in found.items()} != header:
        strange = sorted(key for key in header if _header_name(_plain_name(key)) != key)
        raise ValueError(f"{', '.join(strange) or 'a name'} in the header of a universal file")
    return found


def _stored(balanced: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, Tensor]:
    """Names and precision of the file for balanced changes."""
    _check_attention(balanced)
    tensors: dict[str, Tensor] = {}
    for layer, change in one_rank(balanced).items():
        name = kohya_name(layer)
        if f"{name}.alpha" in tensors:
            raise AdapterError(
                f"two layers are both {name} in the universal file, the second is {layer}. Write the adapter for "
                "diffusers or PEFT."
            )
        for part, tensor in (("lora_down", change.right), ("lora_up", change.left)):
            tensors[f"{name}.{part}.weight"] = rounded(f"{name}.{part}.weight", tensor, dtype)
        # fp32: bfloat16 has whole numbers up to 256 only.
        tensors[f"{name}.alpha"] = torch.tensor(float(change.right.shape[0]))
    return tensors


def _check_attention(changes: Mapping[str, LowRank]) -> None:
    """A1111 fuses the text encoder's attention, and fails on one that is adapted in part."""
    found: dict[str, set[str]] = {}
    for layer in changes:
        match = _SELF_ATTENTION.match(layer) if layer.startswith(TEXT_ENCODER) else None
        if match:
            found.setdefault(match[1], set()).add(match[2])
    partial = {layer: _FOUR - parts for layer, parts in found.items() if parts != _FOUR}
    if partial:
        layer, missing = next(iter(partial.items()))
        raise AdapterError(
            f"{layer} lacks {', '.join(sorted(missing))}: A1111 loads a text encoder's attention only if all four "
            "projections are adapted. Adapt all of them or none, or write the adapter for diffusers."
        )


def _family(changes: Mapping[str, LowRank]) -> str | None:
    """The base by the width of the text that the U-Net reads: "sd1", "sd2", or None for another width."""
    for layer, change in changes.items():
        if layer.endswith(("attn2.to_k", "attn2.to_v")):
            return {_SD1_TEXT: "sd1", _SD2_TEXT: "sd2"}.get(int(change.right.shape[1]))
    # No layer tells the width. SD1 projects with convolutions, SD2 with matrices.
    projections = [c for n, c in changes.items() if n.endswith((".proj_in", ".proj_out"))]
    return "sd1" if any(change.right.ndim == 4 for change in projections) else "sd2"


def _kohya_facts(
    title: str, rank: int, changes: Mapping[str, LowRank], facts: Mapping[str, str]
) -> dict[str, str]:
    """By which A1111 and Forge know the base; they hide what they take for another one."""
    family = _family(changes)
    found = {
        "ss_output_name": title,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
    }
    if family == "sd2":
        is_v = facts.get("prediction_type") == "v_prediction"
        found |= {"ss_v2": "True", "ss_base_model_version": "sd_v2_v" if is_v else "sd_v2"}
    elif family == "sd1":
        found |= {"ss_v2": "False", "ss_base_model_version": "sd_v1"}
    return found


def _modelspec_facts(
    title: str, changes: Mapping[str, LowRank], facts: Mapping[str, str]
) -> dict[str, str]:
    """Stability's ModelSpec. No date of its own: equal adapters are equal files."""
    family, prediction = _family(changes), facts.get("prediction_type")
    resolution = facts.get("resolution")
    kinds = {"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"}
    base = kinds.get(prediction or "") if family == "sd2" else None
    if family == "sd1":
        base = "stable-diffusion-v1"
    licenses = {"sd1": "creativeml-openrail-m", "sd2": "openrail++"}
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{base}/lora" if base else None,
        "implementation": "diffusers",
        "prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(prediction or ""),
        "trigger_phrase": facts.get("instance_prompt"),
        "title": facts.get("title", title),
        "resolution": f"{resolution}x{resolution}" if resolution else None,
        "date": facts.get("date"),
        "license": facts.get("license", licenses.get(family or "")),
    }
    return {f"modelspec.{key}": value for key, value in found.items() if value}


def _own_facts(
    balanced: Mapping[str, LowRank], facts: Mapping[str, str], rank: int
) -> dict[str, str]:
    """Everything that was given, and what the reader checks."""
    layers = sorted(balanced)
    # One line for each layer, in their order. Balanced factors: a column's squared norm is a singular value.
    spectra = [balanced[layer].left.flatten(1).square().sum(0).tolist() for layer in layers]
    found = {
        "energy_kept": "1",
        **carried(facts),
        "rank_exported": str(rank),
        SPECTRA: "\n".join(" ".join(f"{value:.3g}" for value in row) for row in spectra),
        FORMAT_KEY: FORMAT,
        LAYERS_KEY: "\n".join(layers),
    }
    taken = sorted(key for key in found if _plain_name(_header_name(key)) != key)
    if taken:
        raise AdapterError(
            f"the facts {', '.join(taken)} have names that dreamrie uses itself. Nothing was written; rename them."
        )
    return found


def _plain_name(key: str) -> str:
    """A name of the header as other files of dreamrie have it."""
    if key in _PLAIN_NAMES:
        return _PLAIN_NAMES[key]
    if key.startswith(_FINGERPRINT):
        return BASE_KEY + key.removeprefix(_FINGERPRINT)
    return key.removeprefix(OWN)


def _header_name(key: str) -> str:
    if key == "format" or key.startswith(_OF_OTHERS):
        return key
    if key.startswith(BASE_KEY):
        return _FINGERPRINT + key.removeprefix(BASE_KEY)
    return _HEADER_NAMES.get(key, OWN + key)


def _tell(path: Path, balanced: Mapping[str, LowRank], rank: int, dtype: torch.dtype) -> None:
    worst, layer = _largest_rounding(balanced, dtype)
    _log.info("%s: %d layers, rank %d, largest rounding %.1e", path, len(balanced), rank, worst)
    if worst > _ROUNDING and dtype == torch.float16:
        _log.warning(
            "%s: the change of layer %s is so small that rounding it to fp16 loses %.1e of it; float32 keeps it",
            path,
            layer,
            worst,
        )


def _largest_rounding(balanced: Mapping[str, LowRank], dtype: torch.dtype) -> tuple[float, str]:
    """Largest share of a layer's change that rounding its factors loses, and the layer."""
    worst = (0.0, "")
    for layer, change in balanced.items():
        left, right = change.left.flatten(1), change.right.flatten(1)
        size = float((left.T @ left).norm())  # of the diagonal matrix of singular values
        short_left, short_right = left.to(dtype).double(), right.to(dtype).double()
        # A (out, 2k) times B (2k, in) has the norm of R_A R_B^T, with thin QRs; no (out, in) matrix.
        lost_left = torch.linalg.qr(torch.cat([left, -short_left], 1)).R
        lost_right = torch.linalg.qr(torch.cat([right, short_right], 0).T).R
        if size > 0.0:
            worst = max(worst, (float((lost_left @ lost_right.T).norm()) / size, layer))
    return worst
