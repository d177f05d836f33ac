"""Methods by name: an optimizer and a start; and the grid of learning rates of each."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from dreamrie.config.method import usual_init, usual_start_scale
from dreamrie.core_maps import CORE_MAPS
from dreamrie.init_table import INITS
from dreamrie.optimizer_table import OPTIMIZERS, Entry

# Middle of the grid, in the unit of each optimizer, from runs on the tuning concepts; a best value at the end of it
# is marked in the table, and --centre moves the grid.
CENTRES = {
    "riemannion": 3.16e-2,
    "riemann_sgd": 10.0,
    "riemann_adam": 1e-1,
    "imuon": 3.16e-2,
    "lora_muon": 3.16e-2,
    "lora_rite": 3.16e-1,
    "adamw": 1e-2,
    "lorafa": 4.64e-2,
    "rprec_adamw": 1e-2,
    "loraplus": 3.16e-3,
    "muon": 1e-2,
    "sgd": 0.316,
}
# Elementwise, in few launches; the others factor many small matrices, for which a processor is quicker than a GPU.
ELEMENTWISE = {"adamw", "sgd", "loraplus"}
# Adam's first beta is its momentum; the library leaves it at torch's default.
_ADAM_MOMENTUM = dict.fromkeys(("adamw", "loraplus", "lorafa", "rprec_adamw"), 0.9)
DEFAULT = ("adamw", "riemannion+loi")
LAYERS = ("dora", "rslora")
GRID, DECADES = 7, 2.0


@dataclass(frozen=True)
class Method:
    """What a name stands for.

    Attributes:
        name: `OPTIMIZER[@MOMENTUM][:MAP][+INIT][/LAYER]`.
        optimizer: key of `dreamrie.optimizer_table.OPTIMIZERS`.
        init: start of the adapters, key of `dreamrie.init_table.INITS`.
        core_map: key of `dreamrie.core_maps.CORE_MAPS` for an optimizer that has them.
        momentum: that of the optimizer, the first beta of Adam; None is its default.
        layer: of `LAYERS`, or nothing for the usual one.
    """

    name: str
    optimizer: str
    init: str
    core_map: str | None = None
    momentum: float | None = None
    layer: str = ""

    @property
    def is_elementwise(self) -> bool:
        """Whether it steps where the model is; else on the processor."""
        return self.optimizer in ELEMENTWISE

    def start_scale(self, rank: int, lr: float) -> float:
        """Singular value of a start called loi or orthonormal: the rule of the training script."""
        return usual_start_scale(self.optimizer, rank, lr)


def parse_method(name: str) -> Method:
    """Read a name.

    Args:
        name: see `Method`.

    Raises:
        SystemExit: there is no such optimizer or start, or they do not go together.
    """
    parts = re.fullmatch(
        r"([^@:+/]*)(?:@([^:+/]*))?(?::([^@:+/]*))?(?:\+([^@:+/]*))?(?:/([^@:+/]*))?", name
    )
    optimizer, momentum, core_map, init, layer = parts.groups() if parts else (name, *[None] * 4)
    if optimizer not in OPTIMIZERS:
        raise SystemExit(
            f"--methods: there is no optimizer {optimizer!r} in {name!r}; known: {', '.join(OPTIMIZERS)}. A method is "
            "OPTIMIZER[@MOMENTUM][:MAP][+INIT][/LAYER]"
        )
    start, entry = init or usual_init(optimizer), OPTIMIZERS[optimizer]
    if start not in INITS:
        raise SystemExit(
            f"--methods: {name!r} wants the start {start!r}; there are {', '.join(INITS)}"
        )
    anchored = INITS[start].anchored
    if (entry.needs_rank and not anchored) or (entry.anchor == "refused" and anchored):
        raise SystemExit(f"--methods: {optimizer} cannot go on from the start {start!r}")
    if core_map and ("core_map" not in entry.options or core_map not in CORE_MAPS):
        raise SystemExit(
            f"--methods: {name!r} wants the spectral map {core_map!r}; riemannion has {', '.join(CORE_MAPS)}"
        )
    if layer is not None:
        _check_layer(name, entry, anchored, layer)
    usual = _momentum(name, optimizer, momentum)
    return Method(name, optimizer, start, core_map or None, usual, layer or "")


def _check_layer(name: str, entry: Entry, anchored: bool, layer: str) -> None:
    """Refuse a layer that there is not, or that the training script does not offer with the rest of a name."""
    if layer not in LAYERS:
        raise SystemExit(
            f"--methods: {name!r} wants the layer {layer!r}; there are {', '.join(LAYERS)}"
        )
    if (layer == "dora" and (entry.no_dora or anchored)) or (
        layer == "rslora" and entry.gauge_invariant
    ):
        raise SystemExit(
            f"--methods: {name!r}: {layer} does not go with its optimizer or its start"
        )


def usual_momentum(optimizer: str) -> float | None:
    """Default momentum, the first beta of Adam; None where there is none."""
    own = OPTIMIZERS[optimizer].momentum
    return _ADAM_MOMENTUM.get(optimizer) if own is None else own


def start_steps() -> dict[str, float]:
    """Size of a start called loi or orthonormal in learning rates, of the optimizers for which it is one."""
    return {name: entry.start_steps for name, entry in OPTIMIZERS.items() if entry.bounded_step}


def _momentum(name: str, optimizer: str, text: str | None) -> float | None:
    """Momentum of a name, which must be another than the default, or one method had two names."""
    if text is None:
        return None
    usual = usual_momentum(optimizer)
    is_one = re.fullmatch(r"0|0\.\d*[1-9]", text) is not None
    if usual is None or not is_one or float(text) == usual:
        raise SystemExit(
            f"--methods: {name!r} wants the momentum {text}; it is written as 0 or as 0.95 is, and is not {usual}, "
            f"which {optimizer} has without a word"
        )
    return float(text)


def grid(centre: float, count: int = GRID) -> list[float]:
    """Learning rates over two decades around a middle, the middle first, then outwards: 1, 2.15, 0.464, 4.64, ...

    Args:
        centre: geometric middle.
        count: odd, at least 1.

    Returns:
        `count` values, rounded to three digits, so that they are the same wherever they are computed.
    """
    half = count // 2
    places = sorted(range(-half, half + 1), key=lambda place: (abs(place), -place))
    step = DECADES / max(1, count - 1)
    return [float(f"{centre * 10 ** (step * place):.3g}") for place in places]


def grid_of(method: Method, centres: dict[str, float], count: int = GRID) -> list[float]:
    """Grid of a method: around `centres` by its name, else around `CENTRES` by its optimizer."""
    centre = centres.get(method.name) or CENTRES.get(method.optimizer)
    if centre is None or not math.isfinite(centre):
        raise SystemExit(
            f"no middle of the grid is known for {method.name}: give --centre {method.name}=VALUE"
        )
    return grid(centre, count)
