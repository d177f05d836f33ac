"""Rules and defaults of the training method, the same whatever is trained; and the groups of a configuration."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from dreamrie.config.schema import (
    Group,
    OptimizerSettings,
    RecordSettings,
    ScheduleSettings,
    StartSettings,
)
from dreamrie.init_table import INITS
from dreamrie.optimizer_table import OPTIMIZERS

# These do nothing without the start called loi, so giving one alone is a mistake.
LOI_ONLY = ("loi_estimator", "orthogonal_to")
# Starts of a size that can be chosen.
SCALED = ("loi", "orthonormal")


def groups_of(kind: type[BaseModel]) -> dict[str, type[Group]]:
    """The groups of a configuration.

    Args:
        kind: its class, whose fields are all groups.

    Returns:
        Class of each group by its name, in the order of --help and config.yaml.
    """
    found: dict[str, Any] = {name: field.annotation for name, field in kind.model_fields.items()}
    return found


def usual_init(optimizer: str) -> str:
    """Start that goes with an optimizer; PEFT's default one and a factor-wise optimizer are the usual LoRA."""
    return "loi" if OPTIMIZERS[optimizer].needs_rank else "default"


def check_method(adapter: StartSettings, optimizer: OptimizerSettings) -> None:
    """Refuse what is fine alone but not together; the first word of a message is the setting.

    Args:
        adapter: its start.
        optimizer: which one, and how.

    Raises:
        ValueError: a start that the optimizer cannot leave, or a setting that belongs to another choice.
    """
    name, init = optimizer.optimizer, adapter.init or usual_init(optimizer.optimizer)
    entry = OPTIMIZERS[name]
    if entry.needs_rank and not adapter.is_anchored:
        raise ValueError(
            f"init {adapter.init!r} starts from a change of rank 0, which is not a point of "
            f"the manifold that {name} moves on; use --init loi (or orthonormal, pissa), "
            "or --optimizer adamw"
        )
    if entry.anchor == "refused" and adapter.init is not None and adapter.is_anchored:
        raise ValueError(
            f"init {adapter.init!r} keeps a frozen copy of the start, and {name} cannot leave it alone; use --init "
            "default, or another --optimizer"
        )
    if adapter.start_scale == 0:
        raise ValueError("start_scale must not be 0: a change of rank 0 is not on the manifold")
    if adapter.start_scale is not None and init not in SCALED:
        raise ValueError(
            f"start_scale is a setting of the starts {' and '.join(SCALED)}, not of init {init}; leave it out, "
            "or add --init loi"
        )
    if adapter.start_scale is not None and init == "orthonormal" and adapter.start_scale < 0:
        raise ValueError(
            f"start_scale {adapter.start_scale:g} is negative, which only loi can be; give a positive number"
        )
    if optimizer.momentum is not None and entry.momentum is None:
        raise ValueError(
            f"momentum is not a setting of {name}; leave it out, or use --optimizer riemannion"
        )
    if adapter.use_rslora and entry.gauge_invariant:
        raise ValueError(
            f"use_rslora does nothing with {name}, whose steps are those of the product, however it is scaled; leave "
            "it out, or use --optimizer adamw"
        )
    if adapter.use_dora:
        _check_dora(name, init)
    for option in ("core_map", "bias_correction"):
        owners = [key for key, other in OPTIMIZERS.items() if option in other.options]
        if getattr(optimizer, option) is not None and name not in owners:
            raise ValueError(
                f"{option} is not a setting of {name}; leave it out, or use --optimizer {owners[0]}"
            )


def _check_dora(optimizer: str, init: str) -> None:
    """Refuse DoRA where its magnitudes cannot be trained, or would not start at the base."""
    able = [key for key, other in OPTIMIZERS.items() if not other.no_dora]
    if optimizer not in able:
        raise ValueError(
            f"use_dora does not go with {optimizer}, because {OPTIMIZERS[optimizer].no_dora}; leave it out, or use "
            f"--optimizer {able[0]} ({', '.join(able[1:])})"
        )
    if INITS[init].anchored:
        raise ValueError(
            f"use_dora takes starts whose product is zero, and init {init!r} is a point with a frozen copy; use --init "
            "default (gaussian, orthogonal), or leave use_dora out"
        )


