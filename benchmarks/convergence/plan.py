"""What is trained, in which order: a plan that was cut short still fills a balanced table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.convergence.methods import GRID, grid_of, parse_method
from dreamrie.config.method import SCALED
from dreamrie.init_table import INITS

# Learning rates, starts and defaults are chosen on these alone. The pumpkin is that of the demo, whose settings were
# tuned on it long ago.
TUNING = ("pumpkin", "owl", "puzzle_cube")
TEST = ("alien", "flying_saucer", "robot", "rubber_duck", "teapot", "teddy_bear", "unicorn")
CONCEPTS = TUNING + TEST
RANKS, SEEDS = (4, 2, 8, 16), (0, 1, 2)
# Optimizer steps of a training; the second number is that of the part called short.
STEPS, SHORT_STEPS = 200, 67
# Steps after which a training is scored where its curve is asked for, as parts of its length.
MARKS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)

SWEEPS: dict[str, tuple[float | str, ...]] = {
    "alpha": (0.01, 0.1, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    "batches": (1, 8, 128),
    "decay": (0.01, 0.1, 1.0),
    "schedule": ("constant", "linear"),
    "match_rms": (1.0,),
    "guidance": (1.0, 2.0, 7.0),
}
"""Settings of riemannion that can be varied, without what they usually are here: start in multiples of the default,
LOI batches, decay, schedule, and match_rms: learning rates in proportion to sqrt(m n), so that the entries of a step
are of one size in all layers; and the guidance of the pictures, of any method."""
PARTS = ("tuning", "test", "curves", "sweeps", "short")
"""Files of the bench: every learning rate on the tuning concepts; the same on the test concepts; the best of the first
on the test concepts with its curve; single settings varied on the tuning concepts; a third of the steps on the tuning
concepts."""


class Cell(NamedTuple):
    """One training of each concept, all in one stack.

    Attributes:
        method: name, see `methods.Method`.
        rank: r.
        lr: peak learning rate.
        seed: of start, pictures, noise and timesteps.
        setting: one changed setting, such as "decay=0.1", or nothing.
    """

    method: str
    rank: int
    lr: float
    seed: int
    setting: str = ""


def setting_of(cell: Cell) -> tuple[str, str]:
    """The changed setting of a cell and its value; two empty words without one."""
    name, _, value = cell.setting.partition("=")
    return name, value


class Budget(NamedTuple):
    """What every training gets.

    Attributes:
        steps: optimizer steps.
        batch: pictures of a step, and of a batch of a start.
        pictures: drawn for each scoring.
        is_curve: scored on the way, too; else at the end alone.
    """

    steps: int = STEPS
    batch: int = 4
    pictures: int = 12
    is_curve: bool = False

    @property
    def marks(self) -> list[int]:
        """Steps at which a training is scored; the last is its end."""
        parts = MARKS if self.is_curve else MARKS[-1:]
        return sorted({max(1, round(part * self.steps)) for part in parts})


def plan(
    methods: Sequence[str],
    ranks: Sequence[int],
    seeds: Sequence[int],
    centres: dict[str, float] | None = None,
    grid: int = GRID,
) -> list[Cell]:
    """Every cell, the most valuable first.

    First rank first: first seed, then the others. Then the other ranks, all of them for the first seed, then for the
    others. Inside of a stage the middle of the grids comes first, all methods for each place of the grid.

    Args:
        methods: names.
        ranks: the first is the main one.
        seeds: of the trainings.
        centres: middle of the grid by name of a method.
        grid: values of the learning rate for each method, odd.

    Returns:
        Each cell once.
    """
    stages = [(rank, seed) for rank in ranks[:1] for seed in seeds]
    stages += [(rank, seed) for seed in seeds for rank in ranks[1:]]
    rates = {name: grid_of(parse_method(name), centres or {}, grid) for name in methods}
    return [
        Cell(name, rank, rates[name][place], seed)
        for rank, seed in stages
        for place in range(grid)
        for name in methods
    ]


def best_cells(best: Sequence[Mapping[tuple[str, int], float]], seeds: Sequence[int]) -> list[Cell]:
    """Each method and rank at its own learning rates, the first seed of all before the others.

    Args:
        best: learning rate by method and rank, for each measure.
        seeds: of the trainings.
    """
    every = [
        Cell(name, rank, lr, seed)
        for seed in seeds
        for one in best
        for (name, rank), lr in one.items()
    ]
    return list(dict.fromkeys(every))


def sweep_plan(
    settings: Sequence[str], best: Mapping[tuple[str, int], float], seeds: Sequence[int]
) -> list[Cell]:
    """Methods at their own learning rate with one setting varied, everything else as usual.

    Args:
        settings: keys of `SWEEPS`.
        best: learning rate by method and rank.
        seeds: of the trainings.

    Returns:
        As usual, then each value, for the first seed; then for the others.
    """
    varied = [(name, f"{name}={value}") for name in settings for value in SWEEPS[name]]
    return [
        Cell(method, rank, lr, seed, setting)
        for seed in seeds
        for name, setting in (("", ""), *varied)
        for (method, rank), lr in best.items()
        if _has_setting(method, name)
    ]


def _has_setting(method: str, name: str) -> bool:
    """Whether a setting of `SWEEPS` makes a difference to a method; "" is none."""
    known = parse_method(method)
    if name == "batches":
        return INITS[known.init].needs == "batches"
    if name == "alpha":
        return known.init in SCALED
    return known.optimizer == "riemannion" or name in {"", "schedule", "guidance"}


def missing(
    cells: Iterable[Cell], concepts: Sequence[str], done: dict[Cell, dict[str, list[int | None]]]
) -> list[tuple[Cell, tuple[str, ...]]]:
    """Cells that are not complete, in their order, with the concepts that they lack."""
    found = []
    for cell in cells:
        lacking = tuple(name for name in concepts if name not in done.get(cell, {}))
        if lacking:
            found.append((cell, lacking))
    return found
