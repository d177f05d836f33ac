"""Pictures as tensors: values, crops, flips, and an order that is a pure function."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreamrie.diffusion import framing, images
from dreamrie.diffusion.data import ConceptSet, PictureSet, View
from dreamrie.errors import ConfigError, ImageError
from tests.small_models import write_pictures


def _set(directory: Path, **options: bool) -> PictureSet:
    return PictureSet(sorted(directory.iterdir()), "a sks dog", resolution=16, **options)


def test_black_is_minus_one_and_white_is_one(tmp_path: Path) -> None:
    for name, shade in (("a", 0), ("b", 255), ("c", 51)):
        Image.new("RGB", (16, 16), (shade, shade, shade)).save(tmp_path / f"{name}.png")
    pictures = _set(tmp_path)
    means = [float(pictures.pixels(View(i, 0, 0, False)).mean()) for i in range(3)]
    assert means == pytest.approx([-1.0, 1.0, -0.6], abs=1e-6)
    assert pictures.pixels(View(0, 0, 0, False)).shape == (3, 16, 16)


def test_channels_rows_and_columns_keep_their_place(tmp_path: Path) -> None:
    array = np.zeros((16, 16, 3), dtype=np.uint8)
    array[2, 5] = (255, 0, 0)
    array[9, 1] = (0, 0, 255)
    Image.fromarray(array).save(tmp_path / "x.png")
    pictures = _set(tmp_path)
    pixels = pictures.pixels(View(0, 0, 0, False))
    assert [tuple(place) for place in (pixels > 0).nonzero().tolist()] == [(0, 2, 5), (2, 9, 1)]
    flipped = pictures.pixels(View(0, 0, 0, True))
    assert torch.equal(flipped, pixels.flip(2))


def test_every_picture_is_seen_equally_often(tmp_path: Path) -> None:
    """Each run through the pictures is a permutation, and not always the same one."""
    write_pictures(tmp_path, 5, 16)
    pictures = _set(tmp_path)
    order = [pictures.view_at(3, "s", position).picture for position in range(50)]
    epochs = [tuple(order[start : start + 5]) for start in range(0, 50, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 5
    assert order == [pictures.view_at(3, "s", position).picture for position in range(50)]
    assert order != [pictures.view_at(4, "s", position).picture for position in range(50)]
    assert order != [pictures.view_at(3, "t", position).picture for position in range(50)]


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    """D4: the same names in another order of creation give the same stream."""
    first, second = tmp_path / "a", tmp_path / "b"
    paths = write_pictures(first, 4, 16)
    second.mkdir()
    for path in reversed(paths):
        (second / path.name).write_bytes(path.read_bytes())
    streams = []
    for folder in (first, second):
        concept = ConceptSet(folder, "x", resolution=16)
        views = [concept.instance.view_at(0, "s", n) for n in range(8)]
        streams.append([concept.instance.paths[view.picture].name for view in views])
    assert streams[0] == streams[1]


def test_crops_cover_the_picture_and_stay_inside(tmp_path: Path) -> None:
    Image.new("RGB", (28, 16)).save(tmp_path / "wide.png")
    Image.new("RGB", (16, 40)).save(tmp_path / "high.png")
    pictures = _set(tmp_path)
    views = [pictures.view_at(0, "s", position) for position in range(800)]
    assert {view.top for view in views if view.picture == 0} == set(range(25))
    assert {view.left for view in views if view.picture == 1} == set(range(13))
    assert all(view.left == 0 for view in views if view.picture == 0)
    assert all(pictures.pixels(view).shape == (3, 16, 16) for view in views[:50])


def test_center_crop_and_flip(tmp_path: Path) -> None:
    Image.new("RGB", (26, 16)).save(tmp_path / "wide.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    pictures = _set(tmp_path, center_crop=True, random_flip=True)
    drawn = Counter(pictures.view_at(0, "s", position) for position in range(400))
    assert set(drawn) == set(pictures.views() or ())
    assert {view[:3] for view in drawn} == {(0, 0, 5), (1, 0, 0)}
    assert min(drawn.values()) > 60


def test_views_can_be_counted_unless_crops_are_random(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3, 24)
    assert len(_set(tmp_path).views() or ()) == 3
    assert len(_set(tmp_path, random_flip=True).views() or ()) == 6
    Image.new("RGB", (26, 16)).save(tmp_path / "wide.png")
    assert _set(tmp_path).views() is None
    assert len(_set(tmp_path, center_crop=True).views() or ()) == 4


def test_views_of_a_square_picture_can_be_counted_beside_one_that_is_not(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2, 24)
    Image.new("RGB", (26, 16)).save(tmp_path / "wide.png")
    pictures = _set(tmp_path, random_flip=True)
    counted = [pictures.views_of(index) for index in range(3)]
    assert [None if views is None else len(views) for views in counted] == [2, 2, None]
    assert counted[1] == [View(1, 0, 0, False), View(1, 0, 0, True)]


def test_each_picture_is_decoded_once_and_not_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of photos must not fill the memory: before the next is decoded, the last is gone."""
    paths = write_pictures(tmp_path / "concept", 4, 96)
    others = write_pictures(tmp_path / "class", 3, 96)
    decoded: list[Path] = []
    seen: list[weakref.ref[Image.Image]] = []
    decode = images.load_image_and_alpha

    def counted(path: Path, background: tuple[int, int, int]) -> Any:
        assert all(one() is None for one in seen)
        decoded.append(path)
        picture, alpha = decode(path, background)
        seen.append(weakref.ref(picture))
        return picture, alpha

    monkeypatch.setattr(framing, "load_image_and_alpha", counted)
    concept = ConceptSet(
        tmp_path / "concept", "x", resolution=16, class_images=others, class_prompt="y"
    )
    assert decoded == [*paths, *others]
    assert all(one() is None for one in seen)
    kept = [concept.instance.pixels(View(index, 0, 0, False)) for index in range(4)]
    for path, pixels in zip(paths, kept, strict=True):
        small = np.asarray(images.fit_shorter_side(decode(path)[0], 16), dtype=np.float32)
        assert np.allclose(pixels.permute(1, 2, 0).numpy(), small / 127.5 - 1, atol=1e-6)


