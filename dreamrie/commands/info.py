"""What an adapter file is: format, base, trigger, size and spectrum of the change, and who can load it.

python -m dreamrie info FILE [--json FILE]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamrie.adapter_file import BASE_KEY
from dreamrie.adapter_open import OpenAdapter, open_adapter
from dreamrie.commands import files
from dreamrie.commands.table import (
    check_json,
    facts_table,
    names_note,
    percent,
    printable,
    short,
    table,
    wrapped,
    write_json,
)
from dreamrie.lora.comparing import decompose, effective_rank, rank_for_energy

HELP = "say what an adapter file is, without its model"
_TOP = 8
_DORA = "DoRA: a magnitude for each row of every layer; the numbers below are of the product alone"
_SHARE = 0.95

# Only what is sure: that program reads these names, for bases that it knows.
_LOADERS = {
    "diffusers": "diffusers, dreamrie; for ComfyUI, A1111 and Forge: convert --to universal",
    "older diffusers": "diffusers, dreamrie; for ComfyUI, A1111 and Forge: convert --to universal",
    "kohya": "diffusers, dreamrie; ComfyUI, A1111 and Forge if the base is one of SD1 or SD2",
    "PEFT": "PEFT, with adapter_config.json beside it; dreamrie; for others: convert",
    "plain": "dreamrie; for others: convert",
}
# Magnitudes have no universal file; see dreamrie.adapter_magnitudes.
_LOADERS_OF_DORA = {
    "diffusers": "diffusers, dreamrie; for other programs: merge-into-base",
    "PEFT": "PEFT, with adapter_config.json beside it; dreamrie; for diffusers: convert --to diffusers",
    **dict.fromkeys(("older diffusers", "kohya", "plain"), "dreamrie; for others: convert"),
}
_SPELLINGS = {
    "diffusers": "unet.LAYER.lora_A.weight",
    "older diffusers": "unet.LAYER.lora.down.weight",
    "kohya": "lora_unet_LAYER.lora_down.weight",
    "PEFT": "base_model.model.LAYER.lora_A.weight",
    "plain": "LAYER.lora_A.weight, or mixed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    parser.add_argument("file", type=Path, metavar="FILE", help=files.FILE_HELP)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Args:
        options: parsed.

    Returns:
        0. A file that cannot be read is an error.
    """
    check_json(options.json)
    adapter = open_adapter(options.file, use_dora=True)
    record = describe(adapter)
    sys.stdout.write("\n".join([*report(record), ""]))
    write_json(options.json, record)
    return 0


def describe(adapter: OpenAdapter) -> dict[str, Any]:
    """Everything that is known about a file.

    Args:
        adapter: an open file.

    Returns:
        Text and numbers, as `--json` writes them; layers are sorted by the norm of their change.
    """
    spectra = {layer: decompose(change).s for layer, change in adapter.changes.items()}
    total = math.fsum(float((s**2).sum()) for s in spectra.values())
    facts = adapter.facts
    layers = [
        {
            "layer": layer,
            "norm": float(s.norm()),
            "energy": float((s**2).sum()) / total if total > 0.0 else 0.0,
            "effective_rank": effective_rank(s),
            "rank_for_95_percent": rank_for_energy([s], _SHARE),
            "singular_values": s.tolist(),
        }
        for layer, s in spectra.items()
    ]
    return {
        "file": str(adapter.path),
        "bytes": adapter.path.stat().st_size,
        "format": adapter.style,
        "types": list(adapter.dtypes),
        "digest": "verified" if adapter.has_digest else "none",
        "base_model": facts.get("base_model") or None,
        "base_weights": {
            key.removeprefix(BASE_KEY): text
            for key, text in facts.items()
            if key.startswith(BASE_KEY)
        },
        "trigger": facts.get("instance_prompt"),
        "steps": facts.get("steps"),
        "start": facts.get("init"),
        "config_hash": facts.get("config_hash"),
        "kind": "DoRA" if adapter.magnitudes else "LoRA",
        "loaded_by": (_LOADERS_OF_DORA if adapter.magnitudes else _LOADERS)[adapter.style],
        "rank_stored": adapter.rank_stored,
        "rank_trained": facts.get("rank_trained"),
        "norm": math.sqrt(total),
        "energy_by_rank": _energies(list(spectra.values()), total),
        "unchecked": list(adapter.unchecked),
        "facts": dict(facts),
        "layers": sorted(layers, key=lambda row: (-float(str(row["norm"])), row["layer"])),
    }


