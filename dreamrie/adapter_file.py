"""Write adapters for other programs: the file that plain diffusers loads onto the stock base.

safetensors has no checksum of the contents, so the header carries what `dreamrie.adapter_reading` needs to refuse a
file that was changed since it was written, or that was made for other base weights:

    dreamrie_format          "2"; such a file without a digest is damaged, not merely foreign
    dreamrie_layers          names of the adapted layers, one a line, so that missing tensors can be named
    dreamrie_base_<kind>     fingerprint of the base weights, see `dreamrie.lora.fingerprint`; only if the base is known
    dreamrie_digest          SHA-256 over all tensors and over everything else in the header, see `content_digest`

`adapter_universal` and `adapter_peft` write the same facts into files for other programs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dreamrie.adapter_magnitudes import Magnitudes, magnitudes_of, named_magnitudes
from dreamrie.errors import AdapterError, ConfigError, NumericalError
from dreamrie.files import write_atomic
from dreamrie.lora import LoraPair, LowRank, balance, export_factors
from dreamrie.lora.fingerprint import rounded_fingerprints

_log = logging.getLogger(__name__)

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
SUFFIX = ".safetensors"
FILE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMAT = "2"
FORMAT_KEY = "dreamrie_format"
LAYERS_KEY = "dreamrie_layers"
BASE_KEY = "dreamrie_base_"
DIGEST_KEY = "dreamrie_digest"
TEXT_ENCODER = "text_encoder."
SPECTRA = "singular_values"
SETTINGS_KEY = "dreamrie_settings"

_ABOUT_THE_FILE = frozenset(
    {
        "format",
        "rank_exported",
        "lora_adapter_metadata",
        SPECTRA,
        FORMAT_KEY,
        LAYERS_KEY,
        DIGEST_KEY,
        SETTINGS_KEY,
        "adapter_config.json",
    }
)
_OF_OTHER_PROGRAMS = ("ss_", "sshs_", "modelspec.")


def save_diffusers_lora(
    directory: Path,
    pairs: Sequence[LoraPair],
    metadata: Mapping[str, str],
    *,
    base: nn.Module | None = None,
) -> Path:
    """Write the change of a U-Net as diffusers' `load_lora_weights(directory)` reads it.

    The file holds balanced factors of the exact change X - X0, so a stock base with this file is the trained model.
    There is no alpha in it: readers then take alpha = rank, that is scaling 1. All layers get one rank (zero columns
    are added, which changes nothing), because readers disagree about files with several.

    It appears whole or not at all.

    Args:
        directory: made if missing.
        pairs: adapted layers, with names relative to the U-Net.
        metadata: inert facts for the header, such as the base model; text to text.
        base: the U-Net that was trained on, whose base weights are named in the file by their fingerprint; it is
            computed once for a model. Without it the file fits every base of the same shapes.

    Returns:
        Path of the file.

    Raises:
        AdapterError: there is nothing to save, a value is not finite, or the folder cannot be written. What lay there
            before is untouched.
    """
    tensors = diffusers_tensors(pairs)
    facts = {"rank_trained": str(max(pair.rank for pair in pairs)), **metadata, **base_facts(base)}
    return _write_diffusers(directory / DIFFUSERS_FILE, tensors, facts)


def save_diffusers(
    path_or_folder: Path,
    changes: Mapping[str, LowRank],
    facts: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float32,
    magnitudes: Magnitudes | None = None,
) -> Path:
    """Write changes that were read from another file as diffusers' `load_lora_weights` reads them.

    As `save_diffusers_lora`. In fp32 the factors are written as they are, so that a file of dreamrie that is read and
    written again is the same file; before rounding to a half precision they are balanced.

    Args:
        path_or_folder: a file whose name ends in `.safetensors`, or the folder that gets
            `pytorch_lora_weights.safetensors`; made if missing.
        changes: path of each layer in the U-Net to its change, scaling 1.
        facts: as `dreamrie.adapter_reading.read_adapter` or `read_metadata` return them; text to text.
        dtype: float32, float16 or bfloat16; of the factors.
        magnitudes: of DoRA, by layer.

    Returns:
        Path of the file.

    Raises:
        AdapterError: nothing to save, a value is not finite or overflows `dtype`, or the file cannot be written. What
            lay there before is untouched.
    """
    is_file = path_or_folder.suffix == SUFFIX
    path = path_or_folder if is_file else path_or_folder / DIFFUSERS_FILE
    balanced = balanced_changes(changes)
    kept = dict(changes) if dtype == torch.float32 else balanced
    tensors = _named_for_diffusers(one_rank(kept), dtype)
    whole = tensors | named_magnitudes(magnitudes, kept, _place)
    return _write_diffusers(path, whole, carried(facts))


def diffusers_tensors(pairs: Sequence[LoraPair]) -> dict[str, Tensor]:
    """The tensors of the file: fp32, of one rank, scaling 1, under diffusers' names.

    Args:
        pairs: adapted layers, with names relative to the U-Net.

    Returns:
        "unet.NAME.lora_A.weight" (k, in), ".lora_B.weight" (out, k), for DoRA ".lora_magnitude_vector" (out,).

    Raises:
        AdapterError: there is no layer, a value is not finite, or the whole change is zero.
    """
    if not pairs:
        raise AdapterError("there is no adapted layer to save. Attach an adapter before saving.")
    try:
        factors = export_factors(pairs)
    except NumericalError as error:
        raise AdapterError(f"{error} Nothing was written.") from error
    tensors = _named_for_diffusers(one_rank(factors), torch.float32)
    sizes = {
        pair.name: pair.scaling
        * float(pair.left.detach().norm())
        * float(pair.right.detach().norm())
        for pair in pairs
    }
    _refuse_dust(factors, sizes)
    return tensors | named_magnitudes(magnitudes_of(pairs), factors, _place)


def balanced_changes(changes: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Balanced factors of every change, in fp64: what must come before any rounding.

    Args:
        changes: path of each layer to its change, factors shaped as PEFT stores them (4-d for convolutions).

    Returns:
        The same, without the columns that are zero, sorted by layer.

    Raises:
        AdapterError: there is no layer, factors do not fit each other, a value is not finite, or every change is zero.
    """
    if not changes:
        raise AdapterError("there is no adapted layer to save. Attach an adapter before saving.")
    found, sizes = {}, {}
    for name, (left, right) in sorted(changes.items()):
        try:
            # Only zero columns and their rounding in fp64 fall below that.
            even = balance(LowRank(left.flatten(1), right.flatten(1)), drop_below=1e-12)
        except (ConfigError, NumericalError) as error:
            raise AdapterError(f"layer {name!r}: {error} Nothing was written.") from error
        found[name] = LowRank(
            even.left.reshape(*even.left.shape, *left.shape[2:]),
            even.right.reshape(-1, *right.shape[1:]),
        )
        sizes[name] = float(left.double().norm()) * float(right.double().norm())
    _refuse_dust(found, sizes)
    return found


