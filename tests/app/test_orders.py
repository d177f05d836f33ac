"""From what somebody asks for to pictures: which ones, with which settings, and that the files say so."""

from __future__ import annotations

import json
import threading
import zipfile
from pathlib import Path
from typing import Any, cast

import pytest

from app.asked import AskError, Generate, Limits, asked
from app.gallery import Entry
from app.orders import LOOKS, SEEDS, DrawWork, Look, plan, sizes
from app.storage import Storage
from tests.app.fakes import FACTS, FakeDrawing, settings_in

LIMITS = Limits(sizes=(32, 64, 96), max_pixels=64 * 96)


def entry(name: str = "owl", rank: int = 8) -> Entry:
    path = Path("/somewhere/secret") / name / "adapter.safetensors"
    about = ("an example", 300, "")
    return Entry(f"example:{name}", name, f"a sks {name}", "example", path, None, rank, *about)


def wanted(*names: str, scale: float = 0.75, **changes: Any) -> Generate:
    usual = {"prompt": "a sks owl", "steps": 4, "guidance": 4.0, "width": 64, "height": 96}
    adapters = [{"id": f"example:{name}", "scale": scale, "rank": 3} for name in names]
    return asked(Generate, {**usual, "adapters": adapters, "seed": 7, **changes}, LIMITS)


def planned(
    look: Look, *names: str, rank: int = 8, **changes: Any
) -> tuple[list[dict[str, Any]], int]:
    rows, columns = plan(wanted(*names, **changes), [entry(n, rank) for n in names], look, "base/x")
    return [{"caption": caption, **settings} for caption, settings in rows], columns


def test_base_and_adapter_stand_side_by_side_with_one_seed() -> None:
    """Pairs, two columns, seeds that count up."""
    rows, columns = planned("beside the base model", "owl", count=3)
    assert columns == 2
    assert [row["seed"] for row in rows] == [7, 7, 8, 8, 9, 9]
    assert [len(row["adapters"]) for row in rows] == [0, 1] * 3
    assert rows[0]["caption"] == "base model · seed 7"
    assert rows[1]["caption"] == "with owl · seed 7"
    assert rows[1]["adapters"][0]["scale"] == 0.75
    assert rows[1]["adapters"][0]["rank"] == 3


def test_two_concepts_in_one_picture() -> None:
    rows, columns = planned("by itself", "owl", "robot", count=2)
    assert columns == 2
    assert [[use["title"] for use in row["adapters"]] for row in rows] == [["owl", "robot"]] * 2
    assert rows[0]["caption"] == "with owl and robot · seed 7"


@pytest.mark.parametrize("look", LOOKS[:2])
def test_without_a_concept_the_base_model_draws(look: Look) -> None:
    rows, columns = planned(look, count=6)
    assert [row["adapters"] for row in rows] == [[]] * 6
    assert columns == 4
    rows, _ = planned("base model only", "owl")
    assert [row["adapters"] for row in rows] == [[]]


def test_a_strip_of_strengths_starts_at_the_base_model() -> None:
    """One seed, rising strength, 0 without any adapter, 1 as trained."""
    rows, columns = planned("at rising strength", "owl", count=5)
    assert columns == len(rows)
    assert {row["seed"] for row in rows} == {7}
    scales = [row["adapters"][0]["scale"] if row["adapters"] else 0.0 for row in rows]
    assert scales[0] == 0.0
    assert 1.0 in scales
    assert scales == sorted(set(scales))
    assert rows[0]["adapters"] == []


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(1, [1]), (4, [4, 3, 2, 1]), (8, list(range(8, 0, -1))), (64, [64, 35, 20, 11, 6, 3, 2, 1])],
)
def test_a_strip_of_ranks_falls_from_all_to_one(rank: int, expected: list[int]) -> None:
    """At most eight pictures, evenly on a logarithmic scale; nothing but the rank differs."""
    rows, columns = planned("at falling rank", "owl", rank=rank)
    assert [row["adapters"][0]["rank"] for row in rows] == expected
    assert columns == len(rows) <= 8
    assert {row["adapters"][0]["scale"] for row in rows} == {0.75}
    assert rows[0]["caption"] == f"rank {rank} of {rank} · seed 7"


