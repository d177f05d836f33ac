"""A new folder of an owner that is there only if what fills it succeeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from app.storage import Kind, Owner, Storage


@contextmanager
def fresh_folder(storage: Storage, owner: Owner, kind: Kind, title: str) -> Iterator[str]:
    """Make a folder, and remove it again if the body fails in any way.

    Args:
        storage: of the app.
        owner: whose.
        kind: what it is for.
        title: see `Storage.create`.

    Yields:
        Its name.
    """
    name = storage.create(owner, kind, title)
    with ExitStack() as undo:
        undo.callback(storage.remove, owner, kind, name)
        yield name
        undo.pop_all()
