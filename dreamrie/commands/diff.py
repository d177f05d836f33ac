"""Compare two adapter files: distance, cosine and principal angles, layer by layer and in total.

python -m dreamrie diff A B [--json FILE]
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamrie.adapter_open import OpenAdapter
from dreamrie.commands import files
from dreamrie.commands.table import (
    check_json,
    names_note,
    printable,
    short,
    table,
    wrapped,
    write_json,
)
from dreamrie.errors import AdapterError
from dreamrie.lora import LowRank
from dreamrie.lora.comparing import (
    change_norm,
    decompose,
    distance,
    frames,
    inner,
    principal_angles,
)

_log = logging.getLogger(__name__)

HELP = "compare two adapter files: distance, cosine, angles between their spaces"
_EXPLAINED = (
    "distance: |A - B| / sqrt(|A|^2 + |B|^2), Frobenius; 0 equal, 1 orthogonal, 1.41 opposite. cosine: <A, B> / "
    "(|A| |B|). Angles: smallest/mean/largest principal angle in degrees between the column spaces (outputs) and the "
    "row spaces (inputs) of the changes; 0 shared, 90 orthogonal."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    parser.add_argument("first", type=Path, metavar="A", help=files.FILE_HELP)
    parser.add_argument("second", type=Path, metavar="B", help=files.FILE_HELP)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Args:
        options: parsed.

    Returns:
        0, whether they differ or not. A file that cannot be read is an error.
    """
    check_json(options.json)
    first, second = files.opened(options.first), files.opened(options.second)
    if files.bases_differ(first.facts, second.facts):
        _log.warning(
            "%s was trained on %s, and %s on %s",
            first.path,
            files.base_of(first.facts),
            second.path,
            files.base_of(second.facts),
        )
    record = compare(first, second)
    sys.stdout.write("\n".join([*report(record), ""]))
    write_json(options.json, record)
    return 0


def compare(first: OpenAdapter, second: OpenAdapter) -> dict[str, Any]:
    """Everything that is known about the difference of two files.

    Args:
        first: A.
        second: B. A layer that one of them lacks has change zero there.

    Returns:
        As `--json` writes it.

    Raises:
        AdapterError: they give one layer different shapes.
    """
    layers = []
    for layer in sorted({*first.changes, *second.changes}):
        a, b = first.changes.get(layer), second.changes.get(layer)
        try:
            layers.append({"layer": layer, **_compare_layer(a, b)})
        except (RuntimeError, ValueError) as error:
            raise AdapterError(
                f"{first.path} and {second.path}: layer {layer} has different shapes in them; they are of different "
                "models and cannot be compared."
            ) from error
    return {
        "first": str(first.path),
        "second": str(second.path),
        "total": _total(layers),
        "layers": layers,
    }


def compare_changes(a: LowRank, b: LowRank) -> dict[str, Any]:
    """Numbers about two changes of one layer.

    Args:
        a: see `dreamrie.lora.comparing.as_matrix`.
        b: of the same matrix shape.

    Returns:
        Norms, distance, relative distance, inner product, cosine, and angles in degrees of columns and rows.
    """
    norms = change_norm(a), change_norm(b)
    product, apart = inner(a, b), distance(a, b)
    columns, rows = (
        principal_angles(one, other)
        for one, other in zip(frames(decompose(a)), frames(decompose(b)), strict=True)
    )
    return {
        **_sizes(*norms, apart, product),
        "column_angles": _angles(columns),
        "row_angles": _angles(rows),
    }


def report(record: dict[str, Any]) -> list[str]:
    """Write what `compare` found.

    Args:
        record: see `compare`.

    Returns:
        Lines of at most 100 columns.
    """
    heads = ["layer", "|A|", "|B|", "|A - B|", "distance", "cosine", "columns", "rows"]
    rows = [[short(row["layer"], 33), *_cells(row)] for row in record["layers"]]
    rows.append(["all together", *_cells({**record["total"]})])
    lines = [f"A  {printable(record['first'])}", f"B  {printable(record['second'])}", ""]
    return [
        *lines,
        *table(heads, rows),
        *wrapped(_EXPLAINED),
        *names_note(row["layer"] for row in record["layers"]),
    ]


def _compare_layer(a: LowRank | None, b: LowRank | None) -> dict[str, Any]:
    """As `compare_changes`, where one of them may be missing."""
    if a is not None and b is not None:
        if (a.left.shape[0], *a.right.shape[1:]) != (b.left.shape[0], *b.right.shape[1:]):
            raise ValueError("shapes")
        return compare_changes(a, b)
    size_a, size_b = (0.0 if change is None else change_norm(change) for change in (a, b))
    return {
        **_sizes(size_a, size_b, max(size_a, size_b), 0.0),
        "column_angles": None,
        "row_angles": None,
    }


def _sizes(a: float, b: float, apart: float, product: float) -> dict[str, float | None]:
    both = math.hypot(a, b)
    return {
        "norm_a": a,
        "norm_b": b,
        "distance": apart,
        "relative_distance": apart / both if both > 0.0 else 0.0,
        "inner": product,
        # The rounding of two equal changes must not read as a cosine above 1.
        "cosine": max(-1.0, min(1.0, product / (a * b))) if a > 0.0 and b > 0.0 else None,
    }


def _total(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """All layers as one long vector; angles are pooled over them, each layer's smallest, mean and largest."""
    roots = {
        key: math.sqrt(math.fsum(row[key] ** 2 for row in layers))
        for key in ("norm_a", "norm_b", "distance")
    }
    product = math.fsum(row["inner"] for row in layers)
    total: dict[str, Any] = _sizes(roots["norm_a"], roots["norm_b"], roots["distance"], product)
    for key in ("column_angles", "row_angles"):
        found = [row[key] for row in layers if row[key] is not None]
        total[key] = (
            None
            if not found
            else {
                "smallest": min(angles["smallest"] for angles in found),
                "mean": sum(angles["mean"] for angles in found) / len(found),
                "largest": max(angles["largest"] for angles in found),
            }
        )
    return total


def _angles(angles: Tensor) -> dict[str, float] | None:
    if not len(angles):
        return None
    return {
        "smallest": float(angles.min()),
        "mean": float(angles.mean()),
        "largest": float(angles.max()),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    angles = [
        "-"
        if row[key] is None
        else "/".join(f"{row[key][part]:.0f}" for part in ("smallest", "mean", "largest"))
        for key in ("column_angles", "row_angles")
    ]
    return [
        f"{row['norm_a']:.3g}",
        f"{row['norm_b']:.3g}",
        f"{row['distance']:.3g}",
        f"{row['relative_distance']:.3f}",
        "-" if row["cosine"] is None else f"{row['cosine']:.3f}",
        *angles,
    ]
