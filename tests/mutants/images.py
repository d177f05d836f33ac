"""Faults in decoding and in the doctor: what Pillow's usual three calls do, and each single step left out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dreamrie.diffusion import clean_copy, decode, examine, images
from dreamrie.errors import ConfigError
from tests.diffusion import test_doctor, test_images, test_odd_images
from tests.diffusion.odd_images import KINDS
from tests.mutants import Law, Mutant, each, instead, replaced


@contextmanager
def decoding(**attributes: Any) -> Iterator[Any]:
    """The pictures module on top of a decoder with some attributes replaced."""
    with replaced(decode, **attributes):
        yield images


@contextmanager
def hidden_color_shown() -> Iterator[Any]:
    """Layers whose alpha is forgotten."""
    with replaced(decode.Layers, on=lambda self, background: self.color):
        yield images


def law_on(*names: str) -> Law:
    """The law of odd files, on some of them."""
    return each(test_odd_images.law_an_odd_file_is_itself_or_refused, [KINDS[n] for n in names])


def usual() -> AbstractContextManager[Any]:
    """Pillow's `open`, `exif_transpose`, `convert("RGB")`."""
    return instead(test_odd_images.USUAL)


def stretched(path: Path, image: Image.Image, header: Any) -> tuple[Image.Image, None]:
    """Least value black, greatest white, whatever they mean."""
    values = np.asarray(image).astype(np.float64)
    spread = max(float(np.ptp(values)), 1e-9)
    return Image.fromarray(np.uint8(255 * (values - values.min()) / spread)), None


def never_inverted(image: Image.Image) -> decode.Header:
    """Every file means what Adobe's and most others mean."""
    return _read_header(image)._replace(is_inverted=False)


def keeps_opaque_profile(path: Path, base: Image.Image, profile: bytes | None) -> Image.Image:
    """Colors as they are stored."""
    return base.convert("RGB")


def composited(path: Path) -> decode.Layers:
    """Alpha kept, but the color already on white."""
    layers = images.load_layers(path)
    return layers._replace(color=layers.on(images.BACKGROUND))


def keeps_no_alpha(image: Image.Image, path: Path) -> None:
    """RGB, always."""
    images.save_png(image.convert("RGB"), path)


def table_as_it_is(source: Path, names: dict[Path, str], target: Path) -> int:
    """The file of captions, copied."""
    shutil.copy(source / images.METADATA, target / images.METADATA)
    return len(names)


_read_header = decode.read_header

# The rows of the table in which Pillow's own behaviour was measured, and what each would do to a training.
_DOCUMENTED = {
    "16-bit grey PNG": "mean 254 instead of 127: a white picture",
    "float TIFF": "values 0 and 1 of 255: a black picture",
    "RGBA": "the color behind transparency appears",
    "LA": "the grey behind transparency appears",
    "P, one entry transparent": "the color behind transparency appears",
    "P, table of alpha": "the color behind transparency appears",
    "animated GIF": "the first frame, in silence",
    "APNG": "the first frame, in silence",
    "zero bytes": "a message that does not say what is wrong",
    "web page": "a failed download is found in mid-run",
    ".DS_Store": "a message that does not say what is wrong",
    "PNG that claims 89 megapixels": "it decodes first and only warns",
    "strip": "7.9 GB when its short side is enlarged",
}

_USUAL = [
    Mutant(f"usual Pillow on {name}", law_on(name), usual, why) for name, why in _DOCUMENTED.items()
]

