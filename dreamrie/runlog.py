"""What a run leaves behind: metrics, spectra, a progress line, and a manifest to repeat it.

    metrics.jsonl    one JSON object a line: a training step, or scores
    spectrum.jsonl   singular values of every adapted layer, every few steps
    config.yaml      the resolved settings; itself a valid --config
    run.json         exact command, seeds, versions
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
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from dreamrie import __version__, files
from dreamrie.errors import CheckpointError, ConfigError, DreamrieError, NumericalError

logger = logging.getLogger(__name__)

RECORDED_PACKAGES = (
    *("torch", "diffusers", "transformers", "peft"),
    *("accelerate", "safetensors", "numpy", "pillow"),
)
ADAPTER = "pytorch_lora_weights.safetensors"
# What a run writes. The last two mark a folder that holds one, so they are the last to be moved away.
RUN_FILES = (
    *("samples", "scored", "best", "logs"),
    *("scores.jsonl", "scores.png", "metrics.jsonl", "spectrum.jsonl"),
    "config.yaml",
    "run.json",
    ADAPTER,
)
# tqdm's own rate turns into s/step when a step takes longer than a second; ours does not.
BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, ETA {remaining}{postfix}]"


def start_logging(verbose: bool) -> None:
    """Set up a command: messages on standard error, a crash in one line unless `verbose`.

    Args:
        verbose: show debug messages, and where a crash happened.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("dreamrie").setLevel(logging.DEBUG if verbose else logging.INFO)
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
        logger.error("stopped; nothing was saved")
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


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either the old one or the new one, never a part.

    Args:
        path: the file; its folder exists.
        content: all of it.

    Raises:
        CheckpointError: the file cannot be written; nothing is left beside it.
    """
    try:
        files.write_atomic(path, content)
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be written ({len(content)} bytes): {error}\n"
            f"  where: {path}\n"
            "  what to do: check free space and permissions; what was there before is intact"
        ) from error


def check_output_dir(folder: Path, tensorboard: bool = False) -> None:
    """Say before any work whether results could be written; creates nothing.

    Args:
        folder: where the run is to write; it may not exist yet.
        tensorboard: TensorBoard is wanted too.

    Raises:
        ConfigError: it or a folder above it is a file, or it may not be written, or TensorBoard is
            not installed.
    """
    if tensorboard:
        _board_class()
    existing = folder
    try:
        while not (existing.exists() or existing.is_symlink()) and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            reason = "it is a file" if existing == folder else f"{existing} is a file"
        elif not os.access(existing, os.W_OK | os.X_OK):
            reason = f"{existing} is read-only"
        else:
            return
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ConfigError(
        f"the output folder cannot be used: {reason}\n"
        f"  where: --output_dir {folder}\n"
        "  what to do: name a folder that does not exist yet, or one that may be written"
    )


def folder_for_older_run(folder: Path) -> Path | None:
    """Say where the older run of an output folder would go, so that two runs never mix.

    Args:
        folder: output folder; it may not exist yet.

    Returns:
        The first of previous-1, previous-2, ... that is free; None when the folder holds no run.
    """
    if not any((folder / name).exists() for name in RUN_FILES[-2:]):
        return None
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    return folder / f"previous-{number}"


def _move_older_run(folder: Path) -> None:
    """Rename what an older run left, whole and with nothing overwritten."""
    target = folder_for_older_run(folder)
    if target is None:
        return
    target.mkdir()
    for name in RUN_FILES:
        if (folder / name).exists():
            (folder / name).rename(target / name)
    logger.info("%s holds an older run, which was moved to %s", folder, target)


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

    An older run in the folder is moved into a folder of its own, see `folder_for_older_run`.

    Args:
        output_dir: folder of the run; created if needed. None: write nothing (not the main process, tests).
        total_steps: length of the progress bar.
        quiet: no progress bar; None: none unless standard error is a terminal.
        tensorboard_dir: write TensorBoard events there; None: do not.

    Raises:
        ConfigError: the folder cannot be created, or TensorBoard is asked for but not installed.
    """

    def __init__(
        self,
        output_dir: Path | None,
        total_steps: int,
        *,
        quiet: bool | None = None,
        tensorboard_dir: Path | None = None,
    ) -> None:
        self.output_dir = output_dir
        self._metrics: IO[str] | None = None
        self._spectrum: IO[str] | None = None
        self._board: Any = None
        self._bar: Any = None
        self._redirect = ExitStack()
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
        """Create the folder and the files; a run starts with empty records."""
        check_output_dir(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _move_older_run(folder)
            self._metrics = (folder / "metrics.jsonl").open("w", encoding="utf-8")
            self._spectrum = (folder / "spectrum.jsonl").open("w", encoding="utf-8")
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
        write_atomic(self.output_dir / "config.yaml", config_yaml.encode())
        text = json.dumps(
            _finite(record), indent=2, ensure_ascii=False, allow_nan=False, default=str
        )
        write_atomic(self.output_dir / "run.json", (text + "\n").encode())

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

    def _write(self, stream: IO[str] | None, record: Mapping[str, Any]) -> None:
        """One line, at once on its way to the disk; a full disk ends the records, not the training."""
        if stream is None or stream.closed:
            return
        try:
            stream.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
            stream.flush()
        except OSError as error:
            failure = f"{stream.name} takes no more records, training goes on: {error}"
            logger.error(failure)  # noqa: TRY400  one line, as every message
            with suppress(OSError):  # closing writes what is left
                stream.close()

    def _plot(self, values: Mapping[str, Any], step: int) -> None:
        """Hand finite numbers to TensorBoard."""
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._board.add_scalar(name, value, step)


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
