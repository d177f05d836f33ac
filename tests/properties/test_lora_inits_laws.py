"""I1 to I7: where adapters start. Every start keeps the function and the base; each is what its source says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.init_table import INITS, Init
from dreamrie.lora import LoraPair, attach_lora, base_fingerprint
from dreamrie.lora.inits import Data, Request, start, write_factors
from dreamrie.riemannion import Riemannion
from tests.margins import within
from tests.reference import nets, starts
from tests.reference.dense import DenseRiemannion
from tests.strategies import F64, noise

ANCHORED = tuple(name for name, entry in INITS.items() if entry.anchored)
DATA = 3


def started(
    impl: Any, name: str, rank: int = 2, seed: int = 1
) -> tuple[nets.Net, list[LoraPair], list[Any]]:
    """A net with a start, its pairs, and the batches that were seen."""
    model, data = nets.net(), nets.batches(DATA)
    pairs = attach_lora(model, rank, nets.TARGETS, init=INITS[name].layout)
    generator = torch.Generator().manual_seed(seed)
    impl.start_pairs(name, model, pairs, Data(nets.squares, data), generator=generator)
    return model, pairs, data


def weight_of(pair: LoraPair) -> Tensor:
    return pair.as_matrix(pair.base_weight.detach())


def law_i1_a_start_changes_nothing(impl: Any) -> None:
    """Output at step 0, base bytes, modes, gradient flags, gradients and random streams stay, whichever the start."""
    pixels = nets.batches(1, seed=40)[0][0]
    for name, entry in reversed(INITS.items()):
        model, data = nets.net(), nets.batches(DATA)
        before, base = model.eval()(pixels).detach(), base_fingerprint(model)
        pairs = attach_lora(model, 2, nets.TARGETS, init=entry.layout)
        model.train()
        flags = [parameter.requires_grad for parameter in model.parameters()]
        own = [pair.right.detach().clone() for pair in pairs]
        stream = torch.get_rng_state()
        impl.start_pairs(name, model, pairs, Data(nets.squares, data))
        assert torch.equal(torch.get_rng_state(), stream), name
        assert all(module.training for module in model.modules()), name
        assert [parameter.requires_grad for parameter in model.parameters()] == flags, name
        assert all(parameter.grad is None for parameter in model.parameters()), name
        assert base_fingerprint(model) == base, name
        rights = zip(own, pairs, strict=True)
        assert all(not torch.equal(old, pair.right) for old, pair in rights), name
        moved = (model.eval()(pixels).detach() - before).abs().max() / before.abs().max()
        within("I1 step 0", moved, 1e-12)
        nets.disturb(pairs, 0.3)
        moved = (model(pixels).detach() - before).abs().max() / before.abs().max()
        assert float(moved) > 1e-2, name


def law_i2_random_frames(impl: Any) -> None:
    """stiefel_a: lora_B orthonormal, lora_A zero; stiefel_b the other way; stiefel_both: both, singular values 1."""
    unit = torch.eye(2, dtype=F64)
    for name in ("stiefel_a", "stiefel_b", "stiefel_both"):
        drawn = []
        for seed in (1, 1, 2):
            _, pairs, _ = started(impl, name, seed=seed)
            for pair in pairs:
                left, right = pair.left_matrix().detach()[:, :2], pair.right_matrix().detach()[:2]
                lefts = unit if name != "stiefel_b" else torch.zeros_like(unit)
                rights = unit if name != "stiefel_a" else torch.zeros_like(unit)
                within("I2 left", (left.T @ left - lefts).abs().max(), 1e-14)
                within("I2 right", (right @ right.T - rights).abs().max(), 1e-14)
            drawn.append(torch.cat([pairs[0].left.flatten(), pairs[0].right.flatten()]).detach())
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


def law_i3_parts_of_the_weight(impl: Any) -> None:
    """pissa, milora: the largest and smallest singular triples; olora: the first columns of a QR decomposition."""
    for name, bar in (("milora", 1e-12), ("pissa", 1e-5), ("olora", 1e-5)):
        _, pairs, _ = started(impl, name)
        for pair in pairs:
            weight = weight_of(pair)
            values, vectors = torch.linalg.eigh(weight @ weight.T)
            order = values.argsort(descending=True)[: min(weight.shape)]
            chosen = order[:2] if name == "pissa" else order[-2:]
            frame = vectors[:, chosen]
            if name == "olora":
                frame = torch.linalg.qr(weight[:, :2]).Q
            # PEFT decomposes in fp32.
            within(f"I3 {name}", nets.relative(starts.dense(pair), frame @ (frame.T @ weight)), bar)


def law_i4_corda_is_oriented_by_the_inputs(impl: Any) -> None:
    """corda: X0 C is the best rank-r approximation of W C, C the damped mean covariance of the inputs in eval mode."""
    _, pairs, data = started(impl, "corda")
    plain = nets.net().eval()
    calls = [starts.inputs(plain, pixels) for pixels, _ in data]
    for pair in pairs:
        truth = starts.oriented(weight_of(pair), [call[pair.name] for call in calls], 2)
        within("I4 corda", nets.relative(starts.dense(pair), truth), 1e-11)


def law_i5_eva_is_pefts(impl: Any) -> None:
    """eva: lora_A is what PEFT finds when it sees the rows of inputs by itself, of convolutions too; lora_B is zero."""
    _, pairs, data = started(impl, "eva")
    truth = starts.peft_eva(nets.net(), data, 2)
    for pair in pairs:
        within("I5 eva", nets.relative(pair.right_matrix().detach(), truth[pair.name]), 1e-6)
        assert not bool(pair.left.any())


def law_i6_lora_ga_is_pefts(impl: Any) -> None:
    """lora_ga: X0 = sum of +-s_i u_i v_(i-r)^T, i from r + 1 to 2r, over the mean gradient, with PEFT's scale."""
    _, pairs, data = started(impl, "lora_ga", rank=3)
    gradients = nets.dense_gradients(nets.net(), nets.squares, data)
    peft = starts.peft_lora_ga(nets.net(), gradients, 3)
    for pair in pairs:
        u, _, vh = torch.linalg.svd(gradients[pair.name], full_matrices=False)
        # The two factors hold different triples, so the signs of the products are free.
        theirs = (u[:, 3:6].T @ peft[pair.name].to(F64) @ vh[:3].T).abs()
        assert float(theirs.diagonal().min()) > 1e-4
        core = (u[:, 3:6].T @ starts.dense(pair) @ vh[:3].T).abs()
        within("I6 lora_ga", nets.relative(core, theirs), 1e-5)
        rest = starts.dense(pair).norm() ** 2 - core.norm() ** 2
        within("I6 nothing else", rest.abs() / core.norm() ** 2, 1e-9)


