"""Rows of a data set on the Hub, or of a local folder of Parquet or JSON files, through the library `datasets`.

    datasets:NAME            a Hub id, or a folder
    datasets:NAME:CONFIG     one of its configurations
    datasets:NAME@REVISION   a branch, tag or commit
    datasets:NAME#SPLIT      a split of it; else "train", or "test" for rows to validate on

The columns are those of `dreamrie.llm.data`.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamrie.errors import ConfigError

MARK = "datasets:"
_FORM = re.compile(
    r"datasets:(?P<name>[^:@#]+)(:(?P<config>[^:@#]+))?(@(?P<revision>[^:@#]+))?(#(?P<split>[^:@#]+))?"
)


@dataclass(frozen=True)
class HubRows:
    """A data set that `--data` names.

    Attributes:
        name: Hub id or folder.
        config: which configuration; None: the only one.
        revision: branch, tag or commit; None: the newest.
        split: which part; None: what the setting stands for.
    """

    name: str
    config: str | None
    revision: str | None
    split: str | None


def parse(place: str, flag: str) -> HubRows:
    """Take a name apart.

    Args:
        place: begins with `MARK`.
        flag: setting that names it, for messages.

    Returns:
        Its parts.

    Raises:
        ConfigError: it is not of the form at the head of this file.
    """
    parts = _FORM.fullmatch(place)
    if parts is None:
        raise ConfigError(
            f"{place!r} names no data set\n"
            f"  where: {flag}\n"
            "  what to do: give datasets:NAME, with :CONFIG, @REVISION and #SPLIT behind it in this order if needed"
        )
    name = parts["name"]
    folder = Path(name).expanduser()
    return HubRows(
        str(folder) if folder.is_dir() else name, parts["config"], parts["revision"], parts["split"]
    )


def load_rows(place: str, split: str, flag: str) -> Iterator[dict[str, Any]]:
    """Load a data set.

    Args:
        place: see the head of this file.
        split: "train" or "test", where the name has none.
        flag: setting that names it, for messages.

    Yields:
        Column to value of each row; what is missing in a row is left out.

    Raises:
        ConfigError: `datasets` is not installed, or there is no such data set, configuration, revision or split.
    """
    asked, where = parse(place, flag), f"{flag} {place}"
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            "a data set of the Hub needs the package datasets, not installed here\n"
            f"  where: {where}\n"
            "  what to do: pip install datasets, or give JSON files"
        )
    library: Any = importlib.import_module("datasets")
    errors: Any = importlib.import_module("datasets.exceptions")
    try:
        rows = library.load_dataset(
            asked.name, asked.config, split=asked.split or split, revision=asked.revision
        )
    except (errors.DatasetsError, OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"the data set cannot be loaded: {reason}\n"
            f"  where: {where}\n"
            "  what to do: check name, configuration, revision and split (datasets:NAME:CONFIG@REVISION#SPLIT), and "
            "the network"
        ) from error
    for row in rows:
        yield {column: value for column, value in row.items() if value is not None}
