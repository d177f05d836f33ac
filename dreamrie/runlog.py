"""What a run leaves behind: metrics, spectra, a progress line, and a manifest to repeat it.

    metrics.jsonl    one JSON object a line: a training step, or scores
    spectrum.jsonl   singular values of every adapted layer, every few steps
    config.yaml      the resolved settings; itself a valid --config
    run.json         exact command, seeds, versions; one entry more each time that the run goes on from a checkpoint
    previous-1/ ...  the same files of an older run in the same folder

JSON has no NaN: a number that is not finite is written as null, and the record says why the step was skipped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dreamrie import __version__
from dreamrie.checkpoint import sweep
from dreamrie.errors import CheckpointError, ConfigError, DreamrieError, NumericalError
from dreamrie.records import Record
from dreamrie.run_folder import (
    check_output_dir,
    lock_folder,
    move_older_run,
    sweep_files,
    write_atomic,
)

logger = logging.getLogger(__name__)

RECORDED_PACKAGES = (
    *("torch", "diffusers", "transformers", "peft"),
    *("accelerate", "safetensors", "numpy", "pillow"),
)
METRICS, SPECTRUM, MANIFEST = "metrics.jsonl", "spectrum.jsonl", "run.json"
# tqdm's own rate turns into s/step when a step takes longer than a second; ours does not.
BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, ETA {remaining}{postfix}]"


def start_logging(verbose: bool) -> None:
    """Set up a command: messages on standard error, a crash in one line unless `verbose`.

    Of several processes that torchrun or accelerate has launched, only the first one reports; the others say what
    goes wrong.

    Args:
        verbose: show debug messages, and where a crash happened.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    level = logging.DEBUG if verbose else logging.INFO
    if os.environ.get("RANK", "0") != "0":
        level = logging.ERROR
    logging.getLogger("dreamrie").setLevel(level)
    sys.excepthook = sys.__excepthook__ if verbose else _short_crash


def exit_code(error: DreamrieError | KeyboardInterrupt, verbose: bool = False) -> int:
    """Say why a command ends and choose its exit code.

    Args:
        error: what ended it.
        verbose: also show where it was raised.

    Returns:
        2: something given cannot work; 1: it failed on the way; 130: stopped by Ctrl-C.
    """
    if isinstance(error, KeyboardInterrupt):
        logger.error("stopped at once; what was saved before is intact")
        return 130
    logger.error("error: %s", error, exc_info=error if verbose else None)
    return 1 if isinstance(error, NumericalError | CheckpointError) else 2


