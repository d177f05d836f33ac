"""The one training loop. It knows what it trains only as a `Task`.

One step, in this order: micro-batches (each loss divided by their number) -> mean over processes -> unscale (fp16) ->
gradient norm -> skip if anything is not finite -> clip -> optimizer step -> schedule -> records. After a step:
spectrum, validation, scores, and last the checkpoint, which holds what all of them left.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from dreamrie.errors import (
    AdapterError,
    CheckpointError,
    DreamrieError,
    ImageError,
    NumericalError,
)
from dreamrie.optimizers.pair_optimizer import PairOptimizer
from dreamrie.riemannion import Riemannion
from dreamrie.runlog import RunLog
from dreamrie.team import Team
from dreamrie.trainer.control import (
    StopRequest,
    derive_seed,
    make_accelerator,
    own_random_stream,
    schedule_factor,
)
from dreamrie.trainer.joint import joint_mean_, share_start_
from dreamrie.trainer.saving import Checkpoints, Progress, Saver
from dreamrie.trainer.scoring import BestKeeper, Scorer, Verdict, scored_folder
from dreamrie.trainer.spectra import as_lists, change_spectra
from dreamrie.trainer.task import LoopSettings, Task, TrainResult

logger = logging.getLogger(__name__)

# Skipped steps in a row before the run is given up. fp16 finds its loss scale by overflowing: from 2^16 down.
MAX_SKIPS, MAX_SKIPS_FP16 = 3, 20


class _Loop:
    """State of one training: the optimizer in its wrapper, counters."""

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        settings: LoopSettings,
        log: RunLog,
        accelerator: Accelerator,
        scorer: Scorer | None,
        checkpoints: Checkpoints | None,
    ) -> None:
        self.task, self.optimizer, self.settings = task, optimizer, settings
        self.log, self.accelerator, self.scorer = log, accelerator, scorer
        self.keeper = BestKeeper(log.output_dir) if scorer and log.output_dir else None
        self.team = Team(accelerator.process_index, accelerator.num_processes)
        if isinstance(optimizer, Riemannion):
            optimizer.share_work(self.team)
        self.stepper = accelerator.prepare_optimizer(optimizer)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Every group keeps its own peak: LoRA+ has two.
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.progress, self.micro_losses, self.saved_step = Progress(), torch.zeros(0), 0
        plan = checkpoints or Checkpoints(every=None)
        self.saver = Saver(task, optimizer, accelerator, log, scorer, plan)
        self.max_skips = MAX_SKIPS if accelerator.scaler is None else MAX_SKIPS_FP16

    def set_learning_rate(self, done: int) -> None:
        """Learning rate that holds after `done` steps; the schedule counts steps, not batches."""
        s = self.settings
        factor = schedule_factor(s.scheduler, done, s.max_steps, s.warmup_steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def accumulate(self, step: int) -> Tensor:
        """Gradients of the mean loss over all micro-batches of all processes; returns that mean."""
        count, losses = self.settings.accumulation, []
        for index in range(count):
            micro = self.team.number(index)  # k on one process are the same as k/2 on two
            batch = self.task.batch(step, micro)
            seed = derive_seed(self.settings.seed, step, micro)
            with own_random_stream(self.accelerator.device, seed), self.accelerator.autocast():
                loss = self.task.loss(batch)
            self.accelerator.backward(loss / count)
            losses.append(loss.detach())
        self.micro_losses = torch.stack(losses)
        return joint_mean_(self.team, self.micro_losses.mean(), self.parameters)

    def gradient_norm(self) -> Tensor:
        """Norm that is logged and clipped: of the tangent gradients, or of all factor gradients.

        With an anchor the factor norm would count the frozen half as well, a factor sqrt(2) at the
        start (docs/method.md 3); the tangent norm has no such part.
        """
        if isinstance(self.optimizer, Riemannion):
            return self.optimizer.tangent_grad_norm(for_step=True)
        if isinstance(self.optimizer, PairOptimizer):
            return torch.as_tensor(self.optimizer.gradient_norm())
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def step(self, step: int) -> None:
        """One optimizer step: accumulate, unscale, check, clip, step, schedule, record."""
        started = time.perf_counter()
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        loss = self.accumulate(step)
        self.accelerator.unscale_gradients(self.stepper)
        norm = self.gradient_norm()
        loss_value, norm_value = float(loss), float(norm)
        skip = None
        broken: list[str] = []
        if not math.isfinite(loss_value):
            skip = "loss"
        elif not math.isfinite(norm_value):
            skip, broken = "gradient", self.layers_without_finite_gradient()
        elif self.settings.max_grad_norm is not None and norm_value > self.settings.max_grad_norm:
            limit = self.settings.max_grad_norm
            nn.utils.clip_grads_with_norm_(self.parameters, limit, norm.to(loss))
        if skip is None:
            self.stepper.step()
        elif self.accelerator.scaler is not None:
            # Nothing but the scale moves, and that only if it was what overflowed.
            self.accelerator.scaler.update()
        self.stepper.zero_grad()
        self.set_learning_rate(step)
        duration = time.perf_counter() - started
        self.progress.step = step
        self.progress.seconds += duration
        self.progress.last_loss = loss_value
        self.log.step(
            {
                "step": step,
                "loss": loss_value,
                "lr": learning_rate,
                "grad_norm": norm_value,
                "steps_per_s": float(f"{1 / duration:.4g}"),
                "skipped": skip,
            }
        )
        facts = f"loss {loss_value}, lr {learning_rate:.3g}, gradient norm {norm_value}"
        if broken:
            facts += f", {len(broken)} of {len(self.task.pairs)} layers, the first is {broken[0]}"
        self.guard(step, skip, facts)

    def layers_without_finite_gradient(self) -> list[str]:
        """Names of the layers to look at, in the order of the model."""
        names = []
        for pair in self.task.pairs:
            gradients = [p.grad for p in pair.parameters if p.grad is not None]
            if not all(bool(gradient.isfinite().all()) for gradient in gradients):
                names.append(pair.name)
        return names

    def guard(self, step: int, skip: str | None, facts: str) -> None:
        """Count a skipped step and say what was in it; give up when it does not stop."""
        progress = self.progress
        if skip is None:
            progress.skips_in_a_row = 0
            return
        progress.skipped += 1
        progress.skips_in_a_row += 1
        # The batches whose own loss is broken, in whatever process; if none is, it may be any of them.
        bad = [i for i, loss in enumerate(self.micro_losses.tolist()) if not math.isfinite(loss)]
        if not self.team.total(len(bad), self.accelerator.device):
            bad = list(range(self.settings.accumulation))
        micros = gather_object([self.team.number(index) for index in bad])
        content = "; ".join(self.task.describe(self.task.batch(step, micro)) for micro in micros)
        facts = f"{facts}, batch: {content}"
        logger.warning("Step %d skipped: %s is not finite (%s)", step, skip, facts)
        if progress.skips_in_a_row >= self.max_skips:
            raise NumericalError(
                f"the {skip} was not finite {progress.skips_in_a_row} times in a row\n"
                f"  where: step {step}, {facts}\n"
                "  what to do: look at the named examples, lower --learning_rate, or use bf16 or "
                "no for --mixed_precision; no adapter was written"
            )

    def validate(self, step: int) -> None:
        """Samples and scores of the present model; a disk that takes no sample does not end a training."""
        if self.log.output_dir is not None:
            folder = self.log.output_dir / "samples"
            scores: dict[str, float] = {}
            if step == 0:
                logger.info("Samples before training, into %s ...", folder)
            try:
                with torch.no_grad():
                    scores = self.task.validate(step, folder)
            except (OSError, ImageError, CheckpointError) as error:
                failure = f"Samples of step {step} could not be written, training goes on: {error}"
                logger.error(failure)  # noqa: TRY400  one line, as every message
            self.task.model.train()
            if scores:
                self.log.scores(step, scores)
        self.accelerator.wait_for_everyone()

    def score(self, step: int) -> None:
        """Score the present model, and keep the adapter that was scored: it may turn out to be the best one."""
        if self.scorer is not None and self.keeper is not None:
            started = time.perf_counter()
            try:
                if step > 0:
                    self.write_adapter(scored_folder(self.keeper.output_dir, step), step)
                with torch.no_grad():
                    verdict = self.scorer(step)
                self.log.scores(step, verdict.scores)
                self.progress.scored_until = step
                self.keeper(step, verdict)
            except (OSError, DreamrieError) as error:
                failure = f"Scores of step {step} could not be made, training goes on: {error}"
                logger.error(failure)  # noqa: TRY400  one line, as every message
            self.task.model.train()
            self.progress.scoring_seconds += time.perf_counter() - started
        self.accelerator.wait_for_everyone()

    def record_spectrum(self, step: int) -> None:
        """Singular values of the change of every layer, and of the moving point if there is one."""
        values = {"change": change_spectra(self.task.pairs)}
        if isinstance(self.optimizer, Riemannion):
            values["point"] = as_lists(self.optimizer.spectra())
        self.log.spectrum(step, **values)

    @property
    def verdict(self) -> Verdict | None:
        """Of the last scoring, if there was one."""
        return self.keeper.verdict if self.keeper else None

    def begin(self) -> int:
        """Put everything into the state of the checkpoint to go on from; returns the first step to take."""
        checkpoint = self.saver.plan.resume
        if checkpoint is None:
            self.saver.check_space()
            return 0
        self.progress, verdict = self.saver.restore(checkpoint)
        self.saved_step = self.progress.step
        if self.keeper is not None:
            self.keeper.restore(verdict, self.progress.scored_until)
        if self.progress.step == self.settings.max_steps and not self.progress.owes_look:
            logger.info("That was the last step: the training is finished already")
        return self.progress.step + 1

    def run(self) -> TrainResult:
        """All steps, then the final save, also when a signal ends it early after at least one step."""
        first, s = self.begin(), self.settings
        share_start_(self.team, self.task.pairs)
        self.task.model.train()
        self.set_learning_rate(self.progress.step)
        with StopRequest(self.team, self.accelerator.device) as stop:
            if self.progress.owes_look:
                self.look(self.progress.step, stop)
                self.write_checkpoint()
            for step in range(first, s.max_steps + 1):
                if stop.agreed():
                    break
                if step > 0:
                    self.step(step)
                self.after_step(step, stop)
            stopped = stop.agreed()
            self.finish(stopped)
        self.accelerator.free_memory()
        progress = self.progress
        return TrainResult(
            progress.step,
            progress.skipped,
            stopped,
            progress.moved,
            progress.last_loss,
            progress.seconds,
            progress.scoring_seconds,
            self.verdict,
        )

    def after_step(self, step: int, stop: StopRequest) -> None:
        """Everything that happens every so many steps, the checkpoint last."""
        last = step == self.settings.max_steps
        # Not because of a stop: a run that goes on later is to have the records of one that never stopped.
        if _is_due(self.settings.spectrum_steps, step, last):
            self.record_spectrum(step)
        self.look(step, stop)
        if self.saver.is_due(step, last) and self.progress.moved:
            self.write_checkpoint()

    def look(self, step: int, stop: StopRequest) -> None:
        """Samples and scores, if they are due; a run that was asked to stop leaves them to the one that goes on."""
        s, last = self.settings, step == self.settings.max_steps
        draws = _is_due(s.validation_steps, step, last)
        # Without a step that moved it, the adapter is that of step 0.
        scores = _is_due(s.score_steps, step, last) and (self.progress.moved or step == 0)
        self.progress.owes_look = (draws or scores) and stop.agreed()
        if self.progress.owes_look:
            return
        if draws:
            self.validate(step)
        if scores:
            self.score(step)

    def write_checkpoint(self) -> None:
        """Everything that the next step depends on."""
        if self.saver.write(self.progress, self.verdict):
            self.saved_step = self.progress.step

    def finish(self, stopped: bool) -> None:
        """Save the adapter, or say why there is none."""
        progress, keeps = self.progress, self.saver.plan.every is not None
        if progress.moved:
            if stopped and keeps and self.saved_step != progress.step:
                self.write_checkpoint()
            self.save(progress.step)
            if stopped and keeps and self.saved_step == progress.step:
                logger.info(
                    "The same command with --resume_from_checkpoint latest goes on from here"
                )
        elif stopped:
            logger.warning("stopped; nothing was saved")
        elif progress.skipped:
            raise NumericalError(
                f"every one of the {progress.step} steps was skipped, so the adapter is unchanged\n"
                "  where: the warnings above name the batches\n"
                "  what to do: look at the named examples, or lower --learning_rate; "
                "no adapter was written"
            )

    def save(self, step: int) -> None:
        """Write the adapter; only the main process does."""
        if self.log.output_dir is not None:
            self.write_adapter(self.log.output_dir, step)
        self.accelerator.wait_for_everyone()

    def write_adapter(self, folder: Path, step: int) -> None:
        """The adapter as it is after a step, into a folder of its own or the run's."""
        facts = {"steps": str(step), "optimizer": type(self.optimizer).__name__.lower()}
        try:
            self.task.save(folder, facts)
        except (AdapterError, OSError) as error:
            # AdapterError alone would say that something given was wrong; the training failed.
            raise CheckpointError(str(error)) from error