def one_rank(changes: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Give all changes the rank of the largest by adding zero columns, which changes nothing.

    Args:
        changes: at least one.

    Returns:
        The same changes, sorted by layer.
    """
    rank = max(int(change.left.shape[1]) for change in changes.values())
    found = {}
    for name, (left, right) in sorted(changes.items()):
        short = rank - int(left.shape[1])
        found[name] = LowRank(
            torch.cat([left, left.new_zeros(left.shape[0], short, *left.shape[2:])], 1),
            torch.cat([right, right.new_zeros(short, *right.shape[1:])], 0),
        )
    return found


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as a file holds it: on the CPU, in one piece, of a precision that other programs read.

    Args:
        name: for the message.
        tensor: finite.
        dtype: float32, float16 or bfloat16.

    Returns:
        The rounded copy.

    Raises:
        AdapterError: a value overflows, or the precision is another one.
    """
    if dtype not in FILE_DTYPES:
        allowed = ", ".join(str(known).removeprefix("torch.") for known in FILE_DTYPES)
        raise AdapterError(f"an adapter file cannot hold {dtype}; allowed: {allowed}.")
    found = tensor.to("cpu", dtype).contiguous()
    if not bool(found.isfinite().all()):
        short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        remedy = "" if dtype == torch.float32 else " Choose float32."
        raise AdapterError(f"{name} overflows {short}. Nothing was written.{remedy}")
    return found


def sealed(
    tensors: Mapping[str, Tensor], facts: Mapping[str, str], layers: Iterable[str]
) -> dict[str, str]:
    """The header of a file of dreamrie: what the reader checks, and facts.

    Args:
        tensors: of the file.
        facts: of the header, and what the digest covers besides.
        layers: names of the adapted layers.

    Returns:
        Facts with format, layers and digest.
    """
    header = {
        "format": "pt",
        **{str(key): str(value) for key, value in facts.items()},
        FORMAT_KEY: FORMAT,
        LAYERS_KEY: "\n".join(sorted(layers)),
    }
    return {**header, DIGEST_KEY: content_digest(tensors, header)}


def carried(facts: Mapping[str, str]) -> dict[str, str]:
    """The facts of a file that stay true when its changes are written to another.

    Args:
        facts: as `dreamrie.adapter_reading.read_adapter` or `read_metadata` return them.

    Returns:
        Those that say where the changes come from; none that says how they were stored.
    """
    return {
        str(key): str(value)
        for key, value in facts.items()
        if key not in _ABOUT_THE_FILE and not key.startswith(_OF_OTHER_PROGRAMS)
    }


def canonical(name: str) -> str:
    """Path of a text encoder's layer as it is without the flattening of transformers 5.6.

    Args:
        name: begins with "text_encoder."; CLIP's `text_model` may be missing.

    Returns:
        "text_encoder.text_model. ...", which all readers know.
    """
    inside = name.removeprefix(TEXT_ENCODER).removeprefix("text_model.")
    return f"{TEXT_ENCODER}text_model.{inside}"


def write_file(path: Path, content: bytes) -> None:
    """Write a whole adapter file, or leave what was there.

    Args:
        path: the file; its folder is made if missing.
        content: all of it.

    Raises:
        AdapterError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise AdapterError(
            f"the adapter cannot be written to {path}: {error}. Free space or choose another --output_dir."
        ) from error


def _write_diffusers(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> Path:
    names = [name for name in tensors if "lora_B" in name]
    rank = max(int(tensors[name].shape[1]) for name in names)
    layers = [name.removeprefix("unet.").removesuffix(".lora_B.weight") for name in names]
    header = sealed(tensors, {**facts, "rank_exported": str(rank)}, layers)
    write_file(path, stable_bytes(tensors, header))
    _log.info("%s: %d layers, rank %d", path, len(layers), rank)
    return path


def _place(layer: str) -> str:
    return canonical(layer) if layer.startswith(TEXT_ENCODER) else f"unet.{layer}"


def _named_for_diffusers(changes: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for name, change in changes.items():
        place = _place(name)
        for part, tensor in (("A", change.right), ("B", change.left)):
            key = f"{place}.lora_{part}.weight"
            if key in tensors:
                raise AdapterError(f"two layers are both {place}; the second is {name}.")
            tensors[key] = rounded(key, tensor, dtype)
    return tensors


def base_facts(base: nn.Module | None) -> dict[str, str]:
    """What the header says about the base weights.

    Args:
        base: the model, or None.

    Returns:
        `dreamrie_base_<kind>` to fingerprint; nothing for None.
    """
    if base is None:
        return {}
    return {f"{BASE_KEY}{kind}": digest for kind, digest in rounded_fingerprints(base).items()}


def content_digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """SHA-256 over what a file says, however it is laid out.

    Args:
        tensors: of any precision, on the CPU.
        facts: of the header; a digest among them is left out.

    Returns:
        64 hexadecimal digits, equal exactly if names, types, shapes and bytes of the tensors and all facts are.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        # As JSON, so that no name can imitate the border to its neighbour.
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(
        json.dumps(sorted(fact for fact in facts.items() if fact[0] != DIGEST_KEY)).encode()
    )
    return digest.hexdigest()


def _refuse_dust(changes: Mapping[str, LowRank], sizes: Mapping[str, float]) -> None:
    if all(_is_dust(sizes[name], change) for name, change in changes.items()):
        raise AdapterError(
            "no layer has changed: the adapter would be empty. Nothing was written; train at least one step first."
        )


def _is_dust(size: float, change: LowRank) -> bool:
    """Whether a balanced change is zero but for the rounding of X - X0, whose factors have this size."""
    # The squared norm of a balanced factor is the sum of the singular values.
    return float(change.left.square().sum()) <= 1e-9 * abs(size)


def stable_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """Serialize tensors so that equal contents are equal bytes.

    safetensors keeps the header's text in a hash map, whose order changes from call to call; here it is sorted.
    Format: 8 bytes of little-endian length, that many bytes of JSON padded with spaces to a multiple of 8, data.

    Args:
        tensors: contiguous, on the CPU.
        header: text to text.

    Returns:
        A whole safetensors file.
    """
    raw = save(dict(tensors), metadata=dict(header))
    end = 8 + int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:end])
    table["__metadata__"] = dict(sorted(table["__metadata__"].items()))
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[end:]