def law_i7_riemannion_goes_on_from_each(impl: Any) -> None:
    """The first two steps from an anchored start are the dense ones with the gradients at W and at W + X1 - X0."""
    for name in ANCHORED:
        model, pairs, data = started(impl, name)
        plain = nets.net().eval()
        own = {pair.name: starts.dense(pair) for pair in pairs}
        dense = {key: DenseRiemannion(x, 2, lr=1e-3) for key, x in own.items()}
        optimizer = Riemannion(pairs, lr=1e-3, momentum=0.9)
        for batch in data[:2]:
            gradients = nets.dense_gradients(plain, nets.squares, [batch])
            optimizer.zero_grad()
            nets.squares(model.eval(), batch).backward()
            optimizer.step()
            for pair in pairs:
                truth = dense[pair.name].step(gradients[pair.name])
                weight = getattr(plain, pair.name).weight
                with torch.no_grad():
                    weight.copy_((weight_of(pair) + truth - own[pair.name]).reshape(weight.shape))
                change = truth - own[pair.name]
                assert float(torch.linalg.matrix_norm(change, 2)) > 5e-4, name
                within("I7 step", nets.relative(pair.delta(), change), 1e-7)


def _keeps(request: Request) -> str:
    return ""


def _writes_the_base(request: Request) -> str:
    request.pairs[1].base_weight.data[0, 0] += 1e-9
    return ""


def _moves_the_function(request: Request) -> str:
    for pair in request.pairs:
        left, right = noise(1, pair.out, pair.rank), noise(2, pair.rank, pair.in_)
        write_factors(pair, 1e-6 * left, right)
    return ""


def _loses_rank(request: Request) -> str:
    for pair in request.pairs:
        pair.left.data[:, 0], pair.left.data[:, pair.rank] = 0.0, 0.0
    return ""


def _gives_up(request: Request) -> str:
    _loses_rank(request)
    raise ConfigError("enough")


def law_i8_a_bad_start_is_refused(impl: Any) -> None:
    """A start that writes the base, changes the function, has no point or fails is an error; the factors go back."""
    cases = (
        (_keeps, True, None, ""),
        (_writes_the_base, True, NumericalError, "changed the base weight"),
        (_moves_the_function, False, NumericalError, "changes the weight by"),
        (_loses_rank, True, ConfigError, "rank below r"),
        (_gives_up, True, ConfigError, "enough"),
    )
    for begin, anchored, error, message in cases:
        model = nets.net()
        pairs = attach_lora(model, 2, nets.TARGETS, init="orthonormal" if anchored else "gaussian")
        own = [(pair.left.detach().clone(), pair.right.detach().clone()) for pair in pairs]
        entry = Init(f"{__name__}:{begin.__name__}", "", "", anchored=anchored)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(INITS, "bad", entry)
            if error is None:
                assert impl.start_pairs("bad", model, pairs) == "bad"
            else:
                with pytest.raises(error, match=message):
                    impl.start_pairs("bad", model, pairs)
        for (left, right), pair in zip(own, pairs, strict=True):
            assert torch.equal(pair.left, left)
            assert torch.equal(pair.right, right)


LAWS = [value for name, value in sorted(globals().items()) if name.startswith("law_")]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    """Every law of this file on the real implementation."""
    law(start)
