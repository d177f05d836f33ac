"""W4, W6: who is asking, what a page that is closed gives up, and what of an error reaches a browser."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from app import visitor
from app.jobs import Device
from app.storage import Storage, StorageError
from app.tabs import generate
from dreamrie.errors import ConfigError
from tests.app.fake_work import ANNA, BORIS, Gate, held, until_ended


def law_every_secret_is_an_owner(impl: Any) -> None:
    """One browser is one owner, two are two; a login is one whatever the browser says; no browser can say a login."""
    with TemporaryDirectory() as folder:
        storage = Storage(Path(folder))
        first, second = (secrets.token_urlsafe(32) for _ in range(2))
        nobody, anna = SimpleNamespace(username=None), SimpleNamespace(username="anna")
        assert impl.owner_of(storage, first, nobody) == impl.owner_of(storage, first, None)
        assert impl.owner_of(storage, first, nobody) != impl.owner_of(storage, second, nobody)
        logged_in = impl.owner_of(storage, first, anna)
        assert logged_in == impl.owner_of(storage, second, anna)
        assert logged_in != impl.owner_of(storage, first, nobody)
        for said in ("user:anna", None, 7, ["user:anna"]):
            with pytest.raises(gr.Error):
                impl.owner_of(storage, said, nobody)


def law_errors_are_plain_words(impl: Any) -> None:
    """A browser reads what was raised on purpose, without its paths, and of the rest only that it happened."""
    place = "/srv/people/anna/adapter.safetensors"

    def fails(error: Exception) -> Any:
        raise error

    def fails_later(error: Exception) -> Iterator[int]:
        yield 1
        raise error

    for handler in (impl.plainly(fails), lambda e: list(impl.plainly(fails_later)(e))):
        with pytest.raises(gr.Error) as caught:
            handler(StorageError(f"the adapter {place} is damaged."))
        assert caught.value.message == "the adapter adapter.safetensors is damaged."
        assert not caught.value.print_exception
        for error in (FileNotFoundError(2, "no such file", place), KeyError(place), MemoryError()):
            with pytest.raises(gr.Error) as caught:
                handler(error)
            assert caught.value.message == visitor.UNKNOWN


def law_a_closed_page_gives_up_its_own_job(impl: Any) -> None:
    """Whoever closes the page gives up the job that it watched, and no other one."""
    device = Device()
    studio = SimpleNamespace(device=device)
    tab = SimpleNamespace(_studio=studio, _progress=lambda job: job.status)
    try:
        running = held(device, ANNA)
        watched, other = device.submit(BORIS, Gate("b")), device.submit(ANNA, Gate("a"))
        watching = impl.GenerateTab._watch(tab, BORIS, watched)
        assert next(watching)[0] == "waiting"
        watching.close()
        assert watched.status == "cancelled"
        assert other.status == "waiting"
        assert device.running() is not None
        assert not running.opened.is_set()
        assert device.running().status == "running"  # type: ignore[union-attr]
        assert not device.running().is_stopping  # type: ignore[union-attr]
        # Nobody cancels a job by watching it as somebody else.
        watching = impl.GenerateTab._watch(tab, BORIS, other)
        next(watching)
        watching.close()
        assert other.status == "waiting"
        running.opened.set()
        other.work.opened.set()
        until_ended(other)
        assert other.status == "done"
    finally:
        device.close()


def test_every_secret_is_an_owner() -> None:
    law_every_secret_is_an_owner(visitor)


def test_errors_are_plain_words() -> None:
    law_errors_are_plain_words(visitor)


def test_a_closed_page_gives_up_its_own_job() -> None:
    law_a_closed_page_gives_up_its_own_job(generate)


def test_a_toast_of_the_page_itself_stays_as_it_is() -> None:
    """What a handler says to its user goes through unchanged."""

    def handler() -> None:
        raise gr.Error("in words", duration=1.0)

    with pytest.raises(gr.Error, match="in words") as caught:
        visitor.plainly(handler)()
    assert caught.value.duration == 1.0


def test_a_handler_keeps_its_signature_and_its_kind() -> None:
    """Gradio reads the parameters of a handler, and whether it is a generator."""
    import inspect

    def plain(key: str, request: gr.Request) -> str:
        return key

    def generator(key: str) -> Iterator[str]:
        yield key

    assert inspect.signature(visitor.plainly(plain)) == inspect.signature(plain)
    assert not inspect.isgeneratorfunction(visitor.plainly(plain))
    assert inspect.isgeneratorfunction(visitor.plainly(generator))
    assert list(visitor.plainly(generator)("x")) == ["x"]
    with pytest.raises(gr.Error, match="not allowed"):
        visitor.plainly(lambda: (_ for _ in ()).throw(ConfigError("not allowed")).__next__())()


def test_keys_are_long_and_never_the_same() -> None:
    """256 bits, and all that the storage wants of a secret."""
    keys = {visitor.new_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert {len(key) for key in keys} == {43}


@pytest.mark.parametrize(
    "data", [None, 5, "x", [], ["id"], {}, {"id": None}, {"id": [1]}, {"x": "y"}]
)
def test_a_click_without_words_says_nothing(data: Any) -> None:
    """What a browser sends as a click may be anything."""
    assert visitor.told(SimpleNamespace(_data=data), "id") == ""  # type: ignore[arg-type]


def test_a_click_says_its_word() -> None:
    """Text, and only the part that is asked for."""
    event: Any = SimpleNamespace(_data={"id": "example:owl", "action": "pick"})
    assert (visitor.told(event, "id"), visitor.told(event, "action")) == ("example:owl", "pick")
