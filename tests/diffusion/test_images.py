"""D1, D2, D4: a picture is decoded as a person sees it, or refused by name."""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamrie.diffusion import images
from dreamrie.errors import ImageError


def corner_picture() -> Image.Image:
    """24 x 16, each quarter of another color, so that every turn and mirror shows."""
    array = np.zeros((16, 24, 3), dtype=np.uint8)
    array[:8, :12], array[:8, 12:] = (255, 0, 0), (0, 255, 0)
    array[8:, :12], array[8:, 12:] = (0, 0, 255), (255, 255, 0)
    return Image.fromarray(array)


# How a picture must be stored so that the tag turns it back: the inverse of each EXIF orientation.
_STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def law_exif_is_applied(impl: Any) -> None:
    """A picture stored in any of the eight orientations comes out upright, to the bit."""
    upright = corner_picture()
    with tempfile.TemporaryDirectory() as folder:
        for tag, turn in _STORED_AS.items():
            stored = upright if turn is None else upright.transpose(turn)
            exif = Image.Exif()
            exif[0x0112] = tag
            path = Path(folder) / f"{tag}.png"
            stored.save(path, exif=exif)
            loaded = impl.load_image(path)
            assert loaded.size == upright.size, f"orientation {tag}"
            assert np.array_equal(np.asarray(loaded), np.asarray(upright)), f"orientation {tag}"


def law_alpha_falls_on_white(impl: Any) -> None:
    """Hidden color never appears: transparent is white, half transparent is half way to white."""
    expected = np.array([[255, 255, 255], [255, 127, 127], [255, 0, 0]])
    alpha = np.array([0, 128, 255], dtype=np.uint8)
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[..., 0], rgba[..., 3] = 255, alpha
    grey = np.zeros((1, 3, 2), dtype=np.uint8)
    grey[..., 1] = alpha
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.png"
        Image.fromarray(rgba).save(path)
        assert np.abs(np.asarray(impl.load_image(path), dtype=int)[0] - expected).max() <= 1
        Image.fromarray(grey).save(path)
        assert (
            np.abs(np.asarray(impl.load_image(path), dtype=int)[0, :, 1] - [255, 127, 0]).max() <= 1
        )
        palette.save(path, transparency=0)
        assert np.asarray(impl.load_image(path))[0].tolist() == [[255, 255, 255], [0, 0, 255]]
        Image.new("RGB", (2, 1), (9, 8, 7)).save(path, transparency=(9, 8, 7))
        assert np.asarray(impl.load_image(path))[0].tolist() == [[255, 255, 255]] * 2


def law_sixteen_bits_are_rescaled(impl: Any) -> None:
    """0, half and full of 16 bits become 0, half and full of 8 bits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deep.png"
        values = np.array([[0, 128 * 257, 65535, 257 * 3 + 200]], dtype=np.uint16)
        Image.fromarray(values).save(path)
        assert np.asarray(impl.load_image(path))[0, :, 0].tolist() == [0, 128, 255, 4]


def law_names_decide_the_order(impl: Any) -> None:
    """Visible files sorted by name; hidden files, folders and system files left out."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("b.png", "a10.png", "a2.png", "C.png", ".DS_Store", ".c.png", "Thumbs.db"):
            Path(folder, name).touch()
        Path(folder, "aa.png").mkdir()
        # In this order on purpose: a file system that keeps creation order would hide the fault.
        found = [path.name for path in impl.list_images(Path(folder))]
    assert found == ["C.png", "a10.png", "a2.png", "b.png"]