_STEPS = [
    Mutant(
        "EXIF orientation ignored",
        test_images.law_exif_is_applied,
        lambda: decoding(_TURNS={}),
        "photos from a phone lie on their side",
    ),
    Mutant(
        "EXIF turns to the wrong side",
        law_on("EXIF 6, JPEG", "EXIF 8, PNG"),
        lambda: decoding(_TURNS=decode._TURNS | {6: decode._TURNS[8], 8: decode._TURNS[6]}),
        "6 and 8 are easily confused",
    ),
    Mutant(
        "damaged EXIF ends it",
        law_on("EXIF 6 beside a damaged tag"),
        lambda: decoding(turn_upright=lambda path, image: ImageOps.exif_transpose(image)),
        "a good picture is refused for a tag that nobody needs",
    ),
    Mutant(
        "alpha dropped",
        test_images.law_alpha_falls_on_white,
        hidden_color_shown,
        "the color hidden behind transparency appears",
    ),
    Mutant(
        "16 bits clipped",
        test_images.law_sixteen_bits_are_rescaled,
        lambda: decoding(_DEEP=frozenset()),
        "a 16-bit picture becomes white",
    ),
    Mutant(
        "12 bits taken for 16",
        law_on("12-bit TIFF"),
        lambda: decoding(_limits=lambda image, tags: (0.0, 65535.0)),
        "a picture of a microscope becomes black",
    ),
    Mutant(
        "values stretched to those found",
        law_on("float TIFF", "12-bit PGM"),
        lambda: decoding(_eight_bits=stretched),
        "the brightness of a picture would depend on its darkest pixel",
    ),
    Mutant(
        "color profile ignored",
        law_on("Display P3"),
        lambda: decoding(_to_srgb=keeps_opaque_profile),
        "the reds of a phone's photo turn pale",
    ),
    Mutant(
        "grey profile ignored",
        law_on("linear grey"),
        lambda: decoding(_to_srgb=keeps_opaque_profile),
        "a linear scan becomes too dark",
    ),
    Mutant(
        "each CMYK JPEG taken for Adobe's",
        law_on("CMYK JPEG of others"),
        lambda: decoding(read_header=never_inverted),
        "a negative",
    ),
    Mutant(
        "0 always black",
        law_on("16-bit TIFF, 0 is white"),
        lambda: decoding(read_header=never_inverted),
        "a scan becomes a negative",
    ),
    Mutant(
        "transparent grey compared as stored",
        law_on("2-bit grey PNG, this grey transparent"),
        lambda: decoding(_key=lambda image: image.info.get("transparency")),
        "the pixels were scaled to 8 bits, the key was not",
    ),
    Mutant(
        "PNG not checked to its end",
        law_on("PNG without its last 12 bytes"),
        lambda: decoding(_check_png=lambda path: None),
        "a download that was cut passes",
    ),
    Mutant(
        "JPEG of any size in any file",
        law_on("JPEG that claims 48 megapixels"),
        lambda: decoding(_JPEG_PIXELS=10**9),
        "a stub becomes a grey picture",
    ),
    Mutant(
        "pages and frames not counted",
        law_on("multi-page TIFF"),
        lambda: decoding(check_header=lambda path, image: None),
        "the first page, in silence",
    ),
]

_DOCTOR = [
    Mutant(
        "copy with what hides behind alpha on white",
        test_doctor.law_a_clean_copy_trains_alike,
        lambda: replaced(clean_copy, load_layers=composited),
        "transparency would be applied twice",
    ),
    Mutant(
        "copy without alpha",
        test_doctor.law_a_clean_copy_trains_alike,
        lambda: replaced(clean_copy, save_png=keeps_no_alpha),
        "transparency would be lost",
    ),
    Mutant(
        "two copies under one name",
        test_doctor.law_a_clean_copy_trains_alike,
        lambda: replaced(clean_copy, new_names=lambda paths: {p: f"{p.stem}.png" for p in paths}),
        "the second overwrites the first where case does not count",
    ),
    Mutant(
        "captions under the old names",
        test_doctor.law_a_clean_copy_trains_alike,
        lambda: replaced(clean_copy, _copy_table=table_as_it_is),
        "training would refuse the copy",
        raises=(ConfigError,),
    ),
    Mutant(
        "equal pictures copied twice",
        test_doctor.law_a_clean_copy_trains_alike,
        lambda: replaced(clean_copy, LEFT_OUT=frozenset({"broken"})),
        "one picture would count double",
    ),
    Mutant(
        "no two photos nearly the same",
        test_doctor.law_copies_are_told_from_other_photos,
        lambda: replaced(examine, LIMIT_BITS=0),
        "a photo saved anew is not found",
    ),
    Mutant(
        "any two photos nearly the same",
        test_doctor.law_copies_are_told_from_other_photos,
        lambda: replaced(examine, LIMIT_BITS=64, LIMIT_COLOR=255.0),
        "good photos would be thrown away",
    ),
    Mutant(
        "plain pictures all alike",
        test_doctor.law_copies_are_told_from_other_photos,
        lambda: replaced(examine, LIMIT_COLOR=255.0),
        "red equals blue where nothing rises",
    ),
    Mutant(
        "nothing is blurred",
        test_doctor.law_blur_is_seen_and_depth_of_field_is_not,
        lambda: replaced(examine, LIMIT_SHARPNESS=0.0),
        "a shaken photo passes",
    ),
    Mutant(
        "sharpness of the whole picture",
        test_doctor.law_blur_is_seen_and_depth_of_field_is_not,
        lambda: replaced(examine, _PARTS=1),
        "a portrait before a soft background would be refused",
    ),
]

MUTANTS: list[Mutant] = [*_USUAL, *_STEPS, *_DOCTOR]
