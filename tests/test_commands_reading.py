"""`info` and `diff`: the numbers are those of the changes, in lines that fit a terminal."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dreamrie import __main__ as command
from dreamrie.adapter_file import save_diffusers
from dreamrie.adapter_open import open_adapter
from dreamrie.adapter_universal import save_universal
from dreamrie.lora import LowRank
from tests.contracts.sources import ROOT
from tests.small_adapters import save_small, trained_small
from tests.strategies import noise

pytestmark = pytest.mark.end_to_end


def matrices(seed: int = 1) -> dict[str, Tensor]:
    """The change of each layer, from the model."""
    return {pair.name: pair.delta().double().flatten(1) for pair in trained_small(seed)[1]}


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines on the terminal of a command that succeeds."""
    capsys.readouterr()
    assert command.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    # Paths stay in one piece.
    assert max(len(line) for line in lines if "safetensors" not in line) <= 100
    return lines


def test_info_says_how_it_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Start and settings, where the file names them."""
    plain = save_small(tmp_path)
    given, known = (
        open_adapter(plain),
        {"init": "loi, of 7 batches", "config_hash": "0123456789abcdef"},
    )
    named = save_diffusers(tmp_path / "n.safetensors", given.changes, {**given.facts, **known})
    text = "\n".join(told(["info", str(named), "--json", str(tmp_path / "i.json")], capsys))
    assert "start      loi, of 7 batches" in text
    assert "settings   hash 0123456789abcdef" in text
    record = json.loads((tmp_path / "i.json").read_text("utf-8"))
    assert (record["start"], record["config_hash"]) == (known["init"], known["config_hash"])
    assert "settings " not in "\n".join(told(["info", str(plain)], capsys))


def test_info_says_what_the_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_small(tmp_path)
    lines = told(["info", str(tmp_path), "--json", str(tmp_path / "i.json")], capsys)
    assert lines[0] == str(path)
    text = "\n".join(lines)
    for words in (
        "diffusers (unet.LAYER.lora_A.weight), float32",
        "digest     verified",
        "base       small; weights bfloat16 ",
        "trigger    a sks øwl",
        "6 stored, 3 trained",
        "Effective rank = exp of the entropy of p_i = s_i^2 / sum s^2",
        "If every layer keeps rank",
    ):
        assert words in text
    record = json.loads((tmp_path / "i.json").read_text("utf-8"))
    wanted = matrices()
    squares = {layer: torch.linalg.svdvals(m) ** 2 for layer, m in wanted.items()}
    total = sum(float(s.sum()) for s in squares.values())
    assert math.isclose(record["norm"], math.sqrt(total), rel_tol=1e-6)
    assert list(record["energy_by_rank"]) == ["1", "2", "4", "6"]
    kept = sum(float(s[:2].sum()) for s in squares.values()) / total
    assert math.isclose(record["energy_by_rank"]["2"], kept, rel_tol=1e-6)
    rows = record["layers"]
    assert [row["norm"] for row in rows] == sorted((row["norm"] for row in rows), reverse=True)
    for row in rows:
        shares = squares[row["layer"]] / squares[row["layer"]].sum()
        shares = shares[shares > 1e-14]
        entropy = float(-(shares * shares.log()).sum())
        assert math.isclose(row["effective_rank"], math.exp(entropy), rel_tol=1e-5)
        assert math.isclose(row["norm"], float(wanted[row["layer"]].norm()), rel_tol=1e-6)


def test_info_of_strangers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A universal file, and one of another program whose facts hold control characters."""
    given = open_adapter(save_small(tmp_path))
    save_universal(tmp_path / "u.safetensors", given.changes, given.facts)
    lines = told(["info", str(tmp_path / "u.safetensors")], capsys)
    assert any("ComfyUI, A1111 and Forge if the base is one of SD1 or SD2" in x for x in lines)
    tensors = {f"unet.x.lora_{part}.weight": torch.eye(3) * (part == "A" or 0.5) for part in "AB"}
    save_file(tensors, tmp_path / "f.safetensors", metadata={"instance_prompt": "a\x1b[2Jb"})
    lines = told(["info", str(tmp_path / "f.safetensors")], capsys)
    assert "trigger    a\\x1b[2Jb" in lines
    text = " ".join(lines)
    assert "digest     none" in text
    assert "base       not named; weights not named" in text
    assert "3 stored, unknown trained" in text
    assert "effective rank 3.0 on average, 3.0 to 3.0" in " ".join(text.split())


