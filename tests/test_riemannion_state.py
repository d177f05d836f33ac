"""The state of Riemannion: copies, pickles, checkpoints of older versions and of others (O10)."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from dreamrie.errors import ConfigError
from dreamrie.riemannion import Riemannion
from tests.small_optimizer import stepped
from tests.strategies import LAYERS, Layer, Quadratic, make_pairs, run


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_alike(way: str) -> None:
    """A copied optimizer with its parameters takes the same next steps, to the bit, and leaves the original alone."""
    optimizer, pairs = stepped()
    if way == "deepcopy":
        twin, twins = copy.deepcopy((optimizer, pairs))
    elif way == "pickle":
        twin, twins = pickle.loads(pickle.dumps((optimizer, pairs)))
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twins = copy.deepcopy(pairs)
        twin = Riemannion(twins, lr=0.9)
        twin.load_state_dict(torch.load(file, weights_only=True))
    ours = run(optimizer, Quadratic(pairs), 3, start=2)
    theirs = run(twin, Quadratic(twins), 3, start=2)
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_pickle_of_an_older_version_gets_defaults() -> None:
    """Options that did not exist when a pickle was written take their defaults."""
    optimizer, pairs = stepped()
    state = optimizer.__getstate__()
    state = {key: copy.copy(value) for key, value in state.items()}
    state["param_groups"] = [
        {k: v for k, v in group.items() if k not in ("exact_norm", "floor_hits")}
        for group in state["param_groups"]
    ]
    state["defaults"] = {k: v for k, v in state["defaults"].items() if k != "exact_norm"}
    older = Riemannion.__new__(Riemannion)
    older.__setstate__(state)
    assert older.param_groups[0]["exact_norm"] is False
    assert older.floor_hits == 0
    run(older, Quadratic(pairs), 1, start=2)


def test_state_of_an_older_version_gets_defaults() -> None:
    """A state without counters and later options loads; the optimizer's own description of the layers stays."""
    optimizer, pairs = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("exact_norm", "floor_hits", "skipped", "names", "scaling"):
        del saved["param_groups"][0][key]
    fresh = Riemannion(pairs)
    fresh.load_state_dict(saved)
    assert fresh.skipped_steps == fresh.floor_hits == 0
    assert fresh.param_groups[0]["scaling"] == [pair.scaling for pair in pairs]
    assert fresh.param_groups[0]["lr"] == 0.02


def test_state_of_other_layers_is_refused() -> None:
    """State of another rank, another order or another number of layers changes nothing and is named."""
    optimizer, pairs = stepped()
    saved = optimizer.state_dict()
    for others, words in (
        (make_pairs(LAYERS[:2]), "names"),
        (list(reversed(make_pairs())), "names"),
        (make_pairs([*LAYERS[:3], Layer(5, 7, 3, 0.5)]), "rank"),
        (make_pairs([*LAYERS[:3], Layer(5, 8, 4, 0.5)]), "basis|momentum"),
    ):
        fresh = Riemannion(others)
        with pytest.raises(ConfigError, match=words):
            fresh.load_state_dict(saved)
        assert not fresh.state
        assert fresh.param_groups[0]["lr"] == 1e-3
    with pytest.raises(ConfigError, match="2 parameter groups"):
        Riemannion(pairs).load_state_dict(
            Riemannion([{"pairs": pairs[:2]}, {"pairs": pairs[2:]}]).state_dict()
        )


def test_state_of_another_optimizer_is_refused() -> None:
    """AdamW's state over the same factors is named as such; nothing is loaded."""
    _, pairs = stepped()
    other = torch.optim.AdamW([p for pair in pairs for p in (pair.left, pair.right)], lr=0.5)
    for group in other.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    other.step()
    fresh = Riemannion(pairs)
    with pytest.raises(ConfigError, match="another optimizer"):
        fresh.load_state_dict(other.state_dict())
    assert not fresh.state
    assert fresh.param_groups[0]["lr"] == 1e-3


def test_load_hooks_of_others_are_kept() -> None:
    """User hooks around loading may change the input and see the final state."""
    optimizer, pairs = stepped()
    fresh = Riemannion(make_pairs())
    seen = []

    def slower(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.5
        return state

    fresh.register_load_state_dict_pre_hook(slower)
    fresh.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == 0.5
    assert seen == [2 * len(pairs)]
