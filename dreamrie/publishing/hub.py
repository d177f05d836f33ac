"""Publish files of a finished run on the Hugging Face Hub; each task says which.

Nothing goes there unless it is asked for (`--push_to_hub`, or `python -m dreamrie push`). New repositories are private,
and tokens are never shown.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from dreamrie.adapter_container import read_metadata
from dreamrie.config import OutputSettings
from dreamrie.errors import CheckpointError, ConfigError

_log = logging.getLogger(__name__)

# What huggingface_hub raises when a repository cannot be had. The bases of the hub's own error name the transport
# errors of whichever HTTP library it is built on.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
BEST = "best"
_TOKEN = re.compile(r"hf_\w+")
# The Hub's own rules for OWNER/NAME.
_NAME = re.compile(r"(?:[a-z0-9][\w.-]*/)?[a-z0-9](?:[\w.-]*[a-z0-9])?", re.I | re.A)
_LONGEST_NAME = 96
# The uploader for large files is an extension module with errors of its own.
_ERRORS: tuple[type[Exception], ...] = (*HUB_ERRORS, RuntimeError)


def check_hub(output: OutputSettings, api: HfApi | None = None) -> None:
    """Find out before a training whether its result could be published.

    Args:
        output: settings of the run; without `push_to_hub` nothing is done.
        api: of the Hub, for tests.

    Raises:
        ConfigError: the name is not one, the Hub is switched off or out of reach, or there is no valid token.
    """
    if not output.push_to_hub:
        return
    repository = repository_of(output)
    _check_access(repository, api or HfApi())


def repository_of(output: OutputSettings) -> str:
    """Name of the repository.

    Args:
        output: settings of the run.

    Returns:
        `hub_model_id`, else the name of the output folder, below the user's own name.

    Raises:
        ConfigError: the Hub allows no such name.
    """
    return _checked_name(output.hub_model_id or output.output_dir.resolve().name)


def push_when_done(
    folder: Path, output: OutputSettings, push: Callable[[Path, str], str], *, complete: bool
) -> None:
    """Publish behind the last step, if that was asked for.

    Args:
        folder: output folder, where all is saved.
        output: settings of the run.
        push: of the task.
        complete: it came to its end; a run that was stopped is not published.

    Raises:
        CheckpointError: it could not be published. Everything is in the folder, and the message says how to go on.
        ConfigError: the folder lacks something that would be published.
    """
    if output.push_to_hub and complete:
        push(folder, repository_of(output))
    elif output.push_to_hub:
        _log.warning("stopped, so nothing was pushed to the Hub")


def plain_files(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Files of a run that may be published.

    Args:
        folder: output folder.
        names: paths in it.

    Returns:
        Path in the repository to the file.

    Raises:
        ConfigError: one of them is a link, which could lead to anything, or is missing.
    """
    found = {name: folder / name for name in names}
    for path in found.values():
        if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
            raise ConfigError(f"{path} is missing or a link; it is not published.")
    return found


def publish(
    folder: Path,
    hub_model_id: str,
    write_card: Callable[[Path], Path],
    files_of: Callable[[Path], Mapping[str, Path]],
    api: HfApi | None = None,
) -> str:
    """Publish a run: one commit, in a private repository unless it exists already.

    Args:
        folder: output folder of a finished run.
        hub_model_id: OWNER/NAME, or NAME for a repository of the user's own.
        write_card: writes the model card of a folder, when the Hub can be reached.
        files_of: path in the repository to the file, with the card there.
        api: of the Hub, for tests.

    Returns:
        Address of the repository.

    Raises:
        ConfigError: the name is not one, or the folder holds no finished run.
        CheckpointError: the Hub is switched off, there is no valid token, or the upload failed. Nothing is lost.
    """
    name, hub = _checked_name(hub_model_id), api or HfApi()
    try:
        _check_access(name, hub)
    except ConfigError as error:
        raise CheckpointError(_not_pushed(error, folder, name)) from None
    write_card(folder)
    files = files_of(folder)
    _tell_of_folders(files)
    try:
        _log.info("pushing to %s: %s", name, ", ".join(files))
        repository = hub.create_repo(name, private=True, exist_ok=True, repo_type="model")
        operations = [CommitOperationAdd(place, str(path)) for place, path in files.items()]
        hub.create_commit(repository.repo_id, operations, commit_message="LoRA of dreamrie")
    except _ERRORS as error:
        raise CheckpointError(_not_pushed(error, folder, name)) from None
    return str(repository)


def _not_pushed(error: Exception, folder: Path, name: str) -> str:
    remedy = f"python -m dreamrie push {shlex.quote(str(folder))} --hub_model_id {name}"
    return (
        f"the run was not pushed to the Hub: {_without_token(error)}\n"
        f"  where: {name}\n"
        f"  what to do: nothing is lost, all of it is in {folder}; push it later with {remedy}"
    )


def _checked_name(name: str) -> str:
    parts = _NAME.fullmatch(name)
    if parts is None or len(name) > _LONGEST_NAME or "--" in name or ".." in name:
        raise ConfigError(
            f"--hub_model_id {name!r} is no name of a repository. Give OWNER/NAME, such as mary/sks-dog: at most "
            f"{_LONGEST_NAME} letters, digits, single - and ., and _."
        )
    return name


def _check_access(repository: str, api: HfApi) -> None:
    """Refuse without network or token; the Hub is asked who the token belongs to."""
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{repository} cannot be pushed: HF_HUB_OFFLINE is set. Unset it.")
    if not get_token():
        raise ConfigError(
            f"{repository} cannot be pushed: there is no token of the Hub. Log in with hf auth login, or set HF_TOKEN."
        )
    try:
        api.whoami()
    except _ERRORS as error:
        raise ConfigError(
            f"{repository} cannot be pushed: the Hub did not accept the token, or is out of reach "
            f"({_without_token(error)}). Log in again with hf auth login."
        ) from None


def _tell_of_folders(files: Mapping[str, Path]) -> None:
    """The adapter's header says what it was trained on, in the words of the command line."""
    for name, path in files.items():
        if "/" in name or not name.endswith(".safetensors"):
            continue
        facts = read_metadata(path)
        named = [facts.get(key, "") for key in ("base_model", "base_model_requested")]
        local = [name for name in named if Path(name).is_absolute()]
        if local:
            _log.warning("the header of the adapter names a folder of this machine: %s", local[0])


def _without_token(error: Exception) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    token = get_token()
    return _TOKEN.sub("hf_...", text.replace(token, "hf_...") if token else text)
