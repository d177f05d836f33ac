"""From whatever a picture file holds to 8-bit sRGB and alpha. `images.py` opens the files.

Source: what Pillow's `convert("RGB")` gets wrong, measured on one file of each kind (tests/diffusion/odd_images.py):
16-bit, 12-bit and float values clipped, color profiles ignored, hidden color behind alpha shown, keys of transparency
compared at another depth than the pixels, every CMYK JPEG inverted, a PNG without its last bytes taken for whole.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageCms

from dreamrie.errors import ImageError

_log = logging.getLogger(__name__)

# A phone photo has at most 50 megapixels in practice; far beyond that a file is an accident or an attack.
LIMIT_PIXELS = 80_000_000
# A strip cannot be cropped to a square that shows anything, and resizing its short side would explode the long one.
LIMIT_ASPECT = 10
# MPO, a photo with a second picture behind it, opens as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

# What Pillow's decoders raise on damaged files, found by cutting and flipping bytes.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    struct.error,
    zlib.error,
)

# How each EXIF orientation is turned back; 1 is upright, any other number is a mistake of the camera.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
# TIFF: bits of a sample, what 0 means, and least and greatest value in two spellings.
_BITS, _PHOTOMETRIC = 258, 262
_RANGES = ((340, 341), (280, 281))
# Pixels that a byte of a JPEG can hold: a block of 8 x 8 takes one bit at least, which says "as the one before".
_JPEG_PIXELS = 8 * 64
# More than 8 bits in a channel, which Pillow would clip.
_DEEP = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I", "F"})
# Pillow scales the pixels of a PNG with 2 or 4 bits to 8, but not its transparent grey.
_GREY_STEPS = {"L;2": 85, "L;4": 17}
_COLOR_MODES = frozenset({"L", "RGB", "CMYK", "LAB"})
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}

# The first bytes of files that are often put among pictures. Bytes 4 to 8 of a video or photo of a phone are "ftyp".
_HEIF_BRANDS = (b"hei", b"hev", b"mif1", b"msf1", b"avi")
_SIGNATURES = (
    (b"\x89PNG", "a damaged PNG"),
    (b"\xff\xd8\xff", "a damaged JPEG"),
    (b"RIFF", "a damaged or cut WebP"),
    (b"GIF8", "a damaged GIF"),
    ((b"II*\0", b"MM\0*"), "a TIFF that is damaged, or of a kind not read here, such as floats in color"),
    (b"\0\0\1\0", "an icon, which holds several sizes: save the one you mean as PNG"),
    (b"8BPS", "a Photoshop file: export it as PNG"),
    (b"%PDF", "a PDF: export the page as PNG"),
    ((b"\xff\x0a", b"\0\0\0\x0cJXL "), "JPEG XL: convert it to PNG"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000: convert it to PNG"),
    (b"PK\3\4", "a zip archive: unpack it"),
)  # fmt: skip


class Layers(NamedTuple):
    """A decoded picture, turned upright.

    Attributes:
        color: sRGB in mode RGB, as stored: also where it is transparent.
        alpha: mode L, 255 is opaque; None if every pixel is.
        kind: format and mode of the file, such as "JPEG CMYK".
    """

    color: Image.Image
    alpha: Image.Image | None
    kind: str

    def on(self, background: tuple[int, int, int]) -> Image.Image:
        """The picture in mode RGB as it looks before a background of that color."""
        if self.alpha is None:
            return self.color
        layer = self.color.convert("RGBA")
        layer.putalpha(self.alpha)
        canvas = Image.new("RGBA", layer.size, (*background, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")


class Header(NamedTuple):
    """What the file says about its pixels, and Pillow forgets in decoding or turning.

    Attributes:
        kind: format and mode.
        limits: values of black and white where they are not 0 and 255; None: not stated.
        is_inverted: the least value means white, or all ink.
        key: the transparent color or palette entries, at the depth of the decoded pixels.
        profile: ICC profile.
    """

    kind: str
    limits: tuple[float, float] | None
    is_inverted: bool
    key: int | tuple[int, ...] | bytes | None
    profile: bytes | None


def check_header(path: Path, image: Image.Image) -> None:
    """Refuse by size, aspect and frames before anything is decoded.

    Args:
        path: of the file, for the message.
        image: opened, not loaded.

    Raises:
        ImageError: too many pixels, too narrow, more than one frame, or a file that is plainly not whole.
    """
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
    if image.format == "PNG":
        _check_png(path)
    elif image.format in {"JPEG", "MPO"} and width * height > path.stat().st_size * _JPEG_PIXELS:
        # libjpeg would fill it up with grey, in silence.
        raise ImageError(
            f"{path}: cannot be decoded (cut off: {width} x {height} pixels do not fit into so small a file)."
        )


def read_header(image: Image.Image) -> Header:
    """Note what is lost later.

    Args:
        image: opened, not loaded.

    Returns:
        Kind, limits, sense, key of transparency and profile.
    """
    tags = getattr(image, "tag_v2", {})
    # Adobe writes CMYK inverted and says so. Pillow inverts each CMYK JPEG, as if all were Adobe's.
    not_adobe = (
        image.mode == "CMYK" and image.format in {"JPEG", "MPO"} and "adobe" not in image.info
    )
    white_is_zero = image.mode in _DEEP and tags.get(_PHOTOMETRIC) == 0
    profile = image.info.get("icc_profile")
    return Header(
        f"{image.format} {image.mode}",
        _limits(image, tags),
        not_adobe or white_is_zero,
        _key(image),
        profile if isinstance(profile, bytes) and profile else None,
    )


def turn_upright(path: Path, image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; damaged EXIF does not make a good picture bad.

    Args:
        path: of the file, for the message.
        image: loaded.

    Returns:
        The picture as it was held.
    """
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except DECODE_ERRORS as error:
        _log.warning("%s: its EXIF cannot be read (%s), so it is not turned.", path, error)
        return image
    return image if turn is None else image.transpose(turn)


