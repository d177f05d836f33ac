"""Reads the project's own source, for the contracts about it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dreamrie"
TOP_LEVEL = ("eval", "app", "benchmarks", "examples", "tools")


def product_files() -> list[Path]:
    """Every Python file that ships or is run by a user; tests are not among them."""
    folders = [PACKAGE, *(ROOT / name for name in TOP_LEVEL)]
    found = [path for folder in folders for path in folder.rglob("*.py")]
    return sorted([*found, *ROOT.glob("*.py")])


def unit_of(path: Path) -> str:
    """Name of the row a file belongs to.

    `trainer` for dreamrie/trainer.py, `diffusion` for dreamrie/diffusion/*.py; files outside the
    package go by their top-level folder or file name.
    """
    parts = path.relative_to(ROOT).with_suffix("").parts
    return family(parts[1] if parts[0] == "dreamrie" else parts[0])


def family(unit: str) -> str:
    """`riemannion` for riemannion_step and its like: one duty in several files, as in a folder."""
    return "riemannion" if unit.startswith("riemannion_") else unit


def imported_modules(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[str]:
    """Full dotted names that the tree imports, also inside functions.

    Relative names are resolved from `module`, the dotted name of the importing file.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                stem = ".".join([*base, *([node.module] if node.module else [])])
            else:
                stem = node.module or ""
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def dotted_name(path: Path) -> str:
    """`dreamrie.diffusion.task` for dreamrie/diffusion/task.py."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
