"""Check an adapter against its base model: read strictly, loaded by the public loader too, both compared.

python -m dreamrie verify FILE [--base MODEL] [--prompt TEXT] [--steps N] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from dreamrie.commands import files
from dreamrie.commands.table import check_json, facts_table, printable, wrapped, write_json
from dreamrie.diffusion.verifying import SEEDS, Verification, verify

HELP = "put an adapter on its base model in two ways and compare layers and pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    parser.add_argument("file", type=Path, metavar="FILE", help=files.FILE_HELP)
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="alias, hub id or folder, as in training (what the file names)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="of the pictures (the file's trigger)")
    parser.add_argument(
        "--steps", type=int, default=10, metavar="N", help="denoising steps of a picture (10)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Args:
        options: parsed.

    Returns:
        0 if all that was checked is right, else 1. What cannot be used is an error.
    """
    check_json(options.json)
    found = verify(options.file, options.base, prompt=options.prompt, steps=options.steps)
    sys.stdout.write("\n".join([*report(found, options.steps), ""]))
    write_json(options.json, as_record(found, options.steps))
    return 1 if found.problems else 0


def as_record(found: Verification, steps: int) -> dict[str, Any]:
    """The findings for programs.

    Args:
        found: see `verify`.
        steps: denoising steps of the pictures.

    Returns:
        What JSON can hold.
    """
    record = {**dataclasses.asdict(found), "path": str(found.path), "steps": steps}
    return {"verified": not found.problems, **record, "seeds": list(SEEDS)}


def report(found: Verification, steps: int) -> list[str]:
    """What was checked, how it went, and what was not checked.

    Args:
        found: see `verify`.
        steps: denoising steps of the pictures.

    Returns:
        Lines of at most 100 columns.
    """
    verdict = "NOT verified" if found.problems else "verified"
    lines = wrapped(f"{verdict}: {printable(str(found.path))} on {found.base or 'no base model'}")
    rows = [("problem", text) for text in found.problems]
    if found.layers:
        whole = "digest and layers are those that were written, base weights those of the training"
        rows += [] if found.unchecked else [("file", whole)]
        rows += [("not known", text) for text in found.unchecked]
    if found.worst_distance is not None:
        rows.append(
            (
                "change",
                f"{found.layers} layers by dreamrie's reader; by {found.loader} the largest relative difference is "
                f"{found.worst_distance:.1e}",
            )
        )
    if found.grey_between is not None:
        rows.append(
            (
                "pictures",
                f"{len(SEEDS)} of {found.prompt!r}, {steps} steps, by both: largest difference "
                f"{found.grey_between} of 255 grey levels; {found.grey_from_base} from those of the base",
            )
        )
    rows.append(("not checked", _not_checked(found)))
    return [*lines, *facts_table(rows)]


def _not_checked(found: Verification) -> str:
    """What nobody looked at, so that a verdict is not read as more than it is."""
    if found.grey_between is None:
        return f"what comes after the problem; nothing was compared with {found.loader}"
    return (
        f"other prompts, precisions below fp32, programs other than {found.loader}, and whether the "
        "pictures are good"
    )
