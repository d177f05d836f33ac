"""Wrong checkpoints: something not restored, something repeated, a file that is half there, damage not seen."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dreamrie import checkpoint, runlog
from dreamrie.errors import CheckpointError
from dreamrie.records import Record
from dreamrie.trainer import loop, saving
from dreamrie.trainer.saving import Progress, Saver
from tests import test_checkpoint as files
from tests import test_checkpoint_crashes as crashes
from tests import test_records as lines
from tests.mutants import Law, Mutant, replaced
from tests.properties import test_resume_laws as laws
from tests.small_states import state_of

_Loop = loop._Loop
_begin, _rate, _after, _restore = (
    _Loop.begin,
    _Loop.set_learning_rate,
    _Loop.after_step,
    Saver.restore,
)
_score, _look = _Loop.score, _Loop.look
_flatten, _unflatten, _list = (
    checkpoint._flatten,
    checkpoint._unflatten,
    checkpoint.list_checkpoints,
)


@contextmanager
def in_loop(owner: Any, **wrong: Any) -> Iterator[Any]:
    """Yield the module of the loop while something behind it is wrong."""
    with replaced(owner, **wrong):
        yield loop


@contextmanager
def in_files(owner: Any = checkpoint, **wrong: Any) -> Iterator[Any]:
    """Yield the module of checkpoints with wrong functions."""
    with replaced(owner, **wrong):
        yield checkpoint


@contextmanager
def in_saving(**wrong: Any) -> Iterator[Any]:
    """Yield the module of the saver with wrong methods of it."""
    with replaced(Saver, **wrong):
        yield saving


# ---------------------------------------------------------------------------- what is restored


def optimizer_not_restored(self: Any, found: Any) -> Any:
    fresh = copy.deepcopy(self.optimizer.state_dict())
    result = _restore(self, found)
    self.optimizer.load_state_dict(fresh)
    return result


def momentum_not_restored(self: Any, found: Any) -> Any:
    result = _restore(self, found)
    for entry in self.optimizer.state.values():
        entry["momentum"].zero_()
    return result


def adapter_not_restored(self: Any, found: Any) -> Any:
    before = [p.detach().clone() for pair in self.task.pairs for p in (pair.left, pair.right)]
    result = _restore(self, found)
    parameters = [p for pair in self.task.pairs for p in (pair.left, pair.right)]
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return result


def loss_scale_not_restored(self: Any, found: Any) -> Any:
    scaler = self.accelerator.scaler
    self.accelerator.scaler = None
    try:
        return _restore(self, found)
    finally:
        self.accelerator.scaler = scaler


def scorer_not_restored(self: Any, found: Any) -> Any:
    result = _restore(self, found)
    if self.scorer is not None:
        self.scorer.restore("[]")
    return result


def counters_not_restored(self: Any, found: Any) -> Any:
    progress, verdict = _restore(self, found)
    return Progress(step=progress.step), verdict


def verdict_not_restored(self: Any, found: Any) -> Any:
    return _restore(self, found)[0], None


def last_step_repeated(self: Any) -> int:
    return max(_begin(self) - 1, 0)


def one_step_left_out(self: Any) -> int:
    first = _begin(self)
    return first + 1 if first else 0


def remember_start(self: Any) -> int:
    first = _begin(self)
    self.offset = max(first - 1, 0)
    return first


def schedule_from_here(self: Any, done: int) -> None:
    _rate(self, max(done - getattr(self, "offset", 0), 0))


def written_before_the_scores(self: Any, step: int, stop: Any) -> None:
    held: list[int] = []
    with replaced(_Loop, score=lambda loop, step: held.append(step)):
        _after(self, step, stop)
    for each in held:
        _score(self, each)


def forgets_what_it_owes(self: Any, step: int, stop: Any) -> None:
    _look(self, step, stop)
    self.progress.owes_look = False


class Forgetful(Record):
    """What the disk refuses is gone."""

    def _flush(self) -> None:
        super()._flush()
        self._waiting = b""


class Uncut(Record):
    """Cut to the byte, not to the line."""

    def _cut(self, length: int) -> int:
        return min(length, self.path.stat().st_size)


def record_not_cut(path: Path, length: int | None = None) -> Record:
    return Record(path, None if length is None else path.stat().st_size)


def record_begun_anew(path: Path, length: int | None = None) -> Record:
    return Record(path, None)


# ------------------------------------------------------------------------------------- codec


def tuples_as_lists(tree: Any, name: str, tensors: Any) -> Any:
    return _flatten(list(tree) if isinstance(tree, tuple) else tree, name, tensors)


def keys_as_texts(tree: Any, name: str, tensors: Any) -> Any:
    if isinstance(tree, Mapping):
        tree = {str(key): value for key, value in tree.items()}
    return _flatten(tree, name, tensors)


def all_in_fp32(tree: Any, name: str, tensors: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        tree = tree.float()
    return _flatten(tree, name, tensors)


# ------------------------------------------------------------------------------------- disk


def in_place(path: Path, contents: Mapping[str, bytes]) -> None:
    path.mkdir(exist_ok=True)
    for name, content in contents.items():
        with (path / name).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())


def renamed_first(path: Path, contents: Mapping[str, bytes]) -> None:
    temporary = path.with_name(".early")
    temporary.mkdir()
    os.replace(temporary, path)
    in_place(path, contents)


def removed_in_place(run: Path, step: int, limit: int | None) -> None:
    for path in _list(run)[: -(limit or 1)]:
        for file in sorted(path.iterdir()):
            os.replace(file, file.with_name("gone"))
            (file.with_name("gone")).unlink()
        shutil.rmtree(path)


def deleted_before_the_commit(folder: Path) -> None:
    for path in _list(folder):
        shutil.rmtree(path)
    checkpoint.write_checkpoint(folder, 40, state_of(40))


@contextmanager
def crashing(owner: Any = checkpoint, **wrong: Any) -> Iterator[Any]:
    """Yield what the law of crashes calls, with a wrong writer behind it."""
    with (
        replaced(owner, **wrong),
        replaced(crashes, remove_old_checkpoints=checkpoint.remove_old_checkpoints),
    ):
        yield crashes


def size_alone(path: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    content = (path / name).read_bytes()
    if len(content) != entry["bytes"]:
        raise ValueError("size")
    return content


def hash_of_tensors_alone(path: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    return (path / name).read_bytes() if name == checkpoint.STATE else _checked(path, name, entry)


_checked, _read = checkpoint._checked, checkpoint._read


def any_step(path: Path) -> checkpoint.Checkpoint:
    manifest = json.loads((path / checkpoint.MANIFEST).read_bytes())
    plain = json.loads((path / checkpoint.STATE).read_bytes())
    manifest["step"] = plain["step"]
    whole = {checkpoint.MANIFEST: json.dumps(manifest).encode()}
    (path / checkpoint.MANIFEST).write_bytes(whole[checkpoint.MANIFEST])
    return _read(path)


def by_name(run: Path) -> list[Path]:
    return sorted(_list(run), key=lambda path: path.name)


def by_time(run: Path) -> list[Path]:
    return sorted(_list(run), key=lambda path: path.stat().st_mtime_ns)


def _resume(name: str, owner: Any, why: str, **wrong: Any) -> Mutant:
    broken = functools.partial(in_loop, owner, **wrong)
    return Mutant(name, laws.law_c1_straight_equals_resumed, broken, why)


def _file(name: str, law: Law, why: str, **wrong: Any) -> Mutant:
    return Mutant(name, law, functools.partial(in_files, **wrong), why)


def _crash(name: str, broken: Callable[[], AbstractContextManager[Any]], why: str) -> Mutant:
    law = crashes.law_a_crash_at_any_moment_leaves_a_sound_checkpoint
    return Mutant(name, law, broken, why, raises=(CheckpointError,))


MUTANTS = [
    _resume("resume without optimizer", Saver, "momentum is gone", restore=optimizer_not_restored),
    _resume("resume without momentum", Saver, "it is state too", restore=momentum_not_restored),
    _resume("resume without adapter", Saver, "a silent step 0", restore=adapter_not_restored),
    _resume("resume without scores", Saver, "best/ forgets", restore=scorer_not_restored),
    _resume("resume without counters", Saver, "skips are forgotten", restore=counters_not_restored),
    _resume("resume without verdict", Saver, "the summary has none", restore=verdict_not_restored),
    _resume("resume repeats a step", _Loop, "step k is taken twice", begin=last_step_repeated),
    _resume("resume leaves a step out", _Loop, "step k + 1 is lost", begin=one_step_left_out),
    _resume(
        "resume restarts the schedule",
        _Loop,
        "the rate climbs again",
        begin=remember_start,
        set_learning_rate=schedule_from_here,
    ),
    _resume(
        "checkpoint before the scores",
        _Loop,
        "a scoring is lost",
        after_step=written_before_the_scores,
    ),
    _resume("records not cut", runlog, "steps stand there twice", Record=record_not_cut),
    _resume("records begun anew", runlog, "earlier steps are lost", Record=record_begun_anew),
    _resume(
        "resume with dropout from the global stream",
        loop,
        "what ran before decides",
        own_random_stream=lambda device, seed: nullcontext(),
    ),
    Mutant(
        "a stop forgets the scoring",
        laws.law_c8_a_stop_loses_no_scoring,
        lambda: in_loop(_Loop, look=forgets_what_it_owes),
        "a better step could not be chosen",
    ),
    Mutant(
        "a line lost to a full disk",
        lines.law_no_line_is_lost_to_a_full_disk,
        lambda: nullcontext(SimpleNamespace(Record=Forgetful)),
        "the records have a hole",
    ),
    Mutant(
        "half a line kept",
        lines.law_a_record_is_cut_at_a_whole_line,
        lambda: nullcontext(SimpleNamespace(Record=Uncut)),
        "the line after it cannot be read",
    ),
    Mutant(
        "resume without loss scale",
        laws.law_c1_the_loss_scale_comes_back,
        lambda: in_saving(restore=loss_scale_not_restored),
        "the first steps after it overflow",
    ),
    Mutant(
        "resume with other pictures",
        laws.law_c7_another_run_is_refused,
        functools.partial(in_loop, Saver, _check_facts=lambda self, found: None),
        "another training goes on as if it were this one",
    ),
    _file("tuples become lists", files.law_a_state_comes_back, "betas", _flatten=tuples_as_lists),
    _file(
        "keys become texts", files.law_a_state_comes_back, "0 is not '0'", _flatten=keys_as_texts
    ),
    _file("all in fp32", files.law_a_state_comes_back, "fp64 is rounded", _flatten=all_in_fp32),
    _file("size checked alone", files.law_c6_damage_is_found, "a flipped bit", _checked=size_alone),
    _file(
        "settings not hashed",
        files.law_c6_damage_is_found,
        "an edit",
        _checked=hash_of_tensors_alone,
    ),
    _file("step not compared", files.law_c6_damage_is_found, "a copied manifest", _read=any_step),
    _file(
        "latest by name",
        files.law_c6_steps_are_ordered_as_numbers,
        "90 > 1000",
        list_checkpoints=by_name,
    ),
    _file(
        "latest by time",
        files.law_c6_steps_are_ordered_as_numbers,
        "copies",
        list_checkpoints=by_time,
    ),
    _crash(
        "checkpoint written in place",
        functools.partial(crashing, commit_folder=in_place),
        "half a checkpoint looks like one",
    ),
    _crash(
        "renamed before it is written",
        functools.partial(crashing, commit_folder=renamed_first),
        "the name is there before the bytes",
    ),
    _crash(
        "old one removed in place",
        functools.partial(crashing, remove_old_checkpoints=removed_in_place),
        "half a removal looks like a damaged checkpoint",
    ),
    Mutant(
        "a replaced checkpoint not put back",
        crashes.law_a_crash_while_replacing_leaves_one_of_the_two,
        functools.partial(crashing, _put_back=lambda run: None),
        "for a moment neither the old nor the new one has its name",
        raises=(CheckpointError,),
    ),
    _crash(
        "deleted before the commit",
        lambda: nullcontext(SimpleNamespace(save_and_prune=deleted_before_the_commit)),
        "for a moment there is none",
    ),
]
