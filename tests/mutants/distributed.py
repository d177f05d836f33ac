"""Faults of several processes: sums that are none, work that is lost on the way, decisions that each takes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import dreamrie.loi as loi
from dreamrie import riemannion, riemannion_sharing, team
from dreamrie.team import Team
from dreamrie.trainer import joint, loop
from dreamrie.trainer.control import StopRequest
from tests import test_team as team_laws
from tests.distributed import test_loi as loi_laws
from tests.distributed import test_sharding as sharding_laws
from tests.distributed import test_training as training_laws
from tests.mutants import Law, Mutant, each, replaced


def fault(name: str, law: Law, why: str, impl: Any, place: Any, **wrong: Any) -> Mutant:
    """`impl` with attributes of a place replaced; processes are forked, so they have them too."""

    @contextmanager
    def broken() -> Iterator[Any]:
        with replaced(place, **wrong):
            yield impl

    return Mutant(name, law, broken, why=why)


# ------------------------------------------------------------------------------------------------- the team

_add, _exchange, _share = Team.add_, Team.exchange, Team.share


def add_nothing(self: Team, tensors: Sequence[Tensor]) -> None:
    """Each process keeps its own."""


def add_the_first_bucket(self: Team, tensors: Sequence[Tensor]) -> None:
    _add(self, tensors[:1])


def copy_nothing(self: Team, tensors: Sequence[Tensor]) -> None:
    """Each process keeps its own."""


def share_twice(self: Team, items: Any) -> Any:
    return iter(items)


def exchange_without_order(self: Team, own: Any, wholes: Any, rows: Any) -> list[Tensor]:
    return _exchange(self, own, wholes, rows[::-1] if len(set(map(tuple, rows))) > 1 else rows)


def all_to_the_first(counts: Any, costs: Any, size: int) -> list[list[int]]:
    return [list(counts), *[[0] * len(counts) for _ in range(size - 1)]]


def left_over_is_lost(counts: Any, costs: Any, size: int) -> list[list[int]]:
    return [[count // size for count in counts] for _ in range(size)]


# ------------------------------------------------------------------------------------------------- shared steps

_shared = riemannion_sharing.shared_steps


def momentum_stays(team: Team, batches: Any, step: Any) -> Any:
    """The momentum of a layer that another process stepped is the one before."""
    results = _shared(team, batches, step)
    found = []
    for batch, result in zip(batches, results, strict=True):
        half = len(batch.layers) // 2
        rows = (
            torch.arange(len(batch.layers)) < half
            if team.rank
            else torch.arange(len(batch.layers)) >= half
        )
        old, new = batch.state.m_left, result.state.m_left
        kept = torch.where(rows[:, None, None], old, new)
        found.append(result._replace(state=result.state._replace(m_left=kept)))
    return found


def flags_stay(team: Team, batches: Any, step: Any) -> Any:
    """Every layer counts as sound and moved."""
    return [
        result._replace(ok=torch.ones_like(result.ok), moved=torch.ones_like(result.moved))
        for result in _shared(team, batches, step)
    ]


def each_its_own(team: Team, batches: Any, step: Any) -> Any:
    """The second process takes a step of its own length."""
    found = []
    for result in map(step, batches):
        longer = result.state._replace(s=result.state.s * (1 + 1e-6 * team.rank))
        found.append(result._replace(state=longer))
    return found


# ------------------------------------------------------------------------------------------------- the loop

_mean = joint.joint_mean_


def summed(team: Team, loss: Tensor, parameters: Any) -> Tensor:
    mean = _mean(team, loss, parameters)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(team.size)
    return mean


def own_gradient(team: Team, loss: Tensor, parameters: Any) -> Tensor:
    facts = loss.detach().reshape(1).clone()
    team.add_([facts])
    return facts[0] / team.size


def own_loss(team: Team, loss: Tensor, parameters: Any) -> Tensor:
    _mean(team, loss, parameters)
    return loss


def dropped_if_missing(team: Team, loss: Tensor, parameters: Any) -> Tensor:
    there = [parameter.grad is not None for parameter in parameters]
    mean = _mean(team, loss, parameters)
    for parameter, own in zip(parameters, there, strict=True):
        parameter.grad = parameter.grad if own else None
    return mean


def only_the_first_is_asked(self: StopRequest) -> bool:
    return self._team.total(int(self.asked and self._team.rank == 0)) > 0


both_tasks = each(training_laws.law_dd1_two_processes_are_one, ["texts"])

MUTANTS = [
    fault(
        "each process keeps its own sum", team_laws.law_tm1_all_get_the_sum_and_the_first,
        "nothing would be learned from the other processes", team, Team, add_=add_nothing,
    ),
    fault(
        "only the first tensor summed", team_laws.law_tm1_all_get_the_sum_and_the_first,
        "the layers behind it would learn from one process", team, Team, add_=add_the_first_bucket,
    ),
    fault(
        "starts not handed round", team_laws.law_tm1_all_get_the_sum_and_the_first,
        "devices that round differently would train different adapters", team, Team, copy_first_=copy_nothing,
    ),
    fault(
        "every process takes every item", team_laws.law_tm1_all_get_the_sum_and_the_first,
        "no work would be saved", team, Team, share=share_twice,
    ),
    fault(
        "rows in the order of the last process", team_laws.law_tm2_rows_come_together,
        "a layer would get the step of another one", team, Team, exchange=exchange_without_order,
    ),
    fault(
        "one process does everything", team_laws.law_tm3_work_is_divided_evenly,
        "the others wait", team, team, share_rows=all_to_the_first,
    ),
    fault(
        "what cannot be divided is left out", team_laws.law_tm3_work_is_divided_evenly,
        "the last layers would never be stepped", team, team, share_rows=left_over_is_lost,
    ),
    fault(
        "the momentum is not exchanged", sharding_laws.law_sh1_shared_steps_are_the_steps,
        "the next step, or the checkpoint, has the momentum of an earlier one",
        riemannion, riemannion, shared_steps=momentum_stays,
    ),
    fault(
        "a skipped layer is written", sharding_laws.law_sh1_shared_steps_are_the_steps,
        "a layer whose gradient was not finite, or that nothing acted on, would change",
        riemannion, riemannion, shared_steps=flags_stay,
    ),
    fault(
        "every process computes for itself", sharding_laws.law_sh1_shared_steps_are_the_steps,
        "devices that round differently drift apart", riemannion, riemannion, shared_steps=each_its_own,
    ),
    fault(
        "LOI is not summed over processes", loi_laws.law_lo1_two_processes_see_all_batches,
        "each process starts from its own batches", loi, Team, add_=add_nothing,
    ),
    fault(
        "every process evaluates all batches", loi_laws.law_lo1_two_processes_see_all_batches,
        "LOI takes as long on eight devices as on one", loi, Team, share=share_twice,
    ),
    fault(
        "gradients of the processes summed", both_tasks,
        "the norm that is logged and clipped grows with the number of processes",
        loop, loop, joint_mean_=summed,
    ),
    fault(
        "each process has its own gradient", both_tasks,
        "layers learn from the batch of whoever steps them", loop, loop, joint_mean_=own_gradient,
    ),
    fault(
        "the loss of the first process", both_tasks,
        "the record shows a part of the batch", loop, loop, joint_mean_=own_loss,
    ),
    fault(
        "all processes take the same micro-batch", both_tasks,
        "two processes learn what one would", loop, Team, number=lambda self, index: index,
    ),
    fault(
        "only the first process may stop", training_laws.law_dd2_all_stop_together,
        "a signal that reaches another one is lost, and its second kills the training",
        loop, StopRequest, agreed=only_the_first_is_asked,
    ),
    fault(
        "the first process names its own batch", training_laws.law_dd3_a_bad_batch_is_named_wherever_it_is,
        "the user looks at the wrong pictures", loop, loop, gather_object=lambda things: things,
    ),
    fault(
        "no gradient where the own batch gives none",
        training_laws.law_dd4_a_gradient_that_one_process_lacks_counts_as_zero,
        "the processes step different layers",
        joint, joint, joint_mean_=dropped_if_missing,
    ),
]  # fmt: skip
