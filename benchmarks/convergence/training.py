"""One cell: a training of each concept, all in one stack, scored on the way.

The order of a step is that of the library's trainer: gradients, optimizer, schedule. Nothing is clipped, whatever the
optimizer, and gradients are not searched for numbers that are not finite: a training that breaks draws blank pictures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.convergence.methods import Method, parse_method
from benchmarks.convergence.plan import Budget, Cell, setting_of
from benchmarks.convergence.records import LOSS_UNIT, Scores, as_units
from benchmarks.convergence.scoring import GUIDANCE, Found, Judge
from benchmarks.convergence.stacked import Bank, run_on_graph
from benchmarks.convergence.subjects import HELD_BATCHES, LOI_BATCHES, Rows, Subjects
from dreamrie.errors import NumericalError
from dreamrie.lora import LoraPair
from dreamrie.optimizer_table import OPTIMIZERS
from dreamrie.optimizers import build_optimizer
from dreamrie.trainer.control import schedule_factor

# As the training script: a short warm-up, at most a tenth of the run.
WARMUP_STEPS = 20
_BROKEN = (NumericalError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


class OutOfTimeError(Exception):
    """The deadline passed before the training was finished."""


class Rates:
    """Optimizers of a stack on the schedule of the training script.

    Args:
        optimizers: of all trainings.
        steps: length of the trainings.
        schedule: by its name in the training script.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], steps: int, schedule: str = "cosine"
    ) -> None:
        self._optimizers, self._steps, self._schedule = list(optimizers), steps, schedule
        # Every group keeps its own peak: LoRA+ has two.
        self._peaks = [[group["lr"] for group in one.param_groups] for one in self._optimizers]
        self._broken: set[int] = set()

    def step(self, done: int) -> None:
        """One step of every training that is not broken, after `done` steps."""
        warmup = min(WARMUP_STEPS, self._steps // 10)
        factor = schedule_factor(self._schedule, done, self._steps, warmup)
        for number, (one, peaks) in enumerate(zip(self._optimizers, self._peaks, strict=True)):
            for group, peak in zip(one.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            if number not in self._broken:
                try:
                    one.step()
                except _BROKEN:
                    self._broken.add(number)


class Stack:
    """Trainings of several concepts side by side.

    Args:
        subjects: rows and starts.
        judge: draws and scores.
        budget: of every training.
        graphs: record a step once and repeat it, on a GPU.
    """

    def __init__(self, subjects: Subjects, judge: Judge, budget: Budget, graphs: bool) -> None:
        self._subjects, self._judge, self._budget, self._graphs = subjects, judge, budget, graphs

    def base(self, concept: str) -> list[int]:
        """Scores of the base model, see `records.BASE`."""
        unet = self._subjects.components.unet
        (found,) = self._judge(unet, [concept])
        if found is None:
            raise SystemExit(f"the base model draws blank pictures of {concept}")
        (loss,) = self._losses(unet, [concept])
        scores = (found.image, found.margin, found.text, self._judge.ceiling(concept))
        return [*map(as_units, scores), as_units(loss, LOSS_UNIT)]

    @torch.no_grad()
    def _losses(self, unet: Any, concepts: Sequence[str]) -> list[float]:
        """Held-out loss of every training of a stack."""
        rows = [self._subjects.held(name) for name in concepts]
        device = self._subjects.components.device
        total = torch.zeros(len(rows), device=device)
        for number in range(HELD_BATCHES):
            noisy, target, timesteps, text = (
                torch.cat(part).to(device)
                for part in zip(
                    *(
                        (
                            r.noisy[number],
                            r.target[number],
                            r.timesteps[number],
                            r.text[r.prompts[number]],
                        )
                        for r in rows
                    ),
                    strict=True,
                )
            )
            output = unet(noisy, timesteps, encoder_hidden_states=text).sample
            total += (output - target).square().view(len(rows), -1).mean(1)
        return (total / HELD_BATCHES).tolist()

    def run(self, cell: Cell, concepts: Sequence[str], deadline: float) -> dict[str, Scores]:
        """Train and score.

        Args:
            cell: method, rank, learning rate, seed, setting.
            concepts: one training each.
            deadline: of `time.time`, when to give up.

        Returns:
            Scores by concept, see `records.Scores`.

        Raises:
            OutOfTimeError: the deadline came first.
        """
        method = parse_method(cell.method)
        components = self._subjects.components
        home = components.device if method.is_elementwise else torch.device("cpu")
        runs = [self._pairs(method, cell, concept) for concept in concepts]
        bank = Bank(components.unet, runs, home)
        # Those that never give up step all trainings in one go; numbers are no others for it.
        parts = [[pair for pairs in runs for pair in pairs]] if method.is_elementwise else runs
        steps, marks = self._budget.steps, self._budget.marks
        optimizers = [one for pairs in parts for one in self._optimizers(method, cell, pairs)]
        name, value = setting_of(cell)
        rates = Rates(optimizers, steps, value if name == "schedule" else "cosine")
        guidance = float(value) if name == "guidance" else GUIDANCE
        learn = Learning(bank, [self._subjects.rows(c, cell.seed) for c in concepts], self._graphs)
        found: list[list[Found | None]] = []
        losses: list[list[float]] = []
        for step in range(1, steps + 1):
            learn(step)
            bank.pull()
            rates.step(step - 1)
            bank.push()
            if step == 1:
                bank.check_in_place()
            if step in marks:
                found.append(self._judge(bank.unet, concepts, guidance))
                losses.append(self._losses(bank.unet, concepts))
                bank.unet.train()
            if time.time() > deadline and step < steps:
                raise OutOfTimeError
        del learn, bank
        if components.device.type == "cuda":
            torch.cuda.empty_cache()
        return {
            name: _scores([row[k] for row in found], [row[k] for row in losses])
            for k, name in enumerate(concepts)
        }

    def _pairs(self, method: Method, cell: Cell, concept: str) -> list[LoraPair]:
        """Adapters of one training at their start."""
        name, value = setting_of(cell)
        alpha = method.start_scale(cell.rank, cell.lr)
        return self._subjects.pairs(
            concept,
            cell.seed,
            cell.rank,
            method.init,
            alpha * (float(value) if name == "alpha" else 1.0),
            int(value) if name == "batches" else LOI_BATCHES,
            method.layer,
        )

    @staticmethod
    def _optimizers(method: Method, cell: Cell, pairs: Sequence[LoraPair]) -> list[Optimizer]:
        """One for all layers, or one for each where the learning rate is a matter of the layer."""
        name, value = setting_of(cell)
        parts: list[tuple[Sequence[LoraPair], float]] = [(pairs, 1.0)]
        if name == "match_rms":
            # Entries of a step are of the size 1 / sqrt(m n / 2 r). The mean over the layers stays the learning rate.
            sizes = [(len(pair.left) * pair.right.shape[1]) ** 0.5 for pair in pairs]
            mean = sum(sizes) / len(sizes)
            parts = [([pair], size / mean) for pair, size in zip(pairs, sizes, strict=True)]
        has_momentum = OPTIMIZERS[method.optimizer].momentum is not None
        made = [
            build_optimizer(
                method.optimizer,
                layers,
                lr=cell.lr * factor,
                weight_decay=float(value) if name == "decay" else 0.0,
                momentum=method.momentum if has_momentum else None,
                **({"core_map": method.core_map} if method.core_map else {}),
            )
            for layers, factor in parts
        ]
        if method.momentum is not None and not has_momentum:
            for group in (group for one in made for group in one.param_groups):
                group["betas"] = (method.momentum, group["betas"][1])
        return made


class Learning:
    """Gradients of every training of a stack for one step after the other.

    The loss of a training is the task's: the mean over its rows of the mean squared error of the U-Net.

    Args:
        bank: factors and U-Net.
        rows: of each training.
        graphs: record the step, on a GPU.
    """

    def __init__(self, bank: Bank, rows: Sequence[Rows], graphs: bool) -> None:
        device = bank.values.device
        self._bank, self._batch = bank, rows[0].noisy.shape[1]
        bank.unet.train()
        first = [sum(len(part.text) for part in rows[:run]) for run in range(len(rows))]
        self._text = torch.cat([part.text for part in rows]).to(device)
        numbers = [part.prompts + start for part, start in zip(rows, first, strict=True)]
        # Rows of a step: those of the first training, then those of the second, and so on.
        self._all = [
            torch.cat(parts, dim=1).to(device)
            for parts in (
                [part.noisy for part in rows],
                [part.target for part in rows],
                [part.timesteps for part in rows],
                numbers,
            )
        ]
        self._now = [part[0].clone() for part in self._all]
        self._work = run_on_graph(self._gradients, device, graphs)

    def _gradients(self) -> None:
        noisy, target, timesteps, numbers = self._now
        self._bank.gradients.zero_()
        output = self._bank.unet(noisy, timesteps, encoder_hidden_states=self._text[numbers]).sample
        errors = (output - target).square().flatten(1).mean(1)
        (errors.sum() / self._batch).backward()

    def __call__(self, step: int) -> None:
        """Fill the bank's gradients with those of step 1, 2, ..."""
        for now, every in zip(self._now, self._all, strict=True):
            now.copy_(every[step - 1])
        self._work()


def _scores(found: Sequence[Found | None], losses: Sequence[float]) -> Scores:
    """Scores of one training as they are kept."""
    kept: Scores = []
    for one, loss in zip(found, losses, strict=True):
        kept += [as_units(one.image), as_units(one.margin)] if one else [None, None]
        kept.append(as_units(loss, LOSS_UNIT) if math.isfinite(loss) else None)
    return [*kept, as_units(found[-1].text) if found[-1] else None]
