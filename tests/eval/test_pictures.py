"""What is scored is complete and unbroken, or it is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamrie.errors import ConfigError, ImageError
from eval import pictures


def write_pictures(folder: Path, count: int, size_px: int = 40) -> Path:
    """Pictures 0.png ... of random blocks."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(count)
    for index in range(count):
        blocks = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((size_px, size_px)).save(folder / f"{index}.png")
    return folder


def test_pictures_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = pictures.read_folder(write_pictures(tmp_path / "a", 3), 2)
    assert folder.names == ("0.png", "1.png", "2.png")
    assert [image.size for image in folder.images] == [(40, 40)] * 3


@pytest.mark.parametrize("color", [(0, 0, 0), (90, 20, 200)])
def test_blank_pictures_are_named_and_not_averaged_away(
    tmp_path: Path, color: tuple[int, int, int]
) -> None:
    folder = write_pictures(tmp_path / "a", 2)
    Image.new("RGB", (40, 40), color).save(folder / "black.png")
    with pytest.raises(ImageError, match=r"1 of 3 .*black\.png"):
        pictures.read_folder(folder, 1)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "a", 2)
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"0\.png"):
        pictures.read_folder(folder, 1)


def test_too_few_and_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds 1 picture; at least 2"):
        pictures.read_folder(write_pictures(tmp_path / "a", 1), 2)
    (tmp_path / "b").mkdir()
    with pytest.raises(ImageError, match="no pictures"):
        pictures.read_folder(tmp_path / "b", 1)


def test_a_folder_is_not_scored_against_itself(tmp_path: Path) -> None:
    """By another spelling or a link neither."""
    folder = write_pictures(tmp_path / "a", 2)
    (tmp_path / "link").symlink_to(folder)
    for other in (folder, tmp_path / "a" / ".." / "a", tmp_path / "link"):
        with pytest.raises(ConfigError, match="same folder"):
            pictures.check_apart(folder, other)


def _prompts(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_each_picture_has_its_own_prompt(tmp_path: Path) -> None:
    """Whatever the order of the lines."""
    rows = [{"file_name": "b.png", "prompt": "two"}, {"file_name": "a.png", "prompt": "one"}]
    path = _prompts(tmp_path / "p.jsonl", rows)
    assert pictures.read_prompts(path, ("a.png", "b.png")) == ["one", "two"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"file_name": "a.png", "prompt": "x"}], r"without prompt: \['b.png'\]"),
        (
            [{"file_name": n, "prompt": "x"} for n in ("a.png", "b.png", "c.png")],
            r"without picture: \['c.png'\]",
        ),
        ([{"file_name": "a.png", "prompt": "x"}] * 2, "line 2: 'a.png' stands twice"),
        ([{"file_name": "a.png", "prompt": " "}], "line 1: an empty"),
        ([{"name": "a.png"}], "line 1: expected"),
    ],
)
def test_incomplete_prompts_are_errors(
    tmp_path: Path, rows: list[dict[str, str]], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        pictures.read_prompts(_prompts(tmp_path / "p.jsonl", rows), ("a.png", "b.png"))


@pytest.mark.parametrize(
    ("prompt", "seen"),
    [
        ("a photo of a sks dog", "a photo of a dog"),
        ("a sks dog in risks", "a dog in risks"),
        ("sks", ""),
        ("a dog", "a dog"),
    ],
)
def test_the_rare_token_is_left_out(prompt: str, seen: str) -> None:
    """E4: whole words only."""
    assert pictures.without_token(prompt, "sks") == seen
