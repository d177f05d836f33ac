"""L1, L2, L5, L7, laws 13 and 14 (docs/method.md 10): the locally optimal start and its estimators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dreamrie.loi as real
import tests.reference.theorem as theorem
from dreamrie.lora import attach_lora
from dreamrie.riemannion import Riemannion
from tests.margins import within
from tests.reference import nets
from tests.reference.theorem import matrix
from tests.strategies import F64, frame, noise

SHAPES = ((17, 23, 3), (23, 17, 4), (9, 9, 2), (12, 7, 1), (8, 11, 5), (6, 6, 6))


def gradient(out: int, in_: int, seed: int = 0, decay: float = 0.85) -> Tensor:
    """A matrix with a decaying spectrum and distinct singular values."""
    k = min(out, in_)
    values = decay ** torch.arange(k, dtype=F64)
    return (frame(seed + 50, out, k) * values) @ frame(seed + 51, in_, k).T


# ---------------------------------------------------------------------------------------------- the optimum


def law_l1_start_reaches_the_optimum(impl: Any) -> None:
    """|P_X G|^2 at the start is sum of the first 2r sigma^2, also when 2r exceeds the smaller side."""
    for out, in_, rank in SHAPES:
        g = gradient(out, in_)
        for alpha in (0.07, -1.3):
            point, _ = impl.optimal_point(g, rank, alpha)
            best = theorem.optimum(g, rank)
            within("L1", abs(theorem.energy(matrix(point), rank, g) / best - 1), 1e-10)
            within("L1 own energy", abs(impl.captured_energy(point, g) / best - 1), 1e-10)


def law_13_start_is_alpha_u1_v2(impl: Any) -> None:
    """The start is alpha U_1 V_2^T: all singular values |alpha|, no core, d_left = U_2 Sigma_2."""
    g, rank = gradient(17, 23), 3
    u, sigma, vh = torch.linalg.svd(g, full_matrices=False)
    for alpha in (0.07, -1.3):
        point, values = impl.optimal_point(g, rank, alpha)
        truth = alpha * u[:, :rank] @ vh[rank : 2 * rank]
        within("13 start", nets.relative(matrix(point), truth), 1e-12)
        within("13 size", (point.s - abs(alpha)).abs().max(), 1e-14)
        within("13 spectrum", (values[: 2 * rank] - sigma[: 2 * rank]).abs().max(), 1e-12)
        within("13 core", (point.u.T @ g @ point.v).abs().max(), 1e-12)


def law_13_every_member_of_the_family_is_optimal(impl: Any) -> None:
    """Eq. (17) as corrected reaches the optimum for a general S in GL_2r, not for S = I only."""
    g, rank = gradient(14, 11), 2
    for seed in range(4):
        s = noise(seed, 2 * rank, 2 * rank) + 2 * torch.eye(2 * rank, dtype=F64)
        share = theorem.energy(impl.optimal_family(g, rank, s), rank, g) / theorem.optimum(g, rank)
        within("13 family", abs(share - 1), 1e-10)


def test_13_complementary_splits_are_equal_and_nothing_beats_them() -> None:
    """U_I V_J with I and J disjoint and I + J = 1..2r all reach the optimum; random points stay below."""
    g, rank = gradient(13, 10), 2
    best = theorem.optimum(g, rank)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    for rows in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        columns = [n for n in range(4) if n not in rows]
        within("13 split", abs(theorem.energy(u[:, rows] @ vh[columns], rank, g) / best - 1), 1e-10)
    assert theorem.energy(u[:, :2] @ vh[:2], rank, g) / best < 0.7
    shares = [
        theorem.energy(noise(2 * n, 13, rank) @ noise(2 * n + 1, rank, 10), rank, g) / best
        for n in range(2000)
    ]
    assert 0.3 < max(shares) < 0.98


# ------------------------------------------------------------------------------------------------ estimators


def start(
    seed: int = 0, rank: int = 2, alpha: float = 1.5, scaling: float = 0.625
) -> tuple[Any, Any]:
    """A net with a large random anchored start, where a gradient at W + X would be another one."""
    model = nets.net(seed)
    pairs = nets.with_scaling(model, scaling, rank=rank, target_modules=nets.TARGETS, alpha=alpha)
    return model, pairs


def law_l5_gradient_is_taken_at_the_base_weight(impl: Any) -> None:
    """The averaged gradient equals that of the net without adapter in eval mode, to 1e-10."""
    data = nets.batches(3)
    truth = nets.dense_gradients(nets.net(), nets.squares, data)
    model, pairs = start()
    nets.disturb(pairs, 0.3)
    with impl.session.undisturbed(model):
        found, count = impl.mean_gradient(model, pairs, nets.squares, data, torch.Generator())
    assert count == 3
    for pair, svd in zip(pairs, found, strict=True):
        within("L5 full gradient", nets.relative(svd.matrix, truth[pair.name]), 1e-10)


def law_l5_products_by_backward(impl: Any) -> None:
    """sketch and backprop_rsvd find the singular values of that gradient, scaling divided out."""
    data = nets.batches(3)
    truth = nets.dense_gradients(nets.net(), nets.squares, data)
    model, pairs = start()
    nets.disturb(pairs, 0.3)
    with impl.session.undisturbed(model):
        seed = torch.Generator().manual_seed(3)
        sketched, _ = impl.sketch(model, pairs, nets.squares, data, seed)
        powered, _ = impl.backprop_rsvd(
            model, pairs, nets.squares, data, seed, oversample=4, power=15
        )
    for pair, wide, narrow in zip(pairs, sketched, powered, strict=True):
        sigma = torch.linalg.svdvals(truth[pair.name])
        keep = 2 * pair.rank
        # The net is narrower than the sketch, which is therefore exact.
        within("L5 sketch", nets.relative(wide.values[:keep], sigma[:keep]), 1e-10)
        within("L5 products", nets.relative(narrow.values[:keep], sigma[:keep]), 1e-10)


def law_14_randomized_svd_by_backward(impl: Any) -> None:
    """p = 2r, q = 4: the first 2r triples on a small net, 1e-6; p = r, q = 1 holds 0.95 there."""
    data = nets.batches(2)
    truth = nets.dense_gradients(nets.net(), nets.noisy_squares_fixed, data)
    model, pairs = start(alpha=0.05)
    for oversample, power, values_bar, bar in ((4, 4, 1e-6, 1e-6), (2, 1, 0.2, 0.05)):
        seed = torch.Generator().manual_seed(1)
        with impl.session.undisturbed(model):
            found, _ = impl.backprop_rsvd(
                model, pairs, nets.noisy_squares_fixed, data, seed,
                oversample=oversample, power=power,
            )  # fmt: skip
        for pair, svd in zip(pairs, found, strict=True):
            g = truth[pair.name]
            point = impl.split_point(svd, pair.rank, 0.1)
            share = theorem.energy(matrix(point), pair.rank, g) / theorem.optimum(g, pair.rank)
            within(f"14 energy q={power}", 1 - share, bar)
            sigma = torch.linalg.svdvals(g)[: 2 * pair.rank]
            error = (svd.values[: 2 * pair.rank] - sigma).abs().max() / sigma[0]
            within(f"14 values q={power}", error, values_bar)


def law_l2_share_of_the_optimum_over_spectra(impl: Any) -> None:
    """p = r, q = 1 holds 0.999 of the optimum on a decaying spectrum; 0.85 on that of pure noise."""
    rank, model = 4, nets.prescribed(48, 40)
    pairs = attach_lora(model, rank, ["layer"])
    for kind, bar in (("decaying", 1e-3), ("noise", 0.15)):
        shares = []
        for seed in range(5):
            g = gradient(48, 40, seed, 0.7) if kind == "decaying" else noise(seed, 48, 40)
            with impl.session.undisturbed(model):
                (svd,), _ = impl.backprop_rsvd(
                    model, pairs, nets.prescribed_loss, [g], torch.Generator().manual_seed(seed)
                )
            point = impl.split_point(svd, rank, 0.1)
            shares.append(theorem.energy(matrix(point), rank, g) / theorem.optimum(g, rank))
        within(f"L2 {kind}", 1 - min(shares), bar)


def law_14_fixed_objective(impl: Any) -> None:
    """backprop_rsvd replays the random streams: with noise in the loss every pass sees one gradient."""
    data = nets.batches(2)
    model, pairs = start(alpha=0.05)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    truth = nets.dense_gradients(nets.net(), nets.noisy_squares, data)
    torch.set_rng_state(state)
    with impl.session.undisturbed(model):
        found, _ = impl.backprop_rsvd(
            model, pairs, nets.noisy_squares, data, torch.Generator(), oversample=4, power=8
        )
    for pair, svd in zip(pairs, found, strict=True):
        sigma = torch.linalg.svdvals(truth[pair.name])[: 2 * pair.rank]
        within("14 replay", nets.relative(svd.values[: 2 * pair.rank], sigma), 1e-6)


def law_14_sketch(impl: Any) -> None:
    """The sketch is exact for a gradient of rank 2r, and linear: sketches of batches add up."""
    rank, model = 2, nets.prescribed(90, 70)
    pairs = attach_lora(model, rank, ["layer"])
    thin = noise(1, 90, 2 * rank) @ noise(2, 2 * rank, 70)
    with impl.session.undisturbed(model):
        seed = torch.Generator().manual_seed(4)
        (svd,), _ = impl.sketch(model, pairs, nets.prescribed_loss, [thin], seed)
        within("14 sketch", nets.relative((svd.left * svd.values) @ svd.right.T, thin), 1e-9)
        parts = [gradient(90, 70, seed) for seed in (1, 2, 3)]
        once, thrice = (
            impl.sketch(model, pairs, nets.prescribed_loss, given, seed.manual_seed(4))[0][0]
            for given in ([sum(parts) / 3], parts)
        )
        together = [(svd.left * svd.values) @ svd.right.T for svd in (once, thrice)]
        within("14 linear", nets.relative(*together), 1e-12)


def noisy_gradients(count: int, share: float) -> tuple[Tensor, list[Tensor]]:
    """A mean of rank 8 with a decaying spectrum, and `count` samples with noise `share` times it."""
    mean = gradient(120, 100, decay=0.6)
    samples = []
    for n in range(count):
        e = noise(900 + n, 120, 100)
        samples.append(mean + share * float(mean.norm()) * e / e.norm())
    return mean, samples


def law_l7_averaging_beats_one_batch(impl: Any) -> None:
    """32 batches with noise twice the signal: the start holds 0.95 of the mean gradient's optimum."""
    rank, model = 4, nets.prescribed(120, 100)
    pairs = attach_lora(model, rank, ["layer"])
    mean, samples = noisy_gradients(32, 2.0)
    impl.locally_optimal_init(model, pairs, nets.prescribed_loss, samples)
    point = pairs[0].point()
    share = theorem.energy(matrix(point), rank, mean) / theorem.optimum(mean, rank)
    within("L7", 1 - share, 0.05)
    one, _ = real.optimal_point(samples[0], rank, 0.1)
    assert theorem.energy(matrix(one), rank, mean) / theorem.optimum(mean, rank) < 0.9


