"""`python -m dreamrie doctor`: what is wrong is found, what is right is not, and a clean copy trains alike."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from dreamrie import __main__ as command
from dreamrie.diffusion import clean_copy, doctor, examine, images
from dreamrie.diffusion.captions import read_captions
from tests.contracts.sources import ROOT
from tests.diffusion.odd_bytes import p3_profile
from tests.diffusion.odd_images import KINDS

PHOTOS = Path(os.environ.get("DREAMRIE_DATA", ROOT.parent / "shared" / "data")) / "dreambooth"


@functools.cache
def photo(seed: int, size: int = 512) -> Image.Image:
    """Blobs of all sizes down to two pixels: as sharp as a photo, and unlike that of another seed."""
    draw = np.random.default_rng(seed)
    total = np.zeros((size, size, 3))
    side = 4
    while side <= size // 2:
        blobs = Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(blobs.resize((size, size), Image.Resampling.BICUBIC)) / side**0.1
        side *= 2
    total -= total.min()
    return Image.fromarray((total / total.max() * 255).astype(np.uint8))


def codes(found: doctor.Diagnosis) -> dict[str, list[str]]:
    """Names and what was found, without what is as it should be."""
    return {p.path.name: [f.code for f in p.findings] for p in found.pictures if p.findings}


def law_a_clean_copy_trains_alike(impl: Any) -> None:
    """Each copy has the pixels, alpha and caption of its original; broken and repeated ones are not there."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "new", "copy")
        source.mkdir()
        exif = Image.Exif()
        exif[0x0112] = 6
        photo(0, 64).save(source / "a.jpg", exif=exif)
        photo(1, 64).save(source / "A.png", icc_profile=p3_profile())
        clear = photo(2, 64).copy()
        clear.putalpha(Image.linear_gradient("L").resize((64, 64)))
        clear.save(source / "b.webp", lossless=True)
        photo(1, 64).save(source / "c.png", icc_profile=p3_profile(), compress_level=1)
        (source / "d.jpg").write_bytes(b"<html>")
        names = ["A.png", "a.jpg", "b.webp", "c.png", "d.jpg"]
        rows = [{"file_name": n, "text": f"[trigger] {n}", "more": 1} for n in names]
        (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
        found = doctor.diagnose(source, 32)
        words = "\n".join(impl.copy_clean(source, found.pictures, target))
        copies = images.find_pictures(target)
        assert [path.name for path in copies] == ["A.png", "a-2.png", "b.png"]
        kept = [source / name for name in names[:3]]
        assert read_captions(target, copies, "x") == [f"x {path.name}" for path in kept]
        assert (
            json.loads((target / "metadata.jsonl").read_text("utf-8").splitlines()[1])["more"] == 1
        )
        for original, copy in zip(kept, copies, strict=True):
            one, other = images.load_layers(original), images.load_layers(copy)
            assert np.array_equal(np.asarray(one.color), np.asarray(other.color)), original.name
            assert (one.alpha is None) == (other.alpha is None)
            if one.alpha is not None and other.alpha is not None:
                assert np.array_equal(np.asarray(one.alpha), np.asarray(other.alpha))
        assert "c.png, the same picture as A.png" in words
        assert "d.jpg, not a picture" in words
        assert "a.jpg is now a-2.png" in words


def law_copies_are_told_from_other_photos(impl: Any) -> None:
    """Saved anew, reduced, cut by 2 % or made brighter: nearly the same. Another photo, or its mirror: not."""
    original = photo(3)
    copies = {
        "saved.jpg": original,
        "half.png": original.resize((256, 256)),
        "cut.png": original.crop((10, 10, 502, 502)),
        "brighter.png": ImageEnhance.Brightness(original).enhance(1.15),
    }
    others = {
        "mirror.png": original.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        **{f"other {seed}.png": photo(seed) for seed in (4, 5, 6)},
        "plain red.png": Image.new("RGB", (512, 512), (200, 0, 0)),
        "plain blue.png": Image.new("RGB", (512, 512), (0, 0, 200)),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, picture in ({"0 original.png": original} | copies | others).items():
            picture.save(Path(folder, name), quality=50)
        pictures = [impl.examine(path, 8) for path in images.list_images(Path(folder))]
        impl.compare(pictures)
    near = {p.path.name for p in pictures if p.has(frozenset({"near"}))}
    assert near == set(copies)


def law_blur_is_seen_and_depth_of_field_is_not(impl: Any) -> None:
    """A picture that is sharp anywhere is sharp: a subject before a blurred background. Sharp nowhere is blurred."""
    sharp = photo(7)
    blurred = sharp.filter(ImageFilter.GaussianBlur(4))
    portrait = blurred.copy()
    portrait.paste(sharp.crop((128, 128, 256, 256)), (128, 128))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.png")
        for picture, expected in ((sharp, []), (portrait, []), (blurred, ["blurred"])):
            picture.save(path)
            assert [finding.code for finding in impl.examine(path, 512).findings] == expected


LAWS = (
    (law_a_clean_copy_trains_alike, clean_copy),
    (law_copies_are_told_from_other_photos, examine),
    (law_blur_is_seen_and_depth_of_field_is_not, examine),
)


@pytest.mark.parametrize(("law", "module"), LAWS, ids=lambda value: getattr(value, "__name__", ""))
def test_law(law: Any, module: Any) -> None:
    law(module)


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """A folder with one of each fault."""
    folder = tmp_path / "messy"
    folder.mkdir()
    for seed in range(2):
        photo(seed).save(folder / f"good {seed}.png")
    shutil.copy(folder / "good 0.png", folder / "again.png")
    photo(2).resize((200, 300)).save(folder / "small.png")
    ImageEnhance.Brightness(photo(3)).enhance(0.1).save(folder / "night.png")
    light = photo(4).point(lambda value: 225 + value // 9)
    light.save(folder / "snow.png")
    photo(6).filter(ImageFilter.GaussianBlur(4)).save(folder / "soft.png")
    cut_out = photo(5).copy()
    alpha = Image.new("L", cut_out.size, 255)
    alpha.paste(0, (0, 0, 512, 128))
    cut_out.putalpha(alpha)
    cut_out.save(folder / "cut out.png")
    (folder / "phone.heic").write_bytes(KINDS["HEIC"].content)
    for name in (".DS_Store", "Thumbs.db"):
        (folder / name).touch()
    (folder / "old").mkdir()
    return folder


def test_each_fault_is_found_by_name(messy: Path) -> None:
    found = doctor.diagnose(messy, 512)
    assert codes(found) == {
        "cut out.png": ["transparent"],
        "good 0.png": ["same"],
        "night.png": ["dark"],
        "phone.heic": ["broken"],
        "small.png": ["small"],
        "snow.png": ["bright"],
        "soft.png": ["blurred"],
    }
    assert found.ignored == [".DS_Store", "Thumbs.db", "old/"]
    assert "small" not in codes(doctor.diagnose(messy, 200)).get("small.png", [])


def test_the_table_is_aligned_and_the_summary_says_what_to_do(messy: Path) -> None:
    (messy / ("long " * 20 + "name.png")).write_bytes((messy / "small.png").read_bytes())
    (messy / "写真.png").write_bytes((messy / "soft.png").read_bytes())
    (messy / "bad\x1b[31m.png").write_bytes(b"")
    text = doctor.report(doctor.diagnose(messy, 512))
    lines = text.splitlines()
    assert max(doctor._width(line) for line in lines) <= doctor.COLUMNS
    assert "\x1b" not in text
    assert "bad\\x1b[31m.png" in text
    start = lines[0].index("findings")
    (row,) = [line for line in lines if line.startswith("snow.png")]
    assert row[start:].startswith("very bright")
    (wide,) = [line for line in lines if line.startswith("写真.png")]
    assert wide[start - 2 :].startswith("blurred")
    assert "10 of 12 pictures can be used." in lines
    assert "Ignored: .DS_Store, Thumbs.db, old/." in lines
    (broken,) = [line for line in lines if line.startswith("- Remove or replace")]
    assert broken.endswith("bad\\x1b[31m.png, phone.heic.")


def test_exit_codes(messy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0: all well; 1: something needs attention; 2: something given cannot work, in one line."""
    well = tmp_path / "well"
    well.mkdir()
    for seed in range(2):
        photo(seed).save(well / f"{seed}.png")
    (tmp_path / "empty").mkdir()
    assert command.main(["doctor", str(well)]) == 0
    assert "Nothing needs to be done." in capsys.readouterr().out
    assert command.main(["doctor", str(messy)]) == 1
    assert command.main(["doctor", str(tmp_path / "empty")]) == 1
    capsys.readouterr()
    assert command.main([]) == 2
    assert "doctor" in capsys.readouterr().out
    wrong = (
        [str(tmp_path / "gone")],
        [str(well / "0.png")],
        [str(well), "--resolution", "0"],
        [str(well), "--json", str(tmp_path / "gone" / "x.json")],
        [str(well), "--fix", str(well)],
        [str(well), "--fix", str(messy)],
        [str(well), "--fix", str(well / "0.png")],
    )
    for words in wrong:
        assert command.main(["doctor", *words]) == 2, words
    assert sorted(path.name for path in well.iterdir()) == ["0.png", "1.png"]


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    """In a process of its own: no traceback, exit code 2."""
    words = [sys.executable, "-m", "dreamrie", "doctor", str(tmp_path / "gone")]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert (
        run.stderr == f"error: {tmp_path / 'gone'} does not exist. Give a folder with pictures.\n"
    )


def test_the_clean_copy_is_well_where_the_folder_was_not(tmp_path: Path) -> None:
    """From the command line, on a screen that knows ASCII only: 1, then 0; the folder itself stays as it is."""
    folder, target = tmp_path / "folder", tmp_path / "new"
    folder.mkdir()
    for seed, name in enumerate(("写真", "b\n", "c")):
        photo(seed).save(folder / f"{name}.png")
    shutil.copy(folder / "c.png", folder / "d.png")
    (folder / "e.png").touch()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = [sys.executable, "-m", "dreamrie", "doctor", str(folder), "--fix", str(target)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (1, "")
    assert "b\\n.png" in run.stdout
    assert "- left out: d.png, the same picture as c.png" in run.stdout.splitlines()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert command.main(["doctor", str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["b\n.png", "c.png", "写真.png"]


def test_nothing_to_copy_is_no_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(b"no picture")
    words = ["doctor", str(tmp_path / "in"), "--fix", str(tmp_path / "out")]
    assert command.main(words) == 1
    assert "No clean copy" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_findings_are_written_for_programs(messy: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    assert command.main(["doctor", str(messy), "--json", str(path), "--resolution", "300"]) == 1
    record = json.loads(path.read_text("utf-8"))
    rows = {row["name"]: row for row in record["pictures"]}
    assert (record["resolution"], record["well"], len(rows)) == (300, False, 9)
    assert rows["small.png"]["size"] == [200, 300]
    assert rows["phone.heic"]["usable"] is False
    assert rows["good 0.png"]["findings"][0]["others"] == ["again.png"]
    assert rows["good 1.png"]["findings"] == []


def test_captions(tmp_path: Path) -> None:
    """Present, missing, malformed, of a wrong name; of two equal pictures the one with a caption stays."""
    for seed, name in enumerate(("0", "1", "2")):
        photo(seed).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "1.png", tmp_path / "0 copy.png")
    assert doctor.diagnose(tmp_path, 512).captions == frozenset()
    (tmp_path / "1.txt").write_text("one", "utf-8")
    found = doctor.diagnose(tmp_path, 512)
    assert found.captions == {"1.png"}
    assert codes(found) == {"0 copy.png": ["same", "caption"], "0.png": ["caption"], "2.png": ["caption"]}  # fmt: skip
    for name in ("0", "2", "0 copy"):
        (tmp_path / f"{name}.txt").write_text(name, "utf-8")
    complete = doctor.diagnose(tmp_path, 512)
    assert (codes(complete), complete.faults) == ({"1.png": ["same"]}, [])
    (tmp_path / "metadata.json").touch()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png"}\n', "utf-8")
    faults = doctor.diagnose(tmp_path, 512).faults
    assert len(faults) == 2
    assert "name it metadata.jsonl" in faults[0]
    assert "twice" in faults[1]


def test_text_files_follow_their_pictures(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    photo(0, 32).save(source / "a.jpg")
    (source / "a.txt").write_text("[trigger] alone", "utf-8")
    pictures = doctor.diagnose(source, 32).pictures
    (words,) = clean_copy.copy_clean(source, pictures, tmp_path / "new")
    assert words.endswith("pictures 1, captions 1.")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.png", "a.txt"]
    assert (tmp_path / "new" / "a.txt").read_text("utf-8") == "[trigger] alone"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "b.png"], ["a.png", "b.png"]),
        (["A.PNG", "a.jpg"], ["A.png", "a-2.png"]),
        (["a-2.png", "a.jpg", "a.png"], ["a-2.png", "a.png", "a-3.png"]),
        (["x.tar.gif", "x"], ["x.tar.png", "x.png"]),
    ],
)
def test_no_two_copies_share_a_name(names: list[str], expected: list[str]) -> None:
    assert list(clean_copy.new_names([Path(name) for name in names]).values()) == expected


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the photos are not at {PHOTOS}")
def test_real_photos_are_well_and_their_bad_copies_are_not(tmp_path: Path) -> None:
    """The thresholds, measured: no photo is found at fault, and copies that are blurred or repeated are."""
    folders = sorted(folder for folder in PHOTOS.iterdir() if folder.is_dir())
    paths = [path for folder in folders for path in sorted(folder.glob("*.jpg"))]
    assert len(paths) >= 60
    seen = 0
    for number, path in enumerate(paths):
        picture = images.load_image(path)
        soft, cut = tmp_path / f"{number} soft.png", tmp_path / f"{number} cut.jpg"
        picture.filter(ImageFilter.GaussianBlur(3)).save(soft, compress_level=1)
        picture.crop((10, 10, 502, 502)).save(cut, quality=60)
        found = [examine.examine(one, 480) for one in (path, soft, cut)]
        examine.compare(found)
        assert found[0].findings == [], path
        seen += [f.code for f in found[1].findings] in (["blurred", "near"], ["dark", "near"])
        assert [f.code for f in found[2].findings] == ["near"], path
    assert seen >= len(paths) - 3
    for folder in folders:
        assert codes(doctor.diagnose(folder, 512)) == {}
