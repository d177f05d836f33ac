"""Decode one picture to 8-bit RGB, or say why not. The only place that decodes pictures.

Source: the behaviour of Pillow's usual `open`, `exif_transpose`, `convert("RGB")` that must not reach training:
turned photos, hidden colors behind alpha, 16-bit pictures clipped to white, a broken file found in mid-run.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dreamrie.errors import ImageError
from dreamrie.files import write_atomic

T = TypeVar("T")

# A phone photo has at most 50 megapixels in practice; far beyond that a file is an accident or an attack.
LIMIT_PIXELS = 80_000_000
# A strip cannot be cropped to a square that shows anything, and resizing its short side would explode the long one.
LIMIT_ASPECT = 10
BACKGROUND = (255, 255, 255)

# MPO, a photo with a second picture behind it, opens as JPEG.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
# Bytes 8 to 12 of a HEIC, HEIF or AVIF file, after "ftyp".
_HEIF_BRANDS = (b"hei", b"hev", b"mif1", b"msf1", b"avi")
# Captions of a folder; the names that are typed instead of it by mistake.
METADATA = "metadata.jsonl"
_MISNAMED = frozenset({"metadata.json", "metadata.txt", "metadata.jsonl.txt", "metadata.csv"})
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
_SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
# 32-bit integers and floats state no range, so there is no right way to 8 bits.
_NO_RANGE = frozenset({"I", "F"})
_ALPHA = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})

# What Pillow's decoders raise on damaged files, found by cutting and flipping bytes.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def load_image(path: Path) -> Image.Image:
    """Decode a picture completely: EXIF rotation applied, alpha composited on white, 16 bits rescaled to 8.

    Args:
        path: PNG, JPEG, WebP, BMP, TIFF, GIF or PPM with one frame, recognised by content, not by suffix.

    Returns:
        The picture in mode RGB, turned upright.

    Raises:
        ImageError: the file is missing, not a picture, damaged, animated, too large, too narrow or of a mode
            without a stated range.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns at a size that is judged here by LIMIT_PIXELS.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_FORMATS) as image:
                _check_header(path, image)
                image.load()
                upright = ImageOps.exif_transpose(image)
                return _to_rgb(path, upright)
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a picture ({_what_it_is(path)}).") from error
    except _DECODE_ERRORS as error:
        raise ImageError(f"{path}: cannot be decoded ({type(error).__name__}: {error}).") from error


