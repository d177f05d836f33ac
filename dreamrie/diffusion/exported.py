"""Look at a model in training through its own file: what a user will see, made as a user will make it.

The adapter in training is set aside, the saved file is put on the same U-Net by diffusers' `load_lora_weights` under a
name of its own, and afterwards all is as it was: training goes on to the same bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreamrie.adapter_container import read_metadata
from dreamrie.adapter_file import DIFFUSERS_FILE
from dreamrie.diffusion.adapters import LOAD_ERRORS, load_with_diffusers
from dreamrie.diffusion.components import Components
from dreamrie.errors import AdapterError, CheckpointError
from dreamrie.lora.stacking import aside, several_on_purpose, unstack_lora

EXPORTED = "exported"


@contextmanager
def drawn_from_export(components: Components, save: Callable[[Path], None]) -> Iterator[None]:
    """Inside, the model is its base with the adapter that `save` writes.

    Args:
        components: the model in training.
        save: writes the adapter in training into a folder, as the run writes it.

    Yields:
        Nothing.

    Raises:
        CheckpointError: it cannot be saved, or what was saved cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="dreamrie-") as name:
        folder = Path(name)
        try:
            save(folder)
        except (AdapterError, OSError) as error:
            # AdapterError alone would say that something given was wrong.
            raise CheckpointError(f"the adapter cannot be shown as it is saved: {error}") from error
        with drawn_from_file(components, folder / DIFFUSERS_FILE):
            yield


@contextmanager
def drawn_from_file(components: Components, path: Path) -> Iterator[None]:
    """Inside, the model is its base with the adapter of a file; the adapter in training rests.

    What diffusers makes of the file is not checked: if it reads it wrongly, that is to be seen.

    Args:
        components: the model in training.
        path: of the file.

    Yields:
        Nothing.

    Raises:
        CheckpointError: it is missing or damaged, or diffusers cannot load it.
    """
    unet: Any = components.unet
    with aside(unet):
        try:
            try:
                read_metadata(
                    path
                )  # that there is a whole file; the libraries' errors have no common name
                with several_on_purpose():
                    load_with_diffusers(components, path, EXPORTED)
                unet.set_adapters([EXPORTED])
            except (AdapterError, *LOAD_ERRORS) as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise CheckpointError(
                    f"diffusers cannot load the saved adapter {path}: {reason}"
                ) from error
            yield
        finally:
            unstack_lora(unet, EXPORTED)
