"""Laws of the spectral maps: each on the core is the map on the whole momentum, whatever the factors.

Each law takes the module of the optimizer first; `tests/mutants/core_maps.py` runs it on broken maps. Numbers are
those of docs/method.md 10.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dreamrie.core_maps as maps
import dreamrie.riemannion as real
from dreamrie.core_maps import CORE_MAPS
from tests.margins import within
from tests.properties.beside import follow
from tests.reference.dense import msign, projection
from tests.reference.pair_methods import DenseMapped
from tests.strategies import (
    F64,
    LAYERS,
    Quadratic,
    distance,
    frame,
    make_pairs,
    moved,
    noise,
    regauge,
    run,
)


def quintic(values: Tensor) -> Tensor:
    """Muon's five steps on numbers."""
    x = values / values.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def polar(values: Tensor) -> Tensor:
    """The composed quintics on numbers."""
    x = values / values.norm()
    for a, b, c in maps.best_quintics(1e-3, 7):
        x = a * x + b * x**3 + c * x**5
    return x


def clipped(values: Tensor) -> Tensor:
    """Soft clip at the root mean square."""
    tau = values.square().mean().sqrt()
    return values / tau / (1 + (values / tau) ** 2).sqrt()


SPECTRA = {
    "msign": torch.ones_like,
    "newton_schulz": quintic,
    "polar_express": polar,
    "soft_clip": clipped,
    "frobenius": lambda values: values / values.norm(),
    "namo": torch.ones_like,
    "alternating": torch.ones_like,
}


class Alternating(DenseMapped):
    """Three times msign and projection; the iterate of norm one with the largest product with M."""

    def direction(self, U: Tensor, V: Tensor) -> Tensor:
        found, current = [], self.M
        for _ in range(3):
            current = projection(U, V, msign(current))
            found.append(current / torch.linalg.matrix_norm(current, 2))
        return max(found, key=lambda D: float((self.M * D).sum()))


def law_20_core_map_equals_the_map_of_the_momentum(impl: Any, name: str) -> None:
    """6 noisy steps with a map of the core equal those with the map on the full momentum by its SVD."""
    pairs = make_pairs(LAYERS)
    kind = Alternating if name == "alternating" else DenseMapped
    slow = [kind(pair.x, pair.rank, 0.03, 0.9, SPECTRA[name]) for pair in pairs]
    for method in slow:
        method.adaptive = name == "namo"
    optimizer = impl.Riemannion(pairs, lr=0.03, momentum=0.9, core_map=name)
    follow(f"20 {name}", optimizer, Quadratic(pairs), slow, 1e-11, steps=6)


def law_5_core_maps_do_not_depend_on_the_factors(impl: Any, name: str) -> None:
    """The factors (B R, R^-1 A) give the same path of X for every map, and so does another scale of the loss."""
    plain: list[list[Tensor]] = []
    for condition, scale in ((None, 1.0), (50.0, 1.0), (None, 1e3)):
        pairs = make_pairs(LAYERS[1:])
        for number, pair in enumerate(pairs):
            if condition is not None:
                regauge(pair, condition, seed=number)
        optimizer = impl.Riemannion(pairs, lr=0.03, core_map=name)
        path = run(optimizer, Quadratic(pairs, loss_scale=scale), 3)
        # NAMO's epsilon beside the norm of the gradient is the only scale there is.
        if plain:
            within(f"5 {name}", distance(path, plain), 1e-10 if name != "namo" else 1e-8)
        plain = plain or path
    assert moved(plain) > 0.01