def list_images(directory: Path) -> list[Path]:
    """List the files of a folder that are meant as pictures, in the order of their names.

    Args:
        directory: folder; its subfolders, hidden files, files of the operating system and captions are left out.

    Returns:
        Paths sorted by name, whatever order the file system gives.

    Raises:
        ImageError: the folder does not exist, is a file, or cannot be read, or a file of captions has another name.
    """
    if not directory.is_dir():
        kind = "is a file, not a folder" if directory.exists() else "does not exist"
        raise ImageError(f"{directory} {kind}. Give a folder with pictures.")
    try:
        entries = sorted(directory.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise ImageError(f"{directory} cannot be read ({error}).") from error
    kept = [entry for entry in entries if not _is_ignored(entry)]
    wrong = [
        e.name for e in kept if e.name.lower() in _MISNAMED or e.name.lower() == METADATA != e.name
    ]
    if wrong:
        raise ImageError(
            f"{directory}: {wrong[0]} would not be read as captions. Name it {METADATA}."
        )
    stems = {entry.stem for entry in kept if entry.suffix.lower() != ".txt"}
    return [
        entry
        for entry in kept
        if entry.name != METADATA and not (entry.suffix.lower() == ".txt" and entry.stem in stems)
    ]


def map_images(paths: Sequence[Path], use: Callable[[Image.Image], T]) -> list[T]:
    """Decode all pictures one after the other, and name all bad ones together.

    Args:
        paths: files.
        use: gets each RGB picture; a full-size one takes a hundred megabytes, so only its result is kept.

    Returns:
        What `use` made of each picture.

    Raises:
        ImageError: at least one file is bad; the message lists every one.
    """
    results: list[T] = []
    failures: list[str] = []
    for path in paths:
        try:
            results.append(use(load_image(path)))
        except ImageError as error:
            failures.append(str(error))
    if failures:
        listed = "\n  ".join(failures)
        raise ImageError(
            f"{len(failures)} of {len(paths)} files cannot be used:\n  {listed}\nRemove or replace them."
        )
    return results


def find_pictures(directory: Path) -> list[Path]:
    """List the pictures of a folder that must not be empty; nothing is decoded.

    Args:
        directory: folder with pictures.

    Returns:
        The paths, sorted, of at least one file.

    Raises:
        ImageError: the folder is missing or holds no picture.
    """
    paths = list_images(directory)
    if not paths:
        raise ImageError(f"{directory} holds no pictures. Put PNG, JPEG or WebP files into it.")
    return paths


def check_images(directory: Path) -> list[Path]:
    """Decode every picture of a folder.

    Args:
        directory: folder with pictures.

    Returns:
        The paths, sorted, of at least one picture.

    Raises:
        ImageError: the folder is missing or holds no picture, or some files are bad.
    """
    paths = find_pictures(directory)
    map_images(paths, lambda image: None)
    return paths


def fit_shorter_side(image: Image.Image, size_px: int) -> Image.Image:
    """Resize so that the shorter side has `size_px`, keeping the aspect.

    Args:
        image: RGB picture.
        size_px: length of the shorter side afterwards, in pixels.

    Returns:
        The resized picture; both sides are at least `size_px`.
    """
    width, height = image.size
    scale = size_px / min(width, height)
    new_size = (max(size_px, round(width * scale)), max(size_px, round(height * scale)))
    return image if new_size == image.size else image.resize(new_size, Image.Resampling.LANCZOS)


def _is_ignored(entry: Path) -> bool:
    """Hidden files, folders and what operating systems leave behind."""
    return entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FILES or entry.is_dir()


def _check_header(path: Path, image: Image.Image) -> None:
    """Refuse by size, aspect, frames and mode before anything is decoded."""
    width, height = image.size
    if width * height > LIMIT_PIXELS:
        raise ImageError(
            f"{path}: {width} x {height} pixels are more than {LIMIT_PIXELS / 1e6:.0f} million. Scale it down."
        )
    if max(width, height) > LIMIT_ASPECT * min(width, height):
        raise ImageError(
            f"{path}: {width} x {height} pixels are narrower than 1 to {LIMIT_ASPECT}. Crop it."
        )
    # The second picture of an MPO is a depth map or a thumbnail.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"{path}: an animation or multi-page file. Save the frame you mean.")
    if image.mode in _NO_RANGE:
        raise ImageError(
            f"{path}: mode {image.mode} (32 bits a pixel) states no range of values. Save it with 8 or 16 bits."
        )


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    """Any decoded mode to 8-bit RGB."""
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image).astype(np.uint32)
        # 65535 = 257 * 255, so white stays white; 128 rounds to the nearest.
        eight_bit = ((values + 128) // 257).astype(np.uint8)
        return Image.fromarray(eight_bit).convert("RGB")
    if image.mode in _ALPHA or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"{path}: mode {image.mode} has no conversion to RGB.") from error


def _what_it_is(path: Path) -> str:
    """A hint for the message about a file that no decoder takes."""
    size = path.stat().st_size
    if size == 0:
        return "the file is empty"
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:].startswith(_HEIF_BRANDS):
        return "a HEIC or AVIF photo, as phones take them: convert it to PNG or JPEG"
    return f"{size} bytes, none of {', '.join(_FORMATS)}"


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture so that `path` is either whole or not there.

    Args:
        image: any mode that PNG holds.
        path: where to; its folder must exist.

    Raises:
        ImageError: it cannot be written; what lay at `path` before is still there.
    """
    memory = io.BytesIO()
    try:
        image.save(memory, format="PNG")
        write_atomic(path, memory.getvalue())
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error}.") from error


def contact_sheet(images: Sequence[Image.Image], columns: int, gap_px: int = 4) -> Image.Image:
    """Lay pictures of one size out in rows.

    Args:
        images: at least one, left to right, top to bottom.
        columns: pictures in a row.
        gap_px: white space between them, in pixels.

    Returns:
        One RGB picture.
    """
    width, height = images[0].size
    rows = -(-len(images) // columns)
    size = (columns * (width + gap_px) - gap_px, rows * (height + gap_px) - gap_px)
    sheet = Image.new("RGB", size, BACKGROUND)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        sheet.paste(image, (column * (width + gap_px), row * (height + gap_px)))
    return sheet
