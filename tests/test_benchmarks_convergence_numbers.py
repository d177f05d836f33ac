"""The numbers of the convergence bench against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks.convergence import plots
from benchmarks.convergence.gains import (
    Series,
    best_rates,
    collect,
    combined,
    common_units,
    draws,
    gains,
    interval,
    places_of,
    series,
)
from benchmarks.convergence.plan import Cell
from benchmarks.convergence.records import Records
from benchmarks.convergence.report import (
    best_of,
    draw_and_print,
    grids_of,
    main_rows,
    plane,
    trained,
)
from benchmarks.convergence.targets import plateau, row, steps_to, transfer

# Image similarity 0.4 of 0.8, prompts followed: shares 0.5 and 1, harmonic mean 2/3.
BASE = [4000, 3000, 5000, 8000, 100_000]
ZERO = 2 / 3


def test_the_combined_score_is_the_harmonic_mean_of_two_shares() -> None:
    assert combined(0.4, 0.3, 0.8, 0.3) == pytest.approx(ZERO)
    assert combined(0.8, 0.15, 0.8, 0.3) == pytest.approx(2 / 3)
    # Neither share counts for more than 1, and one that is lost takes everything.
    assert combined(0.9, 0.6, 0.8, 0.3) == 1.0
    assert combined(0.8, -0.1, 0.8, 0.3) == 0.0
    assert combined(-0.1, -0.1, 0.8, 0.3) == 0.0


def test_gains_begin_at_the_base_model_and_a_blank_picture_gains_nothing() -> None:
    # Shares 0.75 and 1: 6/7; then broken; then 0.75 and 0.5: 0.6.
    scores = [6000, 3000, 90_000, None, None, None, 6000, 1500, 70_000, 4000]
    assert gains(scores, BASE) == pytest.approx([0.0, 6 / 7 - ZERO, 0.0, 0.6 - ZERO])
    # Of the loss the gain is the part that is gone; what is not finite has gained nothing.
    assert gains(scores, BASE, "loss") == pytest.approx([0.0, 0.1, 0.0, 0.3])


def test_steps_to_a_level_lie_on_straight_lines() -> None:
    steps = [0, 100, 200, 400]
    assert steps_to(0.05, steps, [0.0, 0.1, 0.2, 0.3]) == pytest.approx(50)
    assert steps_to(0.25, steps, [0.0, 0.1, 0.2, 0.3]) == pytest.approx(300)
    # The first time counts, and what was never reached is infinitely far.
    assert steps_to(0.15, steps, [0.0, 0.2, 0.1, 0.3]) == pytest.approx(75)
    assert steps_to(0.4, steps, [0.0, 0.1, 0.2, 0.3]) == math.inf
    assert steps_to(0.0, steps, [0.0, 0.1, 0.2, 0.3]) == 0


def test_a_plateau_is_where_the_gain_is_within_five_percent() -> None:
    # From 1.0 to 0.9 over one decade: 0.95 is half way, on either side.
    flat = plateau([0.1, 1.0, 10.0], [0.9, 1.0, 0.9])
    assert flat.low == pytest.approx(10**-0.5)
    assert flat.high == pytest.approx(10**0.5)
    assert flat.decades == pytest.approx(1.0)
    assert not flat.is_open
    # A second hill does not count: between them it falls below.
    assert plateau([0.1, 1.0, 10.0, 100.0], [1.0, 0.9, 0.99, 0.0]).high == pytest.approx(10**-0.5)
    # The end of the grid may not be the end of the plateau.
    wide = plateau([0.1, 1.0, 10.0], [0.96, 1.0, 0.5])
    assert wide.is_open
    assert (wide.low, wide.high) == (0.1, pytest.approx(10**0.1))
    assert plateau([0.1, 1.0], [-0.2, -0.1]).decades == 0


def _series(*finals: float, lrs: tuple[float, ...] = (0.1, 1.0, 10.0)) -> Series:
    """One unit, one mark."""
    return Series(list(lrs), [("owl", 0)], np.array([[[0.0, value]] for value in finals]))


def test_one_learning_rate_for_all_ranks_is_judged_by_its_worst_rank() -> None:
    ranks = {2: _series(0.5, 0.9, 1.0), 4: _series(0.8, 2.0, 1.0), 8: _series(0.2, 0.38, 0.4)}
    found = transfer(ranks)
    assert found is not None
    # 1.0 keeps 0.9, 1 and 0.95; 10 keeps 1, 0.5 and 1.
    assert found.lr == 1.0
    assert found.share == pytest.approx(0.9)
    nothing = transfer({2: _series(0.5, 0.9, 1.0), 4: _series(-1.0, 0.0, -1.0)})
    assert nothing is not None
    assert nothing.share == 0.0
    apart = {2: _series(0.5, 0.9, lrs=(0.1, 1.0)), 4: _series(0.8, lrs=(0.5,))}
    assert transfer(apart) is None


def test_draws_take_concepts_and_seeds_as_wholes() -> None:
    """A unit's weight is the product of how often its concept and its seed were drawn."""
    units = [(concept, seed) for concept in ("owl", "robot", "teapot") for seed in (0, 1)]
    weights = draws(units, 500)
    assert weights.shape == (500, 6)
    assert weights.sum(1) == pytest.approx(np.ones(500))
    table = weights.reshape(500, 3, 2)
    assert table == pytest.approx(table.sum(2)[:, :, None] * table.sum(1)[:, None, :])
    assert weights.mean(0) == pytest.approx(np.full(6, 1 / 6), abs=0.02)
    assert {round(3 * value) for value in table.sum(2)[:, 0]} == {0, 1, 2, 3}