def check_warmup(schedule: ScheduleSettings) -> None:
    """Refuse a warm-up that is longer than the run.

    Args:
        schedule: length and warm-up.

    Raises:
        ValueError: it is longer.
    """
    warmup, steps = schedule.lr_warmup_steps, schedule.max_train_steps
    if warmup is not None and warmup > steps:
        raise ValueError(
            f"lr_warmup_steps is {warmup}, more than the whole run (max_train_steps {steps})"
        )


def idle_method(
    adapter: StartSettings, optimizer: OptimizerSettings, output: RecordSettings
) -> dict[str, str]:
    """Settings of the method that do nothing because of another one.

    Args:
        adapter: its start.
        optimizer: which one.
        output: what is recorded.

    Returns:
        Name to the flag that would change that.
    """
    found: dict[str, str] = {}
    init = adapter.init or usual_init(optimizer.optimizer)
    if init != "loi":
        known = type(adapter).model_fields
        found |= {name: "--init loi" for name in LOI_ONLY if name in known}
    if INITS[init].needs != "batches":
        found["loi_batches"] = "--init loi"
    if output.report_to != "tensorboard":
        found["logging_dir"] = "--report_to tensorboard"
    if not output.checkpointing_steps:
        found["checkpoints_total_limit"] = "--checkpointing_steps"
    return found


def usual_start_scale(name: str, rank: int, rate: float) -> float:
    """Singular values of a start of `SCALED`, if none are given.

    Args:
        name: of the optimizer.
        rank: r.
        rate: peak learning rate.

    Returns:
        0.1 / sqrt(r) where the learning rate is not the size of a step; where it is, a multiple of it that the table
        of optimizers holds (docs/method.md 5.4), and no less than 1e-6, far above what counts as no singular value.
    """
    entry = OPTIMIZERS[name]
    return max(1e-6, entry.start_steps * rate) if entry.bounded_step else 0.1 / rank**0.5


def usual_batches(init: str) -> int | None:
    """Micro-batches that a start looks at, if no number is given.

    Args:
        init: its name.

    Returns:
        8 for loi, whose trainings on the embedded model gain nothing from more (docs/optimizers.md); 32 for the others
        that look at any, for which that was not measured.
    """
    if INITS[init].needs != "batches":
        return None
    return 8 if init == "loi" else 32


def follow_method(
    adapter: StartSettings, optimizer: OptimizerSettings
) -> dict[str, dict[str, object]]:
    """Values of the method that follow from others.

    Args:
        adapter: its start.
        optimizer: which one.

    Returns:
        Name of the group to name of the setting to value, for those that were not given.
    """
    name, rank = optimizer.optimizer, adapter.rank
    init = adapter.init or usual_init(name)
    entry = OPTIMIZERS[name]
    rate = optimizer.learning_rate or entry.learning_rate
    start = usual_start_scale(name, rank, rate)
    return {
        "optimizer": {
            "learning_rate": rate,
            "momentum": entry.momentum,
            "max_grad_norm": entry.max_grad_norm,
        },
        "adapter": {
            "init": init,
            "start_scale": start if init in SCALED else None,
            "loi_batches": usual_batches(init),
        },
    }


def filled(config: Group, follow: dict[str, dict[str, object]]) -> dict[str, Group]:
    """Groups of a configuration with what was left out filled in.

    Args:
        config: as given.
        follow: name of the group to name of the setting to value.

    Returns:
        The changed groups by name.
    """
    changed: dict[str, Group] = {}
    for group, values in follow.items():
        settings: Group = getattr(config, group)
        missing = {key: v for key, v in values.items() if getattr(settings, key) is None}
        changed[group] = settings.model_copy(update=missing)
    return changed


def start_facts(adapter: StartSettings) -> str:
    """The kind of start, for the header of an adapter.

    Args:
        adapter: resolved.

    Returns:
        Its name, with what it was estimated from and its size.
    """
    start = str(adapter.init)
    if adapter.init == "loi":
        start += f", {adapter.loi_estimator} of {adapter.batches} batches"
    elif INITS[start].needs == "batches":
        start += f" of {adapter.batches} batches"
    if adapter.start_scale is not None:
        start += f", singular values {adapter.start_scale:g}"
    return f"{start}, DoRA" if adapter.use_dora else start
