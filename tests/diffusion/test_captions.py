"""Captions: both ways to write them, and every way to get them wrong, named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dreamrie.diffusion.captions import read_captions
from dreamrie.diffusion.data import ConceptSet
from dreamrie.diffusion.images import find_pictures
from dreamrie.errors import ConfigError, ImageError
from tests.small_models import write_pictures

PROMPT = "a sks dog"


def write_table(folder: Path, rows: list[object], name: str = "metadata.jsonl") -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "dög pictures", 2)
    return tmp_path / "dög pictures"


def row(number: int, text: str) -> dict[str, str]:
    return {"file_name": f"picture-{number}.png", "text": text}


def captions_of(folder: Path) -> list[str] | None:
    return read_captions(folder, find_pictures(folder), PROMPT)


def test_without_captions_there_are_none(folder: Path) -> None:
    assert captions_of(folder) is None


def test_a_table_names_its_pictures_in_any_order(folder: Path) -> None:
    """`[trigger]` stands for the instance prompt; blank lines and blanks at the ends do not count."""
    write_table(folder, [row(1, "[trigger]  at night "), "", row(0, "ein Hund, größer")])
    assert captions_of(folder) == ["ein Hund, größer", "a sks dog at night"]


def test_line_ends_of_other_scripts_stay_inside_a_caption(folder: Path) -> None:
    """JSON allows them in a text, so they end no line of the table; they are blanks like any other."""
    write_table(folder, [row(0, "one\u2028two"), row(1, "three\u0085four")])
    assert captions_of(folder) == ["one two", "three four"]


def test_a_text_file_beside_each_picture_is_its_caption(folder: Path) -> None:
    """A byte order mark is no part of it; the text files are no pictures."""
    (folder / "picture-0.txt").write_text("[trigger] on grass\n", encoding="utf-8-sig")
    (folder / "picture-1.txt").write_text("[trigger] in the snow", encoding="utf-8")
    assert [path.name for path in find_pictures(folder)] == ["picture-0.png", "picture-1.png"]
    assert captions_of(folder) == ["a sks dog on grass", "a sks dog in the snow"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(0, "a")], "pictures without caption: picture-1.png"),
        ([row(0, "a"), row(1, "b"), row(2, "c")], "captions without picture: picture-2.png"),
        ([row(0, "a"), row(1, " ")], "the caption of picture-1.png is empty"),
        ([row(0, "a"), row(0, "b")], "line 2: 'picture-0.png' stands twice"),
        ([row(0, "a"), "{"], "line 2: expected"),
        ([row(0, "a"), {"file_name": "picture-1.png", "caption": "b"}], "line 2: expected"),
        ([row(0, "a"), {"file_name": "picture-1.png", "text": 3}], "line 2: file_name and text"),
    ],
)
def test_a_wrong_table_is_named_by_its_line(folder: Path, rows: list[object], said: str) -> None:
    write_table(folder, rows)
    with pytest.raises(ConfigError, match=said):
        captions_of(folder)


def test_two_kinds_of_captions_are_one_too_many(folder: Path) -> None:
    write_table(folder, [row(0, "a"), row(1, "b")])
    (folder / "picture-0.txt").write_text("c", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"twice, in metadata\.jsonl and in picture-0\.txt"):
        captions_of(folder)


def test_a_caption_that_is_not_text_is_named(folder: Path) -> None:
    (folder / "picture-0.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"picture-0\.txt cannot be read as text"):
        captions_of(folder)


@pytest.mark.parametrize("name", ["metadata.json", "Metadata.jsonl", "metadata.jsonl.txt"])
def test_a_misnamed_table_is_not_passed_over(folder: Path, name: str) -> None:
    write_table(folder, [row(0, "a"), row(1, "b")], name)
    with pytest.raises(ImageError, match=r"Name it metadata\.jsonl"):
        find_pictures(folder)


def test_a_text_file_without_its_picture_is_still_refused(folder: Path) -> None:
    """It may be the caption of a picture that was lost."""
    (folder / "picture-7.txt").write_text("a", encoding="utf-8")
    with pytest.raises(ImageError, match=r"picture-7\.txt"):
        ConceptSet(folder, PROMPT, resolution=16)


def test_each_picture_carries_its_own_prompt(folder: Path) -> None:
    write_table(folder, [row(1, "[trigger] at night"), row(0, "[trigger] on grass")])
    concept = ConceptSet(folder, PROMPT, resolution=16)
    assert concept.instance.prompts == ["a sks dog on grass", "a sks dog at night"]
    assert concept.instance.prompt == PROMPT
