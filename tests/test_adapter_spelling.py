"""Names of tensors come apart into layer and part, and CLIP's layers have one name in both layouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dreamrie import adapter_spelling
from dreamrie.adapter_spelling import parted, unprefixed

REAL = SimpleNamespace(
    one_name=lambda name: adapter_spelling.one_name(name),
    place=lambda *a: adapter_spelling.place_in_text_encoder(*a),
)
ENDS = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]


def law_both_layouts_have_one_name(impl: Any) -> None:
    """With `text_model` or without, under any prefix: one name; layers of other models keep theirs."""
    for end in ENDS:
        wanted = f"text_encoder.text_model.encoder.layers.11.{end}"
        for prefix in ("", "text_encoder.", "base_model.model."):
            for level in ("", "text_model."):
                assert impl.one_name(f"{prefix}{level}encoder.layers.11.{end}") == wanted
    for other in (
        "mid_block.attentions.0.proj_in",
        "model.encoder.layers.1.mlp.fc1",
        "encoder.layers.1.fc1",
        "vision_model.encoder.layers.1.mlp.fc1",
    ):
        assert impl.one_name(other) == other


def law_a_stem_finds_its_place_in_either_layout(impl: Any) -> None:
    """All spellings of a layer find it in a text encoder of either layout, and no other layer does."""
    for level in ("", "text_model."):
        layers = {f"{level}encoder.layers.{n}.{end}" for n in (1, 11) for end in ENDS}
        for layer in layers:
            inside = layer.removeprefix("text_model.")
            stems = [
                f"{prefix}{other}{inside}"
                for prefix in ("text_encoder.", "base_model.model.", "")
                for other in ("", "text_model.")
            ]
            stems.append(f"lora_te_text_model_{inside.replace('.', '_')}")
            assert [impl.place(stem, layers) for stem in stems] == [layer] * len(stems)
        for stem in (
            "lora_te1_text_model_encoder_layers_1_mlp_fc1",
            "text_encoder.encoder.layers.2.mlp.fc1",
        ):
            assert impl.place(stem, layers) is None


LAWS = (law_both_layouts_have_one_name, law_a_stem_finds_its_place_in_either_layout)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    law(REAL)


def test_names_come_apart() -> None:
    """Every spelling of a part, and what is none."""
    for ending, part in {
        "lora_A.weight": "down",
        "lora_down.weight": "down",
        "lora.down.weight": "down",
        "lora_B.weight": "up",
        "lora_up.weight": "up",
        "lora.up.weight": "up",
        "alpha": "alpha",
    }.items():
        assert parted(f"unet.a.{ending}") == ("unet.a", part)
        assert parted(f".{ending}") is None
    assert parted("unet.a.weight") is None


def test_names_of_the_oldest_diffusers() -> None:
    """Attention processors, to_out among them."""
    start = "unet.a.attn1.processor"
    assert parted(f"{start}.to_q_lora.down.weight") == ("unet.a.attn1.to_q", "down")
    assert parted(f"{start}.to_out_lora.up.weight") == ("unet.a.attn1.to_out.0", "up")
    assert parted(f"{start}.to_x_lora.up.weight") is None


def test_the_whole_stem_comes_before_what_follows_a_prefix() -> None:
    """A model may have a child named unet."""
    assert list(unprefixed("unet.a")) == ["unet.a", "a"]
    assert list(unprefixed("text_encoder.a")) == ["text_encoder.a"]
    assert list(unprefixed("a")) == ["a"]
