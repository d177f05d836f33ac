"""Faults of publishing a language model's adapter: too much, too little, and names of one machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dreamrie.llm import card
from dreamrie.publishing import hub
from tests.diffusion.test_hub import SECRET
from tests.llm import test_card as laws
from tests.mutants import Mutant, replaced
from tests.mutants.adapter_files import in_folder

FILES, NAMES = map(in_folder, laws.LAWS)
_files, _rows = card.hub_files, card._rows


def fault(name: str, law: Any, why: str, **wrong: Any) -> Mutant:
    """A mutant with parts of the module replaced, and a token that is there."""

    @contextlib.contextmanager
    def broken() -> Iterator[Any]:
        with (
            replaced(hub, get_token=lambda: SECRET),
            replaced(hub.constants, HF_HUB_OFFLINE=False),
            replaced(card, **wrong),
        ):
            yield card

    return Mutant(name, law, broken, why)


def whole_folder(folder: Path) -> dict[str, Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in files}


def weights_alone(folder: Path) -> dict[str, Path]:
    return {name: path for name, path in _files(folder).items() if "config" not in name}


class NamesFolders(card.Run):
    """The base as it was asked for."""

    @property
    def base(self) -> str:
        return str(self.record["base_model"]["base_model"])


def every_task(counts: Mapping[str, int]) -> str:
    return f"{sum(counts.values())} examples ({', '.join(counts)})"


MUTANTS = [
    fault(
        "llm card: the whole folder published", FILES, "rows are private", hub_files=whole_folder
    ),
    fault(
        "llm card: settings of PEFT left behind",
        FILES,
        "nobody could load it",
        hub_files=weights_alone,
    ),
    fault("llm card: folder of the base named", NAMES, "nobody else has it", Run=NamesFolders),
    fault("llm card: files named as tasks", NAMES, "names of files are private", _rows=every_task),
]
