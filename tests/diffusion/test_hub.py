"""Publishing: exactly the listed files go, in one private commit, after all that could fail early was asked."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from dreamrie import __main__ as command
from dreamrie.config import parse_config
from dreamrie.diffusion import hub
from dreamrie.errors import CheckpointError, ConfigError
from dreamrie.publishing import hub as shared
from dreamrie.run_folder import ADAPTER
from tests.diffusion.test_model_card import make_run
from tests.small_settings import NEEDED

SECRET = "hf_" + "x" * 34
NAME = "mary/sks-dog"


class FakeHub:
    """Records what it is asked; fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails = fails

    def _asked(self, name: str, value: Any) -> None:
        self.calls.append((name, value))
        if self.fails == name:
            raise OSError(f"403 for {SECRET} at the gate")

    def whoami(self) -> dict[str, str]:
        self._asked("whoami", None)
        return {"name": "mary"}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self._asked("create_repo", (repo_id, options))
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str) -> None:
        files = {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}
        self._asked("create_commit", (repo_id, files))


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token, and no word about being offline."""
    monkeypatch.setattr(shared, "get_token", lambda: SECRET)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def finished(folder: Path) -> Path:
    """A scored run, with everything in its folder that must not leave it."""
    run = make_run(folder, best=20)
    (run / "best" / ADAPTER).write_bytes(b"the best")
    for name in ("photo.jpg", "prompts.txt", "metrics.jsonl", "samples/mine.png", "best/notes.txt"):
        (run / name).write_text("private")
    (run / "checkpoint-20").mkdir()
    (run / "checkpoint-20" / "state.json").write_text("private")
    return run


def law_only_the_listed_files_go(impl: Any, folder: Path) -> None:
    """Card, both adapters and the card's pictures, in one commit; nothing else that lies in the folder."""
    run, fake = finished(folder / "run"), FakeHub()
    impl.push(run, NAME, api=fake)
    repository, files = dict(fake.calls)["create_commit"]
    wanted = {"README.md", ADAPTER, f"best/{ADAPTER}"}
    wanted |= {f"samples/step-000020-{number}.png" for number in range(2)}
    assert (repository, set(files)) == (NAME, wanted)
    assert all(files[name] == (run / name).read_bytes() for name in wanted)
    for name in files["README.md"].decode().split("(samples/")[1:]:
        assert f"samples/{name.split(')')[0]}" in files


def law_a_new_repository_is_private(impl: Any, folder: Path, made: Any = None) -> None:
    """It is made before the one commit, private; one that exists is taken as it is."""
    fake = FakeHub()
    impl.push((made or finished)(folder / "run"), NAME, api=fake)
    assert [name for name, _ in fake.calls] == ["whoami", "create_repo", "create_commit"]
    repository, options = dict(fake.calls)["create_repo"]
    assert repository == NAME
    assert (options["private"], options["exist_ok"]) == (True, True)


def law_a_failed_push_loses_nothing_and_tells_no_token(
    impl: Any, folder: Path, made: Any = None
) -> None:
    """Wherever the Hub fails: the folder is as it was, the message has the command for later and no token."""
    run = (made or finished)(folder / "run")
    impl.push(run, NAME, api=FakeHub())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for where in ("whoami", "create_repo", "create_commit"):
        with pytest.raises(CheckpointError) as caught:
            impl.push(run, NAME, api=FakeHub(where))
        assert f"python -m dreamrie push {run} --hub_model_id {NAME}" in str(caught.value)
        assert "403 for hf_... at the gate" in str(caught.value)
        assert SECRET not in f"{caught.value} {caught.value.__cause__}"
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


LAWS = (
    law_only_the_listed_files_go,
    law_a_new_repository_is_private,
    law_a_failed_push_loses_nothing_and_tells_no_token,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any, tmp_path: Path) -> None:
    law(hub, tmp_path)


def settings(*words: str) -> Any:
    return parse_config([*NEEDED, *words]).output


def test_nothing_is_asked_unless_it_is_wanted(tmp_path: Path) -> None:
    """Off by default, before a training and behind it."""
    fake = FakeHub()
    shared.check_hub(settings(), api=fake)  # type: ignore[arg-type]
    hub.hand_over(make_run(tmp_path), settings(), complete=True)
    assert not fake.calls


def test_a_stopped_run_is_not_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole one is; both have their card."""
    pushed: list[Any] = []
    monkeypatch.setattr(hub, "push", lambda *given: pushed.append(given))
    run, output = make_run(tmp_path), settings("--push_to_hub", "--hub_model_id", NAME)
    with caplog.at_level(logging.WARNING):
        hub.hand_over(run, output, complete=False)
    assert not pushed
    assert "nothing was pushed" in caplog.text
    assert (run / "README.md").is_file()
    hub.hand_over(run, output, complete=True)
    assert pushed == [(run, NAME)]


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A picture that is a link could be a photo."""
    run, fake = finished(tmp_path / "run"), FakeHub()
    picture = run / "samples" / "step-000020-1.png"
    picture.unlink()
    picture.symlink_to(run / "photo.jpg")
    with pytest.raises(ConfigError, match=r"step-000020-1\.png is missing or a link"):
        hub.push(run, NAME, api=fake)  # type: ignore[arg-type]
    assert [name for name, _ in fake.calls] == ["whoami"]


def test_a_folder_in_the_header_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The adapter's header names the base model as it was given."""
    with caplog.at_level(logging.WARNING):
        hub.push(make_run(tmp_path / "a"), NAME, api=FakeHub())  # type: ignore[arg-type]
        assert "names a folder" not in caplog.text
        run = make_run(tmp_path / "b", "/models/mine")
        hub.push(run, NAME, api=FakeHub())  # type: ignore[arg-type]
    assert "names a folder of this machine: /models/mine" in caplog.text


def test_the_command_pushes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeHub()
    monkeypatch.setattr(shared, "HfApi", lambda: fake)
    words = ["push", str(finished(tmp_path / "run")), "--hub_model_id", NAME]
    assert command.main(words) == 0
    assert "pushed to" in capsys.readouterr().out
    assert len(fake.calls) == 3
    fake.fails = "create_commit"
    assert command.main(words) == 1
    assert command.main(["push", str(tmp_path), "--hub_model_id", NAME]) == 2
