"""The benchmark of the initialization measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train_dreambooth
from benchmarks import loi_energy
from dreamrie.config import parse_config
from tests.small_models import make_small_pipeline

BATCHES = 4


def flags_for(folder: Path, pictures: Path) -> list[str]:
    """A small random model and small batches."""
    model = make_small_pipeline("tiny-vae", folder / "model")
    flags = ["--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(pictures)]
    return [*flags, "--instance_prompt", "a sks disc", "--train_batch_size", "2", "--rank", "2"]


def test_the_yardstick_is_the_mean_of_the_gradients(tmp_path: Path, disc_pictures: Path) -> None:
    """Two batches average to half the sum of their own gradients."""
    flags = [*flags_for(tmp_path, disc_pictures), "--output_dir", str(tmp_path / "out")]
    task = train_dreambooth.build_task(parse_config(flags), torch.device("cpu"), 1)
    first, second = task.batch(1, 0), task.batch(2, 0)
    both = loi_energy.mean_gradients(task, [first, second])
    alone = [loi_energy.mean_gradients(task, [batch]) for batch in (first, second)]
    for mean, one, two in zip(both, *alone, strict=True):
        assert float((one - two).abs().max()) > 1e-6
        torch.testing.assert_close(mean, (one + two) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_known_gradient_is_captured_completely(tmp_path: Path, disc_pictures: Path) -> None:
    """The first row is 1.0000; the others lie between 0 and 1, with fewer digits of luck."""
    flags = [*flags_for(tmp_path, disc_pictures), "--loi_batches", str(BATCHES)]
    config = parse_config([*flags, "--output_dir", str(tmp_path / "out")])
    task = train_dreambooth.build_task(config, torch.device("cpu"), 1)
    shares = loi_energy.run(task, BATCHES, 2 * BATCHES)
    assert shares[0].total == pytest.approx(1, abs=1e-4)
    assert shares[0].worst == pytest.approx(1, abs=1e-3)
    for share in shares[1:]:
        assert 0 < share.worst <= share.total < 1
    names = [share.name.split(",")[0] for share in shares[1:]]
    assert names == ["mean_gradient", "sketch", "backprop_rsvd"]


def test_the_table_is_printed(
    tmp_path: Path, disc_pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line of the README prints a row for each estimator."""
    flags = [*flags_for(tmp_path, disc_pictures), "--loi_batches", "1", "--yardstick_batches", "1"]
    loi_energy.main(flags)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[3].startswith("exact gradient")
    assert lines[3].split()[-3] == "1.0000"
