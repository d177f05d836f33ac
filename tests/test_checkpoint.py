"""A checkpoint is whole or not there; what is damaged is named and passed over, what is missing is an error."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamrie import checkpoint
from dreamrie.checkpoint import (
    MANIFEST,
    STATE,
    TENSORS,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    remove_old_checkpoints,
    write_checkpoint,
)
from dreamrie.errors import CheckpointError, NumericalError
from tests.small_states import same, state_of

# ------------------------------------------------------------------------------------ contents


def law_a_state_comes_back(impl: Any) -> None:
    """Types, order of keys, and every bit of every tensor, whatever happens to the original afterwards."""
    with tempfile.TemporaryDirectory() as name:
        state = state_of(20)
        impl.write_checkpoint(Path(name), 20, state)
        state["state"][0]["a"].zero_()
        found = impl.read_checkpoint(Path(name) / "checkpoint-20")
        assert found.step == 20
        assert same(found.state, state_of(20))


def test_a_state_comes_back() -> None:
    law_a_state_comes_back(checkpoint)


def test_equal_states_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name, 3, state_of(3))
    for name in (TENSORS, STATE, MANIFEST):
        first, second = (tmp_path / run / "checkpoint-3" / name for run in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor([1.0, float("nan")])])
def test_nothing_that_is_not_finite_is_written(tmp_path: Path, value: Any) -> None:
    """N1: the folder is as before."""
    with pytest.raises(NumericalError, match="not finite"):
        write_checkpoint(tmp_path, 5, {"layer": {"factor": value}})
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_cannot_be_held_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="/groups/0/hook is a function"):
        write_checkpoint(tmp_path, 5, {"groups": [{"hook": lambda: None}]})


# ------------------------------------------------------------------------------------- damage


def truncated(path: Path) -> None:
    content = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(content[: len(content) // 2])


def flipped(path: Path) -> None:
    content = bytearray((path / TENSORS).read_bytes())
    content[-5] ^= 1
    (path / TENSORS).write_bytes(content)


def edited(path: Path) -> None:
    text = (path / STATE).read_text()
    (path / STATE).write_text(text.replace("0.999", "0.998"))


def of_another_step(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"step": 77}))


def of_a_later_format(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "tensors.safetensors has"),
    "a flipped bit": (flipped, "the content of tensors.safetensors has changed"),
    "an edited setting": (edited, "the content of state.json has changed"),
    "short of a file": (lambda path: (path / STATE).unlink(), "No such file"),
    "without manifest": (lambda path: (path / MANIFEST).unlink(), "No such file"),
    "an empty file": (lambda path: (path / TENSORS).write_bytes(b""), "has 0 bytes"),
    "an empty manifest": (lambda path: (path / MANIFEST).write_bytes(b""), "Expecting value"),
    "a manifest of another kind": (lambda path: (path / MANIFEST).write_text("[]"), "list indices"),
    "a huge manifest": (lambda path: (path / MANIFEST).write_text(" " * 20_000), "too long"),
    "another step": (of_another_step, "it is of step 40"),
    "a later format": (of_a_later_format, "its format is 2, this version reads 1"),
    "an empty folder": (lambda path: [file.unlink() for file in path.iterdir()], "No such file"),
    "a folder in its place": (
        lambda path: [(path / STATE).unlink(), (path / STATE).mkdir()],
        "state.json has",
    ),
}


def law_c6_damage_is_found(impl: Any) -> None:
    """Whatever happens to a file of it, a damaged checkpoint is not read."""
    for name, (harm, _) in DAMAGE.items():
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), 40, state_of(40))
            harm(Path(folder) / "checkpoint-40")
            with pytest.raises(CheckpointError):
                impl.read_checkpoint(Path(folder) / "checkpoint-40")
                raise AssertionError(name)


def test_damage_is_found() -> None:
    law_c6_damage_is_found(checkpoint)


@pytest.mark.parametrize("name", DAMAGE)
def test_the_newest_damaged_one_is_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """C6: latest takes the one before, and says so; asked for by name it is an error."""
    for step in (20, 40):
        write_checkpoint(tmp_path, step, state_of(step))
    harm, reason = DAMAGE[name]
    harm(tmp_path / "checkpoint-40")
    found = find_checkpoint(tmp_path, "latest")
    assert found.step == 20
    assert same(found.state, state_of(20))
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert warned[0].startswith("checkpoint-40 is damaged: ")
    assert reason in warned[0]
    with pytest.raises(CheckpointError, match="checkpoint-40 is damaged") as caught:
        find_checkpoint(tmp_path, "checkpoint-40")
    assert len(str(caught.value).splitlines()) == 3


def test_without_a_sound_checkpoint_there_is_an_error_and_no_silent_step_0(tmp_path: Path) -> None:
    for name in ("checkpoint-foo", "checkpoint-1-2", "checkpoint-007", "checkpoint-", "previous-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path / "absent") == []
    with pytest.raises(CheckpointError, match="there is no checkpoint to go on from"):
        find_checkpoint(tmp_path, "latest")
    write_checkpoint(tmp_path, 20, state_of(20))
    truncated(tmp_path / "checkpoint-20")
    with pytest.raises(
        CheckpointError, match="no checkpoint can be read: checkpoint-20 is damaged"
    ):
        find_checkpoint(tmp_path, "latest")
    for name in ("checkpoint-30", "checkpoint-foo", "../checkpoint-20", "", "Latest"):
        with pytest.raises(CheckpointError, match=r"which holds checkpoint-20") as caught:
            find_checkpoint(tmp_path, name)
        assert repr(name) in str(caught.value)


def law_c6_steps_are_ordered_as_numbers(impl: Any) -> None:
    """1000 is later than 90, whatever was written last."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in (1000, 90, 200):
            write_checkpoint(folder, step, state_of(step))
        assert [path.name for path in impl.list_checkpoints(folder)] == [
            "checkpoint-90",
            "checkpoint-200",
            "checkpoint-1000",
        ]
        assert impl.find_checkpoint(folder, "latest").step == 1000
        for name in ("checkpoint-90", "checkpoint-90/", str(folder / "checkpoint-90")):
            assert impl.find_checkpoint(folder, name).step == 90


def test_steps_are_ordered_as_numbers() -> None:
    law_c6_steps_are_ordered_as_numbers(checkpoint)


# ---------------------------------------------------------------------------------- retention


def test_the_oldest_go_first_and_one_always_stays(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, state_of(step))
        remove_old_checkpoints(tmp_path, step, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-30"]
    remove_old_checkpoints(tmp_path, 30, None)
    assert len(list_checkpoints(tmp_path)) == 2
    remove_old_checkpoints(tmp_path, 30, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-30"]


def test_a_run_that_was_set_back_never_loses_what_it_just_wrote(tmp_path: Path) -> None:
    """Checkpoints 80 and 90 are of the same run, later; 20 is the newest of what is being done."""
    for step in (10, 80, 90, 20):
        write_checkpoint(tmp_path, step, state_of(step))
    remove_old_checkpoints(tmp_path, 20, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "checkpoint-20",
        "checkpoint-80",
        "checkpoint-90",
    ]
    write_checkpoint(tmp_path, 80, state_of(81))
    assert same(read_checkpoint(tmp_path / "checkpoint-80").state, state_of(81))