def law_polar_express_converges(impl: Any) -> None:
    """Singular values from 1e-3 |K| upwards come to one, by 1e-8; each quintic is the best for its interval."""
    values = torch.cat([torch.logspace(-2.9, -1, 5, dtype=F64), torch.tensor([0.9], dtype=F64)])
    core = (frame(1, 6, 6) * values) @ frame(2, 6, 6).mT
    found = torch.linalg.svdvals(impl.polar_express(core, 3))
    within("polar express", (found - 1).abs().max(), 1e-8)
    low, high = 1e-3, 1.0
    for a, b, c in impl.best_quintics(1e-3, 7)[:5]:
        x = torch.linspace(low, high, 20001, dtype=F64)
        error = a * x + b * x**3 + c * x**5 - 1
        size = float(error.abs().max())
        # Equal ripples at four points: no odd quintic has smaller ones.
        turning = error[1:-1][(error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) < 0]
        ripples = [-error[0], *turning.abs(), error[0] * 0 - error[-1] * -1]
        assert len(ripples) == 4
        for ripple in ripples:
            within("ripples", abs(abs(float(ripple)) / size - 1), 1e-4)
        low, high = 1 - size, 1 + size


def law_newton_schulz_is_muons(impl: Any) -> None:
    """torch's own Newton-Schulz gives the same matrix up to the rounding of bfloat16; its range is 0.68 to 1.21."""
    core = noise(5, 6, 6)
    parameter = torch.nn.Parameter(torch.zeros(6, 6))
    parameter.grad = core.float()
    muon = torch.optim.Muon([parameter], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
    muon.step()
    found = impl.newton_schulz(core, 3)
    within("Muon", (found + parameter.detach().to(F64)).abs().max(), 0.05)
    spectrum = torch.logspace(-2, 0, 60, dtype=F64)
    values = torch.linalg.svdvals(impl.newton_schulz(torch.diag(spectrum), 30))
    assert 0.002 < float(spectrum[0] / spectrum.norm()) < 0.004
    within("largest", values.max(), 1.21)
    within("smallest", -values.min(), -0.68)


def law_alternating_is_never_worse(impl: Any) -> None:
    """At spectral norm one it has at least the product with K that msign with one projection has, and is tangent."""
    gains = []
    for seed in range(40):
        core = noise(seed, 6, 6)
        core[3:, 3:] = 0
        core[:3, :3] *= 4.0 if seed % 2 else 0.2
        once = impl.masked_msign(core)
        once[3:, 3:] = 0
        once = once / torch.linalg.matrix_norm(once, 2)
        found = impl.alternating(core, 3)
        assert float(found[3:, 3:].abs().max()) == 0
        within("norm one", abs(torch.linalg.matrix_norm(found, 2) - 1), 1e-12)
        gains.append(float((core * (found - once)).sum() / (core * once).sum()))
    within("not worse", -min(gains), 1e-12)
    # Somewhere a repetition wins, and somewhere the safeguard is needed.
    assert max(gains) > 0.005


def law_namo_measures_the_noise(impl: Any) -> None:
    """Equal gradients give a factor of one; gradients that average out give sqrt((1 - b) / (1 + b)) of it."""
    t, beta = 400, 0.9
    steps = torch.tensor(float(t), dtype=F64)
    moment = 4.0 * (1 - impl.NAMO_BETA2**t) * torch.ones((), dtype=F64)
    sum_equal = 2.0 * (1 - beta**t) / (1 - beta) * torch.ones((), dtype=F64)
    equal = impl.noise_adaptive(sum_equal, moment, steps, beta)
    within("equal", abs(equal - 1), 1e-7)
    sum_random = 2.0 / math.sqrt(1 - beta**2) * torch.ones((), dtype=F64)
    random = impl.noise_adaptive(sum_random, moment, steps, beta)
    within("random", abs(random - math.sqrt((1 - beta) / (1 + beta))), 1e-7)


@pytest.mark.parametrize("name", sorted(CORE_MAPS))
def test_core_map_equals_the_map_of_the_momentum(name: str) -> None:
    law_20_core_map_equals_the_map_of_the_momentum(real, name)


@pytest.mark.parametrize("name", sorted(CORE_MAPS))
def test_core_maps_do_not_depend_on_the_factors(name: str) -> None:
    law_5_core_maps_do_not_depend_on_the_factors(real, name)


@pytest.mark.parametrize(
    "law",
    [
        law_polar_express_converges,
        law_newton_schulz_is_muons,
        law_alternating_is_never_worse,
        law_namo_measures_the_noise,
    ],
    ids=lambda law: law.__name__,
)
def test_law_of_a_map(law: Any) -> None:
    law(maps)
