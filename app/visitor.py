"""Who is asking, and errors as messages that a person can use."""

from __future__ import annotations

import functools
import inspect
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import gradio as gr

from app.storage import Owner, Storage
from app.words import plain
from dreamrie.errors import DreamrieError

_log = logging.getLogger(__name__)
_F = TypeVar("_F", bound=Callable[..., Any])
TOAST_S = 12.0
UNKNOWN = "Something went wrong inside the app. The log of the server has the details."


def new_key() -> str:
    """Secret of a browser: who holds it is this user."""
    return secrets.token_urlsafe(32)


def owner_of(storage: Storage, key: object, request: gr.Request | None) -> Owner:
    """Whose request it is.

    Args:
        storage: of the app.
        key: what the browser keeps.
        request: knows who has logged in.

    Returns:
        The owner.

    Raises:
        Error: the page has not yet told who it is.
    """
    name = getattr(request, "username", None)
    if name:
        return storage.owner(f"user:{name}")
    if not isinstance(key, str) or key.startswith("user:"):
        raise gr.Error("The page is still loading. Try again in a second.", duration=TOAST_S)
    return storage.owner(key)


def told(event: gr.EventData, name: str) -> str:
    """What a click says, whatever a browser has sent.

    Args:
        event: of a part of the page.
        name: such as "id".

    Returns:
        "" unless it is text.
    """
    data = getattr(event, "_data", None)
    found = data.get(name) if isinstance(data, dict) else None
    return found if isinstance(found, str) else ""


@contextmanager
def _toasts() -> Iterator[None]:
    """Every error becomes a message in plain words; what is not expected goes to the server's log."""
    try:
        yield
    except gr.Error:
        raise
    except DreamrieError as error:
        raise gr.Error(plain(error, ()), duration=TOAST_S, print_exception=False) from error
    except Exception as error:
        _log.exception("a request failed")
        raise gr.Error(UNKNOWN, duration=TOAST_S, print_exception=False) from error


def plainly(function: _F) -> _F:
    """A handler of the page whose errors are toasts in plain words.

    Args:
        function: handler, or generator.

    Returns:
        The same for gradio, which reads its signature.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with _toasts():
                yield from function(*args, **kwargs)

        return generator  # type: ignore[return-value]

    @functools.wraps(function)
    def handler(*args: Any, **kwargs: Any) -> Any:
        with _toasts():
            return function(*args, **kwargs)

    return handler  # type: ignore[return-value]
