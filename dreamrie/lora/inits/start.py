"""Write a start by name, and hold it to what every start promises."""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.init_table import INITS, Init
from dreamrie.loi.session import digest, undisturbed
from dreamrie.lora.inits.request import Data, Loi, Request, log
from dreamrie.lora.pairs import LoraPair
from dreamrie.team import ALONE

# A product of factors counts as zero below this share of their sizes; bf16 has 8 bits.
_ZERO = {torch.float64: 1e-12, torch.float32: 1e-5}
_ZERO_HALF = 2e-2


def find_init(name: str) -> Init:
    """The entry of a start.

    Args:
        name: key of `INITS`, or `pissa_niter_<number>`, PEFT's randomized `pissa`.

    Returns:
        The entry.

    Raises:
        ConfigError: the name is unknown.
    """
    known = "pissa" if re.fullmatch(r"pissa_niter_\d+", name) else name
    if known not in INITS:
        raise ConfigError(
            f"init {name!r} is not supported here; allowed: {', '.join(INITS)}, pissa_niter_<number>."
        )
    return INITS[known]


def start_pairs(
    name: str,
    model: nn.Module,
    pairs: Sequence[LoraPair],
    data: Data | None = None,
    *,
    loi: Loi | None = None,
    generator: torch.Generator | None = None,
) -> str:
    """Move attached adapters to a start; the base weights and the function of the model stay as they are.

    Starts that need no batches can be had from `attach_lora` at once. For any of them:

        pairs = attach_lora(model, 4, targets, init=INITS[name].layout)
        start_pairs(name, model, pairs, Data(loss, batches))

    Modes, gradient flags and random streams are as before afterwards. If a check fails, so are the factors.

    Args:
        name: see `dreamrie.init_table.INITS`.
        model: holds the pairs.
        pairs: from `attach_lora`, with an anchor exactly if the start is anchored.
        data: loss and batches, for starts that need them; the same on every process.
        loi: sizes, of `loi` and `orthonormal`.
        generator: source of random numbers; default a new one with seed 0.

    Returns:
        How it went, for a log.

    Raises:
        ConfigError: the name is unknown, the pairs have another layout, or the start cannot be computed here.
        NumericalError: a promise is broken: the base was written, or the function of the model changed.
    """
    entry = find_init(name)
    if not pairs:
        raise ConfigError("there is no LoRA pair to start; see dreamrie.attach_lora.")
    for pair in pairs:
        _check_layout(name, entry, pair)
    random = generator if generator is not None else torch.Generator().manual_seed(0)
    sizes = loi if loi is not None else Loi()
    before = [digest(pair.base_weight) for pair in pairs]
    with undisturbed(model), _put_back_on_error(pairs):
        said = builder(entry)(
            Request(name, model, pairs, random, random.initial_seed() % 2**62, data, sizes)
        )
        team = ALONE if data is None else data.team
        team.copy_first_([part.data for pair in pairs for part in pair.parameters])
        for pair, old in zip(pairs, before, strict=True):
            if digest(pair.base_weight) != old:
                raise NumericalError(
                    f"layer {pair.name!r}: the start {name!r} changed the base weight."
                )
            _check_change(name, pair)
        _check_points(name, entry, pairs, sizes.lr)
    return said if name == "loi" else f"{name}, {said}" if said else name


def builder(entry: Init) -> Callable[[Request], str]:
    """The function that writes a start, loaded at its first use.

    Args:
        entry: of the table.

    Returns:
        The function.
    """
    module, _, function = entry.begin.partition(":")
    found: Callable[[Request], str] = getattr(importlib.import_module(module), function)
    return found


def _check_layout(name: str, entry: Init, pair: LoraPair) -> None:
    """An anchored start needs an anchor of its rank, another one allows none."""
    if pair.anchor_rank != (pair.rank if entry.anchored else 0):
        has = f"{pair.anchor_rank} anchor columns" if pair.anchor_rank else "no anchor"
        raise ConfigError(
            f"layer {pair.name!r} has {has}, and the start {name!r} {'needs' if entry.anchored else 'allows'} "
            f"{pair.rank if entry.anchored else 'none'}. Attach with dreamrie.attach_lora(model, rank, target_modules, "
            f"init={entry.layout!r})."
        )


def _check_change(name: str, pair: LoraPair) -> None:
    """The change of the weight is zero."""
    halves = [pair.left.detach().double(), pair.right.detach().double()]
    size = pair.scaling * math.prod(float(torch.linalg.vector_norm(half)) for half in halves)
    change = float(torch.linalg.matrix_norm(pair.delta()))
    if not change <= _ZERO.get(pair.left.dtype, _ZERO_HALF) * size:
        raise NumericalError(
            f"layer {pair.name!r}: the start {name!r} changes the weight by {change:.1e}, so the function of the "
            "model would change at step 0."
        )


def _check_points(name: str, entry: Init, pairs: Sequence[LoraPair], lr: float | None) -> None:
    """An anchored start has rank r; say where it is small beside a step that is added to the factors."""
    if not entry.anchored:
        return
    small = []
    for pair in pairs:
        least = float(pair.point().s[-1])
        if lr is not None and least < lr * (1 - 1e-2):
            small.append((least, pair.name))
    if small:
        least, where = min(small)
        log.warning(
            "start %s: singular values down to %.1e (layer %s), below the learning rate (%.1e) in %d of %d layers: "
            "there the product of the steps of both factors is not small beside their sum",
            name, least, where, lr or 0.0, len(small), len(pairs),
        )  # fmt: skip


@contextlib.contextmanager
def _put_back_on_error(pairs: Sequence[LoraPair]) -> Iterator[None]:
    """Undo a start that fails half-way."""
    own: list[tuple[Tensor, Tensor]] = [
        (pair.left.detach().clone(), pair.right.detach().clone()) for pair in pairs
    ]
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            with torch.no_grad():
                for pair, (left, right) in zip(pairs, own, strict=True):
                    pair.left.copy_(left)
                    pair.right.copy_(right)
