"""FSDP: the frozen base spread over the processes, the adapter whole on each of them.

`accelerate launch` with an FSDP configuration asks for it. The weights are put together block by block for the moment
that they are used in, by torch's `fully_shard`. The adapters stay out of that: Riemannion needs both factors of a
layer, and they are small. Their gradients are averaged by the loop, as without FSDP.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from dreamrie.config.reading import AnyConfig
from dreamrie.errors import ConfigError
from dreamrie.init_table import INITS
from dreamrie.loi.session import is_packed
from dreamrie.lora import lora_pairs
from dreamrie.lora.fingerprint import keep_fingerprints
from dreamrie.trainer.task import Task


def spread_base(accelerator: Accelerator, task: Task, config: AnyConfig) -> None:
    """Spread the base model over the processes, if the launch asks for FSDP; the pairs of the task are read anew.

    Args:
        accelerator: of the training.
        task: with adapters attached; `task.pairs` is a list.
        config: resolved settings.

    Raises:
        ConfigError: FSDP is asked for, and a setting needs the whole model in one process, or cannot share its work
            evenly; or the base is quantized.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    _check(config, accelerator.num_processes)
    # These take seconds to import.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = task.model
    if any(is_packed(parameter) for parameter in model.parameters()):
        raise ConfigError(
            _refusal("the base model is quantized", "load it with --base_precision bf16")
        )
    adapter = {half for pair in task.pairs for half in (pair.left, pair.right)}
    keep_fingerprints(model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    # Blocks inside of blocks first: the outer ones take what is left.
    for module in [m for m in model.modules() if type(m).__name__ in blocks][::-1]:
        fully_shard(module, mesh=mesh, ignored_params=adapter)
    fully_shard(model, mesh=mesh, ignored_params=adapter)
    found = lora_pairs(model, task.pairs[0].adapter_name)
    pairs: Any = task.pairs
    pairs[:] = found


def _check(config: AnyConfig, processes: int) -> None:
    """Every process must ask for the same blocks at the same moments, and none has the whole base."""
    values, adapter = config.loop_values(), config.adapter
    if getattr(config.model, "torch_compile", False):
        raise ConfigError(
            _refusal(
                "torch.compile would meet weights that are put together anew for every step",
                "leave --torch_compile out",
            )
        )
    if adapter.use_dora:
        raise ConfigError(
            _refusal(
                "DoRA needs the rows of whole base weights in every step", "leave --use_dora out"
            )
        )
    if values.get("validation_steps") or values.get("score_steps"):
        raise ConfigError(
            _refusal(
                "samples and scores on the way are made by one process, which has a part of the model",
                "leave validation and scores out, and look at the adapter afterwards",
            )
        )
    name = str(adapter.init)
    if INITS[name].needs != "batches" or config.run.resume_from_checkpoint:
        return
    if name != "loi" or adapter.loi_estimator == "mean_gradient":
        what = f"{name} by mean_gradient" if name == "loi" else name
        raise ConfigError(
            _refusal(
                f"the start {what} needs gradients of whole base weights",
                "give --init loi --loi_estimator sketch, or --init orthonormal",
            )
        )
    if adapter.batches % processes:
        raise ConfigError(
            _refusal(
                f"{adapter.batches} batches cannot be shared evenly by {processes} processes",
                f"make --loi_batches a multiple of {processes}",
            )
        )


def _refusal(what: str, remedy: str) -> str:
    """Message about a setting that does not go with FSDP."""
    return (
        f"{what}\n"
        "  where: FSDP, which spreads the base model over the processes\n"
        f"  what to do: {remedy}; or launch with examples/accelerate/ddp.yaml, where each process has all of it"
    )
