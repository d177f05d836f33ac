"""The laws of the loop and of strict reading, held to the language task by the very functions that hold the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dreamrie.adapter_reading import load_adapter
from dreamrie.errors import AdapterError
from dreamrie.trainer import loop
from tests import test_adapter_reading as reading
from tests.llm import small
from tests.llm.small_task import LanguageTask
from tests.properties import test_resume_laws as resuming
from tests.properties import test_trainer_laws as training
from tests.small_adapters import rewrite, state_of

LAWS: dict[str, Callable[..., None]] = {
    "N1 skipped": training.law_bad_steps_are_skipped,
    "N1 given up": training.law_three_bad_steps_stop_the_run,
    "N2 accumulation": training.law_accumulation,
    "C1 resumed": resuming.law_c1_straight_equals_resumed,
}


@pytest.mark.parametrize("law", LAWS)
def test_the_loop_guards_texts_as_it_guards_points(law: str) -> None:
    LAWS[law](loop, kind=LanguageTask)


Q = "layers.0.self_attn.q_proj"
ALIASES = {
    "unet.mix.": f"base_model.model.model.{Q}.",
    "unet.deep.narrow.": "base_model.model.model.layers.0.mlp.down_proj.",
}
"""Layers of the small U-Net of `tests.test_adapter_reading`, and those of a folder of this task that stand for them."""
DAMAGE: dict[str, tuple[Callable[..., None], str]] = {
    "half gone": (reading.half_gone, "2 tensors are missing.*lora_A.*lora_B"),
    "empty": (reading.nothing_left, "is empty"),
    "extra layer": (reading.extra_layer, r"2 of 6 tensors have no place.*more\.lora_A"),
    "extra tensor": (reading.extra_tensor, "1 of 5 tensors have no place.*lora_magnitude"),
    "wrong rank": (reading.narrower, rf"does not fit|size mismatch.*{Q}\.lora_B.*\(32, 5\)"),
    "no matrix": (reading.no_axes, rf"size mismatch.*{Q}\.lora_A"),
    "NaN": (reading.nan, r"not finite.*mlp\.down_proj\.lora_B"),
    "a bit": (reading.one_bit, ""),
}


def renamed(change: Callable[..., None]) -> Callable[..., None]:
    """The same change to a folder of this task."""

    def changed(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
        def swap(pairs: list[tuple[str, str]]) -> None:
            for name in list(tensors):
                for old, new in pairs:
                    if name.startswith(old):
                        tensors[new + name.removeprefix(old)] = tensors.pop(name)
                        break

        swap([(own, alias) for alias, own in ALIASES.items()])
        change(tensors, facts)
        swap([*ALIASES.items(), ("unet.", "base_model.model.")])

    return changed


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder as the task writes it, of an adapter that has moved."""
    task = LanguageTask(dtype=torch.float32)
    for pair in task.pairs:
        pair.left.data[:, : pair.rank] += torch.eye(pair.out)[:, : pair.rank]
        pair.right.data[: pair.rank] -= torch.eye(pair.in_)[: pair.rank]
    task.save(tmp_path, {"steps": "1"})
    loaded = load_adapter(small.model(num_hidden_layers=1), tmp_path)
    assert loaded.unchecked == ()
    return tmp_path


@pytest.mark.parametrize("row", DAMAGE)
def test_what_does_not_fit_is_refused(row: str, saved: Path) -> None:
    """Unseen by no digest, and by its content alone; the model is then as it was."""
    change, said = DAMAGE[row]
    file = saved / "adapter_model.safetensors"
    content = file.read_bytes()
    for foreign in (False, True):
        if foreign and not said:
            continue  # nothing but the digest can tell
        file.write_bytes(content)
        rewrite(file, renamed(change), foreign=foreign)
        model = small.model(num_hidden_layers=1)
        before = state_of(model)
        with pytest.raises(AdapterError, match=said if foreign else None) as caught:
            load_adapter(model, saved)
        assert saved.name in str(caught.value)
        assert state_of(model) == before


def test_another_base_is_refused(saved: Path) -> None:
    """By its fingerprint: the layers are the same, one weight elsewhere is not."""
    model = small.model(num_hidden_layers=1)
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    before = state_of(model)
    with pytest.raises(AdapterError, match="the fingerprint differs"):
        load_adapter(model, saved)
    assert state_of(model) == before
