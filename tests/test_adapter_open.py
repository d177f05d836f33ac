"""Adapter files without a model: the same change as with it, or a refusal that says why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from dreamrie import adapter_open
from dreamrie.adapter_file import save_diffusers
from dreamrie.adapter_peft import save_peft
from dreamrie.adapter_universal import save_universal
from dreamrie.errors import AdapterError
from tests.small_adapters import rewrite, save_small, trained_small
from tests.test_adapter_file import trained_plain
from tests.test_adapter_names import NO_ALPHA, NO_BASE, NO_DIGEST, SPELLINGS, factors

assert NO_BASE
REAL = SimpleNamespace(open_adapter=lambda path: adapter_open.open_adapter(path))
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = "lora_unet_" + LAYER.replace(".", "_")


def matrix(change: Any) -> Tensor:
    return change.left.double().flatten(1) @ change.right.double().flatten(1)


def kohya(alpha: float | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """One layer of rank 4."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{FLAT}.lora_down.weight": torch.randn(4, 6, generator=generator).to(dtype),
        f"{FLAT}.lora_up.weight": torch.randn(5, 4, generator=generator).to(dtype),
    }
    return tensors if alpha is None else {**tensors, f"{FLAT}.alpha": torch.tensor(alpha)}


def law_alpha_is_honoured(impl: Any, folder: Path) -> None:
    """alpha / r = 0.5 halves the change, alpha / r = 1/3 loses no digit of fp16 factors, no alpha counts as r."""
    for dtype in (torch.float32, torch.float16):
        for alpha in (None, 2.0, 4.0, 4 / 3):
            tensors = kohya(alpha, dtype)
            save_file(tensors, folder / "a.safetensors")
            found = impl.open_adapter(folder / "a.safetensors")
            assert list(found.changes) == [LAYER]
            down, up = (tensors[f"{FLAT}.lora_{part}.weight"].double() for part in ("down", "up"))
            scaling = 1.0 if alpha is None else float(torch.tensor(alpha).double()) / 4
            wanted = scaling * (up @ down)
            assert float((matrix(found.changes[LAYER]) - wanted).norm() / wanted.norm()) < 1e-14
            assert (NO_ALPHA in found.unchecked) == (alpha is None)


def law_other_kinds_are_refused_by_name(impl: Any, folder: Path) -> None:
    """LoCon with a core, DoRA, LoHa, LoKr and biases are not read as LoRA; the message names them."""
    kinds = {
        "lora_mid.weight": "LoCon with a Tucker core",
        "dora_scale": "DoRA",
        "lora_magnitude_vector": "DoRA",
        "hada_w1_a": "LoHa",
        "lokr_w1": "LoKr",
        "oft_blocks": "OFT",
        "on_input": "IA3",
        "diff_b": "a change of biases",
    }
    for part, kind in kinds.items():
        path = folder / "other.safetensors"
        save_file({**kohya(2.0), f"{FLAT}.{part}": torch.ones(2, 2)}, path)
        with pytest.raises(AdapterError, match=f"not a plain LoRA but {kind}") as caught:
            impl.open_adapter(path)
        assert str(path) in str(caught.value)


