"""Wrong pages: everybody is the same person, errors as they come, a closed page that takes others down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from app import visitor
from app.tabs import generate
from tests.app import test_visitor as laws
from tests.mutants import Mutant, replaced

_watch = generate.GenerateTab._watch


def all_one(storage: Any, key: object, request: Any) -> Any:
    return storage.owner("user:" + (getattr(request, "username", None) or "everybody"))


def key_before_login(storage: Any, key: object, request: Any) -> Any:
    name = getattr(request, "username", None)
    if not isinstance(key, str) or key.startswith("user:"):
        raise gr.Error("not yet")
    return storage.owner(key if key else f"user:{name}")


def login_by_word(storage: Any, key: object, request: Any) -> Any:
    name = getattr(request, "username", None)
    if not name and not isinstance(key, str):
        raise gr.Error("not yet")
    return storage.owner(f"user:{name}" if name else key)


@contextmanager
def raw() -> Iterator[None]:
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error(str(error), print_exception=False) from error


def watch_and_cancel_what_runs(self: Any, owner: Any, job: Any) -> Iterator[Any]:
    try:
        yield from _watch(self, owner, job)
    finally:
        running = self._studio.device.running()
        if running is not None:
            self._studio.device.cancel(running.owner, running.id)


def watch_as_anyone(self: Any, owner: Any, job: Any) -> Iterator[Any]:
    yield from _watch(self, job.owner, job)


def watch_to_the_end(self: Any, owner: Any, job: Any) -> Iterator[Any]:
    while not job.has_ended:
        yield [job.status]
        job.wait(0.01)


@contextmanager
def watching(wrong: Any) -> Iterator[Any]:
    with replaced(generate.GenerateTab, _watch=wrong):
        yield generate


MUTANTS = [
    Mutant(
        name="page: everybody is one person",
        law=laws.law_every_secret_is_an_owner,
        broken=lambda: replaced(visitor, owner_of=all_one),
        why="the key is ignored, so every browser sees every training",
    ),
    Mutant(
        name="page: a browser's key before its login",
        law=laws.law_every_secret_is_an_owner,
        broken=lambda: replaced(visitor, owner_of=key_before_login),
        why="who logs in on another machine has lost everything",
    ),
    Mutant(
        name="page: a login by saying so",
        law=laws.law_every_secret_is_an_owner,
        broken=lambda: replaced(visitor, owner_of=login_by_word),
        why="'user:anna' as a browser's key opens Anna's folders",
    ),
    Mutant(
        name="page: errors as they come",
        law=laws.law_errors_are_plain_words,
        broken=lambda: replaced(visitor, _toasts=raw),
        why="paths of the machine reach a browser",
    ),
    Mutant(
        name="page: a closed page cancels what runs",
        law=laws.law_a_closed_page_gives_up_its_own_job,
        broken=lambda: watching(watch_and_cancel_what_runs),
        why="one user's closed tab stops another one's training",
    ),
    Mutant(
        name="page: whoever watches a job may cancel it",
        law=laws.law_a_closed_page_gives_up_its_own_job,
        broken=lambda: watching(watch_as_anyone),
        why="jobs of others are cancelled through the page",
    ),
    Mutant(
        name="page: a closed page keeps its place",
        law=laws.law_a_closed_page_gives_up_its_own_job,
        broken=lambda: watching(watch_to_the_end),
        why="pictures that nobody waits for hold up the queue",
    ),
]