def report(record: dict[str, Any]) -> list[str]:
    """Write what `describe` found.

    Args:
        record: see `describe`.

    Returns:
        Lines of at most 100 columns.
    """
    layers = record["layers"]
    ranks = [row["effective_rank"] for row in layers]
    # A path stays in one piece, however long, so that it can be copied.
    lines = [printable(record["file"]), *facts_table(_rows(record)), ""]
    lines += wrapped(
        f"Change: {len(layers)} layers, norm {record['norm']:.4g} (Frobenius, of all layers together), effective rank "
        f"{sum(ranks) / len(ranks):.1f} on average, {min(ranks):.1f} to {max(ranks):.1f}."
    )
    lines += wrapped(
        "Effective rank = exp of the entropy of p_i = s_i^2 / sum s^2 of a layer's singular values s."
    )
    energies = record["energy_by_rank"]
    lines += [
        "",
        *table(
            ["If every layer keeps rank", *(str(rank) for rank in energies)],
            [["energy (sum s^2) kept", *(percent(share) for share in energies.values())]],
        ),
        "",
    ]
    lines += table(
        [f"Largest of {len(layers)} layers", "norm", "energy", "effective rank", "rank for 95 %"],
        [
            [
                short(row["layer"], 50),
                f"{row['norm']:.4g}",
                percent(row["energy"]),
                f"{row['effective_rank']:.1f}",
                str(row["rank_for_95_percent"]),
            ]
            for row in layers[:_TOP]
        ],
    )
    return [*lines, *names_note(row["layer"] for row in layers[:_TOP])]


def _rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known besides the numbers."""
    digest = {
        "verified": "verified: contents and facts are those that dreamrie wrote",
        "none": "none: a file of another program, or of an older dreamrie",
    }[record["digest"]]
    facts = record["facts"]
    training = [
        f"{record['steps']} steps" if record["steps"] else "",
        facts.get("optimizer", ""),
        f"{facts['resolution']} pixels" if "resolution" in facts else "",
    ]
    size = files.size_text(record["bytes"])
    types = ", ".join(record["types"])
    rows = [
        *([("kind", _DORA)] if record["kind"] == "DoRA" else []),
        ("format", f"{record['format']} ({_SPELLINGS[record['format']]}), {types}, {size}"),
        ("loaded by", record["loaded_by"]),
        ("digest", digest),
        ("base", files.base_of(facts)),
        ("trigger", record["trigger"] or "not named"),
        ("training", ", ".join(part for part in training if part) or "not named"),
        ("rank", f"{record['rank_stored']} stored, {record['rank_trained'] or 'unknown'} trained"),
    ]
    if "init" in facts:
        rows.append(("start", facts["init"]))
    if "config_hash" in facts:
        rows.append(("settings", f"hash {facts['config_hash']}"))
    if "made_by" in facts:
        rows.append(("made by", facts["made_by"]))
    return [*rows, ("unchecked", "; ".join(record["unchecked"]))]


def _energies(spectra: list[Tensor], total: float) -> dict[int, float]:
    """Share that all layers keep together at rank 1, 2, 4, ... and the largest."""
    longest = max(len(s) for s in spectra)
    ranks = sorted({*(2**k for k in range(longest.bit_length()) if 2**k <= longest), longest})
    return {
        rank: math.fsum(float((s[:rank] ** 2).sum()) for s in spectra) / total
        if total > 0.0
        else 1.0
        for rank in ranks
    }
