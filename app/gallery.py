"""Adapters that an owner may see: examples, own trainings with their scored steps, own uploads."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from app.fresh import fresh_folder
from app.names import is_file_name
from app.storage import Owner, Storage, StorageError
from app.words import plain
from dreamrie.adapter_file import DIFFUSERS_FILE
from dreamrie.adapter_open import OpenAdapter, open_adapter
from dreamrie.errors import DreamrieError
from dreamrie.files import write_atomic
from dreamrie.lora.comparing import decompose

EXAMPLES = Path(__file__).resolve().parent / "examples"
ADAPTER = "adapter.safetensors"
ABOUT = "about.json"
# As large as adapters of rank 256 for Stable Diffusion 2 are in half precision.
LARGEST_UPLOAD = 400_000_000
LONGEST_TITLE = 60
_ID = re.compile(
    r"(?P<kind>example|run|upload):(?P<name>[a-z0-9][a-z0-9_-]{0,39})(?:@(?P<step>[0-9]{1,7}))?"
)
_SCORED_STEP = re.compile(r"step-([0-9]{6,7})")
_SAMPLE = re.compile(r"step-([0-9]{6,7})-0\.png")
_SMALL_FILE = 1_000_000
_MOST_KNOWN = 256

EntryKind = Literal["example", "run", "upload"]


@dataclass(frozen=True)
class Entry:
    """An adapter that can be chosen.

    Attributes:
        id: "example:pumpkin", "run:dog-2", "run:dog-2@300" (a scored step), "upload:name".
        title: for people.
        trigger: prompt that calls the concept; "" if the file names none.
        kind: where it comes from.
        path: adapter file.
        thumbnail: a picture of the concept, if there is one.
        rank: columns that are stored.
        note: which step it is and why.
        step: of the training, if known.
        usable: "" or the reason why it cannot be used on the present base model.
    """

    id: str
    title: str
    trigger: str
    kind: EntryKind
    path: Path
    thumbnail: Path | None
    rank: int
    note: str
    step: int | None
    usable: str


@dataclass(frozen=True)
class _Known:
    """What was found when a file was last read; `problem` is "" for one that is whole."""

    facts: Mapping[str, str]
    rank: int
    problem: str
    spectrum: tuple[tuple[float, ...], ...]


class Gallery:
    """What an owner may choose from; several threads may use it.

    Args:
        storage: of the app.
        base: resolved id of the present base model.
        examples: folder of trained examples, which everybody sees.
    """

    def __init__(self, storage: Storage, base: str, examples: Path = EXAMPLES) -> None:
        self._storage = storage
        self._base = base
        self._examples = examples
        self._known: OrderedDict[tuple[str, int, int], _Known] = OrderedDict()
        self._lock = threading.Lock()

    def entries(self, owner: Owner) -> list[Entry]:
        """Everything that an owner may choose from.

        Args:
            owner: who looks.

        Returns:
            Examples by name, then own trainings and uploads, newest first. One that is damaged or of another base
            model says so in `usable`; a training that has no adapter yet is left out.
        """
        found = [
            self._example(folder.name)
            for folder in sorted(self._examples.glob("*"))
            if (folder / ADAPTER).is_file()
        ]
        for name in self._storage.names(owner, "runs"):
            # Removed meanwhile, or with a link inside, which no training makes.
            with contextlib.suppress(StorageError):
                found += self._of_run(owner, name)
        for name in self._storage.names(owner, "uploads"):
            with contextlib.suppress(StorageError):
                found.append(self._upload(owner, name))
        return found

    def entry(self, owner: Owner, id: str) -> Entry:
        """One adapter.

        Args:
            owner: who asks.
            id: see `Entry`.

        Returns:
            What `entries` or `checkpoints` would say of it.

        Raises:
            StorageError: there is none, as far as this owner can know.
        """
        parts = _ID.fullmatch(id) if isinstance(id, str) else None
        unknown = StorageError("there is no such adapter among the examples and your own.")
        if parts is None or (parts["step"] and parts["kind"] != "run"):
            raise unknown
        name = parts["name"]
        if parts["kind"] == "example":
            if name not in {folder.name for folder in self._examples.glob("*")}:
                raise unknown
            return self._example(name)
        if parts["kind"] == "upload":
            return self._upload(owner, name)
        if parts["step"] is None:
            found = next(self._of_run(owner, name), None)
        else:
            steps = self.checkpoints(owner, name)
            found = next((row for row in steps if row.step == int(parts["step"])), None)
        if found is None:
            raise StorageError(f"the training {name} has no adapter of this kind yet.")
        return found

    def checkpoints(self, owner: Owner, run: str) -> list[Entry]:
        """The scored steps of a training.

        Args:
            owner: whose.
            run: its name.

        Returns:
            Those that have an adapter, by step.

        Raises:
            StorageError: there is no such training.
        """
        title = self._title_of_run(owner, run)
        chosen = self._best(owner, run)[0]
        found = []
        for step, folder in self._scored(owner, run):
            path = self._storage.file(owner, "runs", run, "scored", folder, DIFFUSERS_FILE)
            if path.is_file():
                note = f"step {step}" + (", the best so far" if step == chosen else "")
                about = self._entry(f"run:{run}@{step}", "run", title, path, note, step)
                picture = self._storage.file(owner, "runs", run, "scored", folder, "pictures.png")
                found.append(replace(about, thumbnail=_if_there(picture)))
        return found

    def add_upload(self, owner: Owner, upload: str, title: str) -> Entry:
        """Take an adapter file in that somebody has uploaded.

        Args:
            owner: whose it will be.
            upload: path as the page gives it.
            title: for people; "": the name of the file.

        Returns:
            The new entry; it may be for another base model, see `usable`.

        Raises:
            StorageError: it is no upload, or no whole, plain LoRA; nothing of it is left.
        """
        title = _title(title) or _title(Path(str(upload)).stem) or "adapter"
        try:
            with fresh_folder(self._storage, owner, "uploads", title) as name:
                (received,) = self._storage.receive(
                    *(owner, "uploads", name, [upload]),
                    max_bytes=LARGEST_UPLOAD,
                    max_files=1,
                    suffixes=frozenset({".safetensors"}),
                )
                path = self._storage.file(owner, "uploads", name, ADAPTER)
                self._storage.file(owner, "uploads", name, received).rename(path)
                known = self._read(path)
                if known.problem:
                    raise StorageError(f"{title} cannot be used: {known.problem}")
                about = self._storage.file(owner, "uploads", name, ABOUT)
                write_atomic(about, json.dumps({"title": title}).encode())
        except OSError as error:
            raise StorageError(f"{title} could not be kept: {error.strerror}.") from error
        return self._upload(owner, name)

    def spectrum(self, owner: Owner, id: str) -> list[list[float]]:
        """How strong the directions of an adapter are.

        Args:
            owner: who asks.
            id: see `Entry`.

        Returns:
            For each layer, by name, its singular values, the largest first.

        Raises:
            StorageError: there is no such adapter, or it is damaged.
        """
        entry = self.entry(owner, id)
        known = self._read(entry.path)
        if known.problem:
            raise StorageError(f"{entry.title} cannot be used: {known.problem}")
        return [list(values) for values in known.spectrum]

    # ------------------------------------------------------------------------------------------------------ entries

    def _example(self, name: str) -> Entry:
        folder = self._examples / name
        about = _table(folder / ABOUT)
        step = about.get("step")
        found = self._entry(
            *(f"example:{name}", "example", str(about.get("title") or name.replace("_", " "))),
            *(folder / ADAPTER, "an example", step if isinstance(step, int) else None),
        )
        return replace(found, thumbnail=_if_there(folder / "thumbnail.png"))

    def _upload(self, owner: Owner, name: str) -> Entry:
        path = self._storage.file(owner, "uploads", name, ADAPTER)
        about = _table(self._storage.file(owner, "uploads", name, ABOUT))
        found = self._entry(
            f"upload:{name}", "upload", _title(about.get("title")) or name, path, "your file", None
        )
        return found

    def _of_run(self, owner: Owner, name: str) -> Iterator[Entry]:
        """The best adapter of a training, else its last, else nothing."""
        title = self._title_of_run(owner, name)
        step, count = self._best(owner, name)
        best = self._inside(owner, name, "best", DIFFUSERS_FILE)
        last = self._inside(owner, name, DIFFUSERS_FILE)
        if step is not None and best is not None:
            scorings = "scoring" if count == 1 else "scorings"
            note = f"best of {count} {scorings}, step {step}"
            found = self._entry(f"run:{name}", "run", title, best, note, step)
        elif last is not None:
            found = self._entry(f"run:{name}", "run", title, last, "not yet scored", None)
            steps = self._read(last).facts.get("steps", "")
            if steps.isdecimal() and len(steps) < 8:
                note = f"step {int(steps)}, not yet scored"
                found = replace(found, step=int(steps), note=note)
        else:
            return
        yield replace(found, thumbnail=self._sample(owner, name, found.step))

    def _entry(
        self, id: str, kind: EntryKind, title: str, path: Path, note: str, step: int | None
    ) -> Entry:
        known = self._read(path)
        trigger = _title(known.facts.get("instance_prompt", ""), 200)
        usable = f"it cannot be used: {known.problem}" if known.problem else self._misfit(known)
        return Entry(id, title, trigger, kind, path, None, known.rank, note, step, usable)

    def _misfit(self, known: _Known) -> str:
        """Why an adapter does not go with the present base model. Weights are compared when it is loaded."""
        named = known.facts.get("base_model", "")
        # Mirrors have the last part in common, and folders of this machine are nobody's business.
        ours, theirs = (re.split(r"[\\/]", text)[-1] for text in (self._base, named))
        if not named or ours.lower() == theirs.lower():
            return ""
        return f"it was made for {_title(theirs)}, and the model here is {ours}"

    # -------------------------------------------------------------------------------------------------------- runs

    def _inside(self, owner: Owner, run: str, *parts: str) -> Path | None:
        """A file of a run, if it is there."""
        return _if_there(self._storage.file(owner, "runs", run, *parts))

    def _title_of_run(self, owner: Owner, run: str) -> str:
        about = _table(self._storage.file(owner, "runs", run, "app.json"))
        return _title(about.get("title")) or run

    def _best(self, owner: Owner, run: str) -> tuple[int | None, int]:
        """Step in `best/`, and how many steps with an adapter were scored."""
        step = _table(self._storage.file(owner, "runs", run, "best", "best.json")).get("step")
        count = sum(number > 0 for number, _ in self._scored(owner, run))
        return (step if isinstance(step, int) else None), count

    def _scored(self, owner: Owner, run: str) -> list[tuple[int, str]]:
        names = _listed(self._storage.file(owner, "runs", run, "scored"))
        found = [(_SCORED_STEP.fullmatch(name), name) for name in names]
        return sorted((int(match[1]), name) for match, name in found if match)

    def _sample(self, owner: Owner, run: str, step: int | None) -> Path | None:
        """The picture drawn nearest to a step; the step 0 shows the base model."""
        names = _listed(self._storage.file(owner, "runs", run, "samples"))
        steps = {int(m[1]): m[0] for name in names if (m := _SAMPLE.fullmatch(name))}
        steps.pop(0, None)
        if not steps:
            return None
        wanted = max(steps) if step is None else step
        nearest = min(steps, key=lambda drawn: (abs(drawn - wanted), drawn))
        return self._inside(owner, run, "samples", steps[nearest])

    # ------------------------------------------------------------------------------------------------------- files

    def _read(self, path: Path) -> _Known:
        """Open a file strictly, once for each of its versions."""
        try:
            about = path.stat()
        except OSError:
            return _Known({}, 0, "its file is missing.", ())
        stamp = (str(path), about.st_mtime_ns, about.st_size)
        with self._lock:
            if stamp in self._known:
                self._known.move_to_end(stamp)
                return self._known[stamp]
        found = _examined(path)
        with self._lock:
            self._known[stamp] = found
            while len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        return found


def _examined(path: Path) -> _Known:
    try:
        adapter: OpenAdapter = open_adapter(path)
        spectrum = tuple(
            tuple(decompose(change).s.tolist()) for _, change in sorted(adapter.changes.items())
        )
    except DreamrieError as error:
        return _Known({}, 0, plain(error, [path.parent]), ())
    except MemoryError:
        return _Known({}, 0, "it needs more memory than there is.", ())
    return _Known(adapter.facts, adapter.rank_stored, "", spectrum)


def _table(path: Path) -> dict[str, Any]:
    """A small file of JSON, or nothing: a training may be writing it for the first time."""
    try:
        if path.stat().st_size > _SMALL_FILE:
            return {}
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if is_file_name(entry.name))
    except OSError:
        return []


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _title(text: object, longest: int = LONGEST_TITLE) -> str:
    """Text of somebody as one printable line; "" if it is none."""
    if not isinstance(text, str):
        return ""
    words = "".join(c if c.isprintable() else " " for c in text[: 4 * longest]).split()
    return " ".join(words)[:longest].strip()
