"""Adapters of CLIP's text encoder: one file for both layouts of transformers, on both models or on none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from dreamrie import __main__ as command
from dreamrie import adapter_open, adapter_reading
from dreamrie.adapter_file import save_diffusers
from dreamrie.adapter_universal import kohya_name, save_universal
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.lora import LowRank, lora_pairs, place
from tests.small_adapters import read, state_of
from tests.small_models import small_components
from tests.test_adapter_file import relative, stock_pipeline, unet_output

REAL = SimpleNamespace(
    open_adapter=lambda path: adapter_open.open_adapter(path),
    load_adapter=lambda *a, **k: adapter_reading.load_adapter(*a, **k),
)
TOKENS = torch.arange(77)[None]
TEXT = "text_encoder.text_model."
BUDGET = 1e-5


class Before(nn.Module):
    """The layout before transformers 5.6: one more level, named `text_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.text_model = encoder()

    def forward(self, tokens: Tensor) -> Any:
        return self.text_model(tokens)


def encoder() -> Any:
    return copy.deepcopy(small_components("sd2-eps").text_encoder)


LAYOUTS = {"before 5.6": Before, "since 5.6": encoder}


def embedding(text: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = text(TOKENS)[0]
    return found


def changes() -> dict[str, LowRank]:
    """Every linear layer of the text encoder under its one name, and a layer of the U-Net; ranks 2."""
    generator, parts = torch.Generator().manual_seed(1), small_components("sd2-eps")
    linear = {n: m for n, m in parts.text_encoder.named_modules() if isinstance(m, nn.Linear)}
    layers = {f"{TEXT}{name.removeprefix('text_model.')}": m for name, m in linear.items()}
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layers[name] = parts.unet.get_submodule(name)
    return {
        layer: LowRank(
            torch.randn(m.out_features, 2, generator=generator),
            torch.randn(2, m.in_features, generator=generator),
        )
        for layer, m in layers.items()
    }


def kohya(found: dict[str, LowRank]) -> dict[str, Tensor]:
    """As kohya's trainer writes it; alpha is half the rank."""
    tensors = {}
    for layer, (left, right) in found.items():
        stem = kohya_name(layer)
        tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"] = left, 2 * right
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    return tensors


def dotted(found: dict[str, LowRank], level: str) -> dict[str, Tensor]:
    """As diffusers writes it with a transformers of either layout."""
    tensors = {}
    for layer, (left, right) in found.items():
        name = layer.replace(TEXT, f"text_encoder.{level}")
        name = name if name.startswith("text_encoder.") else f"unet.{name}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = right, left
    return tensors


def renamed(tensors: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    """The same under other names."""
    for old, new in pairs:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def write(how: str, folder: Path) -> Path:
    """A file with the changes."""
    path = folder / f"{how}.safetensors"
    if how == "universal":
        return save_universal(path, changes(), {})
    if how == "dreamrie":
        return save_diffusers(path, changes(), {})
    save_file(
        {
            "kohya": lambda: kohya(changes()),
            "text_model": lambda: dotted(changes(), "text_model."),
            "flattened": lambda: dotted(changes(), ""),
            "flattened kohya": lambda: renamed(
                kohya(changes()), ("lora_te_text_model_", "lora_te_")
            ),
            "linear layer": lambda: renamed(dotted(changes(), "text_model."), *LINEAR_LAYER),
            "oldest": lambda: renamed(dotted(changes(), "text_model."), *LINEAR_LAYER, *OLDEST),
        }[how](),
        path,
    )
    return path


SPELLINGS = (
    *("kohya", "text_model", "flattened", "universal", "dreamrie"),
    *("flattened kohya", "linear layer", "oldest"),
)
LINEAR_LAYER = (
    (".lora_A.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.weight", ".lora_linear_layer.up.weight"),
)
OLDEST = tuple(
    (f".{part}_proj.lora_linear_layer.", f".to_{part}_lora.") for part in ("q", "k", "v", "out")
)


def trained() -> tuple[Any, Any]:
    """U-Net and text encoder with the changes added to their weights."""
    parts, text = small_components("sd2-eps"), encoder()
    unet = copy.deepcopy(parts.unet)
    known = dict(text.named_modules())
    with torch.no_grad():
        for layer, change in changes().items():
            inside = layer.removeprefix(TEXT)
            module = known.get(inside) or known.get(f"text_model.{inside}")
            (module or unet.get_submodule(layer)).weight += change.dense()
    return unet, text


def law_a_file_fits_both_layouts(impl: Any, how: str, folder: Path) -> None:
    """The same file draws the trained text and the trained U-Net, whichever layout the text encoder has."""
    path = write(how, folder)
    unet, text = trained()
    for layout in LAYOUTS.values():
        mine, own = small_components("sd2-eps").unet, layout()
        assert relative(embedding(own), embedding(text)) > 0.1
        loaded = impl.load_adapter(mine, path, text_encoder=own)
        assert relative(embedding(own), embedding(text)) < BUDGET
        assert relative(unet_output(mine), unet_output(unet)) < BUDGET
        assert len(loaded.pairs) == 1
        assert len(loaded.text_pairs) == len(changes()) - 1


def law_every_spelling_is_one_change(impl: Any, how: str, folder: Path) -> None:
    """Without a model: every layer under the name with `text_model`, and the change that was written."""
    found, wanted = impl.open_adapter(write(how, folder)).changes, changes()
    assert list(found) == sorted(wanted)
    for layer, change in wanted.items():
        left, right = found[layer]
        assert relative(left.double() @ right.double(), change.dense().double()) < 1e-6


def law_a_failure_in_the_second_model_undoes_the_first(impl: Any, folder: Path) -> None:
    """PEFT fails on the text encoder, after the U-Net has been adapted: both are as they were."""
    unet, text = small_components("sd2-eps").unet, Before()
    before, inject = (state_of(unet), state_of(text)), place.inject

    def failing(model: nn.Module, config: Any, adapter_name: str) -> None:
        inject(model, config, adapter_name)
        if model is text:
            assert lora_pairs(unet)
            raise RuntimeError("no more room")

    path = write("dreamrie", folder)
    with mock.patch.object(place, "inject", failing):
        with pytest.raises(AdapterError, match=r"no more room.*as it was"):
            impl.load_adapter(unet, path, text_encoder=text)
    assert (state_of(unet), state_of(text)) == before


@pytest.mark.parametrize("how", SPELLINGS)
def test_a_file_fits_both_layouts(how: str, tmp_path: Path) -> None:
    law_a_file_fits_both_layouts(REAL, how, tmp_path)


@pytest.mark.parametrize("how", SPELLINGS)
def test_every_spelling_is_one_change(how: str, tmp_path: Path) -> None:
    law_every_spelling_is_one_change(REAL, how, tmp_path)


def test_a_failure_in_the_second_model_undoes_the_first(tmp_path: Path) -> None:
    law_a_failure_in_the_second_model_undoes_the_first(REAL, tmp_path)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_peft_folders_of_a_text_encoder(layout: str, tmp_path: Path) -> None:
    """PEFT itself writes the folder of either layout: read without a model, and onto the other layout."""
    model: Any = get_peft_model(
        LAYOUTS[layout](), LoraConfig(r=2, lora_alpha=6, target_modules=["fc1"])
    )
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    wanted = embedding(model.base_model.model)
    found = adapter_open.open_adapter(tmp_path)
    assert found.style == "PEFT"
    assert all(layer.startswith(f"{TEXT}encoder.layers.") for layer in found.changes)
    for other in LAYOUTS.values():
        text = other()
        assert relative(embedding(text), wanted) > 0.1
        loaded = adapter_reading.load_adapter(text, tmp_path)
        assert {pair.scaling for pair in loaded.pairs} == {3.0}
        assert relative(embedding(text), wanted) < BUDGET


@pytest.mark.parametrize("to", ["diffusers", "universal"])
def test_the_real_loader_draws_what_the_commands_wrote(to: str, tmp_path: Path) -> None:
    """Kohya's file through `convert`: plain diffusers puts it on U-Net and text encoder of the installed layout."""
    given, output = write("kohya", tmp_path), tmp_path / "out.safetensors"
    assert command.main(["convert", str(given), "--to", to, "--output", str(output)]) == 0
    pipe, (unet, text) = stock_pipeline("sd2-eps"), trained()
    pipe.load_lora_weights(tmp_path, weight_name=output.name, use_safetensors=True)
    assert relative(embedding(pipe.text_encoder), embedding(text)) < BUDGET
    assert relative(unet_output(pipe.unet), unet_output(unet)) < BUDGET


def test_every_command_takes_text_encoders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """info, convert there and back, truncate, merge and diff on kohya's file: what comes back is the change."""
    given = write("kohya", tmp_path)
    assert command.main(["info", str(given)]) == 0
    assert "text_encoder.text_model.encoder.layers." in capsys.readouterr().out
    names = {"universal": "u.safetensors", "diffusers": "d.safetensors"}
    last = given
    for to, name in names.items():
        words = ["convert", str(last), "--to", to, "--output", str(tmp_path / name)]
        assert command.main(words) == 0
        last = tmp_path / name
    cut = tmp_path / "cut.safetensors"
    assert command.main(["truncate", str(last), "--rank", "1", "--output", str(cut)]) == 0
    assert {len(c.right) for c in adapter_open.open_adapter(cut).changes.values()} == {1}
    both = tmp_path / "both.safetensors"
    assert command.main(["merge", f"{given}:0.5", f"{last}:0.5", "--output", str(both)]) == 0
    numbers = tmp_path / "diff.json"
    assert command.main(["diff", str(given), str(both), "--json", str(numbers)]) == 0
    assert json.loads(numbers.read_text("utf-8"))["total"]["relative_distance"] < 1e-6
    words = ["convert", str(given), "--to", "peft", "--output", str(tmp_path / "p")]
    assert command.main(words) == 2
    assert not (tmp_path / "p").exists()


def test_both_layouts_in_one_file_are_one_place_twice(tmp_path: Path) -> None:
    tensors = dotted(changes(), "") | dotted(changes(), "text_model.")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x")
    for read_it in (
        lambda: adapter_open.open_adapter(tmp_path / "x"),
        lambda: adapter_reading.load_adapter(
            small_components("sd2-eps").unet, tmp_path / "x", text_encoder=encoder()
        ),
    ):
        with pytest.raises(AdapterError, match="one place twice"):
            read_it()
    twice = {
        f"text_encoder.{level}encoder.layers.0.mlp.fc1": next(iter(changes().values()))
        for level in ("", "text_model.")
    }
    with pytest.raises(AdapterError, match=r"two layers are both text_encoder\.text_model"):
        save_diffusers(tmp_path / "y", twice, {})


def test_stable_diffusion_xl_is_refused_by_name(tmp_path: Path) -> None:
    for stem in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_x", "text_encoder_2.x"):
        ends = ("lora_up", "lora_down") if stem.startswith("lora") else ("lora_B", "lora_A")
        save_file({f"{stem}.{end}.weight": torch.ones(1, 1) for end in ends}, tmp_path / "x")
        with pytest.raises(
            AdapterError, match=f"two text encoders, such as Stable Diffusion XL.*{stem}"
        ):
            adapter_open.open_adapter(tmp_path / "x")
        with pytest.raises(AdapterError, match="such as Stable Diffusion XL"):
            adapter_reading.load_adapter(small_components("sd2-eps").unet, tmp_path / "x")


def test_what_cannot_be_placed_leaves_both_models(tmp_path: Path) -> None:
    """Without a text encoder, with one that is adapted, of another width, or lacks a layer: a reason, and no change."""
    path, parts = write("dreamrie", tmp_path), small_components("sd2-eps")
    adapted: Any = inject_adapter_in_model(LoraConfig(r=1, target_modules=["fc1"]), encoder())
    shallow, wide = Before(), Before()
    shallow.text_model.encoder.layers = shallow.text_model.encoder.layers[:1]
    for layer in wide.text_model.encoder.layers:
        layer.mlp.fc1 = nn.Linear(5, 5)
    before = state_of(parts.unet)
    for text, said in (
        (None, r"of a text encoder, the first is text_encoder\..*text_encoder=pipe\.text_encoder"),
        (adapted, "carries an adapter already"),
        (shallow, r"no place in the model .* and the text encoder.*layers\.1\."),
        (wide, "size mismatch"),
    ):
        with pytest.raises(AdapterError, match=said):
            adapter_reading.load_adapter(parts.unet, path, text_encoder=text)
        assert state_of(parts.unet) == before
    whole = nn.ModuleDict({"text_encoder": encoder()})
    with pytest.raises(ConfigError, match="the model has one itself"):
        adapter_reading.load_adapter(whole, path, text_encoder=encoder())


def test_text_names_never_reach_a_unet(tmp_path: Path) -> None:
    """A layer of the U-Net under a text encoder's prefix has no place."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for stem in (f"text_encoder.{layer}", kohya_name(f"text_encoder.{layer}")):
        end = ("lora_A", "lora_B") if "." in stem else ("lora_down", "lora_up")
        shapes = ((1, 24), (24, 1))
        named = {f"{stem}.{e}.weight": torch.ones(s) for e, s in zip(end, shapes, strict=True)}
        save_file(named, tmp_path / "x")
        with pytest.raises(AdapterError, match="are of a text encoder"):
            adapter_reading.load_adapter(small_components("sd2-eps").unet, tmp_path / "x")


def test_a_lost_layer_of_the_text_encoder_is_missed(tmp_path: Path) -> None:
    """The list of layers in the header is compared by the one name."""
    path = write("universal", tmp_path)
    tensors, header = read(path)
    gone = [name for name in tensors if "lora_te_text_model_encoder_layers_0_mlp_fc1" in name]
    assert len(gone) == 3
    save_file({n: t for n, t in tensors.items() if n not in gone}, path, header)
    for text in (Before(), encoder()):
        with pytest.raises(
            AdapterError, match=r"2 of \d+ tensors are missing.*layers\.0\.mlp\.fc1"
        ):
            adapter_reading.load_adapter(small_components("sd2-eps").unet, path, text_encoder=text)