def test_diff_of_two_trainings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = save_small(tmp_path / "a"), save_small(tmp_path / "b", seed=2)
    place = tmp_path / "d.json"
    lines = told(["diff", str(first), str(second), "--json", str(place)], capsys)
    assert any(line.startswith("all together") for line in lines)
    record = json.loads(place.read_text("utf-8"))
    one, other = matrices(1), matrices(2)
    a, b = (torch.cat([m[k].flatten() for k in sorted(m)]) for m in (one, other))
    total = record["total"]
    assert math.isclose(total["distance"], float((a - b).norm()), rel_tol=1e-6)
    assert math.isclose(total["cosine"], float(a @ b / (a.norm() * b.norm())), abs_tol=1e-6)
    assert 0.05 < abs(total["cosine"]) < 0.95
    assert [row["layer"] for row in record["layers"]] == sorted(one)


def test_diff_of_a_file_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_small(tmp_path)
    place = tmp_path / "d.json"
    told(["diff", str(path), str(path), "--json", str(place)], capsys)
    total = json.loads(place.read_text("utf-8"))["total"]
    assert total["relative_distance"] < 1e-15
    assert total["cosine"] == pytest.approx(1, abs=1e-15)
    assert total["column_angles"]["largest"] < 1e-6
    assert total["row_angles"]["largest"] < 1e-6


def test_a_layer_that_one_file_lacks_is_zero_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(layer: str) -> Path:
        change = {layer: LowRank(noise(1, 5, 2), noise(2, 2, 4))}
        return save_diffusers(tmp_path / layer, change, {"base_model": "x"})

    place = tmp_path / "d.json"
    lines = told(["diff", str(one("p")), str(one("q")), "--json", str(place)], capsys)
    record: dict[str, Any] = json.loads(place.read_text("utf-8"))
    assert [row["layer"] for row in record["layers"]] == ["p", "q"]
    assert record["layers"][0]["norm_b"] == 0
    assert record["layers"][0]["cosine"] is None
    assert record["total"]["relative_distance"] == pytest.approx(1)
    assert record["total"]["cosine"] == 0
    assert record["total"]["column_angles"] is None
    assert sum(line.endswith("-  -        -     -") or " - " in line for line in lines) >= 2


def test_different_shapes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for width in (4, 6):
        change = {"p": LowRank(noise(1, 5, 2), noise(2, 2, width))}
        save_diffusers(tmp_path / str(width), change, {})
    assert command.main(["diff", str(tmp_path / "4"), str(tmp_path / "6")]) == 2
    assert capsys.readouterr().out == ""


def test_errors_are_one_line_and_say_what_to_do(tmp_path: Path) -> None:
    """In a process of its own: exit code 2, nothing on stdout, no traceback."""
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 100)
    words = [sys.executable, "-m", "dreamrie", "info", str(tmp_path / "x.safetensors")]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: the adapter ")
    assert run.stderr.count("\n") == 1
    for name in ("info", "diff"):
        assert command.main([name, *[str(tmp_path / "gone")] * (1 + (name == "diff"))]) == 2


def test_json_without_its_folder_is_refused_first(tmp_path: Path) -> None:
    path = str(save_small(tmp_path))
    place = ["--json", str(tmp_path / "gone" / "x.json")]
    assert command.main(["info", path, *place]) == 2
    assert command.main(["diff", path, path, *place]) == 2
