"""Command line of the scores.

python -m eval score --generated DIR --reference DIR [--prompts FILE] [--encoders NAME,NAME] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dreamrie.errors import ConfigError, DreamrieError
from dreamrie.files import write_atomic

try:
    from eval import encoders, pictures, scoring
except ModuleNotFoundError as error:
    raise SystemExit(
        f'python -m eval needs the package {error.name}: pip install -e ".[eval]" in the checkout.'
    ) from error

_DEFAULT = "effnet-lite2,tiny-clip"


def make_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    score = commands.add_parser("score", help="score pictures that exist already")
    score.add_argument("--generated", type=Path, required=True, help="folder of generated pictures")
    score.add_argument("--reference", type=Path, required=True, help="folder of real pictures")
    score.add_argument(
        "--prompts", type=Path, help='JSON lines {"file_name": ..., "prompt": ...}, one a picture'
    )
    score.add_argument(
        "--token", default="", help="rare token, left out of the prompts for text similarity"
    )
    score.add_argument(
        "--encoders",
        default=_DEFAULT,
        help=f"names of {', '.join(encoders.NAMES)}; default {_DEFAULT}",
    )
    score.add_argument(
        "--weights", action="append", default=[], metavar="NAME=FILE", help="weights from a file"
    )
    score.add_argument("--json", type=Path, help="write every score with all it depends on")
    return parser


def _load(names: str, weights: Sequence[str]) -> list[encoders.Encoder]:
    files: dict[str, Path] = {}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ConfigError(f"--encoders names nothing; known: {', '.join(encoders.NAMES)}.")
    for entry in weights:
        name, separator, file = entry.partition("=")
        if not separator or name not in wanted:
            raise ConfigError(f"--weights {entry!r}: expected NAME=FILE with NAME of {wanted}.")
        files[name] = Path(file)
    return [encoders.load_encoder(name, files.get(name)) for name in dict.fromkeys(wanted)]


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


def score(options: argparse.Namespace) -> str:
    """Run `score`.

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
    scores = [
        entry
        for encoder in _load(options.encoders, options.weights)
        for entry in scoring.score_folders(encoder, generated, reference, prompts, options.token)
    ]
    if options.json:
        rows = [dataclasses.asdict(entry) for entry in scores]
        content = {
            "generated": str(options.generated),
            "reference": str(options.reference),
            "token": options.token,
            "prompts": prompts and dict(zip(generated.names, prompts, strict=True)),
            "scores": rows,
        }
        write_atomic(options.json, (json.dumps(content, indent=2) + "\n").encode())
    return scoring.table(scores)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a wrong input is one message and exit code 2.

    Args:
        argv: command line, default that of the process.

    Returns:
        Exit code.
    """
    options = make_parser().parse_args(argv)
    try:
        print(score(options))
    except DreamrieError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