def test_an_interval_holds_the_middle_and_takes_infinities() -> None:
    assert interval([float(n) for n in range(41)]) == (1.0, 39.0)
    assert interval([1.0] * 20 + [math.inf] * 20) == (1.0, math.inf)


def _records(
    curves: dict[str, dict[float, list[float]]],
    seeds: tuple[int, ...] = (0, 1),
    concepts: tuple[str, ...] = ("robot", "teapot"),
    rank: int = 4,
) -> Records:
    """Trainings with these gains, of score and of loss: prompts kept, so the gain says the likeness."""
    found = Records({"marks": [100, 200]}, {name: BASE for name in concepts})
    for method, rates in curves.items():
        for lr, curve in rates.items():
            for seed in seeds:
                scores: list[int | None] = []
                for gain in curve:
                    score = ZERO + gain
                    scores += [round(8000 * score / (2 - score)), 3000, round(1e5 * (1 - gain))]
                found.add(
                    Cell(method, rank, lr, seed), {name: [*scores, 5000] for name in concepts}
                )
    return found


ADAMW, OURS = ("adamw", 4), ("riemannion+loi", 4)
CURVES = {
    "adamw": {0.1: [0.0, 0.0], 1.0: [0.05, 0.1], 10.0: [0.0, 0.0]},
    "riemannion+loi": {0.1: [0.1, 0.12], 1.0: [0.2, 0.2], 10.0: [0.1, 0.12]},
}
BEST = {name: {1.0: rates[1.0]} for name, rates in CURVES.items()}


def test_the_only_rate_of_a_rank_is_not_its_best_one() -> None:
    """It would be drawn as such, and its plateau would be a point."""
    records = _records(CURVES)
    for cell, scores in _records(BEST, rank=16).cells.items():
        records.add(cell, scores)
    grids = grids_of(records, "loss")
    assert list(grids) == [4]
    assert grids[4].keys() == {ADAMW, OURS}


def test_a_cut_short_seed_is_left_out() -> None:
    records = _records(CURVES)
    assert places_of(records) == [ADAMW, OURS]
    assert len(common_units(records, [ADAMW, OURS])) == 4
    del records.cells[Cell("adamw", 4, 10.0, 1)]["robot"]
    units = common_units(records, [ADAMW, OURS])
    assert [seed for _, seed in units] == [0, 0]
    # The other method alone has both seeds.
    assert len(common_units(records, [OURS])) == 4
    one = series(records, ADAMW, units)
    assert one.lrs == [0.1, 1.0, 10.0]
    assert one.finals == pytest.approx([0, 0.1, 0], abs=1e-4)
    # Without any complete seed a learning rate is not there, and the others have both seeds again.
    del records.cells[Cell("adamw", 4, 10.0, 0)]["robot"]
    both = collect(records, [ADAMW, OURS, ("muon", 4)])
    assert list(both) == [ADAMW, OURS]
    assert both[ADAMW].lrs == [0.1, 1.0]
    assert len(both[OURS].units) == 4