def test_enlarged_pictures_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path, 2, 16)
    Image.new("RGB", (40, 12)).save(tmp_path / "tiny.png")
    pictures = _set(tmp_path, center_crop=True)
    assert "1 of 3 pictures are smaller than 16 px and were enlarged: tiny.png" in caplog.text
    assert pictures.pixels(View(2, 0, 0, False)).shape == (3, 16, 16)


def test_bad_pictures_of_concept_and_class_stop_before_training(tmp_path: Path) -> None:
    good = tmp_path / "good"
    paths = write_pictures(good, 2, 16)
    broken = tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:60])
    with pytest.raises(ImageError, match=r"broken\.png"):
        ConceptSet(good, "x", resolution=16, class_images=[*paths, broken], class_prompt="y")
    (good / "z.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"z\.png"):
        ConceptSet(good, "x", resolution=16)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"resolution": 20}, "--resolution"),
        ({"resolution": 0}, "--resolution"),
        ({"prompt": " "}, "--instance_prompt"),
        ({"class_prompt": None}, "--class_prompt"),
    ],
)
def test_bad_settings_name_their_flag(
    tmp_path: Path, options: dict[str, object], flag: str
) -> None:
    paths = write_pictures(tmp_path, 1, 16)
    settings = {
        "prompt": "x",
        "resolution": 16,
        "class_images": paths,
        "class_prompt": "y",
        **options,
    }
    prompt = settings.pop("prompt")
    with pytest.raises(ConfigError, match=flag):
        ConceptSet(tmp_path, prompt, **settings)  # type: ignore[arg-type]
