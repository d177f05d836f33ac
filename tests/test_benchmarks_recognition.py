"""The table of the encoders: what counts as recognized, by hand; a whole run is in test_benchmarks_concepts.py."""

from __future__ import annotations

import torch

from benchmarks import recognition


def test_recognized_is_nearest_to_its_own_concept() -> None:
    """Three of four pictures point to the cat; the fourth is nearer to the dog, whatever it is called."""
    real = {"cat": torch.eye(3)[:1], "dog": torch.eye(3)[1:2]}
    ours = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0, 0], [1.0, 0, 2.0], [0.6, 0.5, 0], [0.5, 0.6, 0]]), dim=1
    )
    assert recognition.recognized("cat", ours, real) == 0.75
    assert recognition.recognized("dog", ours, real) == 0.25