@pytest.mark.parametrize("look", ["at rising strength", "at falling rank"])
@pytest.mark.parametrize("names", [(), ("owl", "robot")])
def test_a_strip_needs_one_concept(look: Look, names: tuple[str, ...]) -> None:
    with pytest.raises(AskError, match=f"exactly one, {len(names)} are chosen"):
        planned(look, *names)


def test_seeds_wrap_and_a_free_seed_is_said() -> None:
    """The largest seed is followed by 0; without a seed one is drawn, and the settings name it."""
    rows, _ = planned("by itself", "owl", seed=SEEDS - 1, count=2)
    assert [row["seed"] for row in rows] == [SEEDS - 1, 0]
    drawn = {planned("by itself", "owl", seed=None)[0][0]["seed"] for _ in range(20)}
    assert len(drawn) > 10
    assert all(0 <= seed < SEEDS for seed in drawn)


def work(storage: Storage, drawing: Any, **changes: Any) -> DrawWork:
    rows, columns = plan(wanted("owl", **changes), [entry()], "beside the base model", "base/x")
    owner = storage.owner("k" * 20)
    return DrawWork(storage, owner, cast(Any, drawing), rows, columns)


def test_the_outcome_is_files_that_say_how_they_were_made(tmp_path: Path) -> None:
    """Each picture carries its settings, the archive all of them; no path is in any of it."""
    storage = Storage(tmp_path)
    outcome = work(storage, FakeDrawing(), count=2).run(lambda p: None, threading.Event())
    assert (outcome.columns, outcome.seed, len(outcome.pictures)) == (2, 7, 4)
    for picture in outcome.pictures:
        assert settings_in(picture.file) == picture.settings
        assert picture.settings["prompt"] == "a sks owl"
        assert "secret" not in json.dumps(picture.settings)
    assert outcome.pictures[1].settings["adapters"] == [
        {"id": "example:owl", "title": "owl", "scale": 0.75, "rank": 3}
    ]
    with zipfile.ZipFile(outcome.archive) as packed:
        assert packed.testzip() is None
        assert packed.namelist() == ["00.png", "01.png", "02.png", "03.png", "settings.json"]
        listed = json.loads(packed.read("settings.json"))
    assert [row["seed"] for row in listed] == [7, 7, 8, 8]
    assert "secret" not in json.dumps(listed)


def test_the_process_gets_places_and_the_settings_do_not(tmp_path: Path) -> None:
    """The adapter's file is told to the process that draws, and to nobody else."""
    orders: list[dict[str, Any]] = []

    class Noting(FakeDrawing):
        def draw(self, order: dict[str, Any], report: Any, cancelled: Any) -> Any:
            orders.append(order)
            return super().draw(order, report, cancelled)

    work(Storage(tmp_path), Noting()).run(lambda p: None, threading.Event())
    used = orders[0]["pictures"][1]
    assert used["adapters"] == [{"path": str(entry().path), "scale": 0.75, "rank": 3}]
    assert used["guidance"] == 4.0
    assert (used["width"], used["height"]) == (64, 96)
    assert "path" not in json.dumps(used["settings"])


def test_what_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    storage, stopped = Storage(tmp_path), threading.Event()
    stopped.set()
    with pytest.raises(InterruptedError):
        work(storage, FakeDrawing()).run(lambda p: None, stopped)
    assert storage.names(storage.owner("k" * 20), "pictures") == []


def test_old_pictures_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last orders are kept, the newest among them."""
    monkeypatch.setattr("app.orders._KEPT_ORDERS", 3)
    storage = Storage(tmp_path)
    for number in range(5):
        work(storage, FakeDrawing(), prompt=f"p{number}").run(lambda p: None, threading.Event())
    assert storage.names(storage.owner("k" * 20), "pictures") == ["p4", "p3", "p2"]


def test_sides_are_what_the_model_can_draw() -> None:
    """Half to one and a half of its own, in multiples of its unit, its own among them."""
    found = sizes(FACTS)
    assert found == (32, 40, 48, 56, 64, 72, 80, 88, 96)
    assert all(side % FACTS.unit == 0 for side in found)
    assert FACTS.resolution in found
