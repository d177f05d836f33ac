"""Checkpoints of a run: a folder that appears whole or not at all, and is read only if every byte is as it was written.

    checkpoint-200/
        tensors.safetensors   adapter and optimizer
        state.json            step, counters, settings, places in the records
        manifest.json         size and SHA-256 of the other two

A state is a tree of dicts, lists, tuples, numbers, texts and tensors, such as `torch.optim.Optimizer.state_dict`
returns. Nothing is pickled: reading a checkpoint runs no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dreamrie.errors import CheckpointError, NumericalError
from dreamrie.files import commit_folder, set_aside

logger = logging.getLogger(__name__)

LATEST = "latest"
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(0|[1-9]\d{0,11})")
# What a missing, cut or edited file raises on its way through the readers.
_READ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    SafetensorError,
)
# A manifest is a few hundred bytes; a larger one is something else.
_LARGEST_MANIFEST = 10_000


@dataclass(frozen=True)
class Checkpoint:
    """What was read.

    Attributes:
        path: its folder.
        step: optimizer steps taken.
        state: as given to `write_checkpoint`, tensors on the CPU.
    """

    path: Path
    step: int
    state: dict[str, Any]


def checkpoint_path(run: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return run / f"checkpoint-{step}"


def write_checkpoint(run: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Commit a checkpoint: under another name, synced, renamed.

    Args:
        run: output folder of the run; it exists.
        step: optimizer steps taken.
        state: tree of dicts, lists, tuples, finite numbers, texts, None and tensors.

    Returns:
        Folder of the checkpoint.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are intact, and nothing is left of this one.
        NumericalError: the state holds a number that is not finite; nothing is written.
    """
    path = checkpoint_path(run, step)
    contents = _contents(step, state)
    need = sum(map(len, contents.values()))
    try:
        commit_folder(path, contents)
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be written: {error}\n"
            f"  where: {path}, which needs {need:,} bytes; {_free(run)} are free\n"
            "  what to do: free space, raise the quota or limit of the system, or make the folder writable; earlier "
            "checkpoints are intact"
        ) from error
    return path


def check_space(run: Path, state: Mapping[str, Any], copies: int = 2) -> None:
    """Say before training whether its checkpoints would fit: an old one goes only when the new one is there.

    Args:
        run: output folder of the run; it exists.
        state: as it is before the first step.
        copies: how many there are at most at one time.

    Raises:
        CheckpointError: there is too little room.
    """
    need = copies * sum(map(len, _contents(0, state).values()))
    free = shutil.disk_usage(run).free
    if free < need:
        raise CheckpointError(
            f"there is too little room for checkpoints: {copies} need {need:,} bytes, {free:,} are free\n"
            f"  where: {run}\n"
            "  what to do: free space, name another --output_dir, or give --checkpointing_steps 0"
        )


def list_checkpoints(run: Path) -> list[Path]:
    """Folders named like a checkpoint, oldest first, damaged ones included.

    Args:
        run: output folder of a run; need not exist.

    Returns:
        The paths.
    """
    if not run.is_dir():
        return []
    found = [path for path in run.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of)