def test_the_promises_of_made_up_curves() -> None:
    """AdamW reaches 0.1 after 200 steps, the other after 50; a gain of 0.1 more; no spread, so no width."""
    grid, curves = collect(_records(CURVES), [ADAMW, OURS]), _records(BEST)
    both = collect(curves, [ADAMW, OURS])
    rival, ours = (
        row(
            place[0],
            grid[place],
            best_of(grid)[place],
            (grid[place], grid[ADAMW]),
            (both[place], both[ADAMW]),
            [0, 100, 200],
        )
        for place in (ADAMW, OURS)
    )
    assert rival.against is None
    assert rival.speed == pytest.approx((1.0, 1.0, 1.0))
    assert ours.lr == 1.0
    assert not ours.at_edge
    assert (ours.rates, ours.trainings) == (3, 4)
    assert ours.steps == pytest.approx(50, abs=0.1)
    assert ours.speed == pytest.approx((0.25, 0.25, 0.25), abs=1e-3)
    assert ours.against == pytest.approx((0.1, 0.1, 0.1), abs=2e-4)
    assert ours.curve == pytest.approx(np.array([[0, 0.2, 0.2]] * 3), abs=1e-4)
    # Five percent are lost after 0.01/0.08 and 0.005/0.1 of a decade, on either side.
    assert ours.flat.decades == pytest.approx(0.25, abs=2e-3)
    assert ours.widths == pytest.approx((2.5, 2.5, 2.5), abs=0.02)


def test_the_learning_rate_is_chosen_on_tuning_concepts_alone() -> None:
    """0.1 on the tuning concepts, although 10 would be better on the others."""
    tuning, test = _series(1.0, 0.5, 0.0), _series(0.2, 0.4, 0.6)
    curve = _series(0.2, lrs=(0.1,))
    lr = best_of({("muon", 4): tuning})["muon", 4]
    found = row("muon", tuning, lr, (test, test), (curve, curve), [0, 100])
    assert (found.lr, found.at_edge) == (0.1, True)
    assert found.gain[0] == pytest.approx(0.2)
    assert not found.is_tuning
    assert row("muon", tuning, lr, None, (curve, curve), [0, 100]).is_tuning
    tuned = _records({"muon": {0.1: [0.3, 0.3], 1.0: [0.1, 0.1]}})
    assert best_rates(tuned, [("muon", 4)]) == {("muon", 4): 0.1}


def test_curves_of_another_learning_rate_are_refused() -> None:
    """The tuning file has found a better one since."""
    tuning, curves = collect(_records(CURVES), [ADAMW, OURS]), _records(BEST)
    assert [one.name for one in main_rows(tuning, {}, curves, 4)] == ["adamw", "riemannion+loi"]
    for seed in (0, 1):
        old = curves.cells.pop(Cell("riemannion+loi", 4, 1.0, seed))
        curves.cells[Cell("riemannion+loi", 4, 0.1, seed)] = old
    with pytest.raises(SystemExit, match="`run curves` again"):
        main_rows(tuning, {}, curves, 4)


def test_what_was_not_trained_at_the_choice_of_the_score_is_named() -> None:
    tuning = {ADAMW: _series(0.1, 0.2), OURS: _series(0.1, 0.3)}
    other = {ADAMW: _series(0.1, 0.2), OURS: _series(0.4, 0.3)}
    curves = _records(BEST)
    assert trained(curves, {"loss": tuning, "score": other}, "loss") == (best_of(tuning), [])
    # With another setting it is another training.
    changed = Cell("riemannion+loi", 4, 0.1, 0, "alpha=100.0")
    curves.add(changed, curves.cells[Cell("riemannion+loi", 4, 1.0, 0)])
    found = trained(curves, {"loss": tuning, "score": other}, "score")
    assert found == ({ADAMW: 1.0}, ["riemannion+loi, rank 4 (0.1)"])
    # What is missing of the loss stays, so that `main_rows` refuses it.
    assert trained(curves, {"loss": other, "score": tuning}, "loss") == (best_of(other), [])


