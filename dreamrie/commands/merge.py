"""Add adapter files with weights: exactly, or the best approximation of a rank.

python -m dreamrie merge A:0.8 B:0.6 [--rank R] --output PATH

The weighted sum of changes is one thin product whose rank is the sum of the ranks, so nothing is lost. With `--rank` it
is brought back to the matrices of that rank by the truncated SVD, layer by layer: the nearest point of the manifold,
which is the metric projection and so the retraction of the weighted sum.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dreamrie.adapter_file import BASE_KEY, DIFFUSERS_FILE
from dreamrie.adapter_open import OpenAdapter
from dreamrie.commands import files
from dreamrie.commands.table import percent, wrapped
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.lora import LowRank, combine
from dreamrie.lora.arithmetic import first_terms
from dreamrie.lora.comparing import as_matrix, change_norm, decompose, shaped_like

_log = logging.getLogger(__name__)

HELP = "add adapter files with weights"
# Relative to the parts; below it, only the rounding of fp64 keeps a direction of the sum from being zero.
_DUST = 1e-12


class Merged(NamedTuple):
    """A sum.

    Attributes:
        changes: by layer, shaped as in the files.
        discarded: share of the energy of the sum that truncation lost.
        exact_rank: largest rank of a layer of the sum before truncation.
    """

    changes: dict[str, LowRank]
    discarded: float
    exact_rank: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE:WEIGHT",
        help="adapter file and what it counts, such as a.safetensors:0.8; negative weights subtract",
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="bring the sum back to this rank, the nearest there is; without it the sum is exact and ranks add",
    )
    parser.add_argument(
        "--other-base",
        action="store_true",
        help="add adapters that were trained on different base models",
    )
    files.add_output(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Args:
        options: parsed.

    Returns:
        0. What cannot be read, added or written is an error.

    Raises:
        ConfigError: a weight or the rank cannot be used.
    """
    given = [split_weight(text) for text in options.files]
    if options.rank is not None and options.rank < 1:
        raise ConfigError(f"--rank must be at least 1; got {options.rank}.")
    files.check_output(options)
    adapters = [files.opened(path) for path, _ in given]
    weights = [weight for _, weight in given]
    if 0.0 in weights:
        raise ConfigError("a weight of 0 leaves its adapter out; leave it out of the command.")
    check_bases(adapters, options.other_base)
    merged = merge([adapter.changes for adapter in adapters], weights, options.rank)
    facts = merged_facts(adapters, weights, options.rank, 1.0 - merged.discarded)
    path = files.save(options, merged.changes, facts)
    rank = max(int(change.right.shape[0]) for change in merged.changes.values())
    lines = wrapped(
        f"{len(merged.changes)} layers, the exact sum has rank {merged.exact_rank}"
        + (
            "."
            if options.rank is None
            else f"; its nearest point of rank {options.rank}, layer by layer (truncated SVD: the metric projection of "
            f"the weighted sum, its retraction), discards {percent(merged.discarded)} of the energy."
        )
    )
    for adapter in adapters:
        alone = [layer for layer in merged.changes if layer not in adapter.changes]
        if alone:
            lines += wrapped(
                f"{adapter.path} has no change for {len(alone)} of the layers; they are kept."
            )
    lines.append(f"wrote {path}, rank {rank}, {files.size_text(files.bytes_of(path))}")
    sys.stdout.write("\n".join([*lines, ""]))
    return 0


def split_weight(text: str) -> tuple[Path, float]:
    """Read FILE:WEIGHT.

    Args:
        text: of the command line. A path may hold colons; the weight stands behind the last, unless the whole text
            is a path that exists.

    Returns:
        Path and weight; weight 1 where none is given.

    Raises:
        ConfigError: the weight is not finite, or both readings are paths that exist.
    """
    name, colon, last = text.rpartition(":")
    try:
        weight = float(last) if colon else None
    except ValueError:
        weight = None
    if weight is None or not name:
        return Path(text), 1.0
    if Path(text).exists():
        if Path(name).exists():
            raise ConfigError(
                f"{text} is there, and so is {name}. Say which is meant: {text}:1, or {name} under another name."
            )
        return Path(text), 1.0
    if not math.isfinite(weight):
        raise ConfigError(f"{text}: {last} is no finite number; write such as {name}:0.8.")
    return Path(name), weight