def find_checkpoint(run: Path, wanted: str) -> Checkpoint:
    """Read the checkpoint to go on from.

    Args:
        run: output folder of the run.
        wanted: "latest", or the name of a folder in it.

    Returns:
        The checkpoint. For "latest" damaged ones are skipped, newest first, and each is named in a warning.

    Raises:
        CheckpointError: there is none, the named one is missing or damaged, or none can be read.
    """
    _put_back(run)
    known = list_checkpoints(run)
    names = ", ".join(path.name for path in known) or "none"
    if wanted != LATEST:
        # As a shell completes it, or with the folder of the run in front.
        given = Path(wanted)
        if given.parent in (Path(), run) or given.parent.absolute() == run.absolute():
            wanted = given.name
        if not _NAME.fullmatch(wanted) or run / wanted not in known:
            raise CheckpointError(
                f"there is no checkpoint {wanted!r}\n"
                f"  where: {run}, which holds {names}\n"
                f"  what to do: give one of these names, or {LATEST}"
            )
        return read_checkpoint(run / wanted)
    reasons = []
    for path in reversed(known):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            reasons.append(str(error).splitlines()[0])
            logger.warning("%s; it is left out", reasons[-1])
    if reasons:
        raise CheckpointError(
            f"no checkpoint can be read: {'; '.join(reasons)}\n"
            f"  where: {run}\n"
            "  what to do: leave --resume_from_checkpoint out to train from the start; these are moved aside"
        )
    raise CheckpointError(
        f"there is no checkpoint to go on from\n"
        f"  where: {run}\n"
        "  what to do: check --output_dir, or leave --resume_from_checkpoint out to train from the start"
    )


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, and check it against its manifest.

    Args:
        path: its folder.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: a file is missing, has another length or content, or is of a later format.
    """
    try:
        return _read(path)
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{path.name} is damaged: {reason}\n"
            f"  where: {path}\n"
            f"  what to do: give another checkpoint, or {LATEST}, which takes the newest sound one"
        ) from error


def remove_old_checkpoints(run: Path, step: int, limit: int | None) -> None:
    """Keep the newest checkpoints up to a step; later ones, of a run that was set back, are left alone.

    Args:
        run: output folder of the run.
        step: of the checkpoint that was just written, which always stays.
        limit: how many to keep, at least 1; None: all.
    """
    if limit is None:
        return
    older = [path for path in list_checkpoints(run) if _step_of(path) <= step]
    for path in older[:-limit]:
        # Gone at once, whatever interrupts the removal: half a folder would look like a damaged checkpoint.
        gone = path.with_name(f".{path.name}.removed")
        try:
            os.replace(path, gone)
            shutil.rmtree(gone)
        except OSError as error:
            logger.warning("%s cannot be removed, training goes on: %s", path, error)


def _put_back(run: Path) -> None:
    """Give a checkpoint its name again whose replacement was cut off between two renames."""
    for aside in run.glob(".checkpoint-*.old"):
        path = run / aside.name.removeprefix(".").removesuffix(".old")
        if set_aside(path) == aside and not path.exists():
            # Another process of this run may have been faster.
            with suppress(FileNotFoundError):
                os.replace(aside, path)


def _read(path: Path) -> Checkpoint:
    """Read and compare; anything wrong is one of `_READ_ERRORS`."""
    if (path / MANIFEST).stat().st_size > _LARGEST_MANIFEST:
        raise ValueError(f"{MANIFEST} is too long")
    manifest = json.loads((path / MANIFEST).read_bytes())
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']!r}, this version reads {FORMAT}")
    contents = {name: _checked(path, name, manifest["files"][name]) for name in (TENSORS, STATE)}
    plain = json.loads(contents[STATE])
    step = plain["step"]
    if manifest["step"] != step or _step_of(path) != step:
        raise ValueError(f"it is of step {step}")
    return Checkpoint(path, step, _unflatten(plain["state"], load(contents[TENSORS])))


def _contents(step: int, state: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a checkpoint; the manifest comes last."""
    tensors: dict[str, Tensor] = {}
    plain = _flatten(state, "", tensors)
    broken = sorted(
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    )
    if broken:
        raise NumericalError(
            f"{len(broken)} tensors are not finite, the first is {broken[0]}; no checkpoint of step {step} was written"
        )
    try:
        text = json.dumps({"step": step, "state": plain}, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise NumericalError(
            f"a number of the state is not finite; no checkpoint of step {step} was written"
        ) from error
    contents = {TENSORS: save(tensors), STATE: text.encode()}
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    return {**contents, MANIFEST: (json.dumps(manifest, indent=1) + "\n").encode()}


def _checked(path: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    """Content of a file, if it is what the manifest says."""
    size = (path / name).stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"{name} has {size:,} bytes, {entry['bytes']:,} were written")
    content = (path / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ValueError(f"the content of {name} has changed")
    return content


def _step_of(path: Path) -> int:
    """Step in the name of a checkpoint's folder; -1 if it is no such name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _free(folder: Path) -> str:
    """Free bytes for a message, which must not fail itself."""
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"


def _flatten(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Take tensors out of a tree; what is left is JSON that keeps the types and order of containers."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(tree, Mapping):
        entries = [[key, _flatten(value, f"{name}/{key}", tensors)] for key, value in tree.items()]
        return {"dict": entries}
    if isinstance(tree, list | tuple):
        parts = [_flatten(value, f"{name}/{number}", tensors) for number, value in enumerate(tree)]
        return {type(tree).__name__: parts}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    raise CheckpointError(f"{name} is a {type(tree).__name__}, which a checkpoint cannot hold.")


def _unflatten(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse of `_flatten`."""
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(value, tensors) for key, value in content}
    parts = [_unflatten(value, tensors) for value in content]
    return tuple(parts) if kind == "tuple" else parts


def sweep(run: Path) -> None:
    """Remove what a killed run left of checkpoints that it was writing or removing; the caller holds the lock.

    Args:
        run: output folder.
    """
    _put_back(run)
    for path in run.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
