"""Lower the rank of an adapter file: the best approximation of each layer's change, and what it loses.

python -m dreamrie truncate FILE --rank R | --energy 0.95 --output PATH
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamrie.commands import files
from dreamrie.commands.table import (
    check_json,
    names_note,
    percent,
    short,
    table,
    wrapped,
    write_json,
)
from dreamrie.errors import ConfigError, NumericalError
from dreamrie.fixed_rank import Point
from dreamrie.lora.arithmetic import first_terms
from dreamrie.lora.comparing import decompose, rank_for_energy, shaped_like

_log = logging.getLogger(__name__)

HELP = "lower the rank of an adapter file, with the least loss"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    parser.add_argument("file", type=Path, metavar="FILE", help=files.FILE_HELP)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--rank", type=int, metavar="R", help="of every layer")
    how.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="take the smallest rank, the same for every layer, at which all layers together keep this share of the "
        "energy (sum of squared singular values), such as 0.95",
    )
    files.add_output(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the losses here")


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Args:
        options: parsed.

    Returns:
        0. What cannot be read, asked for or written is an error.

    Raises:
        ConfigError: rank or energy cannot be used.
    """
    if options.rank is not None and options.rank < 1:
        raise ConfigError(f"--rank must be at least 1; got {options.rank}.")
    if options.energy is not None and not 0.0 < options.energy <= 1.0:
        raise ConfigError(f"--energy is a share, above 0 and at most 1; got {options.energy}.")
    check_json(options.json)
    files.check_output(options)
    adapter = files.opened(options.file)
    points = {layer: decompose(change) for layer, change in adapter.changes.items()}
    rank = options.rank or rank_for_energy((point.s for point in points.values()), options.energy)
    longest = max(len(point.s) for point in points.values())
    if rank >= longest:
        _log.warning("%s: no layer has more than rank %d; nothing is lost", adapter.path, longest)
    record = losses(points, rank, options.energy)
    cut = {
        layer: shaped_like(first_terms(point, rank), adapter.changes[layer])
        for layer, point in points.items()
    }
    before = adapter.path.stat().st_size
    facts = files.lasting_facts(
        adapter.facts, f"truncate to rank {min(rank, longest)}", 1.0 - record["energy_discarded"]
    )
    path = files.save(options, cut, facts)
    sys.stdout.write("\n".join([*report(record), ""]))
    sizes = f"{files.size_text(files.bytes_of(path))}, was {files.size_text(before)}"
    sys.stdout.write(f"wrote {path}, {sizes}\n")
    write_json(options.json, {"output": str(path), **record})
    return 0


def losses(points: Mapping[str, Point], rank: int, energy: float | None) -> dict[str, Any]:
    """What a truncation loses.

    Args:
        points: SVD of each layer's change.
        rank: of every layer.
        energy: share that was asked for, or None.

    Returns:
        As `--json` writes it.

    Raises:
        NumericalError: every change is zero.
    """
    sizes = {layer: float((point.s**2).sum()) for layer, point in points.items()}
    lost = {layer: float((point.s[rank:] ** 2).sum()) for layer, point in points.items()}
    total = math.fsum(sizes.values())
    if total <= 0.0:
        raise NumericalError("every layer's change is zero; there is nothing to truncate.")
    return {
        "rank": rank,
        "energy_asked": energy,
        "energy_discarded": math.fsum(lost.values()) / total,
        "distance": math.sqrt(math.fsum(lost.values())),
        "norm": math.sqrt(total),
        "layers": [
            {
                "layer": layer,
                "norm": math.sqrt(sizes[layer]),
                "energy_discarded": lost[layer] / sizes[layer] if sizes[layer] > 0.0 else 0.0,
                "rank_for_energy": None if energy is None else rank_for_energy([point.s], energy),
            }
            for layer, point in points.items()
        ],
    }


def report(record: dict[str, Any]) -> list[str]:
    """Write what `losses` found.

    Args:
        record: see `losses`.

    Returns:
        Lines of at most 100 columns.
    """
    energy = record["energy_asked"]
    heads = [f"{len(record['layers'])} layers to rank {record['rank']}", "norm", "energy discarded"]
    if energy is not None:
        heads.append(f"rank for {energy * 100:g} %")
    rows = [
        [
            short(row["layer"], 50),
            f"{row['norm']:.4g}",
            percent(row["energy_discarded"]),
            *([] if energy is None else [str(row["rank_for_energy"])]),
        ]
        for row in record["layers"]
    ]
    last = "" if energy is None else str(max(row["rank_for_energy"] for row in record["layers"]))
    rows.append(
        [
            "all together"
            if energy is None
            else "all together (rank: the most that a layer needs)",
            f"{record['norm']:.4g}",
            percent(record["energy_discarded"]),
            *([last] if last else []),
        ]
    )
    lines = [*table(heads, rows), *names_note(row["layer"] for row in record["layers"])]
    return [
        *lines,
        *wrapped(
            f"Frobenius distance to the file: {record['distance']:.4g} of {record['norm']:.4g}. No adapter of rank "
            f"{record['rank']} is nearer."
        ),
    ]
