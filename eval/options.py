"""Flags and loaders that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from dreamrie.errors import ConfigError
from dreamrie.files import write_atomic
from eval import encoders
from eval.encoders import lpips

# What needs no download, and what photos are scored with in the literature.
OFFLINE = "effnet-lite2,tiny-clip"
FOR_EMBEDDED = "effnet-lite2-64-160,tiny-clip"
FOR_PHOTOS = "dino,dinov2,clip"
LPIPS = "lpips"


def add_encoder_flags(
    parser: argparse.ArgumentParser, words: str, default: str | None = None
) -> None:
    """Add `--encoders` and `--weights`.

    Args:
        parser: of a command.
        words: the default as the help says it.
        default: value when the flag is not given; None: it depends on the model or the settings.
    """
    parser.add_argument(
        "--encoders",
        metavar="NAME,NAME",
        default=default,
        help=f"names of {', '.join(encoders.NAMES)}; default {words}",
    )
    parser.add_argument(
        "--weights", action="append", default=[], metavar="NAME=FILE", help="weights from a file"
    )


def read_weights(weights: Sequence[str], allowed: Sequence[str]) -> dict[str, Path]:
    """Take NAME=FILE apart.

    Args:
        weights: values of `--weights`.
        allowed: names that are in use.

    Returns:
        Files by name.

    Raises:
        ConfigError: an entry of another form or with a name that is not in use.
    """
    found: dict[str, Path] = {}
    for entry in weights:
        name, separator, file = entry.partition("=")
        if not separator or name not in allowed:
            raise ConfigError(
                f"--weights {entry!r}: expected NAME=FILE with NAME of {list(allowed)}."
            )
        found[name] = Path(file)
    return found


def split_names(names: str) -> list[str]:
    """Names of encoders, each once.

    Args:
        names: value of `--encoders`.

    Returns:
        At least one name, unchecked.

    Raises:
        ConfigError: there is none.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ConfigError(f"--encoders names nothing; known: {', '.join(encoders.NAMES)}.")
    return list(dict.fromkeys(wanted))


def load_encoders(names: str, files: Mapping[str, Path]) -> list[encoders.Encoder]:
    """Build encoders.

    Args:
        names: value of `--encoders`.
        files: see `read_weights`.

    Returns:
        At least one, in the order of the names.
    """
    return [encoders.load_encoder(name, files.get(name)) for name in split_names(names)]


def load_diversity(file: Path | None) -> tuple[lpips.LPIPS | None, str]:
    """Build the distance that diversity is measured in, if its weights are at hand.

    Args:
        file: weights that the user named, or None.

    Returns:
        The distance and "", or None and one line saying what is missing and how to get it.
    """
    if file is None and not lpips.available():
        try:
            return lpips.load_lpips(None), ""
        except ConfigError as error:
            return None, f"diversity is left out: {error}"
    return lpips.load_lpips(file), ""


def check_at_least(name: str, value: float, least: float) -> None:
    """Refuse a number that is too small or not a number.

    Args:
        name: flag or setting.
        value: as given.
        least: smallest value that can work.

    Raises:
        ConfigError: it is smaller.
    """
    if not least <= value < float("inf"):
        raise ConfigError(f"{name} {value} cannot work; it must be a number of at least {least}.")


def write_json(path: Path, content: bytes) -> None:
    """Write the file of `--json`.

    Args:
        path: as given.
        content: all of it.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        write_atomic(path, content)
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error}.") from error