def to_layers(path: Path, image: Image.Image, header: Header) -> Layers:
    """Bring any decoded mode to sRGB and alpha, 8 bits each.

    Args:
        path: of the file, for messages.
        image: loaded and upright.
        header: of the same file.

    Returns:
        Color and alpha; they carry no profile, EXIF or transparency besides.

    Raises:
        ImageError: the mode states no range of values or has no conversion.
    """
    alpha = None
    if image.mode in _DEEP:
        base, alpha = _eight_bits(path, image, header)
    elif image.has_transparency_data:
        if header.key is not None:
            image.info["transparency"] = header.key
        # Pillow knows no way from premultiplied grey to RGBA but this.
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        base, alpha = layer.convert("RGB"), layer.getchannel("A")
    elif image.mode in _COLOR_MODES:
        base = ImageChops.invert(image) if header.is_inverted else image
    else:
        try:
            base = image.convert("RGB")
        except ValueError as error:
            raise ImageError(f"{path}: mode {image.mode} has no conversion to RGB.") from error
    if alpha is not None and alpha.getextrema() == (255, 255):
        alpha = None
    color = _to_srgb(path, base, header.profile)
    # A profile left here would be saved with the picture, and applied again.
    color.info = {}
    return Layers(color, alpha, header.kind)


def what_it_is(path: Path) -> str:
    """Say what a file that no decoder takes may be.

    Args:
        path: an existing file.

    Returns:
        A few words, with what to do if that is known.
    """
    size = path.stat().st_size
    if size == 0:
        return "the file is empty"
    with path.open("rb") as file:
        head = file.read(64)
    if head[4:8] == b"ftyp":
        if head[8:].startswith(_HEIF_BRANDS):
            return "a HEIC or AVIF photo, as phones take them: convert it to PNG or JPEG"
        return "a video: save the frame you mean as PNG"
    for signature, words in _SIGNATURES:
        if head.startswith(signature):
            return words
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, as a failed download leaves it"
    if start.startswith((b"<svg", b"<?xml")):
        return "SVG or XML: export it as PNG"
    return f"{size} bytes, none of {', '.join(FORMATS)}"


