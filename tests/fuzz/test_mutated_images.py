"""D3: a damaged picture is decoded or refused by name, within 2 s and 1 GB; no crash, no other error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.sources import ROOT
from tests.fuzz.picture_damage import DAMAGES, damaged, sound_pictures
from tests.mutants.summary import FIGURE

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the limits of a process are set as on Linux"
)


def decode_all(count: int, folder: Path) -> list[dict[str, Any]]:
    """One record for each damaged file; a worker that dies is replaced by one that goes on behind the file."""
    records: list[dict[str, Any]] = []
    while len(records) < count:
        words = [sys.executable, "-W", "error", "-m", "tests.fuzz.decode_worker"]
        words += [str(len(records)), str(count), str(folder)]
        run = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
        )
        found = [json.loads(line) for line in run.stdout.splitlines()]
        records += found
        if len(records) < count:
            number = len(records)
            assert found or number, f"the worker does not start: {run.stderr[-500:]}"
            form, damage, _ = damaged(number, sound_pictures())
            record = {"number": number, "form": form, "damage": damage, "s": 2.0}
            records.append(record | {"outcome": f"crashed with exit code {run.returncode}"})
    assert [record["number"] for record in records] == list(range(count))
    return records


def check(count: int, folder: Path, record: Callable[[str, object], None]) -> None:
    records = decode_all(count, folder)
    kinds = Counter(record["outcome"].split()[0] for record in records)
    crashes = [r for r in records if r["outcome"].startswith("crashed")]
    slowest = max(record["s"] for record in records)
    causes = Counter(r["outcome"] for r in records if r["outcome"].startswith("refused"))
    record(
        FIGURE,
        f"{count} damaged pictures: {kinds['decoded']} decoded, {kinds['refused']} refused, {len(crashes)} crashed; "
        f"slowest {1000 * slowest:.0f} ms",
    )
    assert crashes == []
    # Preconditions: every format and damage was tried, both outcomes are frequent, and what lies behind the refusals is
    # more than the one error that Pillow documents.
    assert {r["form"] for r in records} == {"PNG", "JPEG", "WEBP"}
    assert {r["damage"] for r in records} == {damage.__name__ for damage in DAMAGES}
    assert kinds["decoded"] > count / 10
    assert kinds["refused"] > count / 4
    assert len(causes) >= 4
    assert slowest < 2.0


def test_damaged_pictures_are_decoded_or_refused(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check(500, tmp_path, record_property)


@pytest.mark.slow
def test_more_damaged_pictures(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The same, and 9,500 others."""
    check(10_000, tmp_path, record_property)


@pytest.mark.slow
def test_a_worker_that_dies_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: a decoder that crashes, or takes all memory, is seen, and the files behind it are tried too."""
    program = (
        "from tests.fuzz import decode_worker as worker\n"
        "import os\n"
        "sound, judge = worker.load_layers, worker.outcome_of\n"
        "def broken(path):\n"
        "    kind = len(path.read_bytes()) % 9\n"
        "    if kind == 0: os.abort()\n"
        "    return bytearray(2**31) if kind == 1 else sound(path)\n"
        "def outcome(path):\n"
        "    worker.load_layers = broken\n"
        "    return judge(path)\n"
        "worker.outcome_of = outcome\n"
        "worker.main()\n"
    )
    real = subprocess.run

    def run(words: list[str], **options: Any) -> Any:
        return real([words[0], "-c", program, *words[5:]], **options)

    monkeypatch.setattr(subprocess, "run", run)
    outcomes = Counter(r["outcome"] for r in decode_all(40, tmp_path))
    lengths = [len(damaged(n, sound_pictures())[2]) % 9 for n in range(40)]
    assert outcomes["crashed with exit code -6"] == lengths.count(0) > 0
    assert outcomes["crashed MemoryError: "] == lengths.count(1) > 0
