"""Publish a finished run on the Hugging Face Hub: its adapter, its model card and that card's pictures, no more.

Photos, captions, files of prompts, settings, logs and checkpoints are never sent.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from dreamrie.config import OutputSettings
from dreamrie.diffusion.model_card import leave_card, read_run, write_card
from dreamrie.publishing.hub import BEST, plain_files, publish, push_when_done
from dreamrie.run_folder import ADAPTER, CARD


def hand_over(folder: Path, output: OutputSettings, *, complete: bool) -> None:
    """What happens to the folder of a run behind its last step: a model card, and publishing if that was asked for.

    Args:
        folder: output folder, where all is saved.
        output: settings of the run.
        complete: it came to its end; a run that was stopped is not published.

    Raises:
        CheckpointError: it could not be published. Everything is in the folder, and the message says how to go on.
        ConfigError: the folder lacks something that would be published.
    """
    leave_card(folder)
    push_when_done(folder, output, push, complete=complete)


def hub_files(folder: Path) -> dict[str, Path]:
    """Exactly the files that are published.

    Args:
        folder: output folder of a run with its model card.

    Returns:
        Path in the repository to the file: the card, the adapter, that of `best/` in a scored run, and the pictures
        that the card shows.

    Raises:
        ConfigError: one of them is a link, which could lead to anything, or is missing.
    """
    names = [CARD, ADAPTER]
    if (folder / BEST / ADAPTER).exists():
        names.append(f"{BEST}/{ADAPTER}")
    names += [path for _, path in read_run(folder).samples]
    return plain_files(folder, names)


def push(folder: Path, hub_model_id: str, api: HfApi | None = None) -> str:
    """Publish a run: one commit with `hub_files`, in a private repository unless it exists already.

    Args:
        folder: output folder of a finished run.
        hub_model_id: OWNER/NAME, or NAME for a repository of the user's own.
        api: of the Hub, for tests.

    Returns:
        Address of the repository.

    Raises:
        ConfigError: the name is not one, or the folder holds no finished run.
        CheckpointError: the Hub is switched off, there is no valid token, or the upload failed. Nothing is lost.
    """
    return publish(folder, hub_model_id, write_card, hub_files, api)