def _check_png(path: Path) -> None:
    """Pillow skips the checksums of pixels and stops at the last of them: look at all chunks, to the end."""
    left = path.stat().st_size - 8
    with path.open("rb") as file:
        file.seek(8)
        while left >= 12:
            length, name = struct.unpack(">I4s", file.read(8))
            left -= length + 12
            if left < 0:
                break
            crc = zlib.crc32(file.read(length), zlib.crc32(name))
            # What is not needed for the pixels may be wrong; upper case means needed.
            if file.read(4) != struct.pack(">I", crc) and (name[:1].isupper() or name == b"tRNS"):
                raise ImageError(
                    f"{path}: cannot be decoded (damaged: the checksum of {name!r} is wrong)."
                )
            if name == b"IEND":
                return
    raise ImageError(f"{path}: cannot be decoded (cut off: the end of the PNG is missing).")


def _limits(image: Image.Image, tags: dict[int, object]) -> tuple[float, float] | None:
    """Values of black and white of a deep picture."""
    if image.mode == "F":
        return 0.0, 1.0
    if image.mode == "I":
        if image.format == "PPM":
            return 0.0, 65535.0  # Pillow scales to it, whatever the file's maximum is.
        for low_tag, high_tag in _RANGES:
            low, high = (tags.get(tag) for tag in (low_tag, high_tag))
            low, high = (v[0] if isinstance(v, tuple) and v else v for v in (low, high))
            if isinstance(low, int | float) and isinstance(high, int | float) and low < high:
                return float(low), float(high)
        return None
    bits = tags.get(_BITS, (16,))
    return 0.0, 4095.0 if bits in {12, (12,)} else 65535.0


def _key(image: Image.Image) -> int | tuple[int, ...] | bytes | None:
    """The transparent color at the depth of the decoded pixels."""
    key: int | tuple[int, ...] | bytes | None = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    raw = tiles[0].args if image.format == "PNG" and tiles else None
    if isinstance(key, int) and isinstance(raw, str):
        return key * _GREY_STEPS.get(raw, 1)
    if isinstance(key, tuple) and raw == "RGB;16B":
        return tuple(value >> 8 for value in key)
    return key


def _eight_bits(
    path: Path, image: Image.Image, header: Header
) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 12 to 32 bits to 8, and its alpha."""
    values = np.asarray(image)
    least, greatest = values.min(), values.max()
    if header.limits is None:
        raise ImageError(
            f"{path}: mode {image.mode} (32 bits a pixel) states no range of values; those found reach from "
            f"{least:g} to {greatest:g}. Save it with 8 or 16 bits."
        )
    low, high = header.limits
    # In this form it also refuses what is not a number.
    if not (low <= least and greatest <= high):
        raise ImageError(
            f"{path}: mode {image.mode} with values from {least:g} to {greatest:g}, out of the range from {low:g} "
            f"to {high:g}. Save it with 8 or 16 bits."
        )
    # 0 to 65535 is divided by 257, so white stays white.
    shares = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    if header.is_inverted:
        shares = 255 - shares
    base = Image.fromarray(np.floor(shares + np.float32(0.5)).astype(np.uint8))
    if not isinstance(header.key, int):
        return base, None
    return base, Image.fromarray(np.where(values == header.key, 0, 255).astype(np.uint8))


def _to_srgb(path: Path, base: Image.Image, profile: bytes | None) -> Image.Image:
    """Apply the color profile; L, RGB and CMYK without one are what they are on a screen."""
    if profile is None and base.mode != "LAB":
        return base.convert("RGB")
    try:
        if base.mode == "LAB":
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        else:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        space = source.profile.xcolor_space.strip()
        # Cameras put the profile of color into pictures that were saved as grey.
        picture = base.convert("RGB") if (space, base.mode) == ("RGB", "L") else base
        if space != _SPACES[picture.mode]:
            raise ValueError(f"it is for {space}, the picture is {base.mode}")
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.buildTransform(source, target, picture.mode, "RGB")
        converted = ImageCms.applyTransform(picture, transform)
    except (ImageCms.PyCMSError, *DECODE_ERRORS) as error:
        _log.warning("%s: its color profile is ignored (%s).", path, error)
        return base.convert("RGB")
    return converted or base.convert("RGB")
