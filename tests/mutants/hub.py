"""Faults of publishing: files that must stay, a public repository, a token in a message."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dreamrie.diffusion import hub
from dreamrie.publishing import hub as shared
from tests.diffusion import test_hub as laws
from tests.mutants import Mutant, replaced
from tests.mutants.adapter_files import in_folder

good_files, good_push = hub.hub_files, hub.push
FILES, PRIVATE, FAILED = map(in_folder, laws.LAWS)


def fault(name: str, law: Any, why: str, **wrong: Any) -> Mutant:
    """A mutant with parts of the module replaced, and a token that is there."""

    @contextlib.contextmanager
    def broken() -> Iterator[Any]:
        online = {"get_token": lambda: laws.SECRET}
        with replaced(shared, **online), replaced(shared.constants, HF_HUB_OFFLINE=False):
            with replaced(shared if hasattr(shared, next(iter(wrong))) else hub, **wrong):
                yield hub

    return Mutant(name, law, broken, why)


def whole_folder(folder: Path) -> dict[str, Path]:
    """Whatever lies there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in files}


def all_samples(folder: Path) -> dict[str, Path]:
    more = {f"samples/{path.name}": path for path in (folder / "samples").iterdir()}
    return good_files(folder) | more


def without_best(folder: Path) -> dict[str, Path]:
    return {n: p for n, p in good_files(folder).items() if not n.startswith("best/")}


class Public:
    """The Hub's own default."""

    def __init__(self, api: Any) -> None:
        self.api = api

    def __getattr__(self, name: str) -> Any:
        return getattr(self.api, name)

    def create_repo(self, name: str, **options: Any) -> Any:
        return self.api.create_repo(name, **options | {"private": None})


def public_push(folder: Path, hub_model_id: str, api: Any = None) -> str:
    return good_push(folder, hub_model_id, Public(api))  # type: ignore[arg-type]


def plain_text(error: Exception) -> str:
    return str(error)


MUTANTS = [
    fault("the whole folder published", FILES, "photos and prompts", hub_files=whole_folder),
    fault("every picture published", FILES, "mine.png is no sample", hub_files=all_samples),
    fault("best adapter left behind", FILES, "the card names it", hub_files=without_best),
    fault("public repository", PRIVATE, "nobody asked for that", push=public_push),
    fault("token in the message", FAILED, "logs are shared", _without_token=plain_text),
]
