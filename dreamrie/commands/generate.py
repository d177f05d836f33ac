"""Draw pictures with any number of adapters at once, or with the base model alone.

python -m dreamrie generate --adapter FILE[:SCALE] [--adapter ...] --prompt TEXT [--prompt ...] --output FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamrie.adapter_container import find_adapter, read_metadata
from dreamrie.adapter_file import DIFFUSERS_FILE
from dreamrie.commands import files
from dreamrie.commands.merge import split_weight
from dreamrie.commands.table import wrapped
from dreamrie.diffusion.components import Components
from dreamrie.diffusion.generating import (
    AdapterUse,
    Drawer,
    DrawRequest,
    adapter_digest,
    check_use,
    save_drawings,
    settled,
)
from dreamrie.diffusion.source import EMBEDDED
from dreamrie.diffusion.verifying import base_named_by, load_base
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.trainer import BEST

_log = logging.getLogger(__name__)

HELP = "draw pictures with adapters"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="file or folder and what it counts, such as runs/dog/best:0.8; once for each (the base alone)",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="in quotes; once for each",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="alias, hub id or folder, as in training (what the first adapter names, else the embedded model)",
    )
    parser.add_argument(
        "--negative_prompt", default="", metavar="TEXT", help="what the pictures are led away from"
    )
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="denoising steps (25)")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        metavar="NUMBER",
        help="classifier-free guidance (7.5, for the embedded model 4)",
    )
    parser.add_argument("--width", type=int, metavar="PIXELS", help="(the model's own)")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="(the model's own)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first picture (0)")
    parser.add_argument(
        "--num_images",
        type=int,
        default=1,
        metavar="N",
        help="pictures of each prompt, with seeds N, N + 1, ... (1)",
    )
    parser.add_argument(
        "--rank", type=int, metavar="R", help="draw with the nearest change of this rank instead"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="does not exist yet, or is empty",
    )


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Args:
        options: parsed.

    Returns:
        0. What cannot be read, drawn or written is an error.

    Raises:
        ConfigError: there are to be no pictures.
    """
    if options.num_images < 1:
        raise ConfigError(f"--num_images must be at least 1; got {options.num_images}.")
    check_folder(options.output)
    adapters = [
        AdapterUse(path, scale, options.rank) for path, scale in map(split_weight, options.adapter)
    ]
    for use in adapters:
        check_use(use)
    if options.rank is not None and not adapters:
        raise ConfigError("--rank does nothing without --adapter; leave it out.")
    components = base_for(adapters, options.base)
    request = settled(requested(options), components)
    with Drawer(components, keep=max(len(adapters), 1)) as drawer:
        pictures = drawer.draw(request, adapters, on_step=_progress)
    records = [
        record(request, number, adapters, components) for number in range(len(request.prompts))
    ]
    save_drawings(options.output, pictures, records, columns=options.num_images)
    names = " + ".join(f"{use.scale:g} x {short_name(use.path)}" for use in adapters)
    count = f"{len(pictures)} picture{'s' * (len(pictures) != 1)}"
    text = f"{count} of {names or 'no adapter'} on {components.source.resolved}"
    sys.stdout.write("\n".join([*wrapped(text), f"wrote {options.output}", ""]))
    return 0


def check_folder(folder: Path) -> None:
    """Find out before the work that its result could not be written.

    Args:
        folder: of the pictures.

    Raises:
        ConfigError: something is there.
    """
    try:
        free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be used: {error}.") from error
    if not free:
        raise ConfigError(f"--output: {folder} is there already. Choose another --output.")


def base_for(adapters: Sequence[AdapterUse], base: str | None) -> Components:
    """Load the model to draw with.

    Args:
        adapters: all of them are to fit it.
        base: what the user named, if anything.

    Returns:
        The model.

    Raises:
        AdapterError: two adapters were trained on different base models.
    """
    paths = [find_adapter(use.path) for use in adapters]
    facts = [read_metadata(path) for path in paths]
    for one, other in itertools.combinations(range(len(paths)), 2):
        if files.bases_differ(facts[one], facts[other]):
            raise AdapterError(
                f"{paths[one]} was trained on {files.base_of(facts[one])}, and {paths[other]} on "
                f"{files.base_of(facts[other])}. No picture is of both; give adapters of one base model."
            )
    if base is None and not paths:
        return load_base(EMBEDDED)
    name, revision = (base, None) if base else base_named_by(paths[0], facts[0])
    return load_base(name, revision)


def requested(options: argparse.Namespace) -> DrawRequest:
    """All pictures of a command line, prompt by prompt.

    Args:
        options: parsed.

    Returns:
        Not yet checked.
    """
    seeds = range(options.seed, options.seed + options.num_images)
    pairs = [(prompt, seed) for prompt in options.prompt for seed in seeds]
    prompts, numbers = zip(*pairs, strict=True)
    return DrawRequest(
        prompts,
        numbers,
        negative_prompt=options.negative_prompt,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        width=options.width,
        height=options.height,
    )


def record(
    request: DrawRequest, number: int, adapters: Sequence[AdapterUse], components: Components
) -> dict[str, Any]:
    """All that a picture was made with, without the folders of this computer.

    Args:
        request: settled.
        number: of the picture.
        adapters: that were asked for.
        components: the model.

    Returns:
        What JSON can hold.
    """
    source = components.source
    settings = dataclasses.asdict(request)
    for key in ("prompts", "seeds", "batch_size"):  # of all pictures; none of this one
        del settings[key]
    is_folder = source.resolved == str(source.directory.resolve())
    return {
        "prompt": request.prompts[number],
        "seed": request.seeds[number],
        **settings,
        "adapters": [
            {
                "file": short_name(use.path),
                "sha256": adapter_digest(use.path),
                "scale": use.scale,
                "rank": use.rank,
            }
            for use in adapters
        ],
        "base": source.directory.resolve().name if is_folder else source.resolved,
        "base_commit": source.commit,
    }


def short_name(path: Path) -> str:
    """What a file is called, with its folder where all trainings call it the same.

    Args:
        path: see `find_adapter`.

    Returns:
        Name for people.
    """
    file = find_adapter(path).resolve()
    if file.name != DIFFUSERS_FILE:
        return file.name
    return "/".join(file.parts[-3 if file.parent.name == BEST else -2 :])


def _progress(done: int, total: int) -> None:
    """Now and then a line, so that long drawings can be seen to go on."""
    if done == total or done % max(1, total // 10) == 0:
        _log.info("step %d of %d", done, total)