def law_every_file_is_decoded(impl: Any) -> None:
    """A file cut in the middle opens well and fails only in decoding; all such are named at once."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("good.jpg", "cut1.jpg", "cut2.png"):
            path = Path(folder, name)
            Image.fromarray(noise).save(path)
            if name != "good.jpg":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        Path(folder, "notes.txt").write_text("not a picture", encoding="utf-8")
        try:
            impl.check_images(Path(folder))
        except ImageError as error:
            message = str(error)
        else:
            raise AssertionError("damaged files passed")
    for name in ("cut1.jpg", "cut2.png", "notes.txt", "3 of 4"):
        assert name in message, name
    assert "good.jpg" not in message


LAWS = (
    law_exif_is_applied,
    law_alpha_falls_on_white,
    law_sixteen_bits_are_rescaled,
    law_names_decide_the_order,
    law_every_file_is_decoded,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    law(images)


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff", "ppm", "gif"])
def test_content_decides_not_the_suffix(tmp_path: Path, suffix: str) -> None:
    """A plain picture in any format, under a wrong suffix, is itself."""
    path = tmp_path / f"x.{suffix}"
    flat = Image.new("RGB", (9, 7), (200, 40, 120))
    flat.save(path, **({"lossless": True} if suffix == "webp" else {}))
    renamed = path.rename(tmp_path / "photo.jpg")
    loaded = images.load_image(renamed)
    assert loaded.mode == "RGB"
    assert np.array_equal(np.asarray(loaded), np.asarray(flat))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_keep_their_color(tmp_path: Path, mode: str) -> None:
    """A flat white picture stays white within 2/255, whatever the mode of the file."""
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.tiff")
    Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode).save(path)
    with Image.open(path) as stored:
        assert stored.mode == (mode if mode != "YCbCr" else "RGB")
    assert np.abs(np.asarray(images.load_image(path), dtype=int) - 255).max() <= 2


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=100)
    mean = np.asarray(images.load_image(path), dtype=float).mean((0, 1))
    assert np.abs(mean - [255, 0, 0]).max() <= 3


def test_bad_exif_does_not_stop_a_good_picture(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    exif = Image.Exif()
    exif[0x0112] = 99
    corner_picture().save(path, exif=exif)
    assert np.array_equal(np.asarray(images.load_image(path)), np.asarray(corner_picture()))


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + struct.pack(">I", 0)
        + b"IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "empty"),
        ("page.jpg", b"<html>not found</html>", "not a picture"),
        ("bomb.png", _png_header(30_000, 30_000), "pixels"),
        ("huge.png", _png_header(9_500, 9_500), "pixels"),
        ("strip.png", _png_header(1, 10_000), "narrower"),
        ("stub.png", _png_header(64, 64), "decoded"),
    ],
)
def test_refusals_name_file_and_reason(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        images.load_image(path)
    assert str(path) in str(caught.value)


def test_animation_float_and_missing_file_are_refused(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 100, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.tiff", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((4, 4), 2, dtype=np.float32)).save(tmp_path / "c.tiff")
    for name, reason in (("a.gif", "animation"), ("b.tiff", "multi-page"), ("c.tiff", "range")):
        with pytest.raises(ImageError, match=reason):
            images.load_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"gone\.png"):
        images.load_image(tmp_path / "gone.png")


@pytest.mark.parametrize("cut", range(1, 10))
def test_every_cut_is_an_image_error(tmp_path: Path, cut: int) -> None:
    """Whatever part of a JPEG, PNG or WebP is left, it is an ImageError and nothing else."""
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for suffix in ("jpg", "png", "webp"):
        path = tmp_path / f"x.{suffix}"
        Image.fromarray(noise).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * cut // 10])
        with pytest.raises(ImageError, match=r"x\."):
            images.load_image(path)


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_decode_or_are_refused(tmp_path: Path) -> None:
    """D3 in small: 400 files with a few wrong bytes; whatever happens, it is not another error."""
    generator = np.random.default_rng(2)
    noise = Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    path = tmp_path / "x.bin"
    refused = 0
    for number in range(400):
        memory = io.BytesIO()
        noise.save(memory, format=("PNG", "JPEG", "WEBP", "BMP")[number % 4])
        content = bytearray(memory.getvalue())
        for place in generator.integers(0, min(len(content), 300), 3):
            content[place] = generator.integers(0, 256)
        path.write_bytes(content)
        try:
            assert images.load_image(path).mode == "RGB"
        except ImageError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017  both outcomes are right
    assert 50 < refused < 400


@pytest.mark.parametrize("brand", [b"heic", b"hevc", b"mif1", b"avif"])
def test_a_heic_photo_is_named_with_its_remedy(tmp_path: Path, brand: bytes) -> None:
    """What phones take is not read here; the message says what it is, whatever the file is called."""
    path = tmp_path / "IMG_0001.jpg"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0" * 40)
    with pytest.raises(ImageError, match=r"IMG_0001\.jpg.*HEIC.*convert it to PNG or JPEG"):
        images.load_image(path)


def test_folders_without_pictures_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".hidden.png").touch()
    file = tmp_path / "file"
    file.touch()
    for path, reason in ((empty, "no pictures"), (file, "file"), (tmp_path / "no", "not exist")):
        with pytest.raises(ImageError, match=reason) as caught:
            images.check_images(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 50), (40, 20)), ((33, 99), (20, 60)), ((20, 30), (20, 30))]
)
def test_shorter_side_is_fitted(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert images.fit_shorter_side(Image.new("RGB", size), 20).size == expected


def test_save_png_leaves_old_or_new(tmp_path: Path) -> None:
    """A picture that cannot be written leaves the old file and no litter."""
    path = tmp_path / "x.png"
    images.save_png(corner_picture(), path)
    before = path.read_bytes()
    assert np.array_equal(np.asarray(images.load_image(path)), np.asarray(corner_picture()))
    with pytest.raises(ImageError, match=r"x\.png"):
        images.save_png(Image.new("HSV", (4, 4)), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.png"]


def test_contact_sheet_places_row_by_row() -> None:
    colors = [(10, 0, 0), (20, 0, 0), (30, 0, 0)]
    sheet = images.contact_sheet([Image.new("RGB", (5, 4), color) for color in colors], columns=2)
    assert sheet.size == (14, 12)
    assert [sheet.getpixel(at) for at in ((0, 0), (9, 0), (0, 8), (9, 8))] == [
        *colors,
        (255, 255, 255),
    ]
