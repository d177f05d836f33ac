"""A server with a model that draws at once, and a client that talks to it as the page in a browser does."""

from __future__ import annotations

import json
import secrets
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.app.browser import Server, free_port

API = "gradio_api"


@contextmanager
def fake_page(data: Path, *words: str) -> Iterator[Server]:
    """A running app whose pictures are of one color each.

    Args:
        data: its folder.
        words: further flags of `tests.app.fake_server`.
    """
    port = free_port()
    command = [sys.executable, "-m", "tests.app.fake_server", "--data", str(data), *words]
    server = Server(data, data.with_suffix(".log"), port, [*command, "--port", str(port)])
    try:
        server.wait_until_served()
        yield server
    finally:
        server.stop()


class Client:
    """One browser: its secret, its session, the parts of the page and their values.

    Args:
        url: of the page.
        key: its secret; None: a new one.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.http = httpx.Client(base_url=url, timeout=60.0)
        self.key = key or secrets.token_urlsafe(32)
        self.session = uuid.uuid4().hex[:11]
        self.config = self.http.get("config").json()
        self.parts = {part["id"]: part for part in self.config["components"]}
        self.events = [e for e in self.config["dependencies"] if e["backend_fn"]]

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def part(self, elem_id: str) -> int:
        """Number of a part of the page."""
        return next(i for i, part in self.parts.items() if part["props"].get("elem_id") == elem_id)

    def event(self, elem_id: str, kind: str) -> dict[str, Any]:
        """What happens at, for instance, a click on "draw"."""
        wanted = [self.part(elem_id), kind]
        return next(e for e in self.events if wanted in e["targets"])

    def usual(self, event: dict[str, Any], **changes: Any) -> list[Any]:
        """Values of the inputs of an event: those of a page that was just opened, some of them changed.

        Args:
            event: of the page.
            changes: by elem_id, or by what a browser keeps ("dreamrie", "dreamrie_train").
        """
        values = []
        for number in event["inputs"]:
            props = self.parts[number]["props"]
            kept = (props.get("storage_key") or "").replace("-", "_")
            name = props.get("elem_id") or kept or props.get("label")
            value = self.key if kept == "dreamrie" else props.get("value")
            if kept == "dreamrie_train":
                value = props.get("default_value")
            values.append(changes.get(name, value))
        return values

    def join(
        self, event: dict[str, Any], data: list[Any], event_data: Any = None
    ) -> httpx.Response:
        """Ask for an event; the answer comes by `messages`."""
        body = {
            "data": data,
            "fn_index": event["id"],
            "session_hash": self.session,
            "trigger_id": event["targets"][0][0] if event["targets"] else None,
            "event_data": event_data,
        }
        return self.http.post(f"{API}/queue/join", json=body)

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the server says until all that was asked for is done."""
        query = {"session_hash": self.session}
        with self.http.stream("GET", f"{API}/queue/data", params=query) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    message = json.loads(line.removeprefix("data: "))
                    yield message
                    if message["msg"] in {"close_stream", "process_completed"}:
                        return

    def ask(
        self, event: dict[str, Any], data: list[Any], event_data: Any = None
    ) -> list[dict[str, Any]]:
        """Ask, and wait for the end; every message."""
        answer = self.join(event, data, event_data)
        if answer.status_code != 200:
            return [{"msg": "refused", "status": answer.status_code, "words": answer.text}]
        return list(self.messages())

    def click(
        self, elem_id: str, event_data: Any = None, kind: str = "click", **changes: Any
    ) -> Any:
        """Do something on the page; its last message."""
        event = self.event(elem_id, kind)
        return self.ask(event, self.usual(event, **changes), event_data)[-1]

    def upload(self, path: Path, name: str | None = None) -> dict[str, Any]:
        """Send a file as the page does; how the page then speaks of it."""
        with path.open("rb") as file:
            answer = self.http.post(f"{API}/upload", files={"files": (name or path.name, file)})
        (place,) = answer.raise_for_status().json()
        return {"path": place, "orig_name": name or path.name, "meta": {"_type": "gradio.FileData"}}
