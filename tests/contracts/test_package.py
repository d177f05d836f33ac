"""P6: the wheel holds the library, its types and its embedded model, and nothing else."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.contracts.sources import PACKAGE, ROOT, dotted_name, imported_modules


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names inside a wheel of this checkout, built from links so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode:
        pytest.skip("this copy of the sources is not a git checkout, so its files are not known")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    flags = "--quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check".split()
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", str(folder), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_library(wheel_names: set[str]) -> None:
    """Code, `py.typed` and everything below assets are in it."""
    files = {path.relative_to(ROOT) for path in PACKAGE.rglob("*") if path.is_file()}
    caches = ("__pycache__", ".")
    expected = {
        path.as_posix() for path in files if not any(part.startswith(caches) for part in path.parts)
    }
    assert len(expected) > 10
    assert expected - wheel_names == set()


def test_the_wheel_holds_nothing_else(wheel_names: set[str]) -> None:
    """Tests, tools, examples and benchmarks belong to the checkout."""
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "dreamrie",
        "train_dreambooth.py",
    }
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)


def test_every_import_of_the_library_is_a_declared_dependency() -> None:
    """A fresh install can import all of dreamrie, not the developer's environment alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {_import_name(line) for line in project["dependencies"]}
    used: set[str] = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        used |= {
            name.split(".")[0]
            for name in imported_modules(tree, dotted_name(path), path.stem == "__init__")
        }
    outside = used - set(sys.stdlib_module_names) - {"dreamrie", *OPTIONAL}
    assert outside - declared == set()
    assert declared - used <= {"numpy"}


OPTIONAL = {"dask", "distributed", "jaxtyping", "jinja2", "tensorboard", "triton"}
"""The engine of the sweep extra; types for tests only; the chat templates of the llm extra, which torch brings too; a
writer asked for by a flag; kernels for GPUs, which torch brings where it has them."""


def _import_name(requirement: str) -> str:
    name = requirement.split(">")[0].strip()
    return {"pillow": "PIL", "pyyaml": "yaml"}.get(name, name.replace("-", "_"))


def test_the_assets_are_there() -> None:
    """The embedded pipeline is part of the checkout."""
    assert (PACKAGE / "assets" / "tiny-sd" / "model_index.json").is_file()
    assert Path(PACKAGE / "py.typed").is_file()


def test_the_assets_are_those_of_the_list() -> None:
    """P6: SHA256SUMS names every file of the two models, and each has the hash that stands there."""
    assets = PACKAGE / "assets"
    lines = (assets / "SHA256SUMS").read_text("utf-8").splitlines()
    listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    files = [p for p in assets.rglob("*") if p.is_file() and p.parent != assets]
    found = {
        path.relative_to(assets).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    assert len(found) >= 12
    assert listed == found
