"""Training under autocast copies less, and computes the same."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.unet import SIZES, USUAL, Training
from dreamrie.diffusion.lean import copy_less


class Pass(NamedTuple):
    """Loss, all gradients, and the bytes kept for the backward pass beside weights."""

    loss: float
    gradients: Tensor
    kept: int


def training(way: str = "", device: str = "cpu") -> Training:
    """A small U-Net with bf16 weights and adapters that do something, the same at each call."""
    found = Training(SIZES["small"], 4, "adamw", False, torch.device(device), way)
    torch.manual_seed(1)
    for pair in found.pairs:
        pair.left.data.copy_(0.05 * torch.randn(pair.left.shape))
    found.latents, found.noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    found.times, found.text = torch.tensor([10, 500]), torch.randn(2, 77, 32)
    for name in ("latents", "noise", "times", "text"):
        setattr(found, name, getattr(found, name).to(device))
    return found


def forward_and_backward(given: Training) -> Pass:
    """One pass under autocast, or in fp64 where the weights are."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    dtype = given.unet.conv_in.weight.dtype
    narrow = dtype == torch.bfloat16
    noisy, text, noise = given.latents, given.text, given.noise
    if not narrow:
        noisy, text, noise = noisy.to(dtype), text.to(dtype), noise.to(dtype)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(given.device.type, torch.bfloat16, enabled=narrow),
    ):
        output = given.unet(noisy, given.times, text).sample
        loss = nn.functional.mse_loss(output.to(noise.dtype), noise)
    loss.backward()
    for parameter in given.unet.parameters():
        kept.pop(parameter.data_ptr(), None)
    gradients = [f.grad.double().flatten() for f in given.factors if f.grad is not None]
    return Pass(float(loss.detach()), torch.cat(gradients), sum(kept.values()))


def test_loss_and_gradients_are_the_same_to_the_bit() -> None:
    """Autocast for CPUs has norms in bf16 anyway; what is left are the inputs of the LoRA layers."""
    usual, lean = (forward_and_backward(training(way)) for way in (USUAL, ""))
    assert lean.loss == usual.loss
    assert torch.equal(lean.gradients, usual.gradients)
    assert lean.kept < 0.95 * usual.kept


def test_without_autocast_nothing_changes() -> None:
    passes = []
    for way in (USUAL, ""):
        given = training(way)
        given.unet.float()
        passes.append(forward_and_backward(given))
    usual, lean = passes
    assert lean.loss == usual.loss
    assert torch.equal(lean.gradients, usual.gradients)
    assert lean.kept == usual.kept


def test_norms_work_outside_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[type, bool, torch.dtype]] = set()
    for kind in (nn.GroupNorm, nn.LayerNorm):
        usual = kind.forward

        def watched(self: Any, x: Tensor, usual: Any = usual) -> Tensor:
            seen.add((type(self), torch.is_autocast_enabled("cpu"), x.dtype))
            found: Tensor = usual(self, x)
            return found

        monkeypatch.setattr(kind, "forward", watched)
    forward_and_backward(training())
    assert seen == {(kind, False, torch.bfloat16) for kind in (nn.GroupNorm, nn.LayerNorm)}


def test_norms_in_fp32_are_left_to_autocast() -> None:
    """Their input is bf16 behind a product, and the kernels take one type."""
    norm = nn.GroupNorm(2, 4)
    holder = nn.Sequential(norm)
    x = torch.randn(2, 4, 3)
    wanted = norm(x)
    copy_less(holder)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(holder(x), wanted)
        assert holder(x.bfloat16()).dtype in (torch.float32, torch.bfloat16)


def test_a_copy_of_the_network_has_norms_of_its_own() -> None:
    given = training()
    twin = copy.deepcopy(given.unet)
    for parameter in given.unet.parameters():
        parameter.data.zero_()
    wanted = forward_and_backward(training()).loss
    given.unet = twin
    given.factors = [p for p in twin.parameters() if p.requires_grad]
    assert forward_and_backward(given).loss == wanted


def test_compiled_it_computes_the_same() -> None:
    """A block with norms of both kinds and LoRA layers."""
    block = training().unet.down_blocks[0].attentions[0]
    hidden = torch.randn(2, 32, 8, 8, dtype=torch.bfloat16)
    text = torch.randn(2, 77, 32, dtype=torch.bfloat16)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = block(hidden, text, return_dict=False)[0]
        assert torch.equal(compiled(hidden, text, return_dict=False)[0], wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CPUs have norms in bf16 anyway")
def test_on_a_gpu_less_is_kept_and_nothing_is_lost() -> None:
    usual, lean = (forward_and_backward(training(way, "cuda")) for way in (USUAL, ""))
    exact = training(device="cuda")
    exact.unet.double()
    wanted = forward_and_backward(exact)
    errors = [float((p.gradients - wanted.gradients).norm()) for p in (usual, lean)]
    assert errors[1] < 1.2 * errors[0]
    assert lean.kept < 0.8 * usual.kept
