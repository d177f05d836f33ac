"""A sweep on its engine: the killed go on, the failed stop nobody, and nothing is trained twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamrie.errors import ConfigError
from dreamrie.run_folder import lock_folder
from dreamrie.sweeps import engine, plan, running, table
from dreamrie.sweeps.running import Slot
from tests.contracts.sources import ROOT
from tests.mutants import replaced
from tests.sweeps import fake

SLOTS = [Slot("one", {}), Slot("two", {})]
WHOLE = list(range(1, fake.STEPS + 1))
TASKS = {"dreambooth": (fake.MODULE,)}


@contextmanager
def on_forks(folder: Path) -> Iterator[list[fake.Forked]]:
    """Counting trainings in forked processes; the engines that were started."""
    engines: list[fake.Forked] = []
    program = fake.put_program(folder / "program")
    with (
        fake.forked_engine(program, engines) as start,
        replaced(running, start_engine=start, COMMANDS=TASKS),
    ):
        yield engines


def statuses(sweep: plan.Sweep) -> dict[str, tuple[str, int]]:
    """Status and starts of each training."""
    return {row.concept: (row.status, row.starts) for row in table.read_rows(sweep)}


def law_nothing_is_trained_twice(impl: Any, folder: Path) -> None:
    """A killed training goes on, a failing one stops nobody; the same sweep again starts only what has not finished."""
    folder = folder / "sweep"
    sweep = fake.write_sweep(folder, ["refused", "killed", "fine"])
    told: list[tuple[str, str]] = []
    with on_forks(folder) as engines:
        impl.run_sweep(
            sweep, folder / "out", SLOTS, 2, lambda *said: told.append((said[0], said[1].name))
        )
        assert statuses(sweep) == {
            "refused": ("failed", 1),
            "killed": ("finished", 2),
            "fine": ("finished", 1),
        }
        assert fake.trace(sweep.runs[1].folder) == [*WHOLE[:6], *WHOLE[fake.EVERY :]]
        assert fake.trace(sweep.runs[2].folder) == WHOLE
        assert [name for what, name in told if what == "ended"].count("killed") == 1
        adapters = [fake.adapter(run.folder) for run in sweep.runs[1:]]
        assert adapters[0] == adapters[1]
        impl.run_sweep(sweep, folder / "out", SLOTS, 2, lambda *_: None)
        assert engines[1].given == ["refused"]
        assert statuses(sweep)["refused"] == ("failed", 2)
        assert fake.trace(sweep.runs[2].folder) == WHOLE


def law_a_training_is_given_up_after_so_many_kills(impl: Any, folder: Path) -> None:
    """Started once and as often again as allowed; the table says why, and a later sweep tries it again."""
    folder = folder / "sweep"
    sweep = fake.write_sweep(folder, ["doomed"])
    with on_forks(folder) as engines:
        impl.run_sweep(sweep, folder / "out", SLOTS, 2, lambda *_: None)
        (row,) = table.read_rows(sweep)
        assert (row.status, row.starts, len(engines[0].given)) == ("failed", 3, 3)
        assert "killed 3 times" in row.error
        impl.run_sweep(sweep, folder / "out", SLOTS, 0, lambda *_: None)
        assert len(engines[1].given) == 1


# ------------------------------------------------------------------------------------------------------ tests


def test_nothing_is_trained_twice(tmp_path: Path) -> None:
    law_nothing_is_trained_twice(running, tmp_path)


def test_a_training_is_given_up_after_so_many_kills(tmp_path: Path) -> None:
    law_a_training_is_given_up_after_so_many_kills(running, tmp_path)


CHILD = "import sys, tests.app.light; from dreamrie.sweeps import child; child.main(sys.argv[1:])"


# What a library warns about in its own threads is no failure of a sweep, and would leave it without an answer.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_engine_starts_a_killed_worker_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One training kills its worker, one is killed itself: all end as alone, and the first takes no step twice."""
    program = fake.put_program(tmp_path / "program")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{program}")
    monkeypatch.setattr(running, "COMMANDS", TASKS)
    monkeypatch.setattr(running, "CHILD", (sys.executable, "-c", CHILD))
    sweep = fake.write_sweep(tmp_path, ["orphaned", "killed", "fine"])
    running.run_sweep(sweep, tmp_path / "out", SLOTS, 2, lambda *_: None)
    assert statuses(sweep) == {
        "orphaned": ("finished", 2),
        "killed": ("finished", 2),
        "fine": ("finished", 1),
    }
    traces = [fake.trace(run.folder) for run in sweep.runs]
    assert traces == [WHOLE, [*WHOLE[:6], *WHOLE[fake.EVERY :]], WHOLE]
    assert len({fake.adapter(run.folder) for run in sweep.runs}) == 1
    assert not list((tmp_path / "out").glob(".engine-*"))


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    sweep = fake.write_sweep(tmp_path, ["fine"])
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out"), on_forks(tmp_path) as engines:
        with pytest.raises(ConfigError, match="another run is writing"):
            running.run_sweep(sweep, tmp_path / "out", SLOTS, 2, lambda *_: None)
        assert engines == []


def test_a_missing_engine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_NEEDED", ("distributed", "no_such_package"))
    sweep = fake.write_sweep(tmp_path, ["fine"])
    with pytest.raises(
        ConfigError, match=r"no_such_package is not installed(.|\n)*dreamrie\[sweep\]"
    ):
        running.run_sweep(sweep, tmp_path / "out", SLOTS, 2, lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_threads_are_divided_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    assert [slot.environment["OMP_NUM_THREADS"] for slot in running.find_slots(2)] == ["4", "4"]
    assert [slot.environment["OMP_NUM_THREADS"] for slot in running.find_slots(20)] == ["1"] * 20
    assert [slot.name for slot in running.find_slots(None)] == ["CPU 0, threads: 9"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert running.find_slots(2)[1].environment["OMP_NUM_THREADS"] == "3"
    with pytest.raises(ConfigError, match="--workers 0"):
        running.find_slots(0)


def test_each_worker_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the numbering of those that may be used; more workers than GPUs take them in turn."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [slot.environment for slot in running.find_slots(None)] == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "1"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [slot.name for slot in running.find_slots(3)] == ["GPU 4", "GPU 7", "GPU 4"]
    assert len(running.find_slots(1)) == 1
