"""Wrong spectral maps: of the entries, of the wrong matrix, with a lost normalization, or without their safeguard."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import dreamrie.core_maps as maps
import dreamrie.riemannion as riemannion
import dreamrie.riemannion_maps as use
from dreamrie.core_maps import CORE_MAPS
from tests.mutants import Law, Mutant, replaced
from tests.properties import test_core_maps_laws as laws

_quintics, _noise = maps.best_quintics, maps.noise_adaptive


@contextmanager
def with_map(name: str, wrong: Any) -> Iterator[Any]:
    """Yield the optimizer's module with one map replaced."""
    with replaced(use, CORE_MAPS=CORE_MAPS | {name: wrong}):
        yield riemannion


@contextmanager
def with_use(**wrong: Any) -> Iterator[Any]:
    """Yield the optimizer's module with a wrong piece around the maps."""
    with replaced(use, **wrong):
        yield riemannion


def named(law: Any, name: str) -> Law:
    """The law for one map."""

    @functools.wraps(law)
    def of_one(impl: Any) -> None:
        law(impl, name)

    return of_one


DENSE, GAUGE = (
    laws.law_20_core_map_equals_the_map_of_the_momentum,
    laws.law_5_core_maps_do_not_depend_on_the_factors,
)


def signs(core: Tensor, rank: int) -> Tensor:
    """Signs of the entries of the core, as Lion or a cosh of entries would take them."""
    return core.sign() * core.abs().amax(dim=(-2, -1), keepdim=True).sign()


def quintic_of_unnormalized(core: Tensor, rank: int) -> Tensor:
    """A fixed factor in the place of 1 / |K|."""
    core = 1e-6 * core
    for _ in range(maps.QUINTIC_STEPS):
        core = maps.odd_quintic(core, maps.QUINTIC)
    return core


def quintic_of_one_step(core: Tensor, rank: int) -> Tensor:
    return maps.odd_quintic(maps.frobenius(core, rank), maps.QUINTIC)


def clip_at_one(core: Tensor, rank: int) -> Tensor:
    """tau = 1 whatever the size of the gradient."""
    left, values, right_t = torch.linalg.svd(core, full_matrices=False)
    return (left * (values * (1 + values.square()).rsqrt()).unsqueeze(-2)) @ right_t


def clip_at_the_norm(core: Tensor, rank: int) -> Tensor:
    """tau = |K|, larger by sqrt(2r)."""
    return clip_at_one(maps.frobenius(core, rank), rank)


def spectral_norm_one(core: Tensor, rank: int) -> Tensor:
    return core / torch.linalg.matrix_norm(core, 2)[..., None, None]


def last_iterate(core: Tensor, rank: int) -> Tensor:
    """No safeguard."""
    for _ in range(maps.ALTERNATIONS):
        core = use.zero_normal_block(maps.masked_msign(core), rank)
    return core / torch.linalg.matrix_norm(core, 2)[..., None, None]


def first_iterate(core: Tensor, rank: int) -> Tensor:
    """Compared before they are divided by their norms, the first always wins."""
    core = use.zero_normal_block(maps.masked_msign(core), rank)
    return core / torch.linalg.matrix_norm(core, 2)[..., None, None]


def no_projection(core: Tensor, rank: int) -> Tensor:
    return core


def noise_of_the_sum(norm: Tensor, moment: Tensor, steps: Tensor, momentum: float) -> Tensor:
    """The heavy-ball sum taken for the average."""
    return _noise(norm / (1 - momentum), moment, steps, momentum)


def noise_uncorrected(norm: Tensor, moment: Tensor, steps: Tensor, momentum: float) -> Tensor:
    return (1 - momentum) * norm / (moment.sqrt() + maps.NAMO_EPS)


def noise_without_root(norm: Tensor, moment: Tensor, steps: Tensor, momentum: float) -> Tensor:
    return _noise(norm, moment.square(), steps, momentum)


def quintics_in_reverse(lowest: float, steps: int) -> tuple[tuple[float, float, float], ...]:
    """The last polynomial first."""
    return _quintics(lowest, steps)[::-1]


def quintics_of_taylor(lowest: float, steps: int) -> tuple[tuple[float, float, float], ...]:
    """The classical Newton-Schulz of order five: right, but far too slow from 1e-3."""
    return ((15 / 8, -10 / 8, 3 / 8),) * steps


MUTANTS = [
    *(
        Mutant(name, named(law, kind), lambda k=kind, w=wrong: with_map(k, w), why)
        for name, law, kind, wrong, why in (
            ("map of the entries", GAUGE, "frobenius", signs, "the axes turn with the factors"),
            (
                "quintic without normalization",
                GAUGE,
                "newton_schulz",
                quintic_of_unnormalized,
                "depends on the scale of the loss",
            ),
            ("quintic of one step", DENSE, "newton_schulz", quintic_of_one_step, "five are Muon's"),
            ("soft clip at one", GAUGE, "soft_clip", clip_at_one, "depends on the scale"),
            ("soft clip at the norm", DENSE, "soft_clip", clip_at_the_norm, "tau is the rms"),
            ("spectral for Frobenius", DENSE, "frobenius", spectral_norm_one, "another norm"),
            ("alternating that stops at once", DENSE, "alternating", first_iterate, "norm one"),
        )
    ),
    Mutant(
        "map without projection",
        named(DENSE, "polar_express"),
        lambda: with_use(zero_normal_block=no_projection),
        "the direction is not tangent",
    ),
    Mutant(
        "NAMO of the sum",
        named(DENSE, "namo"),
        lambda: with_use(noise_adaptive=noise_of_the_sum),
        "ten times too long",
    ),
    Mutant(
        "NAMO without correction",
        named(DENSE, "namo"),
        lambda: with_use(noise_adaptive=noise_uncorrected),
        "the averages begin at zero",
    ),
    Mutant(
        "NAMO without root",
        named(GAUGE, "namo"),
        lambda: with_use(noise_adaptive=noise_without_root),
        "depends on the scale of the loss",
    ),
    Mutant(
        "NAMO of the sum: number",
        laws.law_namo_measures_the_noise,
        lambda: replaced(maps, noise_adaptive=noise_of_the_sum),
        "equal gradients give one",
    ),
    Mutant(
        "quintics in reverse",
        laws.law_polar_express_converges,
        lambda: replaced(maps, best_quintics=quintics_in_reverse),
        "each is the best for where the one before ends",
    ),
    Mutant(
        "Taylor's quintic",
        laws.law_polar_express_converges,
        lambda: replaced(maps, best_quintics=quintics_of_taylor),
        "small singular values stay small",
    ),
    Mutant(
        "Muon's quintic with a coefficient of Polar Express",
        laws.law_newton_schulz_is_muons,
        lambda: replaced(maps, QUINTIC=(3.4445, -4.7750, 2.315)),
        "another spectrum",
    ),
    Mutant(
        "alternating without safeguard: value",
        laws.law_alternating_is_never_worse,
        lambda: replaced(maps, alternating=last_iterate),
        "a dominating core makes repetitions worse",
    ),
    Mutant(
        "alternating that stops at once: value",
        laws.law_alternating_is_never_worse,
        lambda: replaced(maps, alternating=first_iterate),
        "nothing is gained",
    ),
]
