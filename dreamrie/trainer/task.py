"""What the loop is told: a task, and settings; and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from dreamrie.lora import LoraPair
from dreamrie.run_folder import ADAPTER_FILES
from dreamrie.trainer.scoring import BEST, Verdict


class Task(Protocol):
    """What the loop needs to know of the thing being trained.

    Steps count from 1. Step 0 is "before training": `batch(0, i)` are the batches used by locally
    optimal initialization, `validate(0, ...)` shows the base model.

    A batch is a pure function of (the task's seed, step, micro): no state advances, so a batch can
    be asked for twice and in any order. A task touches no global random state.

    Attributes:
        name: short, for logs: "dreambooth".
        model: the network that carries the adapters (a U-Net, a language model).
        pairs: the adapted layers.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def model(self) -> nn.Module: ...  # noqa: D102

    @property
    def pairs(self) -> Sequence[LoraPair]: ...  # noqa: D102

    def batch(self, step: int, micro: int) -> Any:
        """Micro-batch `micro` (0, 1, ...) of `step`, already on the right device."""
        ...

    def loss(self, batch: Any) -> Tensor:
        """Scalar mean loss of one micro-batch; differentiable; the loop adds autocast around it."""
        ...

    def describe(self, batch: Any) -> str:
        """Name what is in the batch (files, timesteps): for the message about a bad loss."""
        ...

    def validate(self, step: int, directory: Path) -> dict[str, float]:
        """Write samples of the present model under `directory`; return scores, {} if none."""
        ...

    def save(self, directory: Path, metadata: dict[str, str]) -> None:
        """Write the adapter into `directory`, crash-safe; `metadata` joins the file's own."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, how often. The peak of the learning rate is the optimizer's own `lr`.

    Attributes:
        max_steps: optimizer steps.
        accumulation: micro-batches per optimizer step and process.
        scheduler: "constant", "linear" or "cosine"; each after a linear warm-up.
        warmup_steps: optimizer steps of warm-up.
        max_grad_norm: clip the global (Riemannion: tangent) gradient norm to this; None: no clip.
        validation_steps: validate before training, every so many steps and at the end; None: never.
        score_steps: score before training, every so many steps and at the end; None: never.
        spectrum_steps: write the singular values every so many steps; None: never.
        seed: for dropout inside the model; each micro-batch has its own stream.
    """

    max_steps: int
    accumulation: int = 1
    scheduler: str = "cosine"
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    validation_steps: int | None = None
    score_steps: int | None = None
    spectrum_steps: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class TrainResult:
    """How a training ended.

    Attributes:
        steps: steps taken, skipped ones included.
        skipped_steps: steps left out because a loss or gradient was not finite.
        interrupted: a signal asked to stop.
        saved: the adapter was saved; it is not when a signal came before the first finished step.
        last_loss: mean loss of the last step; NaN if there was none.
        seconds: time in training steps, without validation and scoring.
        scoring_seconds: time in scorings.
        verdict: of the last scoring; None without a scorer.
    """

    steps: int
    skipped_steps: int
    interrupted: bool
    saved: bool
    last_loss: float
    seconds: float
    scoring_seconds: float = 0.0
    verdict: Verdict | None = None

    def summary(self, output_dir: Path) -> str:
        """What the run came to, for its end.

        Args:
            output_dir: of the run.

        Returns:
            A line; with scores a second one: which step is in `best/`, why, and what scoring cost.
        """
        lines = [f"{self.steps} steps in {self.seconds:.0f} s; adapter in {output_dir}"]
        if self.verdict is not None:
            best = f"no step could be scored, so there is no {output_dir / BEST}"
            if self.verdict.best_step is not None:
                best = f"{output_dir / BEST} holds step {self.verdict.best_step}: {self.verdict.reason}"
                if not any((output_dir / BEST / name).is_file() for name in ADAPTER_FILES):
                    best = f"step {self.verdict.best_step} is the best, but {output_dir / BEST} could not be kept"
            share = self.scoring_seconds / max(self.seconds, 1e-9)
            lines.append(
                f"{best}; scoring took {self.scoring_seconds:.0f} s, {share:.0%} of the training time"
            )
        return "\n".join(lines)
