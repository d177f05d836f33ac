"""The plan of the convergence bench, its jobs and its records: what is trained first, and that nothing is lost."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from benchmarks.convergence import pool
from benchmarks.convergence.__main__ import FILES, budget_of, cells_of, read_options
from benchmarks.convergence.methods import (
    DEFAULT,
    Method,
    grid,
    grid_of,
    parse_method,
    start_steps,
    usual_momentum,
)
from benchmarks.convergence.plan import (
    CONCEPTS,
    PARTS,
    RANKS,
    SEEDS,
    TEST,
    TUNING,
    Budget,
    Cell,
    best_cells,
    missing,
    plan,
    setting_of,
    sweep_plan,
)
from benchmarks.convergence.pool import jobs_of
from benchmarks.convergence.records import Records, read_records
from benchmarks.convergence.subjects import LOI_BATCHES, PICTURES, Shelf
from benchmarks.convergence.training import OutOfTimeError
from dreamrie.optimizer_table import OPTIMIZERS


def test_every_concept_is_either_tuned_on_or_tested_on() -> None:
    assert sorted(CONCEPTS) == sorted(path.name for path in PICTURES.iterdir())
    assert not set(TUNING) & set(TEST)
    assert "pumpkin" in TUNING  # the demo was tuned on it


def test_a_grid_covers_two_decades_from_its_middle_outwards() -> None:
    assert grid(1e-2, 5) == [1e-2, 3.16e-2, 3.16e-3, 1e-1, 1e-3]
    seven = grid(1.0)
    assert len(seven) == 7
    assert (min(seven), max(seven)) == (0.1, 10.0)
    assert grid(3.0, 1) == [3.0]


def test_names_of_methods() -> None:
    """Optimizer and start: the usual start where none is named."""
    assert parse_method("riemannion") == Method("riemannion", "riemannion", "loi")
    assert parse_method("adamw+pissa") == Method("adamw+pissa", "adamw", "pissa")
    mapped = Method("riemannion:namo", "riemannion", "loi", "namo")
    assert parse_method("riemannion:namo") == mapped
    full = Method("riemannion@0:namo+orthonormal", "riemannion", "orthonormal", "namo", 0.0)
    assert parse_method("riemannion@0:namo+orthonormal") == full
    assert parse_method("adamw/dora") == Method("adamw/dora", "adamw", "default", layer="dora")
    turned = Method("muon+gaussian/rslora", "muon", "gaussian", layer="rslora")
    assert parse_method("muon+gaussian/rslora") == turned
    assert parse_method("adamw@0.5") == Method("adamw@0.5", "adamw", "default", None, 0.5)
    assert parse_method("riemannion").start_scale(4, 0.02) == pytest.approx(0.002)
    assert parse_method("imuon").start_scale(4, 0.02) == pytest.approx(0.02)
    assert parse_method("adamw+loi").start_scale(4, 0.02) == pytest.approx(0.05)
    assert grid_of(parse_method("adamw"), {"adamw": 0.5}, 1) == [0.5]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adam", "no optimizer 'adam'"),
        ("adamw:namo", "spectral map 'namo'"),
        ("riemannion:sharp", "spectral map 'sharp'"),
        ("adamw+best", "wants the start 'best'; there are loi, "),
        ("riemannion+default", "cannot go on from"),
        ("lorafa+loi", "cannot go on from"),
        ("adamw/lora", "wants the layer 'lora'"),
        ("adamw/", "wants the layer ''"),
        ("muon/dora", "dora does not go with"),
        ("adamw+pissa/dora", "dora does not go with"),
        ("riemannion/rslora", "rslora does not go with"),
        ("adamw@1", "momentum 1; it is written as 0 or as 0.95 is"),
        ("adamw@0.80", "momentum 0.80; it is written as 0 or"),
        ("adamw@.8", "momentum .8; it is written as 0 or"),
        ("muon@0.1.2", "momentum 0.1.2; it is written as 0 or"),
        ("riemannion@0.5", "and is not 0.5, which riemannion has without a word"),
        ("riemannion:namo@0.5", "no optimizer 'riemannion:namo@0.5'"),
    ],
)
def test_a_method_that_cannot_be_is_refused(name: str, words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        parse_method(name)


@pytest.mark.parametrize("part", FILES)
def test_the_results_are_of_methods_with_names(part: str) -> None:
    """A default that changes gives its methods other names; their results must not stay under the old ones."""
    records = read_records([FILES[part]])
    assert records.cells
    assert {parse_method(cell.method).name for cell in records.cells} == {
        cell.method for cell in records.cells
    }
    assert records.facts["momenta"] == {name: usual_momentum(name) for name in OPTIMIZERS}
    assert records.facts["start_steps"] == start_steps()
    assert records.facts["loi_batches"] == LOI_BATCHES


def test_a_plan_that_is_cut_short_is_balanced() -> None:
    """Main rank first, all its seeds; then the other ranks, all of them for each seed; the middle of the grid first."""
    centres = {"adamw": 1e-3, "riemannion+loi": 1e-2}
    cells = plan(list(centres), (4, 2, 8), (0, 1), centres, grid=3)
    assert len(cells) == len(set(cells)) == 2 * 3 * 3 * 2
    stages = list(dict.fromkeys((cell.rank, cell.seed) for cell in cells))
    assert stages == [(4, 0), (4, 1), (2, 0), (8, 0), (2, 1), (8, 1)]
    assert [(cell.method, cell.lr) for cell in cells[:6]] == [
        ("adamw", 1e-3),
        ("riemannion+loi", 1e-2),
        ("adamw", 1e-2),
        ("riemannion+loi", 1e-1),
        ("adamw", 1e-4),
        ("riemannion+loi", 1e-3),
    ]
    rates = {(c.rank, c.seed): {d.lr for d in cells if d[1:4:2] == (c.rank, c.seed)} for c in cells}
    assert len(set(map(frozenset, rates.values()))) == 1


def test_marks_are_where_the_curve_is_read() -> None:
    assert Budget(400, is_curve=True).marks == [50, 100, 150, 200, 300, 400]
    assert Budget(4, is_curve=True).marks == [1, 2, 3, 4]
    assert Budget(400).marks == [400]


def test_only_what_is_missing_is_done() -> None:
    first, second = plan(["adamw"], (4,), (0, 1), grid=1)
    done = {first: {"owl": [1], "robot": [1]}, second: {"owl": [1]}}
    assert missing([first, second], ("owl", "robot"), done) == [(second, ("robot",))]


def test_shared_things_are_made_once_before_the_first_stack_that_needs_them() -> None:
    cells = plan(["adamw", "riemannion+loi", "adamw+loi"], (4, 2), (0,), grid=3)
    jobs = list(jobs_of([(cell, ("owl", "robot")) for cell in cells]))
    shared = [(job.kind, job.cell.rank, job.cell.seed, job.concepts) for job in jobs[:4]]
    assert sorted(shared) == [
        ("rows", 4, 0, ("owl",)),
        ("rows", 4, 0, ("robot",)),
        ("start", 4, 0, ("owl",)),
        ("start", 4, 0, ("robot",)),
    ]
    assert [job.cell for job in jobs if job.kind == "cell"] == cells
    later = [job for job in jobs[4:] if job.kind != "cell"]
    assert [(job.kind, job.cell.rank) for job in later] == [("start", 2), ("start", 2)]
    assert [job.kind for job in jobs].index("cell") == 4
    parts = [job.concepts for job in jobs_of([(cells[0], ("owl", "robot", "teapot"))], 2)]
    assert parts[-2:] == [("owl", "robot"), ("teapot",)]
    both = [Cell(f"adamw+{init}", 4, 1e-2, 0) for init in ("eva", "lora_ga", "pissa")]
    made = [
        job.cell.method
        for job in jobs_of([(cell, ("owl",)) for cell in both])
        if job.kind == "start"
    ]
    assert made == ["adamw+eva", "adamw+lora_ga"]


def test_a_sweep_changes_one_setting_at_the_best_learning_rate() -> None:
    cells = sweep_plan(("decay", "schedule"), {("riemannion+loi", 4): 2e-2}, (0, 1))
    assert {cell[:3] for cell in cells} == {("riemannion+loi", 4, 2e-2)}
    settings = [cell.setting for cell in cells if cell.seed == 0]
    assert settings[:3] == ["", "decay=0.01", "decay=0.1"]
    assert settings[-2:] == ["schedule=constant", "schedule=linear"]
    assert [setting_of(cell) for cell in cells[:2]] == [("", ""), ("decay", "0.01")]
    assert len(cells) == 2 * len(settings)
    cells = sweep_plan(("batches",), {("riemannion+loi", 8): 2e-2}, (0,))
    starts = [job for job in jobs_of([(cell, ("owl",)) for cell in cells]) if job.kind == "start"]
    assert [job.cell.setting for job in starts] == ["", *(cell.setting for cell in cells[1:])]


def _cells(*words: str, tuned: Records | None = None) -> list[Cell]:
    return cells_of(read_options(["run", *words]), tuned or Records())


def test_the_usual_command_is_the_whole_plan() -> None:
    cells = _cells("test", "--seeds", *map(str, SEEDS))
    assert len(cells) == len(DEFAULT) * 7 * len(RANKS) * len(SEEDS)
    with pytest.raises(SystemExit, match="odd"):
        _cells("tuning", "--grid", "6")
    with pytest.raises(SystemExit, match="names no method"):
        _cells("tuning", "--centre", "muon=1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tuning", "--choices", "loss"), "run tuning does not read --choices; that is of curves"),
        (("curves", "--settings", "decay"), "--settings; that is of sweeps"),
        (
            ("sweeps", "--grid", "3"),
            "run sweeps does not read --grid; that is of tuning, test, short",
        ),
        (("curves", "--centre", "muon=1", "--methods", "muon"), "--centre"),
    ],
)
def test_an_option_that_changes_nothing_is_refused(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read_options(["run", *words])
    assert said in capsys.readouterr().err


def test_a_short_training_has_a_third_of_the_steps() -> None:
    def steps(*words: str) -> int:
        return budget_of(read_options(["run", *words])).steps

    assert [steps(part) for part in PARTS] == [200, 200, 200, 200, 67]
    assert steps("short", "--steps", "30") == 30
    # The learning rates are those of the whole length.
    assert _cells("short", "--grid", "1") == _cells("tuning", "--grid", "1")


def test_curves_are_trained_at_the_best_learning_rates_of_the_tuning_file() -> None:
    tuned = Records({}, {"owl": [4000, 3000, 5000, 8000, 100_000]})
    for method, rank, lr, image, loss in (
        ("adamw", 4, 1e-3, 5000, 90_000),
        ("adamw", 4, 1e-2, 6000, 80_000),
        ("adamw", 8, 1e-3, 6000, 90_000),
        ("adamw", 8, 1e-2, 5000, 80_000),
        ("muon", 4, 1e-1, 5000, 80_000),
    ):
        tuned.add(Cell(method, rank, lr, 0), {"owl": [image, 3000, loss, 5000]})
    found = _cells(
        "curves", "--methods", "adamw", "--ranks", "4", "8", "--seeds", "0", "1", tuned=tuned
    )
    # At rank 8 the best score and the best loss are at different learning rates.
    best = {("adamw", 4): 1e-2, ("adamw", 8): 1e-3}
    assert found == best_cells([best, {**best, ("adamw", 8): 1e-2}], (0, 1))
    assert [cell[1:4] for cell in found] == [
        (rank, lr, seed) for seed in (0, 1) for rank, lr in ((4, 1e-2), (8, 1e-3), (8, 1e-2))
    ]
    words = ("curves", "--methods", "adamw", "--ranks", "8", "--choices", "loss")
    assert [cell.lr for cell in _cells(*words, tuned=tuned)] == [1e-2]
    swept = _cells("sweeps", "--methods", "adamw", "--ranks", "4", tuned=tuned)
    # Momentum, start and decay are Riemannion's.
    settings = [cell.setting for cell in swept]
    assert settings[:2] == ["", "schedule=constant"]
    assert {setting.partition("=")[0] for setting in settings} == {"", "schedule", "guidance"}
    with pytest.raises(SystemExit, match=r"run tuning --methods muon --ranks 8"):
        _cells("curves", "--methods", "muon", "--ranks", "8", tuned=tuned)


def _full(facts: dict[str, object]) -> Records:
    """More than is ever trained into one file, with four digits a number."""
    found = Records(facts, {name: [4321, 4321, 4321, 8765, 123456] for name in CONCEPTS})
    for cell in plan([*DEFAULT, "sgd", "muon"], RANKS, SEEDS):
        found.add(cell, {name: [4321] * 4 for name in CONCEPTS})
    return found


def test_records_come_back_and_stay_small(tmp_path: Path) -> None:
    records = _full({"steps": 400, "marks": Budget(400).marks})
    cell = Cell("adamw", 4, 1e-3, 0, "decay=0.1")
    records.add(cell, {"owl": [1, None]})
    records.add(cell, {"robot": [2, 3]})
    path = tmp_path / "new" / "convergence.json"
    records.write(path)
    assert read_records([path]) == records
    assert records.cells[cell] == {"owl": [1, None], "robot": [2, 3]}
    assert path.stat().st_size < 300_000
    assert read_records([tmp_path / "none.json"]) == Records()


def test_trainings_of_other_lengths_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "convergence.json"
    Records({"steps": 400}).write(path)
    with pytest.raises(SystemExit, match="steps 400, now 200"):
        read_records([path]).expect({"steps": 200}, path)
    again = read_records([path])
    again.expect({"steps": 400, "pictures": 22}, path)
    assert again.facts == {"steps": 400, "pictures": 22}


def test_what_lies_on_the_shelf_is_not_made_again(tmp_path: Path) -> None:
    made = []

    def make() -> list[int]:
        made.append(1)
        return [7]

    assert Shelf(tmp_path).get("seven", make) == [7]
    assert Shelf(tmp_path).get("seven", make) == [7]
    assert len(made) == 1


class _Slow:
    """Stands for a stack: trains until the deadline, or fails."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def run(self, cell: Cell, concepts: tuple[str, ...], deadline: float) -> dict[str, list[int]]:
        if self.error is not None:
            raise self.error
        return {name: [1] for name in concepts}


