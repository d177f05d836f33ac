"""Scores while training: what a scorer is to the loop, and the folder of the best adapter.

The loop knows a scorer as a callable that it is handed; the networks behind it are not this package's business.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dreamrie.errors import CheckpointError
from dreamrie.run_folder import ADAPTER_FILES, write_atomic

logger = logging.getLogger(__name__)

SCORED, BEST = "scored", "best"


@dataclass(frozen=True)
class Verdict:
    """What a scorer says after a scoring.

    Attributes:
        scores: numbers by name, for the records.
        best_step: step whose adapter is the best so far; None while there is none.
        reason: why that one.
        message: how the training goes, in plain words.
        is_alarm: something goes wrong, and the message says what to do.
    """

    scores: Mapping[str, Any]
    best_step: int | None
    reason: str
    message: str
    is_alarm: bool = False


class Scorer(Protocol):
    """Scores the model as it is at the moment; called with the step, 0 before training.

    It draws from random streams of its own, and leaves no gradient behind.
    """

    def __call__(self, step: int) -> Verdict: ...  # noqa: D102

    def state(self) -> str:
        """All scorings so far, for a checkpoint."""
        ...

    def restore(self, state: str) -> None:
        """Go on as after the scorings of `state`."""
        ...


def scored_folder(output_dir: Path, step: int) -> Path:
    """Folder of the adapter that was scored at a step."""
    return output_dir / SCORED / f"step-{step:06d}"


@dataclass
class BestKeeper:
    """Keeps `best/` equal to the adapter that the scorer prefers.

    Args:
        output_dir: of the run.

    Attributes:
        verdict: the last one; None before the first scoring.
    """

    output_dir: Path
    verdict: Verdict | None = None
    _kept: int | None = field(default=None, init=False)

    def __call__(self, step: int, verdict: Verdict) -> None:
        """Say how it goes; keep the adapter of the best step, and the reason.

        Args:
            step: of the scoring.
            verdict: its outcome.

        Raises:
            CheckpointError: the folder cannot be written; what was there before is intact.
        """
        self.verdict = verdict
        log = logger.warning if verdict.is_alarm else logger.info
        log("Step %d: %s", step, verdict.message)
        self._keep(verdict, step)

    def restore(self, verdict: Verdict | None, scored_until: int) -> None:
        """Go on as after a verdict: make `best/` again from what was scored, whatever it holds now.

        Args:
            verdict: of a checkpoint; None: there was none so far.
            scored_until: step of that scoring.
        """
        self.verdict = verdict
        if verdict is None:
            return
        try:
            self._keep(verdict, scored_until)
        except CheckpointError as error:
            logger.warning("%s; it is made anew when another step is better", error)

    def _keep(self, verdict: Verdict, step: int) -> None:
        """Copy the adapter of the best step, and write down why."""
        if verdict.best_step is None:
            return
        source = scored_folder(self.output_dir, verdict.best_step)
        record = {"step": verdict.best_step, "scored_until": step, "reason": verdict.reason}
        folder = self.output_dir / BEST
        try:
            if self._kept != verdict.best_step:
                names = [name for name in ADAPTER_FILES if (source / name).exists()]
                if not names:
                    raise FileNotFoundError(f"{source} holds no adapter")
                contents = {name: (source / name).read_bytes() for name in names}
                folder.mkdir(exist_ok=True)
                for name, content in contents.items():
                    write_atomic(folder / name, content)
                self._kept = verdict.best_step
            write_atomic(folder / "best.json", (json.dumps(record, indent=2) + "\n").encode())
        except OSError as error:
            raise CheckpointError(
                f"the best adapter cannot be kept in {folder}: {error}"
            ) from error