def merge(
    parts: Sequence[Mapping[str, LowRank]], weights: Sequence[float], rank: int | None
) -> Merged:
    """The weighted sum of changes, layer by layer.

    Args:
        parts: changes of each adapter by layer, scaling 1. Layers that only some have are kept.
        weights: one for each.
        rank: of the result; None for the exact sum.

    Returns:
        Balanced factors in fp64.

    Raises:
        AdapterError: adapters give one layer different shapes.
        ConfigError: the sum is zero.
    """
    changes: dict[str, LowRank] = {}
    sizes, lost, exact = [], [], 0
    for layer in sorted({layer for part in parts for layer in part}):
        having = [(p[layer], w) for p, w in zip(parts, weights, strict=True) if layer in p]
        sample = having[0][0]
        for change, _ in having:
            _check_shapes(layer, sample, change)
        # The order of files must not show in the rounding, so the sum is taken in one of its own.
        having.sort(key=lambda item: (item[1], float(item[0].left.double().sum())))
        point = decompose(combine([as_matrix(c) for c, _ in having], [w for _, w in having]))
        size = math.fsum(abs(weight) * change_norm(c) for c, weight in having)
        ranked = int((point.s > _DUST * size).sum())
        if not ranked:  # the parts cancel; a layer of rank 0 has no place in a file
            point, ranked = point._replace(s=torch.zeros_like(point.s)), 1
        kept = ranked if rank is None else min(rank, ranked)
        changes[layer] = shaped_like(first_terms(point, kept), sample)
        sizes.append(float((point.s**2).sum()))
        lost.append(float((point.s[kept:ranked] ** 2).sum()))
        exact = max(exact, ranked)
    total = math.fsum(sizes)
    if total <= 0.0:
        raise ConfigError("the weighted sum is zero: the adapters cancel. Choose other weights.")
    return Merged(changes, math.fsum(lost) / total, exact)


def check_bases(adapters: Sequence[OpenAdapter], other_base: bool) -> None:
    """Changes of different base weights do not add up to anything that was trained.

    Args:
        adapters: to be added.
        other_base: accept different ones; this is logged.

    Raises:
        AdapterError: two of them have different bases.
    """
    for first, second in itertools.combinations(adapters, 2):
        differ = files.bases_differ(first.facts, second.facts)
        if differ is None:
            _log.warning(
                "%s and %s: whether they have one base could not be checked",
                first.path,
                second.path,
            )
        elif differ:
            text = (
                f"{first.path} was trained on {files.base_of(first.facts)}, and {second.path} on "
                f"{files.base_of(second.facts)}"
            )
            if not other_base:
                raise AdapterError(
                    f"{text}. Their sum fits neither; pass --other-base if it is wanted all the same."
                )
            _log.warning("%s; added because of --other-base", text)


def merged_facts(
    adapters: Sequence[OpenAdapter],
    weights: Sequence[float],
    rank: int | None,
    energy_kept: float,
) -> dict[str, str]:
    """What the header of a sum says.

    Args:
        adapters: that were added.
        weights: one for each.
        rank: of `--rank`.
        energy_kept: of the sum, by truncation.

    Returns:
        Facts that all of them share, all triggers, and how it was made.
    """
    # Files of trainings all have one name; their folders tell them apart.
    named = [
        f"{a.path.parent.name}/{a.path.name}:{weight:g}"
        if a.path.name == DIFFUSERS_FILE
        else f"{a.path.name}:{weight:g}"
        for a, weight in zip(adapters, weights, strict=True)
    ]
    made_by = f"merge {' '.join(named)}" + ("" if rank is None else f" --rank {rank}")
    shared = {
        key: text
        for key, text in adapters[0].facts.items()
        if all(adapter.facts.get(key) == text for adapter in adapters)
    }
    if any(files.bases_differ(adapters[0].facts, other.facts) for other in adapters[1:]):
        shared = {key: text for key, text in shared.items() if not key.startswith(BASE_KEY)}
    triggers = [adapter.facts.get("instance_prompt") for adapter in adapters]
    found = dict.fromkeys(trigger for trigger in triggers if trigger)
    if found:
        shared["instance_prompt"] = "; ".join(found)
    shared.pop("energy_kept", None)  # of the parts, not of the sum
    return files.lasting_facts(shared, made_by, energy_kept)


def _check_shapes(layer: str, first: LowRank, second: LowRank) -> None:
    shapes = [(c.left.shape[0], *c.right.shape[1:]) for c in (first, second)]
    if shapes[0] != shapes[1]:
        raise AdapterError(
            f"layer {layer} is of shape {shapes[0]} in one adapter and {shapes[1]} in another: they are of different "
            "models, and cannot be added."
        )
