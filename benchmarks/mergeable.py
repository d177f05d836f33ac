"""Two concepts in one model: does a second one interfere less if it was trained orthogonal to the first?

    python -m benchmarks.mergeable

Each pair (A, B) of example concepts is added up in several ways: the plain sum, PEFT's `ties_svd` and `dare_linear`
(also followed by an SVD), the nearest change of a fixed rank, and A plus a B that was trained with `--orthogonal_to A`.
The merged model draws the prompts of A and of B from the same seeds as each adapter alone does. Densities of PEFT's
methods are chosen by the first seed, in their favor. Trainings and pictures that are there already are not made again;
adapters of `python -m benchmarks.concepts` are taken where they are found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.concepts import CONCEPTS, DONE, ENCODERS, Job, flags_of, train_one
from benchmarks.examiner import Examiner
from benchmarks.responses import shares_on_other
from dreamrie.adapter_file import save_diffusers
from dreamrie.adapter_open import OpenAdapter, open_adapter
from dreamrie.commands.merge import merge, merged_facts
from dreamrie.config import parse_config
from dreamrie.diffusion.adapters import read_metadata
from dreamrie.files import write_atomic
from dreamrie.lora import LowRank, lora_pairs
from dreamrie.lora.apart import row_space
from dreamrie.lora.comparing import as_matrix, change_norm
from eval import metrics
from eval.encoders import load_encoder

PAIRS = ("pumpkin+robot", "alien+teapot", "teddy_bear+owl")
PICTURES = 16
DENSITIES = (0.3, 0.5, 0.7)
PEFT_METHODS = ("ties_svd", "dare_linear", "dare_linear_svd")
RANKS = (4, 8)
PLAIN, APART = "plain sum", "A + B trained orthogonal to A"
ALONE, APART_ALONE, BASE = "alone", "B trained orthogonal to A, alone", "base model"
SUMMARY = Path(__file__).resolve().parent / "results" / "mergeable.json"
# The settings that the steps of a training depend on.
GROUPS = ("model", "data", "prior", "adapter", "optimizer", "schedule")


@dataclass(frozen=True)
class Cell:
    """One pair and seed: concepts, and the folders of the three trainings."""

    first: str
    second: str
    seed: int
    jobs: tuple[Job, Job, Job]

    @property
    def name(self) -> str:
        """For files and messages."""
        return f"{self.first}+{self.second}-{self.seed}"


def cell_of(pair: str, seed: int, options: argparse.Namespace, extra: Sequence[str]) -> Cell:
    """Where the trainings of a pair lie; those of single concepts are shared with `benchmarks.concepts`."""
    first, second = pair.split("+")
    singles = [
        (name, seed, options.runs / f"{name}-{seed}", ["--score_steps", "100", *extra])
        for name in (first, second)
    ]
    folder = options.output / f"{second}-apart-from-{first}-{seed}"
    flags = ["--score_steps", "0", "--checkpointing_steps", "0", *extra]
    apart = (second, seed, folder, [*flags, "--orthogonal_to", str(singles[0][2])])
    return Cell(first, second, seed, (singles[0], singles[1], apart))


def is_there(job: Job) -> bool:
    """Whether a training with these settings has been finished, in this checkout or in one elsewhere."""
    concept, seed, folder, extra = job
    if not (folder / DONE).is_file():
        return False
    own = ["--output_dir", str(folder), "--instance_data_dir", str(CONCEPTS / concept)]
    recorded = parse_config(["--config", str(folder / "config.yaml"), *own])
    wanted = parse_config(flags_of(concept, seed, folder, extra))
    wanted = wanted.with_resolution(recorded.data.resolution or 0)
    same = all(getattr(recorded, group) == getattr(wanted, group) for group in GROUPS)
    return same and int(read_metadata(folder)["steps"]) == wanted.schedule.max_train_steps


# ---------------------------------------------------------------------------------------------- ways to merge


def peft_merge(
    parts: Sequence[Mapping[str, LowRank]], kind: str, density: float, seed: int
) -> dict[str, LowRank]:
    """PEFT's `add_weighted_adapter` with weights 1 and 1.

    Args:
        parts: changes of two adapters with the same layers, scaling 1.
        kind: PEFT's name of the method; those that end in an SVD keep the sum of both ranks.
        density: share of values that is kept.
        seed: of the values that DARE drops.

    Returns:
        Factors by layer, scaling folded in.
    """
    flat = [{name: as_matrix(change) for name, change in part.items()} for part in parts]
    keys = {f"layer{number:03d}": name for number, name in enumerate(sorted(flat[0]))}
    sizes = {key: (flat[0][n].right.shape[1], flat[0][n].left.shape[0]) for key, n in keys.items()}
    rank = max(change.left.shape[1] for part in flat for change in part.values())
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(keys))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        holder: Any = nn.ModuleDict({k: nn.Linear(*size, bias=False) for k, size in sizes.items()})
        model: Any = get_peft_model(holder, config, adapter_name="0")
        model.add_adapter("1", config)
        for number, part in enumerate(flat):
            for pair in lora_pairs(model, str(number)):
                change = part[keys[pair.name]]
                width = change.left.shape[1]
                pair.left.data.zero_()[:, :width] = change.left.to(pair.left)
                pair.right.data.zero_()[:width] = change.right.to(pair.right)
        size = 2 * rank if kind.endswith("_svd") else None
        model.add_weighted_adapter(
            ["0", "1"], [1.0, 1.0], "sum", combination_type=kind, density=density, svd_rank=size
        )
    # PEFT leaves views of an SVD behind, of which `change_of` would say that they are not contiguous.
    return {
        keys[pair.name]: LowRank(
            pair.scaling * pair.left.detach().double(), pair.right.detach().double()
        )
        for pair in lora_pairs(model, "sum")
    }


def methods(densities: Mapping[str, Sequence[float]]) -> dict[str, tuple[str, float]]:
    """Ways to merge by their name in the table: a kind, and its rank or density."""
    found = {PLAIN: ("sum", 0.0), APART: ("apart", 0.0)}
    found |= {f"rank {rank}": ("rank", float(rank)) for rank in RANKS}
    for kind, values in densities.items():
        found |= {f"{kind} {value:g}": (kind, value) for value in values}
    return found


def merged(adapters: Sequence[OpenAdapter], way: tuple[str, float]) -> dict[str, LowRank]:
    """A change that holds both concepts.

    Args:
        adapters: A, B, and B trained orthogonal to A.
        way: of `methods`.

    Returns:
        Factors by layer.
    """
    first, second, apart = (adapter.changes for adapter in adapters)
    kind, value = way
    if kind in ("sum", "apart"):
        return merge([first, apart if kind == "apart" else second], [1.0, 1.0], None).changes
    if kind == "rank":
        return merge([first, second], [1.0, 1.0], int(value)).changes
    return peft_merge([first, second], kind, value, seed=0)


def overlap(of: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> float:
    """Share |D V| / |D| of a change along the input directions of another one, median over layers."""
    shares = []
    for layer, change in of.items():
        left, right = as_matrix(change)
        inside = LowRank(left, right @ row_space([other[layer]]))
        shares.append(change_norm(inside) / change_norm(change))
    return float(torch.tensor(shares).median())


# ------------------------------------------------------------------------------------------------- one pair


class Bench:
    """Draws and scores the merged models of one cell, and remembers what is done in a file.

    Args:
        cell: with finished trainings.
        examiner: draws and scores.
        folder: for results and merged adapters.
    """

    def __init__(self, cell: Cell, examiner: Examiner, folder: Path) -> None:
        self.cell, self.examiner, self.folder = cell, examiner, folder / cell.name
        self.adapters = [open_adapter(job[2]) for job in cell.jobs]
        files = [hashlib.sha256(adapter.path.read_bytes()).hexdigest() for adapter in self.adapters]
        fresh = {"files": files, "pictures": PICTURES, "rows": {}}
        self.path = self.folder / "rows.json"
        kept = json.loads(self.path.read_text("utf-8")) if self.path.is_file() else fresh
        same = all(kept[key] == fresh[key] for key in ("files", "pictures"))
        self.content = kept if same else fresh
        if not same:
            # Sums of other adapters; before the new scores are begun, after which nobody could tell.
            for merged_file in self.folder.glob(f"*/{DONE}"):
                merged_file.unlink()

    def score(self, method: str, adapter: Path | None, concepts: Sequence[str]) -> None:
        """Score pictures of these concepts, unless that was done before."""
        for concept in concepts:
            key = f"{method}: {concept}"
            if key in self.content["rows"]:
                continue
            job = self.cell.jobs[0 if concept == self.cell.first else 1]
            config = parse_config(flags_of(concept, self.cell.seed, job[2], job[3]))
            sheet = self.folder / f"{method}, {concept}.png"
            row, _ = self.examiner.scores(config, adapter, PICTURES, "mergeable", sheet)
            text = torch.zeros(1) if row.text is None else row.text
            self.content["rows"][key] = {
                "pair": f"{self.cell.first}+{self.cell.second}",
                "seed": self.cell.seed,
                "method": method,
                "concept": concept,
                "image": round(float(row.image.mean()), 5),
                "text": round(float(text.mean()), 5),
            }
            write_atomic(self.path, json.dumps(self.content).encode())

    def alone(self) -> None:
        """The base model, A, B and the other B, each by itself."""
        first, second, apart = (adapter.path for adapter in self.adapters)
        names = (self.cell.first, self.cell.second)
        if self.cell.seed == 0:  # it is the same for every seed
            self.score(BASE, None, names)
        self.score(ALONE, first, names[:1])
        self.score(ALONE, second, names[1:])
        self.score(APART_ALONE, apart, names[1:])

    def together(self, densities: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
        """Every way to merge; returns all rows of the cell."""
        for method, way in methods(densities).items():
            folder = self.folder / method
            if not (folder / DONE).is_file():
                used = [self.adapters[0], self.adapters[2 if way[0] == "apart" else 1]]
                facts = merged_facts(used, [1.0, 1.0], None, 1.0)
                save_diffusers(folder, merged(self.adapters, way), facts)
            self.score(method, folder, (self.cell.first, self.cell.second))
        return list(self.content["rows"].values())

    def overlaps(self) -> tuple[float, float]:
        """Of B with A, and of the B that was trained orthogonal to A."""
        first, second, apart = (adapter.changes for adapter in self.adapters)
        return overlap(second, first), overlap(apart, first)

    def responses(self) -> tuple[float, ...]:
        """How strongly both B answer the prompt of A, relative to their own."""
        if "responses" not in self.content:
            own, other = (
                f"a sks {name.replace('_', ' ')}" for name in (self.cell.second, self.cell.first)
            )
            parts = [adapter.changes for adapter in self.adapters[1:]]
            self.content["responses"] = shares_on_other(parts, own, other)
            write_atomic(self.path, json.dumps(self.content).encode())
        return tuple(self.content["responses"])


# --------------------------------------------------------------------------------------------------- tables


def differences(rows: Sequence[Mapping[str, Any]], method: str, than: str, of: str) -> torch.Tensor:
    """Paired differences of a score, one for each pair and seed, averaged over the concepts that both have."""
    cells: dict[tuple[str, int], dict[tuple[str, str], float]] = {}
    for row in rows:
        cell = cells.setdefault((row["pair"], row["seed"]), {})
        cell[row["method"], row["concept"]] = row[of]
    found = []
    for cell in cells.values():
        names = [name for kind, name in cell if kind == method and (than, name) in cell]
        if names:
            gaps = [cell[method, name] - cell[than, name] for name in names]
            found.append(sum(gaps) / len(gaps))
    return torch.tensor(found, dtype=torch.float64)


def interval(values: torch.Tensor) -> tuple[float, float, float]:
    """Mean with its 95 % interval over pairs and seeds."""
    draws = metrics.bootstrap_weights([str(number) for number in range(len(values))]) @ values
    return (float(values.mean()), *metrics.percentile_interval(draws))


def side(rows: Sequence[Mapping[str, Any]], method: str, which: int) -> float:
    """Mean change of image similarity of all A (0) or all B (1) against the adapter alone."""
    own = [row for row in rows if row["pair"].split("+")[which] == row["concept"]]
    return float(differences(own, method, ALONE, "image").mean())


def report(content: Mapping[str, Any]) -> str:
    """The table of a summary.

    Args:
        content: as `main` writes it.

    Returns:
        Lines for people.
    """
    rows = content["rows"]
    cells = len({(row["pair"], row["seed"]) for row in rows})
    gain = differences(rows, ALONE, BASE, "image").mean()
    lines = [
        f"{cells} pairs and seeds, {content['pictures']} pictures for each concept and way; differences to each "
        "adapter alone [95 % interval over pairs and seeds] +- standard deviation",
        f"each adapter alone is {float(gain):+.3f} above the base model in image similarity",
        "",
        f"{'way':<34} {'image similarity':<33} {'of A':>6} {'of B':>6}  kept  text similarity",
    ]
    shown = [*content["ways"], APART_ALONE, BASE]
    for method in shown:
        image = differences(rows, method, ALONE, "image")
        text = interval(differences(rows, method, ALONE, "text"))
        spread = float(image.std()) if len(image) > 1 else 0.0
        first = "" if method == APART_ALONE else f"{side(rows, method, 0):+.3f}"
        lines.append(
            f"{method:<34} "
            + "{:+.3f} [{:+.3f} {:+.3f}] ".format(*interval(image))
            + f"+- {spread:.3f}  {first:>6} {side(rows, method, 1):+.3f}  "
            + f"{float(1 + image.mean() / gain):4.0%}  "
            + "{:+.3f} [{:+.3f} {:+.3f}]".format(*text)
        )
    lines.append("")
    for method in content["ways"]:
        if method != APART:
            found = interval(differences(rows, APART, method, "image"))
            lines.append(
                f"{APART}, against {method}: image similarity "
                + "{:+.3f} [{:+.3f} {:+.3f}]".format(*found)
            )
    for what, key in (
        ("share |D V| / |D| of B along the input directions of A", "overlaps"),
        ("answer |D x| of B to the prompt of A, relative to its own prompt", "responses"),
    ):
        plain, apart = (sum(part) / len(part) for part in zip(*content[key], strict=True))
        lines.append(f"{what}, median over layers: {plain:.3g}; trained orthogonal: {apart:.3g}")
    return "\n".join(lines)


def best_density(rows: Sequence[Mapping[str, Any]], kind: str) -> float:
    """The density at which a method of PEFT keeps most image similarity."""
    score = {d: float(differences(rows, f"{kind} {d:g}", ALONE, "image").mean()) for d in DENSITIES}
    return max(score, key=lambda density: score[density])


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, merge, draw, score; print the table and write its numbers.

    Args:
        argv: `--output DIR`, `--runs DIR` of `benchmarks.concepts`, `--seeds N`, `--pairs A+B,C+D`, `--summary FILE`,
            and any flag of `train_dreambooth.py`.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--output", type=Path, default=Path("runs/mergeable"))
    parser.add_argument("--runs", type=Path, default=Path("runs/concepts"))
    parser.add_argument("--summary", type=Path, default=SUMMARY)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", default=",".join(PAIRS))
    options, extra = parser.parse_known_args(argv)
    encoders = load_encoder(ENCODERS[0]), load_encoder(ENCODERS[1])
    examiner = Examiner(encoders, (10, 4.0, PICTURES))
    densities: dict[str, Sequence[float]] = dict.fromkeys(PEFT_METHODS, DENSITIES)
    rows: list[dict[str, Any]] = []
    overlaps, responses = [], []
    for seed in range(options.seeds):
        for pair in options.pairs.split(","):
            cell = cell_of(pair, seed, options, extra)
            for job in cell.jobs:
                if not is_there(job):
                    print(train_one(job), flush=True)
            bench = Bench(cell, examiner, options.output)
            bench.alone()
            rows += bench.together(densities)
            overlaps.append(bench.overlaps())
            responses.append(bench.responses())
            print(f"{cell.name}: scored", flush=True)
        if seed == 0:
            densities = {kind: [best_density(rows, kind)] for kind in PEFT_METHODS}
    content = {
        "pictures": PICTURES,
        "ways": list(methods(densities)),
        "tuning": sorted(
            set(methods(dict.fromkeys(PEFT_METHODS, DENSITIES))) - set(methods(densities))
        ),
        "overlaps": overlaps,
        "responses": responses,
        "rows": rows,
    }
    print(report(content))
    options.summary.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.summary, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
