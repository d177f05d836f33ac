"""P1: a module imports from lower rows or from its own folder, and each package has one home."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.contracts.sources import (
    ROOT,
    dotted_name,
    family,
    imported_modules,
    product_files,
    unit_of,
)

ROWS = (
    {"errors", "files", "init_table", "optimizer_table"},
    {"fixed_rank", "config", "checkpoint", "records", "run_folder", "streams", "team"},
    {"riemannion_layers", "core_maps", "runlog", "manifolds", "tensorion"},
    {"riemannion_checks"},
    {"riemannion", "loi"},
    {"lora"},
    {"optimizers", "adapter_magnitudes"},
    {"adapter_file"},
    {"adapter_universal", "adapter_peft"},
    {"adapter_spelling", "adapter_flat"},
    {"adapter_container"},
    {"adapter_names"},
    {"adapter_scaling"},
    {"adapter_reading"},
    {"adapter_open"},
    {"trainer", "publishing"},
    {"diffusion", "llm"},
    {"sweeps"},
    {"commands"},
    {"eval"},
    {"app", "benchmarks", "examples", "train_dreambooth", "tools", "__main__"},
)
RANK = {unit: row for row, units in enumerate(ROWS) for unit in units}
PUBLIC_FACE = "__init__"
"""dreamrie/__init__.py re-exports from every row, so it stands outside them; P3 bounds its load."""

OUTSIDE = {"eval", "app", "benchmarks", "examples", "tools", "train_dreambooth"}

HOMES: dict[str, tuple[str, ...]] = {
    "peft": ("dreamrie/lora", "dreamrie/optimizers/libraries"),
    "accelerate": ("dreamrie/trainer",),
    "diffusers": ("dreamrie/diffusion/",),
    "transformers": ("dreamrie/diffusion/", "dreamrie/llm/"),
    "safetensors": (
        *("dreamrie/adapter_file", "dreamrie/checkpoint", "dreamrie/diffusion/merging"),
        *("dreamrie/llm/models", "eval/encoders"),
    ),
    "pydantic": ("dreamrie/config", "app/asked"),
    "yaml": ("dreamrie/config",),
    "filelock": ("dreamrie/run_folder",),
    "tqdm": ("dreamrie/runlog",),
    "tensorboard": ("dreamrie/runlog",),
    "open_clip": ("eval/encoders",),
    "timm": ("eval/encoders",),
    "matplotlib": ("benchmarks/", "examples/", "eval/report"),
    "gradio": ("app/",),
    "distributed": ("dreamrie/sweeps/engine",),
    "dask": ("dreamrie/sweeps/engine",),
}
FREE = ("examples/", "benchmarks/", "tools/")
"""Scripts that show or measure how other libraries meet ours; only the library keeps homes."""

ANYWHERE = {"matplotlib", "gradio"}
"""Packages whose home is kept even by the scripts."""

TORCH_ALONE = {
    "fixed_rank",
    "riemannion_step",
    "riemannion_layers",
    "riemannion_checks",
    "riemannion",
    "core_maps",
    "loi",
    "manifolds",
    "team",
    "tensorion",
}


def breaches(path: Path, source: str) -> list[str]:
    """Every rule that the file breaks, in words."""
    unit = unit_of(path)
    place = path.relative_to(ROOT).as_posix()
    found: list[str] = []
    names = set(imported_modules(ast.parse(source), dotted_name(path), path.stem == "__init__"))
    for name in sorted(names):
        top, *rest = name.split(".")
        found += _row_breach(unit, place, top, rest)
        found += _home_breach(unit, place, top)
    return found


def _row_breach(unit: str, place: str, top: str, rest: list[str]) -> list[str]:
    if unit == PUBLIC_FACE:
        if top in OUTSIDE:
            return [f"{place}: the library imports {top}, which is built on it"]
        return []
    target = family(rest[0]) if top == "dreamrie" and rest else top
    if target not in RANK or (top != "dreamrie" and top not in OUTSIDE) or target == unit:
        return []
    if RANK[target] < RANK[unit]:
        return []
    if RANK[target] == RANK[unit] == RANK["app"]:
        return []
    return [f"{place}: row {RANK[unit]} imports {target} of row {RANK[target]}"]


def _home_breach(unit: str, place: str, top: str) -> list[str]:
    if unit in TORCH_ALONE and top in {*HOMES, "PIL", "numpy"}:
        return [f"{place}: works with torch alone, but imports {top}"]
    if (
        top == "PIL"
        and place.startswith("dreamrie/")
        and not place.startswith("dreamrie/diffusion/")
    ):
        return [f"{place}: pictures are handled in dreamrie/diffusion/ only"]
    homes = HOMES.get(top)
    if homes is None or place.startswith(homes):
        return []
    if place.startswith(FREE) and top not in ANYWHERE:
        return []
    if top == "matplotlib" and place.startswith("tools/"):
        return []
    return [f"{place}: {top} is at home in {' and '.join(homes)} only"]


@pytest.mark.parametrize(
    "path", product_files(), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_a_module_imports_from_lower_rows_and_keeps_packages_at_home(path: Path) -> None:
    """P1 on every file of the project."""
    assert breaches(path, path.read_text("utf-8")) == []


def test_every_module_has_a_row() -> None:
    """A new module must be given its place on purpose."""
    units = {unit_of(path) for path in product_files()} - {PUBLIC_FACE}
    assert units - set(RANK) == set()


def test_pictures_are_decoded_in_one_place() -> None:
    """`Image.open` stands in dreamrie/diffusion/images.py and in no other file of the library."""
    callers = set()
    for path in product_files():
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith("dreamrie/"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "open":
                if isinstance(node.value, ast.Name) and node.value.id in {"Image", "PIL"}:
                    callers.add(place)
    assert callers == {"dreamrie/diffusion/images.py"}


MUTANTS = {
    "upwards": ("dreamrie/fixed_rank.py", "from dreamrie.trainer import train"),
    "upwards, in a family": ("dreamrie/fixed_rank.py", "from dreamrie.riemannion_step import step"),
    "upwards, relative": ("dreamrie/loi.py", "from .lora import attach_lora"),
    "upwards, from the package": ("dreamrie/lora.py", "from dreamrie import trainer"),
    "sideways": ("dreamrie/diffusion/task.py", "from dreamrie.llm.task import Task"),
    "library on application": ("dreamrie/trainer.py", "import eval.metrics"),
    "face on application": ("dreamrie/__init__.py", "import app.jobs"),
    "hidden in a function": ("dreamrie/runlog.py", "def f():\n    from dreamrie import lora"),
    "peft away from home": ("dreamrie/loi.py", "import peft"),
    "peft in the trainer": ("dreamrie/trainer.py", "from peft import LoraConfig"),
    "numpy in the method": ("dreamrie/riemannion.py", "import numpy as np"),
    "diffusers in the script": ("train_dreambooth.py", "from diffusers import UNet2DModel"),
    "yaml twice": ("dreamrie/runlog.py", "import yaml"),
    "plots in the library": ("dreamrie/diffusion/task.py", "import matplotlib.pyplot"),
    "pictures in the trainer": ("dreamrie/trainer.py", "from PIL import Image"),
}


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_an_offending_source_is_caught(name: str) -> None:
    """P1 fails on each kind of breach; an empty file has none."""
    place, source = MUTANTS[name]
    assert len(breaches(ROOT / place, source)) == 1
    assert breaches(ROOT / place, "") == []


ALLOWED = {
    "downwards": ("dreamrie/trainer.py", "from dreamrie.lora import LoraPair"),
    "own folder": ("dreamrie/diffusion/task.py", "from .images import load_image"),
    "own family": ("dreamrie/riemannion.py", "from dreamrie.riemannion_step import step"),
    "errors": ("dreamrie/fixed_rank.py", "from dreamrie.errors import NumericalError"),
    "peft optimizers": ("dreamrie/optimizers/libraries.py", "import peft.optimizers"),
    "an example": ("examples/any.py", "from transformers import LlamaForCausalLM"),
}


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_an_honest_source_is_let_through(name: str) -> None:
    """P1 does not forbid what the house needs."""
    place, source = ALLOWED[name]
    assert breaches(ROOT / place, source) == []
