"""D1: every kind of picture file gives the color that a person sees, or a message with the file and the reason."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from dreamrie.diffusion import decode, images
from dreamrie.errors import ImageError
from tests.diffusion.odd_bytes import p3_profile
from tests.diffusion.odd_images import COLOR, KINDS, Kind, flat, quarters, saved


def quarter_means(image: Image.Image) -> np.ndarray:
    """(2, 2, 3): mean colors of the four quarters; of a single row or column the whole, four times."""
    pixels = np.asarray(image, dtype=float)
    height, width = pixels.shape[:2]
    if height < 2 or width < 2:
        return np.broadcast_to(pixels.mean((0, 1)), (2, 2, 3))
    halves = [np.array_split(half, 2, axis=1) for half in np.array_split(pixels, 2)]
    return np.array([[quarter.mean((0, 1)) for quarter in half] for half in halves])


def law_an_odd_file_is_itself_or_refused(impl: Any, kind: Kind) -> None:
    """Mean colors within 1/255 of the true ones, or an ImageError that names the file and the reason."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"odd one.{kind.suffix}")
        path.write_bytes(kind.content)
        try:
            image = impl.load_image(path)
        except ImageError as error:
            message = str(error)
            assert kind.expected is None, message
            assert str(path) in message
            assert re.search(kind.reason, message), message
            return
    assert kind.expected is not None, "it was taken"
    assert image.mode == "RGB"
    found = quarter_means(image)
    worst = np.abs(found - np.asarray(kind.expected, dtype=float)).max()
    assert worst <= 1.0, f"{found.round(1).tolist()} instead of {kind.expected}"


def usual_load(path: Path) -> Image.Image:
    """What most scripts do; its failures are given our type, so that only what they say is judged."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:
        raise ImageError(f"{path}: cannot be decoded ({error}).") from error


USUAL = SimpleNamespace(load_image=usual_load)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", KINDS)
def test_odd_file(name: str) -> None:
    law_an_odd_file_is_itself_or_refused(images, KINDS[name])


def test_there_are_enough_kinds() -> None:
    """D1 asks for 30; both outcomes are among them many times."""
    refused = sum(kind.expected is None for kind in KINDS.values())
    assert len(KINDS) >= 90
    assert 30 <= refused <= len(KINDS) - 60


def test_a_broken_profile_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is ignored, as a viewer does; one line says which file and why. A whole one is applied in silence."""
    for name, profile in (("whole", p3_profile()), ("broken", b"\7" * 300)):
        (tmp_path / f"{name}.png").write_bytes(
            saved(flat("RGB", COLOR), "PNG", icc_profile=profile)
        )
    with caplog.at_level(logging.WARNING):
        whole, broken = (images.load_image(tmp_path / f"{n}.png") for n in ("whole", "broken"))
    assert broken.getpixel((0, 0)) == COLOR != whole.getpixel((0, 0))
    (record,) = caplog.records
    assert str(tmp_path / "broken.png") in record.getMessage()
    assert "profile" in record.getMessage()


def test_alpha_is_kept_and_turned_with_the_picture(tmp_path: Path) -> None:
    """Alpha has the size of the upright picture, and the background shows through it."""
    path = tmp_path / "x.png"
    picture = quarters().convert("RGBA")
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (0, 0, 24, 16))
    picture.putalpha(alpha)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    color, found = images.load_image_and_alpha(path, (10, 20, 30))
    assert found is not None
    assert (found.mode, found.size, color.size) == ("L", (48, 32), (48, 32))
    assert np.array_equal(np.asarray(found), np.asarray(alpha))
    assert [color.getpixel(at) for at in ((0, 0), (47, 0))] == [(10, 20, 30), (0, 255, 1)]
    layers = images.load_layers(path)
    assert layers.color.getpixel((0, 0)) == (254, 0, 0)
    assert layers.kind == "PNG RGBA"
    assert images.load_image(path).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_picture_without_transparency_has_no_alpha(tmp_path: Path, mode: str) -> None:
    """An alpha channel in which every pixel is opaque is none."""
    path = tmp_path / "x.png"
    flat("RGB", COLOR).convert(mode).save(path)
    assert images.load_image_and_alpha(path, (1, 2, 3))[1] is None


def test_nothing_of_the_file_stays_with_the_picture(tmp_path: Path) -> None:
    """A profile or a transparent color that came along would be applied again when the picture is saved."""
    path = tmp_path / "x.png"
    content = saved(flat("RGB", COLOR), "PNG", icc_profile=p3_profile(), transparency=(1, 2, 3))
    path.write_bytes(content)
    loaded = images.load_image(path)
    assert loaded.info == {}
    images.save_png(loaded, tmp_path / "again.png")
    assert np.array_equal(np.asarray(images.load_image(tmp_path / "again.png")), np.asarray(loaded))


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [("HSV", (0, 255, 255), (255, 0, 0)), ("RGBX", (*COLOR, 9), COLOR), ("RGBa", (20, 0, 40, 100), (51, 0, 102))],
)  # fmt: skip
def test_modes_that_no_file_opens_with_today(mode: str, color: Any, expected: Any) -> None:
    """Pillow reads no file as these, but may in its next version."""
    header = decode.Header("TIFF", None, False, None, None)
    layers = decode.to_layers(Path("x"), flat(mode, color), header)
    assert layers.color.getpixel((0, 0)) == expected
    assert (layers.alpha is not None) == (mode == "RGBa")


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png: not a file"):
        images.check_images(tmp_path)


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    """In a circle, or to a file that is gone; with the system's reason."""
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "gone.png")
    for name, reason in (("circle", "symbolic links"), ("lost", "No such file")):
        with pytest.raises(ImageError, match=rf"{name}\.png: cannot be read .*{reason}"):
            images.load_image(tmp_path / f"{name}.png")
    with pytest.raises(ImageError, match="2 of 2 files"):
        images.check_images(tmp_path)
