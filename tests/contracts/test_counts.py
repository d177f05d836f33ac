"""T6, P8: every module has its mirror, and tests that stop being collected are seen."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.contracts.sources import PACKAGE, ROOT, unit_of

TESTS = ROOT / "tests"

MINIMUM = {
    "files": 5,
    "fixed_rank": 20,
    "riemannion": 25,
    "loi": 12,
    "manifolds": 28,
    "tensorion": 14,
    "init_table": 4,
    "lora": 15,
    "config": 12,
    "runlog": 5,
    "checkpoint": 15,
    "commands": 45,
    "publishing": 7,
    "sweeps": 30,
    "records": 4,
    "run_folder": 5,
    "optimizers": 25,
    "optimizer_table": 4,
    "core_maps": 8,
    "adapter_container": 10,
    "adapter_file": 6,
    "adapter_flat": 3,
    "adapter_magnitudes": 4,
    "adapter_names": 10,
    "adapter_open": 12,
    "adapter_peft": 6,
    "adapter_reading": 20,
    "adapter_scaling": 3,
    "adapter_spelling": 3,
    "adapter_universal": 15,
    "trainer": 12,
    "diffusion": 20,
    "llm": 60,
    "streams": 3,
    "team": 6,
    "eval": 25,
    "app": 80,
}
"""Test functions of a module, its laws included; a parametrized one counts once."""

WITHOUT_TESTS = {"__init__", "__main__", "errors"}
"""The public face is tested in contracts, each command beside its module; the error classes hold no code."""


def files_of(unit: str) -> list[Path]:
    """Mirror and laws of a module."""
    patterns = (f"test_{unit}*.py", f"{unit}/test_*.py", f"properties/test_{unit}*.py")
    return sorted({path for pattern in patterns for path in TESTS.glob(pattern)})


def functions_of(path: Path) -> list[str]:
    """Names of the test functions that pytest collects."""
    tree = ast.parse(path.read_text("utf-8"))
    found = []
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        found += [member for member in members if isinstance(member, ast.FunctionDef)]
    return [function.name for function in found if function.name.startswith(("test_", "law_"))]


def units() -> list[str]:
    """Modules and folders of dreamrie that hold code, the scores, and the app."""
    folders = (PACKAGE, ROOT / "eval", ROOT / "app")
    found = {unit_of(path) for folder in folders for path in folder.rglob("*.py")}
    return sorted(found - WITHOUT_TESTS)


@pytest.mark.parametrize("unit", units())
def test_each_module_has_a_mirror_with_enough_tests(unit: str) -> None:
    """P8: at least the number of tests that stands in the table."""
    count = sum(len(functions_of(path)) for path in files_of(unit))
    assert count >= MINIMUM[unit], f"{unit}: {count} tests in {files_of(unit)}"


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.relative_to(TESTS).as_posix()
)
def test_no_test_hides(path: Path) -> None:
    """A test file holds tests, no name twice; a law is said in words in its docstring."""
    names = functions_of(path)
    assert names
    assert len(names) == len(set(names))
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("law_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} does not say its law"
        if isinstance(node, ast.ClassDef):
            assert not node.name.startswith("test"), f"{path.name}: {node.name} is never collected"


def test_a_lost_test_is_noticed(tmp_path: Path) -> None:
    """Mutant: a misnamed function is not counted."""
    source = "def test_a(): ...\ndef tst_b(): ...\nclass TestC:\n    def test_d(self): ...\n"
    (tmp_path / "test_x.py").write_text(source, "utf-8")
    assert functions_of(tmp_path / "test_x.py") == ["test_a", "test_d"]