def _worker(error: BaseException | None, deadline: float = float("inf")) -> pool._Worker:
    worker = object.__new__(pool._Worker)
    worker.order = pool.Order("cpu", Budget(), ("owl",), True, deadline, Path())
    worker.facts, worker.known, worker.stack = {"steps": 400}, {}, _Slow(error)  # type: ignore[assignment]
    return worker


JOB = pool.Job("cell", Cell("adamw", 4, 1e-3, 0), ("owl",))


def test_a_worker_does_what_there_is_time_for() -> None:
    """Done; given up half-way; not begun after the deadline, or where it took longer the last time."""
    assert _worker(None)(JOB).content == {"owl": [1]}
    assert _worker(OutOfTimeError())(JOB)[1:] == (None, pytest.approx(0, abs=1), {"steps": 400}, "")
    assert _worker(None, deadline=0.0)(JOB).content is None
    hurried = _worker(None, deadline=time.time() + 50)
    assert hurried(JOB).content is not None
    hurried.known["adamw", 4] = 100.0
    assert hurried(JOB).content is None


@pytest.mark.parametrize("error", [ValueError("no such thing"), SystemExit("no such thing")])
def test_what_fails_is_told_and_the_worker_lives(error: BaseException) -> None:
    """An exit would take the worker along, and its parent would wait for ever."""
    found = _worker(error)(JOB)
    assert found.content is None
    assert "no such thing" in found.failure


def test_a_worker_that_cannot_start_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_settle", lambda: None)
    monkeypatch.setattr(pool, "_WORKERS", [])
    pool.start_worker(pool.Order("nonsense", Budget(), ("owl",), True, 0.0, tmp_path))
    assert "nonsense" in pool.work(JOB).failure


def test_workers_that_do_not_answer_are_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    class Results:
        """One outcome, then silence."""

        count = 0

        def next(self, left: float | None) -> str:
            self.count += 1
            if self.count > 1:
                assert left is not None
                raise multiprocessing.TimeoutError
            return "one"

    assert list(pool._until(Results(), time.time() + 5)) == ["one"]
    assert "given up" in capsys.readouterr().out
