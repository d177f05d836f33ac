"""The alarms on scores of real trainings of the demo, and once more while it trains.

`curves/default.jsonl` is the run of examples/demo.yaml with `--score_steps 100`. The others have one more change each:
`--learning_rate 0.2`; `--max_train_steps 4000 --score_steps 400`; `--learning_rate 2e-4 --max_train_steps 100
--score_steps 50`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import train_dreambooth
from eval.training import Curve, Opinion, choose, judge, read_curve
from tests.contracts.sources import ROOT

CURVES = Path(__file__).parent / "curves"


def opinions(path: Path) -> dict[int, Opinion]:
    """What was said at each scoring of a run."""
    facts = json.loads(path.read_text("utf-8").splitlines()[0])
    whole, said = read_curve(path), {}
    for count in range(1, len(whole.rows) + 1):
        part = Curve(whole.yardstick, whole.rows[:count])
        said[part.rows[-1].step] = judge(part, choose(part), facts["max_steps"])
    return said


def test_the_default_run_raises_no_alarm() -> None:
    said = opinions(CURVES / "default.jsonl")
    assert list(said) == [0, 100, 200, 300, 400]
    assert not [opinion.message for opinion in said.values() if opinion.is_alarm]
    assert said[100].kind == "still improving"
    assert said[400].kind == "settled"


def test_ten_times_too_long_is_overfitting_and_best_is_early() -> None:
    """Prompts fade slowly: no alarm before four times the default length, then at every scoring."""
    said = opinions(CURVES / "ten_times_too_long.jsonl")
    kinds = {step: opinion.kind for step, opinion in said.items()}
    assert kinds[400] == "still improving"
    assert {kinds[step] for step in range(1600, 4001, 400)} == {"overfitting"}
    assert said[4000].is_alarm
    assert "best/ holds step 400" in said[4000].message
    choice = choose(read_curve(CURVES / "ten_times_too_long.jsonl"))
    assert choice is not None
    assert choice.step == 400


def test_ten_times_the_rate_is_overfitting_from_the_first_scoring_on() -> None:
    said = opinions(CURVES / "ten_times_the_rate.jsonl")
    assert {opinion.kind for step, opinion in said.items() if step > 0} == {"overfitting"}
    assert "try a third of the --learning_rate" in said[100].message
    choice = choose(read_curve(CURVES / "ten_times_the_rate.jsonl"))
    assert choice is not None
    assert not choice.follows_prompts


def test_a_hundredth_of_the_rate_is_not_learning() -> None:
    said = opinions(CURVES / "a_hundredth_of_the_rate.jsonl")
    assert said[100].kind == "not learning"
    assert "the model hardly moved: try three times the --learning_rate" in said[100].message


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "alarm"), [([], False), (["--learning_rate", "0.2"], True)])
def test_the_alarm_for_real(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flags: list[str], alarm: bool
) -> None:
    """The demo trains for two minutes, as it is and at ten times its rate."""
    caplog.set_level(logging.INFO, "dreamrie")
    words = ["--config", str(ROOT / "examples" / "demo.yaml"), "--score_steps", "100"]
    words += ["--instance_data_dir", str(ROOT / "examples" / "concepts" / "pumpkin")]
    assert train_dreambooth.main([*words, "--output_dir", str(tmp_path / "run"), *flags]) == 0
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert any("overfitting" in message for message in warned) == alarm, warned
