"""`python -m eval score`: scores of pictures that exist already."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from dreamrie.errors import ConfigError
from eval import pictures, scoring
from eval.options import (
    OFFLINE,
    add_encoder_flags,
    load_encoders,
    read_weights,
    split_names,
    write_json,
)

HELP = "score pictures that exist already"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of this command.
    """
    parser.add_argument(
        "--generated", type=Path, required=True, help="folder of generated pictures"
    )
    parser.add_argument("--reference", type=Path, required=True, help="folder of real pictures")
    parser.add_argument(
        "--prompts", type=Path, help='JSON lines {"file_name": ..., "prompt": ...}, one a picture'
    )
    parser.add_argument(
        "--token", default="", help="rare token, left out of the prompts for text similarity"
    )
    add_encoder_flags(parser, OFFLINE, OFFLINE)
    parser.add_argument("--json", type=Path, help="write every score with all it depends on")


def run(options: argparse.Namespace) -> str:
    """Score a folder.

    Args:
        options: parsed command line.

    Returns:
        The table.
    """
    pictures.check_apart(options.generated, options.reference)
    generated = pictures.read_folder(options.generated, 1)
    reference = pictures.read_folder(options.reference, 2)
    prompts = pictures.read_prompts(options.prompts, generated.names) if options.prompts else None
    _check_token(options.token, prompts)
    files = read_weights(options.weights, split_names(options.encoders))
    scores = [
        entry
        for encoder in load_encoders(options.encoders, files)
        for entry in scoring.score_folders(encoder, generated, reference, prompts, options.token)
    ]
    if options.json:
        content = {
            "generated": str(options.generated),
            "reference": str(options.reference),
            "token": options.token,
            "prompts": prompts and dict(zip(generated.names, prompts, strict=True)),
            "scores": [dataclasses.asdict(entry) for entry in scores],
        }
        write_json(options.json, (json.dumps(content, indent=2) + "\n").encode())
    return scoring.table(scores)


def _check_token(token: str, prompts: Sequence[str] | None) -> None:
    """A token that is left out of nothing is a mistake, not a score."""
    if not token:
        return
    if prompts is None:
        raise ConfigError(f"--token {token!r} is left out of prompts: give them with --prompts.")
    if not any(pictures.without_token(prompt, token) != prompt for prompt in prompts):
        raise ConfigError(
            f"--token {token!r} stands in none of the prompts, such as {prompts[0]!r}."
        )
    if not all(pictures.without_token(prompt, token) for prompt in prompts):
        raise ConfigError(f"--token {token!r} is all that one of the prompts says.")