def _short_crash(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What a user sees of an error that nobody foresaw."""
    sys.stderr.write(
        f"error: unexpected {kind.__name__}: {error}\n  run again with -v to see where\n"
    )


def _finite(value: Any) -> Any:
    """The same value with every number that JSON lacks replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def package_versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    versions = {"python": platform.python_version(), "dreamrie": __version__}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def code_version() -> str:
    """Commit of the checkout this module runs from, "+" when it was edited; "" outside of one."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return ""

    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


class RunLog:
    """Writer of one run's records; a context manager, so that the files are closed whatever happens.

    An older run in the folder is moved into a folder of its own, see `folder_for_older_run`; no second run gets the
    folder while this one has it.

    Args:
        output_dir: folder of the run; created if needed. None: write nothing (not the main process, tests).
        total_steps: length of the progress bar.
        quiet: no progress bar; None: none unless standard error is a terminal.
        tensorboard_dir: write TensorBoard events there; None: do not.
        resume: lengths of the records when the checkpoint was written (`positions`), to go on with the run that the
            folder holds: what was recorded later is cut off, because it will be recorded again.

    Raises:
        ConfigError: the folder cannot be created, another run is writing into it, or TensorBoard is asked for but not
            installed.
    """

    def __init__(
        self,
        output_dir: Path | None,
        total_steps: int,
        *,
        quiet: bool | None = None,
        tensorboard_dir: Path | None = None,
        resume: Mapping[str, int] | None = None,
    ) -> None:
        self.output_dir = output_dir
        self._resume = resume
        self._metrics: Record | None = None
        self._spectrum: Record | None = None
        self._board: Any = None
        self._bar: Any = None
        self._redirect, self._in_use = ExitStack(), ExitStack()
        self._total_steps = total_steps
        try:
            if output_dir is not None:
                self._open(output_dir, tensorboard_dir)
        except ConfigError:
            self.close()
            raise
        hidden = not sys.stderr.isatty() if quiet is None else quiet
        self._has_bar = output_dir is not None and not hidden

    def _open(self, folder: Path, tensorboard_dir: Path | None) -> None:
        """Create the folder and the files; a run starts with empty records, or with those of its checkpoint."""
        check_output_dir(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._in_use.enter_context(lock_folder(folder))
            sweep(folder)
            sweep_files(folder)
            if self._resume is None:
                move_older_run(folder)
            lengths = dict.fromkeys((METRICS, SPECTRUM)) if self._resume is None else self._resume
            self._metrics = Record(folder / METRICS, lengths.get(METRICS, 0))
            self._spectrum = Record(folder / SPECTRUM, lengths.get(SPECTRUM, 0))
        except OSError as error:
            raise ConfigError(
                f"the output folder cannot be used: {error}\n"
                f"  where: --output_dir {folder}\n"
                "  what to do: name another folder, or free the files in it"
            ) from error
        if tensorboard_dir is not None:
            self._board = _board_class()(str(folder / tensorboard_dir))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close everything; may be called twice."""
        for stream in (self._metrics, self._spectrum, self._board, self._bar):
            if stream is not None:
                stream.close()
        self._metrics = self._spectrum = self._board = self._bar = None
        self._has_bar = False
        self._redirect.close()
        self._in_use.close()

    def positions(self) -> dict[str, int]:
        """Lengths of the records in bytes, once they are on the disk."""
        records = [record for record in (self._metrics, self._spectrum) if record is not None]
        return {record.path.name: record.sync() for record in records}

    def manifest(
        self,
        config_yaml: str,
        command: Sequence[str],
        seeds: Mapping[str, int],
        facts: Mapping[str, Any],
    ) -> None:
        """Write config.yaml and run.json.

        Args:
            config_yaml: resolved settings.
            command: arguments of the program as given.
            seeds: by purpose.
            facts: anything else that decides the result, such as the resolved base model.
        """
        if self.output_dir is None:
            return
        record = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join([sys.executable, sys.argv[0], *command]),
            "folder": str(Path.cwd()),
            "seeds": dict(seeds),
            "versions": package_versions(),
            "code": code_version(),
            "platform": platform.platform(),
            **facts,
        }
        if self._resume is not None:
            record = _resumed_record(self.output_dir / MANIFEST, record)
        write_atomic(self.output_dir / "config.yaml", config_yaml.encode())
        text = json.dumps(
            _finite(record), indent=2, ensure_ascii=False, allow_nan=False, default=str
        )
        write_atomic(self.output_dir / MANIFEST, (text + "\n").encode())

    def step(self, record: Mapping[str, Any]) -> None:
        """Record one training step and move the progress bar.

        Args:
            record: has "step", "loss", "lr", "grad_norm", "steps_per_s", "skipped" (reason or None).
        """
        self._write(self._metrics, record)
        numbers = ("loss", "lr", "grad_norm", "steps_per_s")
        self._plot({name: record[name] for name in numbers}, record["step"])
        if self._has_bar:
            self._move_bar(record)

    def _move_bar(self, record: Mapping[str, Any]) -> None:
        """Create the bar at the first step, below what was logged until then; later messages go above it."""
        words = {"loss": f"{record['loss']:.4f}", "lr": f"{record['lr']:.1e}"}
        words["steps/s"] = f"{record['steps_per_s']:.3g}"
        if self._bar is None:
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._redirect.enter_context(logging_redirect_tqdm())
            self._bar = tqdm(
                total=self._total_steps,
                initial=record["step"],
                dynamic_ncols=True,
                smoothing=0.1,
                bar_format=BAR_FORMAT,
                postfix=words,
            )
        else:
            self._bar.set_postfix(words, refresh=False)
            self._bar.update(1)

    def scores(self, step: int, scores: Mapping[str, Any]) -> None:
        """Record the scores of a validation or a scorer."""
        self._write(self._metrics, {"step": step, "scores": dict(scores)})
        means = {name: v[0] if isinstance(v, tuple) else v for name, v in scores.items()}
        self._plot({f"scores/{name}": value for name, value in means.items()}, step)

    def spectrum(self, step: int, **values: Mapping[str, Sequence[float]]) -> None:
        """Record singular values.

        Args:
            step: optimizer steps so far.
            values: kind ("point", "change") to layer name to singular values, largest first.
        """
        self._write(self._spectrum, {"step": step, **values})

    def _write(self, record: Record | None, content: Mapping[str, Any]) -> None:
        """One line."""
        if record is not None:
            record.add(json.dumps(_finite(content), ensure_ascii=False, allow_nan=False))

    def _plot(self, values: Mapping[str, Any], step: int) -> None:
        """Hand finite numbers to TensorBoard."""
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._board.add_scalar(name, value, step)


def _resumed_record(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What is known of a run that goes on: how it began, and every time it went on."""
    try:
        first = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return record  # lost or damaged, which is no reason not to go on
    again = {key: record[key] for key in ("started", "command", "folder", "versions", "code")}
    return {**first, "resumed": [*first.get("resumed", []), again]}


def check_records(tensorboard: bool) -> None:
    """Say before any work whether the records that are asked for can be made.

    Args:
        tensorboard: TensorBoard is wanted.

    Raises:
        ConfigError: it is not installed.
    """
    if tensorboard:
        _board_class()


def _board_class() -> Any:
    """TensorBoard's writer, which is an extra."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "TensorBoard is not installed\n"
            "  where: --report_to tensorboard\n"
            "  what to do: pip install tensorboard, or leave --report_to out; metrics.jsonl has it all"
        ) from error
    return SummaryWriter
