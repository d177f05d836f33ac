"""Adapter files that commands read and write: flags, what may be overwritten, which facts a new file bears."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from dreamrie.adapter_file import (
    BASE_KEY,
    DIFFUSERS_FILE,
    SUFFIX,
    carried,
    save_diffusers,
)
from dreamrie.adapter_magnitudes import Magnitudes, refuse_universal
from dreamrie.adapter_open import NO_MODEL, OpenAdapter, open_adapter
from dreamrie.adapter_peft import PEFT_FILE, PEFT_SETTINGS, save_peft
from dreamrie.adapter_universal import save_universal
from dreamrie.errors import ConfigError
from dreamrie.lora import LowRank

_log = logging.getLogger(__name__)

FORMATS = ("diffusers", "universal", "peft")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FILE_HELP = "adapter file, folder of a training, or PEFT's folder"


def add_output(parser: argparse.ArgumentParser, *, to: str | None = "diffusers") -> None:
    """Declare the flags of a command that writes an adapter.

    Args:
        parser: of the command.
        to: default of `--to`; None where it must be given.
    """
    parser.add_argument(
        "--to",
        choices=FORMATS,
        default=to,
        required=to is None,
        help="diffusers: the file that training writes. universal: one file for diffusers, ComfyUI, A1111 and Forge. "
        "peft: a folder" + ("" if to is None else f" ({to})"),
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="file ending in .safetensors; or a folder for --to diffusers, and always for --to peft",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="precision of the factors (fp32)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace what is there, an input file included"
    )


def check_output(options: argparse.Namespace) -> None:
    """Find out before the work that its result could not be written.

    Args:
        options: with the flags of `add_output`.

    Raises:
        ConfigError: the path does not fit the format, or something is there and `--force` is not given.
    """
    path: Path = options.output
    is_file = path.suffix == SUFFIX
    if options.to == "peft" and is_file:
        raise ConfigError(
            f"--output {path}: --to peft writes a folder; give a name without {SUFFIX}."
        )
    if options.to == "universal" and not is_file:
        raise ConfigError(
            f"--output {path}: --to universal writes one file; its name must end in {SUFFIX}."
        )
    target = path if is_file else path / (PEFT_FILE if options.to == "peft" else DIFFUSERS_FILE)
    if is_file and path.is_dir():
        raise ConfigError(f"--output {path} is a folder. Choose another name.")
    if not is_file and path.exists() and not path.is_dir():
        raise ConfigError(f"--output {path} is a file; --to {options.to} needs a folder here.")
    if target.exists() and not options.force:
        raise ConfigError(
            f"--output: {target} is there already. Choose another --output, or pass --force to replace it."
        )


def opened(path: Path, *, use_dora: bool = False) -> OpenAdapter:
    """Open a file and log what could not be checked, but for what a model would tell.

    Args:
        path: see `open_adapter`.
        use_dora: see `open_adapter`.

    Returns:
        What the file holds. Errors are those of `open_adapter`.
    """
    adapter = open_adapter(path, use_dora=use_dora)
    unknown = [text for text in adapter.unchecked if text != NO_MODEL]
    if unknown:
        _log.warning("%s: could not be checked: %s", adapter.path, "; ".join(unknown))
    return adapter


def lasting_facts(
    facts: Mapping[str, str], made_by: str, energy_kept: float = 1.0
) -> dict[str, str]:
    """Facts that hold for a file that was made from another.

    Args:
        facts: of the file that was read.
        made_by: the command, for the fact `made_by`.
        energy_kept: share that the command kept; multiplies what earlier ones did.

    Returns:
        Facts about the training and the base; those about the tensors of the old file are left out.
    """
    found = carried(facts)
    before = found.get("made_by")
    found["made_by"] = f"{before}; {made_by}" if before else made_by
    if energy_kept < 1.0:
        try:
            energy_kept *= float(found.get("energy_kept", "1"))
        except ValueError:
            pass  # text of somebody else under this name; the new number is at least of this command
        found["energy_kept"] = f"{energy_kept:.6g}"
    return found


def save(
    options: argparse.Namespace,
    changes: Mapping[str, LowRank],
    facts: Mapping[str, str],
    magnitudes: Magnitudes | None = None,
) -> Path:
    """Write an adapter as the flags say, whole or not at all.

    Args:
        options: with the flags of `add_output`.
        changes: path of each layer to its change, scaling 1.
        facts: for the header.
        magnitudes: of DoRA, by layer.

    Returns:
        Path of the file, or PEFT's folder. Errors are those of the writers.
    """
    dtype = DTYPES[options.dtype]
    if options.to == "universal":
        refuse_universal(magnitudes)
        return save_universal(options.output, changes, facts, dtype=dtype)
    writer = save_peft if options.to == "peft" else save_diffusers
    return writer(options.output, changes, facts, dtype=dtype, magnitudes=magnitudes)


def bytes_of(path: Path) -> int:
    """Size of a file, or of all files of PEFT's folder.

    Args:
        path: as `save` returns it.

    Returns:
        Bytes.
    """
    files = [path] if path.is_file() else [path / PEFT_FILE, path / PEFT_SETTINGS]
    return sum(file.stat().st_size for file in files)


def size_text(count: int) -> str:
    """Bytes as people read them.

    Args:
        count: bytes.

    Returns:
        In kB or MB.
    """
    return f"{count / 1e6:.1f} MB" if count >= 999_500 else f"{count / 1e3:.0f} kB"


def base_of(facts: Mapping[str, str]) -> str:
    """What a file says about its base.

    Args:
        facts: of the header.

    Returns:
        Name and beginnings of the fingerprints, or that it says nothing.
    """
    name = facts.get("base_model") or facts.get("ss_sd_model_name") or "not named"
    prints = [
        f"{key.removeprefix(BASE_KEY)} {text[:12]}"
        for key, text in sorted(facts.items())
        if key.startswith(BASE_KEY)
    ]
    return f"{name}; weights {', '.join(prints)}" if prints else f"{name}; weights not named"


def bases_differ(first: Mapping[str, str], second: Mapping[str, str]) -> bool | None:
    """Whether two files were trained on other base weights.

    Fingerprints decide where both have one of the same rounding; else the names do.

    Args:
        first: facts of one header.
        second: facts of the other.

    Returns:
        None if one of them says too little.
    """
    common = {key for key in first if key.startswith(BASE_KEY)} & set(second)
    if common:
        return all(first[key] != second[key] for key in common)
    names = first.get("base_model"), second.get("base_model")
    return names[0] != names[1] if all(names) else None
