"""torch.compile for the network of a task, with what it gains measured first.

Only `task.loss` goes through compiled code. The module itself stays as it is: starts, samples, scores and files see no
difference, and no name of a weight changes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from dreamrie.errors import ConfigError
from dreamrie.trainer.control import own_random_stream
from dreamrie.trainer.task import Task

logger = logging.getLogger(__name__)

# Passes of which the fastest counts: the first ones choose kernels and allocate.
ROUNDS = 5


class CompilableTask(Task, Protocol):
    """What compiling needs to know of a task, beside what the loop does.

    Attributes:
        network: what `loss` calls; the model, until it is replaced here.
    """

    network: Any

    def trial_batches(self) -> Sequence[Any]:
        """Batches of every shape that training comes with, always the same ones in the same order."""
        ...


@dataclass(frozen=True)
class Gain:
    """Seconds of a forward and backward pass of one micro-batch, and of compiling.

    Attributes:
        plain: of the pass without torch.compile.
        compiled: of the pass with it.
        compiling: spent once.
    """

    plain: float
    compiled: float
    compiling: float

    def pays_after(self, micros: int) -> int | None:
        """Steps after which the passes saved what compiling took.

        Args:
            micros: passes of a step.

        Returns:
            That number of steps; None: no number is enough.
        """
        saved = micros * (self.plain - self.compiled)
        return math.ceil(self.compiling / saved) if saved > 0 else None

    def describe(self, steps: int, micros: int) -> tuple[str, bool]:
        """The gain in words.

        Args:
            steps: that are to be taken.
            micros: passes of a step.

        Returns:
            One line, and whether the training as a whole becomes shorter.
        """
        before, after = (1e3 * micros * seconds for seconds in (self.plain, self.compiled))
        facts = (
            f"torch.compile took {self.compiling:.1f} s; forward and backward passes of a step take {after:.1f} ms, "
            f"without it {before:.1f} ms"
        )
        needed = self.pays_after(micros)
        if needed is None:
            return f"{facts}: no gain here, leave --torch_compile out", False
        if needed > steps:
            few = f"it would pay after {needed} steps, and {steps} are to be taken"
            return f"{facts}: {few}, so leave --torch_compile out", False
        saved = steps * micros * (self.plain - self.compiled) - self.compiling
        return f"{facts}: it pays after {needed} of {steps} steps, {saved:.0f} s in all", True


def compile_network(
    task: CompilableTask,
    accelerator: Accelerator,
    *,
    steps: int,
    micros: int = 1,
    backend: str = "inductor",
) -> Gain | None:
    """Let the loss of a task go through torch.compile, and say what that gains.

    A few passes are made over one batch; no random stream, gradient, weight or mode of the model is another one
    afterwards. The compiled code stays in use whatever the clock says, so that two runs with the same settings compute
    the same numbers. It is made from batches that are the same for a run that goes on as for one that begins.

    Args:
        task: ready to train, its adapter at its start.
        accelerator: of the training.
        steps: optimizer steps that are to be taken.
        micros: micro-batches in each of them.
        backend: of torch.compile.

    Returns:
        What was measured; it is logged, too. None: there is no step to take, and nothing is compiled.

    Raises:
        ConfigError: this machine cannot compile.
    """
    if not steps:
        return None
    batch, shapes = task.batch(1, 0), list(task.trial_batches())
    # Programs of earlier trainings in this process would count against the number that torch allows for one network.
    torch.compiler.reset()
    logger.info("torch.compile: this takes a minute or several ...")
    with _without_trace(task, accelerator):
        plain = min(_pass_seconds(task, accelerator, batch) for _ in range(ROUNDS))
        # One shape gets code of its own; several share code for all sizes.
        task.network = torch.compile(task.model, backend=backend, dynamic=len(shapes) > 1)
        compiling = _compile(task, accelerator, [*shapes, batch])
        compiled = min(_pass_seconds(task, accelerator, batch) for _ in range(ROUNDS))
    gain = Gain(plain, compiled, max(0.0, compiling - (len(shapes) + 1) * compiled))
    text, shorter = gain.describe(steps, micros)
    logger.log(logging.INFO if shorter else logging.WARNING, "%s", text)
    return gain


def _compile(task: CompilableTask, accelerator: Accelerator, batches: Sequence[Any]) -> float:
    """Seconds of the first passes, in which the compiler works; its refusals become messages for people."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError

    try:
        return sum(_pass_seconds(task, accelerator, batch) for batch in batches)
    except (TorchDynamoException, CppCompileError) as error:
        task.network = task.model
        said = str(getattr(error, "inner_exception", error))
        reason = next((line for line in said.splitlines() if line.strip()), "no reason given")
        raise ConfigError(
            f"the network cannot be compiled on this machine: {reason}\n"
            "  where: --torch_compile\n"
            "  what to do: install a C++ compiler such as g++ (for a GPU also Triton, which comes with torch for "
            "Linux), or leave --torch_compile out"
        ) from error


def _pass_seconds(task: CompilableTask, accelerator: Accelerator, batch: Any) -> float:
    """Seconds of one forward and backward pass."""
    _wait(accelerator.device)
    started = time.perf_counter()
    with accelerator.autocast():
        loss = task.loss(batch)
    loss.backward()
    _wait(accelerator.device)
    return time.perf_counter() - started


@contextmanager
def _without_trace(task: CompilableTask, accelerator: Accelerator) -> Iterator[None]:
    """Inside, the model is in the mode it is trained in, and gradients and random numbers are nobody's."""
    from torch.fx.experimental import _config

    shapes: Any = _config
    modes = [(module, module.training) for module in task.model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in task.model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        task.model.train()
        # Two sides that are equal by chance would be one number to the compiler, and the next batch a new program.
        with own_random_stream(accelerator.device, 0), shapes.patch(use_duck_shape=False):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


def _wait(device: torch.device) -> None:
    """Let a GPU finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
