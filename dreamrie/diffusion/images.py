"""Decode one picture to 8-bit RGB, or say why not. The only place that opens pictures.

Source: the behaviour of Pillow's usual `open`, `exif_transpose`, `convert("RGB")` that must not reach training:
turned photos, hidden colors behind alpha, 16-bit pictures clipped to white, a broken file found in mid-run.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image, UnidentifiedImageError

from dreamrie.diffusion import decode
from dreamrie.diffusion.decode import LIMIT_ASPECT, LIMIT_PIXELS, Layers
from dreamrie.errors import ImageError
from dreamrie.files import write_atomic

__all__ = [
    "BACKGROUND",
    "LIMIT_ASPECT",
    "LIMIT_PIXELS",
    "METADATA",
    "Entries",
    "Layers",
    "check_images",
    "contact_sheet",
    "find_pictures",
    "fit_shorter_side",
    "list_images",
    "load_image",
    "load_image_and_alpha",
    "load_layers",
    "map_images",
    "save_png",
    "sort_entries",
]

T = TypeVar("T")

BACKGROUND = (255, 255, 255)
# Captions of a folder; the names that are typed instead of it by mistake.
METADATA = "metadata.jsonl"
_MISNAMED = frozenset({"metadata.json", "metadata.txt", "metadata.jsonl.txt", "metadata.csv"})
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


class Entries(NamedTuple):
    """What lies in a folder, each list sorted by name.

    Attributes:
        pictures: files that are meant as pictures.
        captions: metadata.jsonl, and text files beside pictures.
        ignored: hidden files, folders, and what operating systems leave behind.
        misnamed: files of captions that would not be read.
    """

    pictures: list[Path]
    captions: list[Path]
    ignored: list[Path]
    misnamed: list[Path]


def load_image(path: Path) -> Image.Image:
    """Decode a picture completely: upright, in sRGB, 16 bits rescaled to 8, alpha composited on white.

    Args:
        path: PNG, JPEG, WebP, BMP, TIFF, GIF or PPM with one frame, recognised by content, not by suffix.

    Returns:
        The picture in mode RGB, turned upright.

    Raises:
        ImageError: the file is missing, not a picture, damaged, animated, too large, too narrow, or of a mode
            without a stated range of values.
    """
    return load_image_and_alpha(path)[0]


def load_image_and_alpha(
    path: Path, background: tuple[int, int, int] = BACKGROUND
) -> tuple[Image.Image, Image.Image | None]:
    """Decode a picture completely, as `load_image` does, and keep its transparency.

    Args:
        path: as for `load_image`.
        background: 8-bit RGB color that shows where the picture is transparent.

    Returns:
        The picture in mode RGB, turned upright, and its alpha of the same size in mode L (255 is opaque); None when
        the file has no transparency.

    Raises:
        ImageError: as for `load_image`.
    """
    layers = load_layers(path)
    return layers.on(background), layers.alpha


def load_layers(path: Path) -> Layers:
    """Decode a picture completely and keep the color that transparency hides.

    Args:
        path: as for `load_image`.

    Returns:
        Color, alpha and kind of file.

    Raises:
        ImageError: as for `load_image`.
    """
    if path.exists() and not path.is_file():
        # Opening a pipe would wait for its other end.
        raise ImageError(f"{path}: not a file.")
    try:
        with warnings.catch_warnings():
            # Pillow warns at a size that is judged here by LIMIT_PIXELS.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=decode.FORMATS) as image:
                decode.check_header(path, image)
                header = decode.read_header(image)
                image.load()
                return decode.to_layers(path, decode.turn_upright(path, image), header)
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a picture ({decode.what_it_is(path)}).") from error
    except Image.DecompressionBombError as error:
        limit = f"{LIMIT_PIXELS / 1e6:.0f} million"
        raise ImageError(f"{path}: its pixels are more than {limit}. Scale it down.") from error
    except decode.DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(f"{path}: cannot be read ({error.strerror}).") from error
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
    entries = sort_entries(directory)
    if entries.misnamed:
        name = entries.misnamed[0].name
        raise ImageError(f"{directory}: {name} would not be read as captions. Name it {METADATA}.")
    return entries.pictures


def sort_entries(directory: Path) -> Entries:
    """Tell pictures, captions and what is neither apart, by their names.

    Args:
        directory: folder.

    Returns:
        Every entry of the folder in one of four lists.

    Raises:
        ImageError: the folder does not exist, is a file, or cannot be read.
    """
    if not directory.is_dir():
        kind = "is a file, not a folder" if directory.exists() else "does not exist"
        raise ImageError(f"{directory} {kind}. Give a folder with pictures.")
    try:
        everything = sorted(directory.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise ImageError(f"{directory} cannot be read ({error}).") from error
    found = Entries([], [], [], [])
    stems = {e.stem for e in everything if not _is_ignored(e) and e.suffix.lower() != ".txt"}
    for entry in everything:
        name = entry.name.lower()
        if _is_ignored(entry):
            found.ignored.append(entry)
        elif name in _MISNAMED or name == METADATA != entry.name:
            found.misnamed.append(entry)
        elif name == METADATA or (entry.suffix.lower() == ".txt" and entry.stem in stems):
            found.captions.append(entry)
        else:
            found.pictures.append(entry)
    return found


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
