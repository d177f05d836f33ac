"""Small random Stable Diffusion pipelines of the real classes, saved as plain diffusers folders."""

from __future__ import annotations

import atexit
import copy
import dataclasses
import functools
import gzip
import importlib.util
import io
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreamrie.diffusion.components import Components, load_components
from dreamrie.diffusion.source import quiet_libraries

KINDS = ("sd2-eps", "sd2-v", "sd15", "tiny-vae")
TEXT_WIDTH = 16
VOCABULARY = 49_408

_EMBEDDED_TOKENIZER = Path(__file__).parent.parent / "dreamrie" / "assets" / "tiny-sd" / "tokenizer"


@functools.lru_cache(maxsize=1)
def clip_tokenizer() -> Any:
    """CLIP's genuine tokenizer: from the embedded model, else from open_clip's merge list."""
    if _EMBEDDED_TOKENIZER.is_dir():
        return CLIPTokenizer.from_pretrained(_EMBEDDED_TOKENIZER)
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None, "neither the embedded model nor open_clip is there"
    assert spec.origin is not None
    packed = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines[1 : 48_894 + 1]]
    symbols = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in symbols]
    characters = [chr(byte) for byte in symbols] + [chr(256 + n) for n in range(len(rest))]
    words = characters + [c + "</w>" for c in characters] + ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=merges,
        model_max_length=77,
    )


def small_unet(kind: str) -> Any:
    """A U-Net with cross-attention in the layout of `kind`."""
    linear = kind != "sd15"
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=32 if kind == "tiny-vae" else 4,
        out_channels=32 if kind == "tiny-vae" else 4,
        block_out_channels=(16, 24),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        # SD1 says 8 heads everywhere; SD2 says heads per block (the config's name is historical).
        attention_head_dim=(2, 4) if linear else 2,
        use_linear_projection=linear,
        upcast_attention=kind == "sd2-v",
    )


def small_vae(kind: str) -> Any:
    """An autoencoder of factor 8."""
    if kind == "tiny-vae":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
            latent_channels=32,
            scaling_factor=0.7,
        )
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.18215,
    )


def small_scheduler(kind: str) -> Any:
    """The scheduler that is saved with models of this kind."""
    betas: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    if kind == "sd15":
        return PNDMScheduler(**betas, skip_prk_steps=True)
    if kind == "tiny-vae":
        betas = {"beta_schedule": "linear", "set_alpha_to_one": False, "steps_offset": 1}
    prediction = "v_prediction" if kind == "sd2-v" else "epsilon"
    return DDIMScheduler(**betas, clip_sample=False, prediction_type=prediction)


def make_small_pipeline(kind: str, directory: Path, seed: int = 0) -> Path:
    """Save a random pipeline of `kind` (one of `KINDS`) as a diffusers folder and return the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, vae = small_unet(kind), small_vae(kind)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCABULARY,
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                hidden_act="quick_gelu" if kind == "sd15" else "gelu",
                bos_token_id=49_406,
                eos_token_id=49_407,
            )
        )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=small_scheduler(kind),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with quiet_libraries():
        pipe.save_pretrained(directory, safe_serialization=True)
    return directory


@functools.cache
def small_folder(kind: str) -> Path:
    """A pipeline of `kind`, saved once per process and removed at its end."""
    directory = Path(tempfile.mkdtemp(prefix=f"dreamrie-{kind}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return make_small_pipeline(kind, directory)


@functools.cache
def _loaded(kind: str) -> Components:
    return load_components(small_folder(kind))


class _WithoutTensors(pickle.Pickler):
    """Keeps the tensors of what it writes, and writes their keys."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, part: object) -> int | None:
        if not isinstance(part, Tensor):
            return None
        self.tensors[id(part)] = part
        return id(part)


class _WithCopies(pickle.Unpickler):
    """Puts a copy in the place of each key; a tensor in two places is one in the copy, too."""

    def __init__(self, written: bytes, tensors: Mapping[int, Tensor]) -> None:
        super().__init__(io.BytesIO(written))
        self._tensors, self._made = tensors, dict[int, Tensor]()

    def persistent_load(self, key: int) -> Tensor:
        if key not in self._made:
            self._made[key] = copy.deepcopy(self._tensors[key])
        return self._made[key]


@functools.cache
def _written(kind: str) -> dict[str, tuple[bytes, Mapping[int, Tensor]]]:
    """The networks in a form that is copied seven times as fast as by deepcopy, which is slow at their many dicts."""
    found = {}
    for name in ("unet", "vae", "text_encoder"):
        pickler = _WithoutTensors(stream := io.BytesIO())
        pickler.dump(getattr(_loaded(kind), name))
        found[name] = (stream.getvalue(), pickler.tensors)
    return found


def small_components(kind: str) -> Components:
    """Loaded parts of a small pipeline, with networks of the caller's own."""
    own = {name: _WithCopies(*written).load() for name, written in _written(kind).items()}
    return dataclasses.replace(_loaded(kind), **own)


def write_pictures(directory: Path, count: int, size_px: int = 64, seed: int = 0) -> list[Path]:
    """Write `count` different noisy PNG pictures and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((size_px, size_px), Image.Resampling.BICUBIC)
        paths.append(directory / f"picture-{number}.png")
        picture.save(paths[-1])
    return paths
