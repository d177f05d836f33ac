"""W5: a training is started, watched, stopped and resumed, and all of it is true after a restart of the server."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app import recipe, running, training
from app.asked import Train
from app.jobs import BusyError
from app.running import TrainingError, is_alive, read_record
from app.storage import StorageError
from app.words import BROKEN
from dreamrie.config import make_config, parse_yaml
from tests.app.fake_training import LONG_S, Server, left_behind, server
from tests.app.fake_work import ANNA, BORIS, held
from tests.app.test_drawing import waits_until
from tests.contracts.sources import ROOT

pytestmark = pytest.mark.end_to_end

# ----------------------------------------------------------------------------------------------------- laws


def law_a_stopped_training_goes_on_where_it_stopped(impl: Any, folder: Path) -> None:
    """Waiting, running, stopped with a checkpoint, resumed, finished; its records are those of one without a stop."""
    with server(folder) as one:
        gate = held(one.device, BORIS)
        name = one.ask(ANNA, steps=120)
        state = one.trainings.state(ANNA, name)
        assert (state.status, state.doing) == ("waiting", "waiting, 1 job before it")
        assert (state.title, state.subject, state.prompt) == ("My Dog", "dog", "a sks dog")
        gate.opened.set()
        state = one.until(ANNA, name, "running", step=3)
        assert state.doing.endswith(f"step {state.step} of 120")
        assert state.eta_s is None or state.eta_s == pytest.approx((120 - state.step) / 50)
        assert not state.can_resume
        one.trainings.stop(ANNA, name)
        state = one.until(ANNA, name, "stopped")
        stopped_at = state.step
        assert 0 < stopped_at < 120
        assert (state.can_resume, state.error) == (True, "")
        one.trainings.resume(ANNA, name)
        state = one.until(ANNA, name, "finished")
        assert f"Going on from step {stopped_at}" in training.log_of(
            one.storage.folder(ANNA, "runs", name)
        )
        assert (state.step, state.can_resume, state.error) == (120, False, "")
        assert state.losses == [(step, 1 / step) for step in range(1, 121)]


def law_a_killed_training_can_be_resumed(impl: Any, folder: Path) -> None:
    """kill -9 in the middle: failed in plain words, and it goes on from its last checkpoint."""
    with server(folder) as one:
        name = one.ask(ANNA)
        one.until(ANNA, name, "running", step=25)
        os.kill(read_record(one.storage.folder(ANNA, "runs", name))["pid"], signal.SIGKILL)
        state = one.until(ANNA, name, "failed")
        checkpoint = 20 * (state.step // 20)
        assert state.error == (
            "the training ran out of memory or was killed from outside; it can go on from step "
            f"{checkpoint}."
        )
        assert state.can_resume
        # Another version had another default; a training goes on with the settings that it began with.
        config = one.storage.folder(ANNA, "runs", name) / "config.yaml"
        config.write_text(
            config.read_text("utf-8").replace("momentum: 0.5", "momentum: 0.9"), "utf-8"
        )
        one.trainings.resume(ANNA, name)
        state = one.until(ANNA, name, "finished")
        assert [step for step, _ in state.losses] == list(range(1, 201))
        assert parse_yaml(config.read_text("utf-8"), "")["momentum"] == 0.9


def law_a_training_survives_its_server(impl: Any, folder: Path) -> None:
    """The server killed with -9: the next one shows the training as running, gives it the device, and can stop it."""
    with server(folder) as old:
        held(old.device, BORIS)
        name = old.ask(ANNA, steps=5000)
        run = old.storage.folder(ANNA, "runs", name)
        old.device.close(LONG_S)
        pid = left_behind(folder, run)
        try:
            new = Server(folder / "data")
            try:
                state = new.until(ANNA, name, "running", step=5)
                assert (state.title, state.prompt, state.max_steps) == ("My Dog", "a sks dog", 5000)
                assert [job.status for job in new.device.jobs(ANNA)] == ["running"]
                assert new.trainings.states(BORIS) == []
                with pytest.raises(TrainingError, match="running"):
                    new.trainings.remove(ANNA, name)
                with pytest.raises(TrainingError, match="running already"):
                    new.trainings.resume(ANNA, name)
                new.trainings.stop(ANNA, name)
                state = new.until(ANNA, name, "stopped")
                assert state.can_resume
                assert not is_alive(run)
            finally:
                new.device.close(LONG_S)
        finally:
            running.send(run, signal.SIGKILL)
            assert waits_until(lambda: not is_alive(run), 5), pid


def law_nobody_reaches_anothers_training(impl: Any, folder: Path) -> None:
    """Another owner cannot see, stop, resume or remove a training."""
    with server(folder) as one:
        name = one.ask(ANNA)
        one.until(ANNA, name, "running", step=1)
        assert one.trainings.states(BORIS) == []
        for ask in ("state", "stop", "resume", "remove"):
            with pytest.raises(StorageError):
                getattr(one.trainings, ask)(BORIS, name)
        assert one.trainings.state(ANNA, name).status == "running"
        one.trainings.stop(ANNA, name)
        one.until(ANNA, name, "stopped")


def law_a_deaf_training_is_killed(impl: Any, folder: Path) -> None:
    """One that does not stop when it is told to is killed after a while, and the device is free."""
    with server(folder, kill_after_s=0.5) as one:
        name = one.ask(ANNA, "deaf", steps=300)
        one.until(ANNA, name, "running", step=25)
        one.trainings.stop(ANNA, name)
        assert one.trainings.state(ANNA, name).status == "stopping"
        state = one.until(ANNA, name, "stopped")
        assert state.step < 200
        assert (state.can_resume, state.error) == (True, "")
        assert waits_until(lambda: one.device.running() is None, 5)


LAWS = [
    law_a_stopped_training_goes_on_where_it_stopped,
    law_a_killed_training_can_be_resumed,
    law_a_training_survives_its_server,
    law_nobody_reaches_anothers_training,
    law_a_deaf_training_is_killed,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_trainings_keep_their_laws(law: Callable[[Any, Path], None], tmp_path: Path) -> None:
    """Each law on real processes that train nothing."""
    law(training, tmp_path)


# ---------------------------------------------------------------------------------------------------- tests


def test_a_server_that_ends_in_order_stops_its_training(tmp_path: Path) -> None:
    """It commits a checkpoint; the next server shows it as stopped, with the same history, and can go on."""
    with server(tmp_path) as one:
        name = one.ask(ANNA)
        waiting = one.ask(ANNA)
        one.until(ANNA, name, "running", step=5)
        one.device.close(LONG_S)
        before = one.trainings.states(ANNA)
    with server(tmp_path) as two:
        after = two.trainings.states(ANNA)
        assert after == before
        assert [(state.name, state.status) for state in after] == [
            (waiting, "stopped"),
            (name, "stopped"),
        ]
        assert after[0].error == "it had not begun yet."
        assert [state.can_resume for state in after] == [False, True]
        for each in (name, waiting):
            two.trainings.resume(ANNA, each)
            assert two.until(ANNA, each, "finished").step == 200


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        ("refused", "a.png is no picture; what to do: give another; it can go on from the start."),
        ("broken", f"the training failed: {BROKEN}; it can go on from the start."),
        ("memory", "the training ran out of memory; try a smaller rank"),
    ],
)
def test_a_failure_is_told_in_plain_words(subject: str, words: str, tmp_path: Path) -> None:
    """What the training said, without a path; nothing of an error that nobody foresaw."""
    with server(tmp_path) as one:
        name = one.ask(ANNA, subject)
        state = one.until(ANNA, name, "failed")
        assert state.error.startswith(words)
        assert str(tmp_path) not in repr(state.error)
        assert not state.can_resume


def test_a_start_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    """No photos, photos of another, a full queue."""
    with server(tmp_path) as one:
        empty = one.storage.create(ANNA, "photos", "empty")
        theirs = one.storage.create(BORIS, "photos", "theirs")
        values = {"title": "x", "subject": "dog", "living": True, "steps": 50, "rank": 2}
        for photos in (empty, theirs):
            train = Train(**values, photos=photos, learning_rate=0.02, seed=0)
            with pytest.raises((TrainingError, StorageError)) as caught:
                one.trainings.start(ANNA, train)
            assert str(tmp_path) not in str(caught.value)
        one.device.close(LONG_S)
        with pytest.raises(BusyError):
            one.ask(ANNA)
        assert one.storage.names(ANNA, "runs") == []


def test_only_what_has_ended_is_removed_and_resumed(tmp_path: Path) -> None:
    """A training that waits is stopped at once, begins again, finishes, and can then be removed."""
    with server(tmp_path) as one:
        gate = held(one.device, BORIS)
        name = one.ask(ANNA, steps=20)
        for ask in (one.trainings.remove, one.trainings.resume):
            with pytest.raises(TrainingError, match="waiting"):
                ask(ANNA, name)
        one.trainings.stop(ANNA, name)
        assert one.trainings.state(ANNA, name).status == "stopped"
        one.trainings.stop(ANNA, name)
        config = one.storage.folder(ANNA, "runs", name) / "config.yaml"
        written = config.read_bytes()
        config.write_bytes(b"\xff")
        with pytest.raises(TrainingError, match=f"config.yaml of {name} is damaged"):
            one.trainings.resume(ANNA, name)
        config.write_bytes(written)
        one.trainings.resume(ANNA, name)
        gate.opened.set()
        one.until(ANNA, name, "finished")
        with pytest.raises(TrainingError, match="nothing left to do"):
            one.trainings.resume(ANNA, name)
        one.trainings.remove(ANNA, name)
        assert one.trainings.states(ANNA) == []


def test_a_damaged_record_is_shown_and_can_be_removed(tmp_path: Path) -> None:
    """The rest of the list is not lost with it."""
    with server(tmp_path) as one:
        good = one.ask(ANNA, steps=20)
        bad = one.storage.create(ANNA, "runs", "bad")
        one.storage.file(ANNA, "runs", bad, "app.json").write_text("{")
        one.until(ANNA, good, "finished")
        states = {state.name: state for state in one.trainings.states(ANNA)}
        assert (states[bad].status, states[bad].title) == ("failed", bad)
        assert "damaged" in states[bad].error
        with pytest.raises(TrainingError, match="damaged"):
            one.trainings.resume(ANNA, bad)
        one.trainings.remove(ANNA, bad)
        assert [state.name for state in one.trainings.states(ANNA)] == [good]


def test_photos_that_are_gone_are_told(tmp_path: Path) -> None:
    """A training cannot go on without them."""
    with server(tmp_path) as one:
        name = one.ask(ANNA)
        one.until(ANNA, name, "running", step=1)
        one.trainings.stop(ANNA, name)
        one.until(ANNA, name, "stopped")
        one.storage.remove(ANNA, "photos", one.storage.names(ANNA, "photos")[0])
        with pytest.raises(StorageError):
            one.trainings.resume(ANNA, name)


# --------------------------------------------------------------------------------------------- the settings


def train_of(**changes: Any) -> Train:
    """What a user asks for."""
    values: dict[str, Any] = {
        "title": "x",
        "subject": "pumpkin",
        "living": False,
        "photos": "p",
        "steps": 400,
        "rank": 4,
        "learning_rate": 5e-2,
        "seed": 0,
    }
    return Train(**{**values, **changes})


def settings(train: Train, pictures: int = 5, **where: Any) -> dict[str, Any]:
    """Of a training on the embedded model unless told otherwise."""
    given = {"model": None, "revision": None, "device": "cpu", **where}
    return recipe.settings_of(train, pictures=pictures, **given)


def test_the_embedded_model_is_trained_as_in_the_demo() -> None:
    """What the app sets and the demo sets, they set alike."""
    demo = parse_yaml((ROOT / "examples" / "demo.yaml").read_text("utf-8"))
    made = settings(train_of())
    same = set(demo) & set(made) - {"validation_prompt", "validation_steps", "score_steps"}
    same -= {"spectrum_steps"}
    assert len(same) >= 11
    assert {name: made[name] for name in same} == {name: demo[name] for name in same}
    assert (made["score_steps"], made["validation_steps"]) == (100, 100)
    usual = recipe.usual(embedded=True)
    assert (usual.steps, usual.rank, usual.learning_rate) == (400, 4, 5e-2)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("model", [None, "sd2-base"])
@pytest.mark.parametrize("steps", [10, 600, 5000])
def test_every_recipe_is_a_valid_configuration(
    prior: bool, model: str | None, steps: int, tmp_path: Path
) -> None:
    """Of any base model, with and without class pictures, for one photo as well."""
    device = "cuda:0" if model else "cpu"
    for pictures in (1, 5):
        made = settings(
            train_of(prior=prior, steps=steps, living=True), pictures, model=model, device=device
        )
        config = make_config(recipe.with_folders(made, tmp_path / "photos", tmp_path / "run"))
        assert config.scores.score_steps == (max(50, steps // 4) if pictures > 1 else 0)
        assert config.schedule.mixed_precision == ("bf16" if model else "no")
        assert config.prior.class_data_dir == (tmp_path / "run" / "class" if prior else None)
        if model and pictures > 1:
            assert config.scores.score_prompts == "living"


# ------------------------------------------------------------------------------------------- for real, once


def quick(train: Train, **where: Any) -> dict[str, Any]:
    """A training of seconds: two pictures, no scores, no samples."""
    made = recipe.settings_of(train, **where)
    for name in ("validation_prompt", "num_validation_images", "validation_steps"):
        del made[name]
    return {**made, "score_steps": 0, "train_batch_size": 1, "loi_batches": 2}


@pytest.mark.slow
def test_a_real_training_is_stopped_and_resumed(tmp_path: Path) -> None:
    """The embedded model: SIGTERM commits a checkpoint, the training goes on from it and finishes with an adapter."""
    one = Server(tmp_path / "data", recipe=quick)
    try:
        name = one.ask(ANNA, steps=60)
        state = one.until(ANNA, name, "running", "failed", step=2, seconds=120)
        one.trainings.stop(ANNA, name)
        state = one.until(ANNA, name, "stopped", "failed", "finished", seconds=60)
        assert (state.status, state.can_resume, state.error) == ("stopped", True, "")
        stopped_at = state.step
        assert 2 <= stopped_at < 60
        one.trainings.resume(ANNA, name)
        state = one.until(ANNA, name, "finished", "failed", "stopped", seconds=120)
        assert (state.status, state.error, state.step) == ("finished", "", 60)
        assert [step for step, _ in state.losses] == list(range(1, 61))
        steps, values = state.spectrum
        assert steps == [0, 10, 20, 30, 40, 50, 60]
        assert all(row == sorted(row, reverse=True) for row in values)
        # From no change at all to a learned one.
        assert values[-1][0] > 1000 * values[0][0]
        run = one.storage.folder(ANNA, "runs", name)
        assert (run / "pytorch_lora_weights.safetensors").is_file()
        assert "Going on from step" in training.log_of(run)
    finally:
        one.device.close(LONG_S)
