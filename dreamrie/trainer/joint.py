"""What the loop does together with other processes: one start, one gradient, one decision to stop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dreamrie.errors import ConfigError
from dreamrie.lora import LoraPair
from dreamrie.team import Team

# Devices of two kinds round differently; two seeds, or two sets of batches, differ by more.
_ROUNDING = 1e-3


def share_start_(team: Team, pairs: Sequence[LoraPair]) -> None:
    """Give every process the adapter of the first one, to the byte.

    Args:
        team: the processes of the training; each calls this.
        pairs: of the training.

    Raises:
        ConfigError: the adapters differ by more than rounding: they are starts of different trainings. Raised by every
            process.
    """
    if team.size == 1:
        return
    names = [pair.name for pair in pairs for _ in pair.parameters]
    factors = [part.detach() for pair in pairs for part in pair.parameters]
    own = [factor.clone() for factor in factors]
    team.copy_first_(factors)
    differs = [
        name
        for name, mine, first in zip(names, own, factors, strict=True)
        if float((mine - first).abs().max()) > _ROUNDING * float(first.abs().max())
    ]
    if team.total(len(differs), factors[0].device):
        raise ConfigError(
            f"the {team.size} processes start from different adapters\n"
            f"  where: {differs[0] if differs else 'in another process'}\n"
            "  what to do: give all of them the same seed, the same model and the same data; locally_optimal_init "
            "needs team=Team.here()"
        )


def joint_mean_(team: Team, loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Replace gradients by their mean over the processes.

    A gradient that only some processes have counts as zero in the others; one that none has stays None.

    Args:
        team: the processes of the training; each calls this.
        loss: scalar, of this process.
        parameters: the same on every process.

    Returns:
        Mean of the loss.
    """
    if team.size == 1:
        return loss
    there = [float(parameter.grad is not None) for parameter in parameters]
    facts = torch.cat([loss.detach().reshape(1), loss.new_tensor(there)])
    team.add_([facts])
    gradients = []
    for parameter, count in zip(parameters, facts[1:].tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    team.add_(gradients)
    for gradient in gradients:
        gradient.div_(team.size)
    return facts[0] / team.size
