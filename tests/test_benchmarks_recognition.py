"""The table of the encoders: what counts as recognized, by hand, and one adapter from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import concepts, recognition


def test_recognized_is_nearest_to_its_own_concept() -> None:
    """Three of four pictures point to the cat; the fourth is nearer to the dog, whatever it is called."""
    real = {"cat": torch.eye(3)[:1], "dog": torch.eye(3)[1:2]}
    ours = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0, 0], [1.0, 0, 2.0], [0.6, 0.5, 0], [0.5, 0.6, 0]]), dim=1
    )
    assert recognition.recognized("cat", ours, real) == 0.75
    assert recognition.recognized("dog", ours, real) == 0.25


def test_one_adapter_alone_is_always_recognized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one concept there is nothing to mistake it for; the table has a row for each encoder."""
    monkeypatch.setattr(concepts, "BRUTE_FACTOR", 1)
    monkeypatch.setattr(recognition, "SIZES", ((48,), (48, 64)))
    monkeypatch.setattr(recognition, "PICTURES", 4)
    flags = ["--output", str(tmp_path), "--concepts", "owl", "--seeds", "1", "--jobs", "1"]
    flags += ["--max_train_steps", "2", "--score_steps", "2", "--score_images", "4"]
    flags += ["--loi_batches", "1", "--score_inference_steps", "1", "--num_inference_steps", "1"]
    concepts.main(flags)
    capsys.readouterr()
    recognition.main(["--runs", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 adapters of 1 concepts, 4 pictures of each adapter"
    assert [line[:16].strip() for line in lines[2:]] == ["effnet 48", "effnet 48+64", "tiny-clip"]
    assert [line.split()[-4] for line in lines[2:]] == ["1.000"] * 3
    with pytest.raises(SystemExit, match="holds no run"):
        recognition.main(["--runs", str(tmp_path / "nothing")])