def law_a_changed_file_is_refused(impl: Any, folder: Path) -> None:
    """A value, a fact, a name that changed after dreamrie wrote the file is found by the digest."""

    def value(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
        tensors["unet.mix.lora_A.weight"][0, 0] += 1e-3

    def fact(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
        facts["base_model"] = "other"

    assert impl.open_adapter(save_small(folder / "good")).has_digest
    for change in (value, fact):
        path = rewrite(save_small(folder / change.__name__), change)
        with pytest.raises(AdapterError, match="digest"):
            impl.open_adapter(path)


LAWS = (
    law_alpha_is_honoured,
    law_other_kinds_are_refused_by_name,
    law_a_changed_file_is_refused,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any, tmp_path: Path) -> None:
    law(REAL, tmp_path)


def test_a_file_of_dreamrie_is_the_change(tmp_path: Path) -> None:
    _, pairs = trained_small()
    found = adapter_open.open_adapter(save_small(tmp_path))
    assert (found.style, found.has_digest, found.dtypes) == ("diffusers", True, ("float32",))
    assert found.unchecked == (adapter_open.NO_MODEL,)
    assert found.rank_stored == 6
    assert list(found.changes) == sorted(pair.name for pair in pairs)
    for pair in pairs:
        wanted = pair.delta().double()
        error = float((matrix(found.changes[pair.name]) - wanted).norm() / wanted.norm())
        assert error < 1e-6


@pytest.mark.parametrize("how", [name for name in SPELLINGS if name != "kohya"])
def test_dotted_spellings_are_read(how: str, tmp_path: Path) -> None:
    down, up = SPELLINGS[how]
    given = factors()
    tensors = {down(layer): right for layer, (right, _) in given.items()}
    tensors |= {up(layer): left for layer, (_, left) in given.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    found = adapter_open.open_adapter(tmp_path / "a.safetensors")
    assert list(found.changes) == sorted(given)
    for layer, (right, left) in given.items():
        assert torch.equal(found.changes[layer].left, left)
        assert torch.equal(found.changes[layer].right, right)
    assert NO_DIGEST in found.unchecked
    styles = {"no prefix": "plain", "PEFT": "PEFT"}
    assert found.style == styles.get(how, how)


def test_kohyas_own_converter(tmp_path: Path) -> None:
    """A U-Net's adapter, scaling 3, through diffusers' converter to kohya."""
    parts, pairs = trained_plain("sd15")
    state = get_peft_model_state_dict(parts.unet)
    flat = convert_state_dict_to_kohya({f"unet.{name}": t for name, t in state.items()})
    flat = {name: t.contiguous() for name, t in flat.items() if not name.endswith(".alpha")}
    stems = {name.split(".")[0] for name in flat}
    flat |= {f"{stem}.alpha": torch.tensor(6.0) for stem in stems}
    flat = {name.replace("lora_unet_unet_", "lora_unet_"): t for name, t in flat.items()}
    save_file(flat, tmp_path / "k.safetensors")
    found = adapter_open.open_adapter(tmp_path / "k.safetensors")
    assert found.style == "kohya"
    assert set(found.changes) == {pair.name for pair in pairs}
    for pair in pairs:
        wanted = pair.delta().double()
        assert float((matrix(found.changes[pair.name]) - wanted).norm() / wanted.norm()) < 1e-6


def test_the_list_of_layers_resolves_flat_names(tmp_path: Path) -> None:
    """A universal file of any model: its layers follow no rule, but it names them."""
    given = adapter_open.open_adapter(save_small(tmp_path))
    path = save_universal(tmp_path / "u.safetensors", given.changes, given.facts)
    found = adapter_open.open_adapter(path)
    assert (found.style, found.has_digest) == ("kohya", True)
    assert list(found.changes) == list(given.changes)
    for layer, change in given.changes.items():
        wanted = matrix(change)
        assert float((matrix(found.changes[layer]) - wanted).norm() / wanted.norm()) < 1e-6


def test_folders_of_peft(tmp_path: Path) -> None:
    """The strength is in the settings beside the weights; settings for more than plain LoRA are refused."""
    given = adapter_open.open_adapter(save_small(tmp_path))
    folder = save_peft(tmp_path / "peft", given.changes, given.facts)
    found = adapter_open.open_adapter(folder)
    assert (found.style, found.has_digest) == ("PEFT", True)
    assert list(found.changes) == list(given.changes)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    name = "base_model.model.mix.lora_{}.weight"
    tensors = {name.format("A"): torch.ones(4, 7), name.format("B"): torch.ones(6, 4)}
    save_file(tensors, foreign / "adapter_model.safetensors")
    settings: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 2}
    (foreign / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    found = adapter_open.open_adapter(foreign)
    assert float(matrix(found.changes["mix"])[0, 0]) == 2.0
    settings["use_dora"] = True
    (foreign / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(AdapterError, match="use_dora"):
        adapter_open.open_adapter(foreign)


def test_flat_names_of_other_models_are_an_error(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.ones(1, 3),
        "lora_unet_input_blocks_1_1_proj_in.lora_up.weight": torch.ones(2, 1),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=r"input_blocks_1_1_proj_in\.lora_down.* is not known"):
        adapter_open.open_adapter(tmp_path / "x.safetensors")


def edit(change: Callable[[dict[str, Tensor]], None], folder: Path) -> Path:
    """The file of one layer, changed."""
    tensors = kohya(2.0)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "b.safetensors")
    return folder / "b.safetensors"


def test_what_is_broken_is_refused(tmp_path: Path) -> None:
    """Shapes, a lost factor, values that are not finite, alpha that is no number, unknown tensors, text encoders."""
    down, up, alpha = (f"{FLAT}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    wrong: list[tuple[str, Callable[[dict[str, Tensor]], Any]]] = [
        ("do not multiply", lambda t: t.update({up: torch.ones(5, 3)})),
        ("do not multiply", lambda t: t.update({down: torch.ones(4, 6, 1, 1)})),
        ("do not multiply", lambda t: t.update({down: torch.ones(4)})),
        ("incomplete", lambda t: t.pop(up)),
        ("not finite", lambda t: t.update({up: torch.full((5, 4), math.nan)})),
        ("one positive number", lambda t: t.update({alpha: torch.tensor(-1.0)})),
        ("no part of a LoRA", lambda t: t.update({f"{FLAT}.weight": torch.ones(1)})),
        ("twice", lambda t: t.update({f"unet.{LAYER}.lora_A.weight": torch.ones(4, 6)})),
        ("text encoder", lambda t: t.update({"lora_te_x.lora_up.weight": torch.ones(5, 4)})),
    ]
    for message, change in wrong:
        with pytest.raises(AdapterError, match=message):
            adapter_open.open_adapter(edit(change, tmp_path))
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="cannot be read as safetensors"):
        adapter_open.open_adapter(tmp_path / "c.safetensors")
    with pytest.raises(AdapterError, match="there is no adapter"):
        adapter_open.open_adapter(tmp_path / "gone.safetensors")


def test_convolutions_keep_their_shape(tmp_path: Path) -> None:
    found = adapter_open.open_adapter(save_small(tmp_path))
    cut = found.changes["deep.cut"]
    assert (cut.left.shape[2:], cut.right.shape[1:]) == ((1, 1), (3, 3, 2))


def test_reading_and_writing_again_is_the_same_file(tmp_path: Path) -> None:
    """Scaling 1 leaves the bits alone."""
    first = save_small(tmp_path)
    given = adapter_open.open_adapter(first)
    again = save_diffusers(tmp_path / "again", given.changes, given.facts)
    assert again.read_bytes() == first.read_bytes()
