"""What publishing is for every task: names, tokens, links, and text of a user in Markdown and YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from dreamrie.config import parse_yaml
from dreamrie.errors import CheckpointError, ConfigError
from dreamrie.publishing import cards
from dreamrie.publishing import hub as shared
from dreamrie.run_folder import CARD_MARK
from tests.diffusion.test_hub import NAME, SECRET, FakeHub, settings


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token, and no word about being offline."""
    monkeypatch.setattr(shared, "get_token", lambda: SECRET)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_training_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong name, no network, no token, a token that is not accepted."""
    fake: Any = FakeHub()
    output = settings("--push_to_hub", "--hub_model_id", NAME)
    shared.check_hub(output, api=fake)
    assert [name for name, _ in fake.calls] == ["whoami"]
    for name in ("a/b/c", ".a/b", "a--b", "mary/..", "mary/dög", "m/" + "x" * 96, "mary/"):
        with pytest.raises(ConfigError, match="is no name of a repository"):
            shared.check_hub(settings("--push_to_hub", "--hub_model_id", name), api=fake)
    refusing: Any = FakeHub("whoami")
    with pytest.raises(ConfigError, match="did not accept the token") as caught:
        shared.check_hub(output, api=refusing)
    assert SECRET not in str(caught.value)
    monkeypatch.setattr(shared, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="there is no token"):
        shared.check_hub(output, api=fake)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        shared.check_hub(output, api=fake)
    assert len(fake.calls) == 1


def test_the_folder_names_the_repository() -> None:
    output = settings("--push_to_hub", "--output_dir", "runs/my-dog")
    assert shared.repository_of(output) == "my-dog"


def test_no_link_and_no_missing_file_is_published(tmp_path: Path) -> None:
    """A link, or a folder that is one, could lead to anything."""
    inside = tmp_path / "run"
    (inside / "best").mkdir(parents=True)
    for name in ("a", "best/b"):
        (inside / name).write_text(name, "utf-8")
    found = shared.plain_files(inside, ["a", "best/b"])
    assert {name: path.read_text("utf-8") for name, path in found.items()} == {
        "a": "a",
        "best/b": "best/b",
    }
    (inside / "link").symlink_to(inside / "a")
    (inside / "folder").symlink_to(inside / "best")
    for name in ("link", "folder/b", "missing", "best"):
        with pytest.raises(ConfigError, match="is missing or a link; it is not published"):
            shared.plain_files(inside, [name])


HOSTILE = [
    'a "b"',
    "back\\slash",
    "two\nlines",
    "colon: value",
    "tab\t",
    "ümläut ☃",
    "bell \x07",
    "\u202e",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_quoted_text_comes_back_from_yaml(text: str) -> None:
    line = cards.quoted(text)
    assert "\n" not in line
    assert line.isprintable()
    assert parse_yaml(f"a: {line}\n") == {"a": text}


def test_text_of_a_user_stays_text() -> None:
    assert cards.plain(" a\n<b>  \x1b[1mc ") == "a (b) [1mc"
    assert cards.code("a `b`") == "`a 'b'`"
    assert cards.cell("a|b") == "a\\|b"


def test_a_card_replaces_its_own_kind_alone(tmp_path: Path) -> None:
    """A README.md of somebody else is kept; records that cannot be read are one message."""
    path = cards.write_card(tmp_path, lambda folder: f"{CARD_MARK} {folder.name}")
    assert path.read_text("utf-8") == f"{CARD_MARK} {tmp_path.name}"
    assert cards.write_card(tmp_path, lambda _: f"{CARD_MARK} again") == path

    def damaged(_: Path) -> str:
        raise KeyError("steps")

    with pytest.raises(ConfigError, match=r"holds no finished run .* 'steps'"):
        cards.write_card(tmp_path, damaged)
    assert path.read_text("utf-8") == f"{CARD_MARK} again"
    path.write_text("mine", "utf-8")
    with pytest.raises(ConfigError, match="was not written by dreamrie, so it is kept"):
        cards.write_card(tmp_path, lambda _: CARD_MARK)
    assert path.read_text("utf-8") == "mine"


def test_a_card_that_fails_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: Path) -> Path:
        raise CheckpointError("no space")

    cards.leave_card(tmp_path, full)
    assert "The model card was not written, everything else was: no space" in caplog.text