def test_few_methods_are_drawn_in_color(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """AdamW and three near the top, at any rank; the others are grey behind them, with one line of legend."""
    names = ("sgd", "adamw", "muon, rank 8", "imuon", "adamw+pissa")
    one = _series(0.2, lrs=(0.1,))
    rows = [row(name, one, 0.1, None, (one, one), [0, 100]) for name in names]
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    figures = plots.Figures(tmp_path)
    figures.steps(rows, [0, 100], "gain")
    figures.save()
    (axes,) = drawn[0].axes
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["3 others with all seeds", "adamw, lr 0.1", "muon, rank 8, lr 0.1"]
    # The last line is that of zero.
    colors = [line.get_color() for line in axes.lines[:-1]]
    assert colors[:3] == ["0.75"] * 3
    assert len(set(colors)) == 3


def test_tables_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test, ours = _records(CURVES), {"riemannion+loi": CURVES["riemannion+loi"]}
    for cell, scores in _records(ours, rank=8).cells.items():
        test.add(cell, scores)
    tuning = _records(CURVES, seeds=(0,), concepts=("owl", "pumpkin"))
    curves = _records({**BEST, "muon": {0.1: [0.1, 0.1]}})
    for cell, scores in _records({"adamw": {0.1: [0.1, 0.2]}}, rank=8).cells.items():
        curves.add(cell, scores)
    for other in (
        _records({"muon": {0.1: [0.3, 0.3], 1.0: [0.1, 0.1]}}, (0,), ("owl", "pumpkin")),
        _records({"adamw": {0.1: [0.3, 0.3]}}, (0,), ("owl", "pumpkin"), rank=8),
    ):
        for cell, scores in other.cells.items():
            tuning.add(cell, scores)
    sweeps = Records({}, {"owl": BASE})
    sweeps.add(Cell("riemannion+loi", 4, 1.0, 0, "decay=1"), {"owl": [6000, 3000, 90_000, 5000]})
    sweeps.add(Cell("riemannion+loi", 4, 1.0, 0), {"owl": [4000, 3000, 90_000, 5000]})
    short = Records({"steps": 67}, {"owl": BASE})
    short.add(Cell("muon", 4, 0.5, 0), {"owl": [4000, 3000, 70_000, 5000]})
    points = plane(test, collect(test, [ADAMW, OURS]))
    assert points["base model"] == [(0.5, 1.0)]
    assert points["adamw"][0] == pytest.approx((0.5, 1.0), abs=1e-3)
    files = {"tuning": tuning, "test": test, "curves": curves, "sweeps": sweeps, "short": short}
    draw_and_print(files, 4, tmp_path)
    said = capsys.readouterr().out
    assert said.count("over adamw's own: 0.25 [0.25 0.25]; target at most 0.33: reached") == 4
    assert "at the end of the curves, on the test concepts:" in said
    # Of two curves without spread: 0.2 and 0.1 at the end, score and loss alike.
    pair = next(
        line for line in said.splitlines() if line.startswith("| 4    | riemannion+loi | adamw")
    )
    assert pair.count("+0.100 [+0.100 +0.100]") == 2
    assert "over adamw's: 2.50 [2.50 2.50]; target at least 4: MISSED" in said
    assert "riemannion+loi: lr 1 keeps 100.0% of the best gain at its worst of ranks 4, 8" in said
    # The gain of 6/7 - 2/3 has no spread; three quarters of the likeness, all prompts, a tenth of the loss.
    cells = next(line for line in said.splitlines() if "decay=1" in line).split("|")[4:-1]
    assert [cell.strip() for cell in cells] == [
        "decay=1",
        "1",
        "+0.190 ± 0.000",
        "+0.190 ± 0.000 (1)",
        "0.750",
        "1.000",
        "0.100",
    ]
    third = said[said.index("trainings of 67 steps, on the tuning concepts:") :].splitlines()[3]
    assert [cell.strip() for cell in third.split("|")[1:]][::9] == ["muon", "0.300"]
    tables = said[said.index("===") :].splitlines()
    names = [line.split("|")[1].strip() for line in tables if line.startswith("| ")]
    assert names[:5] == ["method", "-" * 14, "adamw", "adamw, rank 8", "muon"]
    assert said.count("over adamw's own: 0.25 [0.25 0.25]") == 4
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sorted(sizes) == [
        f"convergence-{name}.png" for name in ("plane", "ranks", "rates", "steps")
    ]
    assert max(sizes.values()) < 200_000
