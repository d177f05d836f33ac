"""W2, W3: an owner sees examples and what is his own; a file that is no whole adapter is refused and leaves nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import app.gallery
from app.gallery import ADAPTER, EXAMPLES
from app.storage import Owner, Storage, StorageError
from dreamrie.adapter_open import open_adapter
from dreamrie.diffusion.images import load_image
from tests.app.fence import fenced
from tests.app.test_storage import HOSTILE, KEYS, tree
from tests.contracts.sources import ROOT
from tests.small_adapters import save_small

FILE = "pytorch_lora_weights.safetensors"
BASE = "small"


class Shown(NamedTuple):
    """A gallery with one example, and two owners; Alice has a training and an upload."""

    impl: Any
    gallery: Any
    storage: Storage
    alice: Owner
    bob: Owner
    sound: bytes

    def upload(self, content: bytes, name: str = "mine.safetensors") -> str:
        path = self.storage.incoming / name
        path.write_bytes(content)
        return str(path)

    def file(self, *parts: str) -> Path:
        return self.storage.file(self.alice, "runs", "dog", *parts)


@contextmanager
def shown(impl: Any = app.gallery, base: str = BASE) -> Iterator[Shown]:
    with tempfile.TemporaryDirectory() as place, fenced(Path(place)):
        around = Path(place).resolve()
        sound = save_small(around / "small").read_bytes()
        example = around / "examples" / "puzzle_cube"
        example.mkdir(parents=True)
        (example / ADAPTER).write_bytes(sound)
        (example / "about.json").write_text(json.dumps({"title": "puzzle cube", "step": 300}))
        storage = Storage(around / "data")
        alice, bob = (storage.owner(key) for key in KEYS)
        here = Shown(
            *(impl, impl.Gallery(storage, base, around / "examples"), storage, alice, bob, sound)
        )
        assert storage.create(alice, "runs", "Dog") == "dog"
        train(here)
        assert (
            here.gallery.add_upload(alice, here.upload(sound), "Found it").id == "upload:found-it"
        )
        yield here


def train(here: Shown) -> None:
    """What a training with scores at the steps 0, 100 and 200 leaves; 100 is the best."""
    for step in (0, 100, 200):
        folder = here.file("scored", f"step-{step:06d}")
        folder.mkdir(parents=True)
        (folder / "pictures.png").write_bytes(b"sheet")
        if step:
            (folder / FILE).write_bytes(here.sound)
    here.file("best").mkdir()
    here.file("best", FILE).write_bytes(here.sound)
    here.file("best", "best.json").write_text(json.dumps({"step": 100, "reason": "why"}))
    here.file("samples").mkdir()
    for step in (0, 100, 200):
        here.file("samples", f"step-{step:06d}-0.png").write_bytes(b"sample")
    here.file("app.json").write_text(json.dumps({"title": "My  dog\n"}))


def program(raw: bytes) -> bytes:
    return b"\x7fELF" + raw


def damaged(raw: bytes) -> bytes:
    """One bit of the data is another."""
    return raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]


BAD: dict[str, Callable[[bytes], bytes]] = {
    "damaged": damaged,
    "cut": lambda raw: raw[:-100],
    "a program": program,
    "a picture": lambda raw: b"\x89PNG\r\n" + raw,
    "a pickle": lambda raw: b"\x80\x04\x95" + raw,
    "empty": lambda raw: b"",
    "text": lambda raw: b"hello" * 100,
    "a header of 16 EB": lambda raw: b"\xff" * 8 + raw,
}


def law_a_refused_upload_leaves_nothing(impl: Any) -> None:
    """W3: an upload is opened strictly, whatever its suffix says; one that is refused leaves no folder and no file."""
    with shown(impl) as here:
        users = here.storage.root / "users"
        before = tree(users)
        for what, bad in BAD.items():
            with pytest.raises(StorageError) as caught:
                here.gallery.add_upload(here.alice, here.upload(bad(here.sound)), "Spoilt")
            assert str(here.storage.root) not in str(caught.value), what
            assert tree(users) == before, what
        outside = here.storage.root.parent / "small" / FILE
        for path in (str(outside), here.upload(here.sound, "mine.ckpt"), "", "../x"):
            with pytest.raises(StorageError):
                here.gallery.add_upload(here.alice, path, "Spoilt")
            assert tree(users) == before, path
        assert here.gallery.add_upload(here.alice, here.upload(here.sound), "").title == "mine"


def law_an_adapter_of_another_is_unknown(impl: Any) -> None:
    """W2: ids of another's trainings and uploads are unknown, and lists show examples and what is one's own."""
    with shown(impl) as here:
        own = [entry.id for entry in here.gallery.entries(here.alice)]
        assert own == ["example:puzzle_cube", "run:dog", "upload:found-it"]
        assert [entry.id for entry in here.gallery.entries(here.bob)] == ["example:puzzle_cube"]
        for id in (*own[1:], "run:dog@100"):
            assert here.gallery.entry(here.alice, id).id == id
            for call in (here.gallery.entry, here.gallery.spectrum):
                with pytest.raises(StorageError):
                    call(here.bob, id)
        with pytest.raises(StorageError):
            here.gallery.checkpoints(here.bob, "dog")


def law_what_cannot_be_used_says_why(impl: Any) -> None:
    """A damaged file, or one for another base model, stays in the list with the reason, which tells no path."""
    with shown(impl) as here:
        assert [entry.usable for entry in here.gallery.entries(here.alice)] == ["", "", ""]
        here.file("best", FILE).write_bytes(damaged(here.sound))
        found = here.gallery.entry(here.alice, "run:dog")
        assert "digest" in found.usable
        assert str(here.storage.root) not in found.usable
        with pytest.raises(StorageError, match="digest"):
            here.gallery.spectrum(here.alice, "run:dog")
    with shown(impl, base="/home/me/models/other-model") as here:
        for entry in here.gallery.entries(here.alice):
            assert entry.usable == "it was made for small, and the model here is other-model"
    with shown(impl, base="mirror/small") as here:
        assert here.gallery.entry(here.alice, "run:dog").usable == ""


def law_a_spectrum_is_that_of_the_dense_change(impl: Any) -> None:
    """Singular values of every layer, the largest first, are those of its dense matrix, to 1e-6 of the largest."""
    with shown(impl) as here:
        found = here.gallery.spectrum(here.alice, "upload:found-it")
        changes = open_adapter(here.gallery.entry(here.alice, "upload:found-it").path).changes
        assert len(found) == len(changes) == 3
        for (_, change), values in zip(sorted(changes.items()), found, strict=True):
            dense = change.left.double().flatten(1) @ change.right.double().flatten(1)
            wanted = torch.linalg.svdvals(dense)[: len(values)]
            assert float(wanted[0]) > 1.5 * float(wanted[1])
            torch.testing.assert_close(
                torch.tensor(values, dtype=torch.float64),
                wanted,
                rtol=0,
                atol=1e-6 * float(wanted[0]),
            )


LAWS = (
    *(law_a_refused_upload_leaves_nothing, law_an_adapter_of_another_is_unknown),
    *(law_what_cannot_be_used_says_why, law_a_spectrum_is_that_of_the_dense_change),
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_gallery_keeps_its_laws(law: Callable[[Any], None]) -> None:
    law(app.gallery)


def test_a_training_offers_its_best_step_and_every_scored_one() -> None:
    with shown() as here:
        found = here.gallery.entry(here.alice, "run:dog")
        assert (found.title, found.trigger, found.step) == ("My dog", "a sks øwl", 100)
        assert found.note == "best of 2 scorings, step 100"
        assert found.rank == open_adapter(found.path).rank_stored
        assert found.thumbnail == here.file("samples", "step-000100-0.png")
        steps = here.gallery.checkpoints(here.alice, "dog")
        assert [(row.id, row.step, row.note) for row in steps] == [
            ("run:dog@100", 100, "step 100, the best so far"),
            ("run:dog@200", 200, "step 200"),
        ]
        assert steps[1].thumbnail == here.file("scored", "step-000200", "pictures.png")
        for id in ("run:dog@0", "run:dog@300", "example:puzzle_cube@100", "upload:found-it@1"):
            with pytest.raises(StorageError):
                here.gallery.entry(here.alice, id)


def test_a_training_without_scores_offers_its_last_adapter_and_one_without_adapter_nothing() -> (
    None
):
    with shown() as here:
        shutil.rmtree(here.file("best"))
        shutil.rmtree(here.file("scored"))
        assert here.gallery.checkpoints(here.alice, "dog") == []
        with pytest.raises(StorageError, match="no adapter"):
            here.gallery.entry(here.alice, "run:dog")
        assert "run:dog" not in [entry.id for entry in here.gallery.entries(here.alice)]
        here.file(FILE).write_bytes(here.sound)
        found = here.gallery.entry(here.alice, "run:dog")
        assert (found.note, found.step) == ("not yet scored", None)
        assert found.thumbnail == here.file("samples", "step-000200-0.png")


def test_links_in_a_training_lead_nowhere() -> None:
    """A link in a run hides the run; the rest of the list stays."""
    with shown() as here:
        outside = here.storage.root.parent / "small"
        shutil.rmtree(here.file("best"))
        (here.file("best")).symlink_to(outside, target_is_directory=True)
        ids = [entry.id for entry in here.gallery.entries(here.alice)]
        assert ids == ["example:puzzle_cube", "upload:found-it"]
        with pytest.raises(StorageError):
            here.gallery.entry(here.alice, "run:dog")


@pytest.mark.parametrize("kind", ["", "example:", "run:", "upload:", "run:dog@"])
def test_a_hostile_id_is_unknown(kind: str) -> None:
    with shown() as here:
        for name in HOSTILE:
            id = f"{kind}{name}" if isinstance(name, str) else name
            with pytest.raises(StorageError) as caught:
                here.gallery.entry(here.alice, id)
            assert str(here.storage.root) not in str(caught.value)


def test_a_file_that_was_changed_is_read_again() -> None:
    """What is remembered of a file belongs to its version."""
    with shown() as here:
        assert here.gallery.entry(here.alice, "run:dog").usable == ""
        here.file("best", FILE).write_bytes(here.sound[:-1])
        assert here.gallery.entry(here.alice, "run:dog").usable != ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"title": 3, "step": "x"}', "[" * 10**5])
def test_notes_that_cannot_be_read_are_done_without(text: str) -> None:
    """A training is writing them at this moment, or a disk was full."""
    with shown() as here:
        here.file("app.json").write_text(text)
        here.file("best", "best.json").write_text(text)
        assert here.gallery.checkpoints(here.alice, "dog")[0].title == "dog"
        here.gallery.entries(here.alice)


def concepts() -> list[str]:
    return sorted(path.name for path in (ROOT / "examples" / "concepts").iterdir())


@pytest.mark.parametrize("concept", concepts())
def test_an_example_of_the_app_is_whole(concept: str) -> None:
    """Half precision, with digest, layers and fingerprint of the base; pictures open; no path of a machine in it."""
    folder = EXAMPLES / concept
    adapter = open_adapter(folder / ADAPTER)
    assert adapter.has_digest
    assert adapter.dtypes == ("float16",)
    assert {"dreamrie_base_float16", "dreamrie_base_bfloat16"} <= set(adapter.facts)
    assert adapter.facts["base_model"] == "dreamrie/tiny-sd"
    about = json.loads((folder / "about.json").read_text("utf-8"))
    assert about["trigger"] == adapter.facts["instance_prompt"] == f"a sks {about['subject']}"
    assert about["step"] == int(adapter.facts["steps"])
    assert {"title", "reason", "source"} <= set(about)
    assert load_image(folder / "thumbnail.png").size == (64, 64)
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows[1:]]
    assert about["step"] in steps
    for step in steps:
        assert min(load_image(folder / f"step-{step:06d}.webp").size) > 64
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not any(place in content for place in (b"/home/", b"/work/", b"/root/", b"/tmp/"))


def test_the_examples_are_all_there_and_small() -> None:
    assert sorted(path.name for path in EXAMPLES.iterdir()) == concepts()
    assert sum(path.stat().st_size for path in EXAMPLES.rglob("*")) < 4_500_000