def law_13_first_riemannian_gradient_is_optimal(impl: Any) -> None:
    """What the optimizer sees first has the norm^2 of 2r singular values per layer, as the report says; c is not 1."""
    data = nets.batches(2)
    truth = nets.dense_gradients(nets.net(), nets.squares, data)
    model, pairs = start()
    report = impl.locally_optimal_init(model, pairs, nets.squares, data, alpha=0.4)
    best = sum(theorem.optimum(truth[pair.name], pair.rank) for pair in pairs)
    for kind in ("optimum", "energy"):
        total = sum(getattr(layer, kind) for layer in report.layers)
        within(f"13 reported {kind}", abs(total / best - 1), 1e-10)
    model.eval()
    (sum(nets.squares(model, batch) for batch in data) / len(data)).backward()
    norm = float(Riemannion(pairs, lr=0.01).tangent_grad_norm())
    within("13 first gradient", abs(norm**2 / best - 1), 1e-10)


LAWS = [value for name, value in sorted(globals().items()) if name.startswith("law_")]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    """Every law of this file on the real implementation."""
    law(theorem if law is law_13_every_member_of_the_family_is_optimal else real)


def test_l7_one_batch_is_not_enough_for_any_estimator() -> None:
    """The sketch averages as well: 32 batches hold more than one, at most the mean gradient's share."""
    rank, model = 4, nets.prescribed(120, 100)
    pairs = attach_lora(model, rank, ["layer"])
    mean, samples = noisy_gradients(32, 2.0)
    shares = {}
    for name, estimator, given in (
        ("mean", "mean_gradient", samples),
        ("sketch", "sketch", samples),
        ("one", "sketch", samples[:1]),
    ):
        real.locally_optimal_init(model, pairs, nets.prescribed_loss, given, estimator=estimator)
        x = matrix(pairs[0].point())
        shares[name] = theorem.energy(x, rank, mean) / theorem.optimum(mean, rank)
    assert shares["mean"] + 1e-3 > shares["sketch"] > shares["one"] + 0.05
