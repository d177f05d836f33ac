"""The table of truncation: its arithmetic by hand, and one small run from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import truncation
from dreamrie.adapter_file import save_diffusers
from dreamrie.adapter_open import open_adapter
from dreamrie.lora import LowRank
from dreamrie.lora.comparing import change_norm
from tests.eval.small_curves import small_curve
from tests.strategies import noise


def test_rows_are_compared_with_the_whole_adapter(tmp_path: Path) -> None:
    """0.5 whole and 0.42 truncated is a loss of 0.08, whatever the base model has; all are of one step."""
    curve = small_curve({0: 0.3, 100: 0.5, 200: 0.42}, dict.fromkeys((0, 100, 200), 0.25))
    path = save_diffusers(tmp_path, {"a": LowRank(noise(1, 6, 3), noise(2, 3, 5))}, {})
    models = [("base model", None, 0.0), ("whole", path, 1.0), ("rank 4", path, 0.7)]
    base, whole, cut = truncation.rows_of(models, curve.rows, curve.yardstick)
    assert (base.rank, base.size, whole.rank) == (0, 0, 3)
    assert whole.size == path.stat().st_size
    assert whole.change == (0.0, 0.0, 0.0)
    assert cut.change[0] == pytest.approx(-0.08)
    assert cut.change[1] <= cut.change[0] <= cut.change[2] < 0
    assert base.change[0] == pytest.approx(-0.2)
    assert cut.image[0] == pytest.approx(0.42)
    assert cut.image[1] < 0.42 < cut.image[2]
    assert cut.text == pytest.approx(0.25)
    text = truncation.report([base, whole, cut], 8)
    assert text.startswith("8 pictures of each model")
    assert text.splitlines()[-1].startswith("rank 4                    3 ")
    assert " 70.0%  0.420 [" in text.splitlines()[-1]
    assert "-0.080 [" in text.splitlines()[-1]


def test_the_energy_is_that_of_the_file(tmp_path: Path) -> None:
    """What the command says it keeps is the share of the squared norm that the written file has."""
    whole = save_diffusers(tmp_path, {"a": LowRank(noise(1, 6, 3), noise(2, 3, 5))}, {})
    kept = truncation.truncated(whole, ["--rank", "1"], tmp_path / "cut.safetensors")
    norms = [
        change_norm(open_adapter(p).changes["a"]) for p in (tmp_path / "cut.safetensors", whole)
    ]
    assert kept == pytest.approx((norms[0] / norms[1]) ** 2, rel=1e-5)
    assert 0.3 < kept < 0.99


@pytest.mark.slow
def test_a_small_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps on the embedded model; a second call trains nothing."""
    run, output = tmp_path / "run", tmp_path / "results" / "t.json"
    flags = ["--run", str(run), "--output", str(output), "--work", str(tmp_path / "work")]
    flags += ["--pictures", "4", "--to_rank", "2"]
    training = ["--max_train_steps", "2", "--score_steps", "2", "--score_images", "4"]
    training += ["--loi_batches", "1", "--score_inference_steps", "1", "--num_inference_steps", "1"]
    truncation.main([*flags, *training])
    assert "run: trained\n" in capsys.readouterr().out
    written = json.loads(output.read_text("utf-8"))
    assert [row["name"] for row in written["rows"]] == [
        "base model",
        "whole",
        "rank 2",
        "90 % of the energy",
    ]
    assert [row["rank"] for row in written["rows"][:3]] == [0, 8, 2]
    assert written["rows"][3]["energy"] >= 0.9
    assert written["rank_trained"] == 4
    truncation.main(flags)
    assert "run: trained before" in capsys.readouterr().out
    assert json.loads(output.read_text("utf-8")) == written
