"""Spectral maps of the core: what they do with zero, batches and precision."""

from __future__ import annotations

import pytest
import torch

from dreamrie import riemannion_fast
from dreamrie.core_maps import CORE_MAPS, best_quintics
from dreamrie.optimizer_table import CORE_MAP_NAMES
from dreamrie.riemannion import Riemannion
from tests.strategies import F32, Layer, make_pairs, noise


def test_the_names_of_the_flag_are_those_of_the_maps() -> None:
    """The table imports nothing, so a test keeps the two lists equal."""
    assert tuple(CORE_MAPS) == CORE_MAP_NAMES


@pytest.mark.parametrize("name", sorted(CORE_MAPS))
def test_zero_gives_zero_beside_other_layers(name: str) -> None:
    """A layer without momentum is not moved, and the others of its batch do not notice it."""
    core = noise(3, 3, 4, 4)
    core[:, 2:, 2:] = 0
    core[1] = 0
    found = CORE_MAPS[name](core, 2)
    assert torch.equal(found[1], torch.zeros(4, 4, dtype=core.dtype))
    for row in (0, 2):
        torch.testing.assert_close(found[row], CORE_MAPS[name](core[row], 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CORE_MAPS))
def test_fp32_agrees_with_fp64_at_every_scale(name: str) -> None:
    """The size of the gradient does not matter, from 1e-9 to 1e9."""
    core = noise(4, 6, 6)
    core[3:, 3:] = 0
    wanted = CORE_MAPS[name](core, 3)
    for scale in (1e-9, 1.0, 1e9):
        found = CORE_MAPS[name]((scale * core).to(F32), 3)
        assert found.dtype == F32
        torch.testing.assert_close(found.to(core.dtype), wanted, rtol=0, atol=2e-4)


def test_the_quintics_are_made_once() -> None:
    assert best_quintics(1e-3, 7) is best_quintics(1e-3, 7)
    # The first maps 1e-3 to 8.5e-3: the slope at zero is what counts there.
    a, b, c = best_quintics(1e-3, 7)[0]
    assert a * 1e-3 + b * 1e-9 + c * 1e-15 == pytest.approx(8.47e-3, abs=1e-5)


def test_the_quintics_stop_where_rounding_begins() -> None:
    """Asked for more than there is to gain, it gives fewer."""
    assert len(best_quintics(0.01, 9)) < 9


@pytest.mark.parametrize("name", sorted(CORE_MAPS))
def test_a_layer_that_needs_the_exact_step_has_its_own_numbers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient of rank one in the second of three layers: the fast step gives it, and it alone, to the exact one."""

    def path(exact: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        pairs = make_pairs([Layer(20, 16, 3, 1.0)] * 3, dtype=F32)
        optimizer = Riemannion(pairs, lr=0.02, core_map=name)
        with monkeypatch.context() as patch:
            if exact:
                patch.setattr(riemannion_fast, "can_be_fast", lambda work: False)
            for _ in range(3):
                for number, pair in enumerate(pairs):
                    dense = torch.randn(20, 16, generator=generator)
                    if number == 1:
                        dense = dense[:, :1] @ dense[:1]
                    pair.left.grad = pair.scaling * dense @ pair.right.detach().T
                    pair.right.grad = pair.scaling * pair.left.detach().T @ dense
                optimizer.step()
        return [pair.scaling * pair.left.detach() @ pair.right.detach() for pair in pairs]

    for fast, exact in zip(path(exact=False), path(exact=True), strict=True):
        torch.testing.assert_close(fast, exact, rtol=0, atol=2e-4)