def _is_due(every: int | None, step: int, last: bool) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return every is not None and (step % every == 0 or last)


def train(
    task: Task,
    optimizer: Optimizer,
    settings: LoopSettings,
    log: RunLog,
    accelerator: Accelerator | None = None,
    scorer: Scorer | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainResult:
    """Train, validate on the way, save at the end; also after Ctrl-C, which finishes the step.

    A signal before the first finished step saves nothing: the adapter would be empty.

    Args:
        task: what is trained; its model is already on the accelerator's device.
        optimizer: over the task's pairs; its `lr` is the peak of the schedule.
        settings: length, schedule, clipping, intervals.
        log: open; its folder also gets the samples and the adapter. Without a folder (every process
            but the main one) nothing is written.
        accelerator: from `make_accelerator`; None makes one in full precision.
        scorer: asked every `settings.score_steps` steps by the process that has the folder; the adapters it scored
            are kept in `scored/step-NNNNNN/`, the one it prefers in `best/`.
        checkpoints: when to write `checkpoint-N/`, and which one to go on from; `log` must have been opened with its
            `records` then. None: write none.

    Returns:
        What happened.

    Raises:
        NumericalError: loss or gradient was not finite 3 times in a row (20 times under fp16, which finds its
            loss scale by overflowing), or in every step; nothing is saved.
        CheckpointError: the adapter cannot be written at the end, there is no room for two checkpoints at the
            beginning, or the checkpoint to go on from is of another run.
        ConfigError: an unknown schedule.
    """
    own = accelerator or make_accelerator()
    return _Loop(task, optimizer, settings, log, own, scorer, checkpoints).run()
