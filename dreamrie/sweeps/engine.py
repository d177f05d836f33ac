"""The engine of a sweep, dask.distributed: workers on this machine that are started again when they are killed.

A worker only waits for the training that it has started. When a worker is killed its training sees the end of a pipe,
and the engine hands what it was doing to the worker that takes its place.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from dreamrie.errors import CheckpointError, ConfigError

# Its own messages are about its insides; ours say what happened.
_QUIET = logging.CRITICAL
_HOST = "127.0.0.1"
_CLOSE_S = 15.0
_NEEDED = ("distributed", "cryptography")


class Engine(Protocol):
    """Workers that run programs, one at a time each."""

    def give(self, slot: int, words: Sequence[str]) -> None:
        """Let a worker start a program, and wait for it.

        Args:
            slot: of a worker that has none.
            words: command line.
        """
        ...

    def wait(self) -> tuple[int, int | None]:
        """Wait for the next program to end.

        Returns:
            Slot of its worker, and its exit code: negative, the signal that killed it; None: its worker was killed
            more often than allowed.
        """
        ...


class _Dask:
    """Implements `Engine` for a client of dask.distributed."""

    def __init__(self, client: Any) -> None:
        from distributed import as_completed

        self._client, self._flying = client, as_completed()
        self._slots: dict[str, int] = {}
        self._given = 0

    def give(self, slot: int, words: Sequence[str]) -> None:
        """Submit it to the one worker that has this slot, also after that was started again."""
        self._given += 1
        with _told():
            future = self._client.submit(
                subprocess.call,
                list(words),
                # Nobody writes into it: the program sees its end when the worker is gone.
                stdin=subprocess.PIPE,
                # Ctrl-C at a terminal is for the sweep, whose end stops workers and programs.
                start_new_session=True,
                key=f"training-{self._given}",
                resources={_resource(slot): 1},
                pure=False,
            )
        self._slots[future.key] = slot
        self._flying.add(future)

    def wait(self) -> tuple[int, int | None]:
        """The next of those that fly."""
        from distributed import KilledWorker

        with _told():
            future = next(self._flying)
        slot = self._slots.pop(future.key)
        if future.status != "error":
            return slot, int(future.result())
        error = future.exception()
        if isinstance(error, KilledWorker):
            return slot, None
        raise CheckpointError(f"a training cannot be started: {error}")


def _resource(slot: int) -> str:
    """What only the worker of a slot has; its name and address change when it is started again."""
    return f"slot-{slot}"


def check_engine() -> None:
    """Say before any work that the engine is missing.

    Raises:
        ConfigError: it is not installed.
    """
    missing = [name for name in _NEEDED if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} is not installed, which sweeps need\n"
            "  where: python -m dreamrie sweep\n"
            '  what to do: pip install "dreamrie[sweep]", or in a checkout pip install -e ".[sweep]"'
        )


@contextmanager
def start_engine(
    environments: Sequence[Mapping[str, str]], scratch: Path, restarts: int
) -> Iterator[Engine]:
    """Workers on this machine, which only those who were born with their keys can talk to.

    Args:
        environments: variables of each worker and its programs.
        scratch: folder for files of the engine; made if missing.
        restarts: how often a program is started again whose worker was killed.

    Yields:
        The engine; at the end workers are gone, and programs are told to stop.

    Raises:
        CheckpointError: the workers cannot be started or reached.
    """
    import dask
    from distributed import Client, Nanny, Scheduler, Security, SpecCluster

    security = Security.temporary()
    common = {"host": _HOST, "dashboard": False, "security": security}
    workers = {
        slot: {
            "cls": Nanny,
            "options": {
                **common,
                "nthreads": 1,
                "resources": {_resource(slot): 1},
                "env": dict(environment),
                # It would look at the worker, and not at the training.
                "memory_limit": 0,
                "local_directory": str(scratch),
                "silence_logs": _QUIET,
            },
        }
        for slot, environment in enumerate(environments)
    }
    address = {"port": 0, "dashboard_address": f"{_HOST}:0"}
    scheduler = {"cls": Scheduler, "options": {**common, **address}}
    settings = {
        "distributed.scheduler.allowed-failures": restarts,
        # Variables for arrays in workers; a training is to have what it would have alone.
        "distributed.nanny.pre-spawn-environ": {},
        # Its web pages show what our table shows, to everybody on the machine.
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
    }
    with _silenced("distributed"), dask.config.set(settings):
        with _told():
            cluster = SpecCluster(
                workers=workers, scheduler=scheduler, security=security, silence_logs=_QUIET
            )
        client = None
        try:
            with _told():
                client = Client(cluster, security=security)
            yield _Dask(client)
        finally:
            _close(cluster, client)


@contextmanager
def _told() -> Iterator[None]:
    """Errors of the engine itself, not of its user, become messages."""
    try:
        yield
    except (OSError, TimeoutError) as error:
        raise CheckpointError(f"the engine of the sweep cannot go on: {error}") from error


def _close(cluster: Any, client: Any) -> None:
    """End the workers; those that do not end in time are killed, with whom nothing is lost: they only wait."""
    pids = [worker.pid for worker in cluster.workers.values() if getattr(worker, "pid", None)]
    try:
        if client is not None:
            client.close(timeout=_CLOSE_S)
        cluster.close(timeout=_CLOSE_S)
    except TimeoutError:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Keep the messages of a library to itself."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(_QUIET)
    try:
        yield
    finally:
        logger.setLevel(before)
