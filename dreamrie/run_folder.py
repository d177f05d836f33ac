"""The output folder of a run: whether it can be used, who is using it, and what an older run left there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dreamrie import files
from dreamrie.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

ADAPTER = "pytorch_lora_weights.safetensors"
# A PEFT folder is two files; the settings come first, as they are written first.
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER_FILES = (*PEFT_FILES, ADAPTER)
"""Whatever of these a run has saved is its adapter."""
LOCK = ".lock"
CARD = "README.md"
CARD_MARK = "<!-- written by dreamrie -->"
# These mark a folder that holds a run, so they are the last to be moved away.
MARKS = ("run.json", ADAPTER)
# What a run writes, beside its checkpoints.
RUN_FILES = (
    *("samples", "scored", "best", "logs"),
    *("scores.jsonl", "scores.png", "metrics.jsonl", "spectrum.jsonl"),
    *PEFT_FILES,
    CARD,
    "config.yaml",
    *MARKS,
)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either the old one or the new one, never a part.

    Args:
        path: the file; its folder exists.
        content: all of it.

    Raises:
        CheckpointError: the file cannot be written; nothing is left beside it.
    """
    try:
        files.write_atomic(path, content)
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be written ({len(content)} bytes): {error}\n"
            f"  where: {path}\n"
            "  what to do: check free space and permissions; what was there before is intact"
        ) from error


def check_output_dir(folder: Path) -> None:
    """Say before any work whether results could be written; creates nothing.

    Args:
        folder: where the run is to write; it may not exist yet.

    Raises:
        ConfigError: it or a folder above it is a file, or it may not be written.
    """
    existing = folder
    try:
        while not (existing.exists() or existing.is_symlink()) and existing != existing.parent:
            existing = existing.parent
        if existing.is_symlink() and not existing.exists():
            reason = f"{existing} is a link that leads nowhere"
        elif not existing.is_dir():
            reason = "it is a file" if existing == folder else f"{existing} is a file"
        elif not os.access(existing, os.W_OK | os.X_OK):
            reason = f"{existing} is read-only"
        else:
            return
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ConfigError(
        f"the output folder cannot be used: {reason}\n"
        f"  where: --output_dir {folder}\n"
        "  what to do: name a folder that does not exist yet, or one that may be written"
    )


def _lock_of(folder: Path) -> Path:
    """The lock file of a folder; it stays behind, because removing it would race with the next run."""
    return folder / LOCK


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a folder to one run; the system frees the lock of a process that dies, however it dies.

    Args:
        folder: exists.

    Yields:
        Nothing.

    Raises:
        ConfigError: another run holds it, or the lock cannot be opened.
    """
    lock = FileLock(_lock_of(folder), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"another run is writing into {folder} at this moment\n"
            f"  where: --output_dir {folder}\n"
            "  what to do: wait for it, stop it, or name another folder"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"the output folder cannot be locked: {error}\n"
            f"  where: --output_dir {folder}\n"
            f"  what to do: remove {_lock_of(folder).name} there, or name another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def sweep_files(folder: Path) -> None:
    """Remove the half-written files that a killed run left; the caller holds the lock.

    Args:
        folder: output folder of the run.
    """
    own = [path for name in RUN_FILES for path in folder.glob(f".{name[:50]}.*")]
    # These folders are the run's own, so every hidden file in them is one of `files.write_atomic`.
    own += [path for name in ("samples", "scored", "best") for path in (folder / name).rglob(".*")]
    for path in own:
        if path.is_file():
            path.unlink(missing_ok=True)


def check_not_in_use(folder: Path) -> None:
    """Say before any work that another run has the folder; for the process that will write.

    Args:
        folder: output folder; it may not exist yet.

    Raises:
        ConfigError: another run is writing into it, or it cannot be used.
    """
    check_output_dir(folder)
    if _lock_of(folder).exists():
        with lock_folder(folder):
            pass


def folder_for_older_run(folder: Path) -> Path | None:
    """Say where the older run of an output folder would go, so that two runs never mix.

    Args:
        folder: output folder; it may not exist yet.

    Returns:
        The first of previous-1, previous-2, ... that is free; None when the folder holds no run.
    """
    signs = [folder / name for name in (*MARKS, "metrics.jsonl")]
    if not any(path.exists() for path in [*signs, *folder.glob("checkpoint-*")]):
        return None
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    return folder / f"previous-{number}"


def is_of_texts(folder: Path) -> bool:
    """Whether a folder is that of a language model's run, by its adapter.

    Args:
        folder: output folder.

    Returns:
        True for a PEFT folder that holds no adapter of a diffusion model.
    """
    return (folder / PEFT_FILES[1]).is_file() and not (folder / ADAPTER).exists()


def is_own_card(path: Path) -> bool:
    """Whether a model card was written by a run, or is a README.md of somebody else, which is left alone.

    Args:
        path: of a file that exists.

    Returns:
        True if it bears the mark.

    Raises:
        OSError: it cannot be read.
    """
    return CARD_MARK in path.read_text("utf-8", errors="replace")


def move_older_run(folder: Path) -> None:
    """Rename what an older run left, whole and with nothing overwritten.

    Args:
        folder: output folder; it exists.

    Raises:
        OSError: something cannot be renamed.
    """
    target = folder_for_older_run(folder)
    if target is None:
        return
    target.mkdir()
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
    for name in (*checkpoints, *RUN_FILES):
        if (folder / name).exists() and (name != CARD or is_own_card(folder / name)):
            (folder / name).rename(target / name)
    logger.info("%s holds an older run, which was moved to %s", folder, target)
    if checkpoints:
        logger.info(
            "To go on with it instead: --output_dir %s --resume_from_checkpoint latest", target
        )
