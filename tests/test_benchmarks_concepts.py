"""The table of the example concepts: its arithmetic by hand, and one small run from end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import concepts, recognition
from tests.eval.small_curves import CEILING, small_curve


def test_a_gain_is_the_paired_difference() -> None:
    """0.4 to 0.5 is a rise; the same numbers the other way round are none."""
    curve = small_curve({0: 0.4, 100: 0.5}, {0: 0.3, 100: 0.3})
    base, row = curve.rows
    found = concepts.gain("owl", 1, base, row, curve.yardstick)
    assert found.image[:3] == pytest.approx((0.4, 0.5, 0.1))
    assert found.image[3] > 0.09
    assert found.rises
    assert found.step == 100
    fall = small_curve({0: 0.5, 100: 0.4}, {0: 0.3, 100: 0.3})
    assert not concepts.gain("owl", 1, *fall.rows, fall.yardstick).rises


def test_seeds_are_averaged_before_prompts_are_drawn() -> None:
    """Two seeds that differ by 0.2 prompt by prompt, in turn: their mean has no spread left, each alone has."""
    curve = small_curve({0: 0.4, 100: 0.5}, {0: 0.3, 100: 0.3})
    rise = concepts.gain("owl", 0, *curve.rows, curve.yardstick)
    up = dataclasses.replace(rise, changes=(0.2, 0.0, 0.2, 0.0))
    down = dataclasses.replace(rise, seed=1, changes=(0.0, 0.2, 0.0, 0.2))
    assert concepts.over_seeds([up, down])["owl"] == pytest.approx((0.1, 0.1, 0.1))
    mean, low, high = concepts.over_seeds([up])["owl"]
    assert mean == pytest.approx(0.1)
    assert low < 0.05 < 0.15 < high


@pytest.mark.parametrize(
    ("kept", "same", "agrees"), [(300, True, True), (200, False, True), (100, False, False)]
)
def test_a_kept_step_agrees_if_it_lies_in_the_interval_of_the_found_one(
    kept: int, same: bool, agrees: bool
) -> None:
    """Step 300 is found; 200 is 0.02 lower, inside the interval of about 0.05; 100 is far below."""
    image = {0: 0.2, 100: 0.3, 200: 0.58, 300: 0.6}
    curve = small_curve(image, dict.fromkeys(image, 0.3), own_noise=0.001)
    found = concepts.search("owl", kept, curve.rows, curve.yardstick)
    assert found.found == 300
    assert (found.step == found.found) == same
    assert found.agrees == agrees
    assert found.interval[0] < 0.6 < found.interval[1] <= CEILING


def test_the_tables_count_what_rises_and_what_agrees() -> None:
    curve = small_curve({0: 0.4, 100: 0.5}, {0: 0.3, 100: 0.3})
    rise = concepts.gain("owl", 0, *curve.rows, curve.yardstick)
    found = concepts.search("owl", 100, curve.rows, curve.yardstick)
    again = dataclasses.replace(rise, seed=1)
    text = concepts.report([rise, again], [found])
    assert any(
        line.startswith("owl             +0.100 [+0.0") and line.endswith("yes")
        for line in text.splitlines()
    )
    assert "rises beyond noise in 1 of 1 concepts" in text
    assert (
        "rises beyond noise in 2 of 2 runs; by +0.100 on average, standard deviation 0.000" in text
    )
    assert (
        "within its interval, in 1 of 1 runs; the same step in 1, not worse beyond noise when paired in 1"
        in text
    )


@pytest.mark.slow
def test_a_small_run_trains_examines_and_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of one concept on the embedded model; a second call trains nothing; its adapter is recognized."""
    monkeypatch.setattr(concepts, "BRUTE_FACTOR", 1)
    flags = ["--output", str(tmp_path), "--concepts", "owl", "--seeds", "1", "--jobs", "1"]
    flags += ["--max_train_steps", "2", "--score_steps", "2", "--score_images", "4"]
    flags += ["--loi_batches", "1", "--score_inference_steps", "1", "--num_inference_steps", "1"]
    threads = torch.get_num_threads()
    concepts.main(flags)
    assert torch.get_num_threads() == threads
    first = capsys.readouterr().out
    assert "owl-0: trained; best/ holds step 2" in first
    written = json.loads((tmp_path / "concepts.json").read_text("utf-8"))
    assert [row["concept"] for row in written["gains"]] == ["owl"]
    assert written["searches"][0]["step"] == 2
    concepts.main(flags)
    assert "owl-0: trained before" in capsys.readouterr().out
    monkeypatch.setattr(recognition, "SIZES", ((48,), (48, 64)))
    monkeypatch.setattr(recognition, "PICTURES", 4)
    recognition.main(["--runs", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 adapters of 1 concepts, 4 pictures of each adapter"
    assert [line[:16].strip() for line in lines[2:]] == ["effnet 48", "effnet 48+64", "tiny-clip"]
    # With one concept there is nothing to mistake it for.
    assert [line.split()[-4] for line in lines[2:]] == ["1.000"] * 3
    with pytest.raises(SystemExit, match="holds no run"):
        recognition.main(["--runs", str(tmp_path / "nothing")])
