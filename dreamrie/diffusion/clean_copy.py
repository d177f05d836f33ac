"""Write a folder of training pictures anew, each one decoded, upright and in sRGB, with its caption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamrie.diffusion.examine import LEFT_OUT, Examined
from dreamrie.diffusion.images import METADATA, load_layers, save_png
from dreamrie.errors import ConfigError
from dreamrie.files import write_atomic


def check_target(target: Path, source: Path) -> None:
    """Refuse a folder in which a clean copy would mix with something else.

    Args:
        target: where the copy is to go.
        source: what is to be copied.

    Raises:
        ConfigError: the target is a file, not empty, the source itself, or cannot be read.
    """
    if target.resolve() == source.resolve():
        raise ConfigError(
            f"--fix {target} is the folder itself. Name a new one; nothing is changed in place."
        )
    try:
        if target.is_dir() and not any(target.iterdir()):
            return
    except OSError as error:
        raise ConfigError(f"--fix {target} cannot be read: {error}.") from error
    if target.exists() or target.is_symlink():
        kind = "is not empty" if target.is_dir() else "is a file"
        raise ConfigError(f"--fix {target} {kind}. Name a new or an empty folder.")


def copy_clean(source: Path, pictures: Sequence[Examined], target: Path) -> list[str]:
    """Write what can be used.

    Args:
        source: folder of the pictures and of their captions.
        pictures: all of them, examined and compared.
        target: passed `check_target`.

    Returns:
        What was written and what was left out, line by line.

    Raises:
        ConfigError: the folder or a caption cannot be written.
    """
    kept = [picture for picture in pictures if not picture.has(LEFT_OUT)]
    if not kept:
        return [f"No clean copy: there is no picture that could go into {target}."]
    names = new_names([picture.path for picture in kept])
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path, name in names.items():
            layers = load_layers(path)
            if layers.alpha is not None:
                layers.color.putalpha(layers.alpha)
            save_png(layers.color, target / name)
        captions = _copy_texts(names, target) + _copy_table(source, names, target)
    except OSError as error:
        raise ConfigError(f"--fix {target} cannot be written: {error}.") from error
    lines = [f"Clean copy in {target}: pictures {len(names)}, captions {captions}."]
    for picture in pictures:
        reasons = [finding.text for finding in picture.findings if finding.code in LEFT_OUT]
        if reasons:
            lines.append(f"- left out: {picture.path.name}, {reasons[0]}")
    renamed = [f"{p.name} is now {n}" for p, n in names.items() if n != f"{p.stem}.png"]
    lines += [f"- {words}, since two pictures had that name" for words in renamed]
    return lines


def new_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Name the copies.

    Args:
        paths: of one folder.

    Returns:
        For each the stem with `.png`; with a number where a system that does not tell upper from lower case would
        write two into one file.
    """
    names: dict[Path, str] = {}
    # A name that a file has by itself must not be given to another one first.
    taken = {f"{path.stem}.png".casefold() for path in paths}
    used: set[str] = set()
    for path in paths:
        name, number = f"{path.stem}.png", 2
        while name.casefold() in used or (number > 2 and name.casefold() in taken):
            name, number = f"{path.stem}-{number}.png", number + 1
        used.add(name.casefold())
        names[path] = name
    return names


def table_rows(table: Path) -> list[dict[str, Any]]:
    """Read what is sound in a table of captions.

    Args:
        table: metadata.jsonl, which need not exist.

    Returns:
        The lines that name a file; malformed ones are left out, as `read_captions` tells about them.
    """
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return []
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("file_name"), str):
            rows.append(row)
    return rows


def _copy_texts(names: dict[Path, str], target: Path) -> int:
    """Text files beside the pictures; returns how many."""
    count = 0
    for path, name in names.items():
        text = path.with_suffix(".txt")
        if text != path and text.is_file():
            write_atomic((target / name).with_suffix(".txt"), text.read_bytes())
            count += 1
    return count


def _copy_table(source: Path, names: dict[Path, str], target: Path) -> int:
    """The table of captions with the new names, without the pictures that are left out; returns how many lines."""
    new = {path.name: name for path, name in names.items()}
    rows = [row for row in table_rows(source / METADATA) if row["file_name"] in new]
    lines = [
        json.dumps(row | {"file_name": new[row["file_name"]]}, ensure_ascii=False) for row in rows
    ]
    if lines:
        # What UTF-8 cannot hold, such as a byte of an old file name, becomes the escape that JSON has for it.
        content = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
        write_atomic(target / METADATA, content)
    return len(lines)
