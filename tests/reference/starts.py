"""What the starts from batches should be, from explicit inputs and dense decompositions of `nets.net`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, inject_adapter_in_model
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from tests.reference import nets


def inputs(model: nets.Net, pixels: Tensor) -> dict[str, Tensor]:
    """Rows that the matrix of each layer of a plain net is applied to; 3 x 3 patches cut out by hand."""
    patches = [
        pixels[number, :, i : i + 3, j : j + 3].reshape(-1)
        for number in range(len(pixels))
        for i in range(3)
        for j in range(3)
    ]
    with torch.no_grad():
        hidden = torch.tanh(model.conv(pixels)).flatten(1)
        return {
            "conv": torch.stack(patches),
            "first": hidden,
            "second": torch.tanh(model.first(hidden)),
        }


def dense(pair: Any) -> Tensor:
    """The trained half."""
    point = pair.point()
    return (point.u * point.s) @ point.v.T


def oriented(weight: Tensor, calls: list[Tensor], rank: int, damping: float = 0.01) -> Tensor:
    """CorDA's part of a weight: best rank-r approximation of W C, times the inverse of C."""
    scaled = [rows / rows.max().abs() for rows in calls]
    covariance = sum(rows.T @ rows for rows in scaled) / len(scaled)
    assert isinstance(covariance, Tensor)
    covariance = covariance + damping * covariance.diagonal().mean() * torch.eye(
        len(covariance), dtype=covariance.dtype
    )
    product = weight @ covariance
    # By the eigenvectors of the Gram matrix, another way than an SVD.
    basis = torch.linalg.eigh(product @ product.T).eigenvectors[:, -rank:]
    return basis @ basis.T @ product @ torch.linalg.inv(covariance)


class Seen(nn.Module):
    """Linear layers on given rows: PEFT's own procedures run on it without any help."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = weight.detach().float().clone()
            setattr(self, name, layer)

    def forward(self, rows: dict[str, Tensor]) -> list[Tensor]:
        return [getattr(self, name)(value.float()) for name, value in rows.items()]


def peft_eva(model: nets.Net, batches: list[Any], rank: int) -> dict[str, Tensor]:
    """PEFT's principal components, (r, in)."""
    plain = copy.deepcopy(model).eval()
    data = [inputs(plain, pixels) for pixels, _ in batches]
    seen = Seen({name: getattr(plain, name).weight.flatten(1) for name in nets.TARGETS})
    config = LoraConfig(
        r=rank,
        target_modules=list(nets.TARGETS),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )
    found: dict[str, Tensor] = get_eva_state_dict(
        seen, data, config, forward_fn=lambda net, rows: net(rows),
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    return found


def peft_lora_ga(model: nets.Net, gradients: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """PEFT's B A from given gradients: the loss of its training step is their inner product with the weights."""
    seen = Seen({name: getattr(model, name).weight.flatten(1) for name in nets.TARGETS})
    before = {name: getattr(seen, name).weight.detach().clone() for name in nets.TARGETS}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(nets.TARGETS),
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )

    def step() -> None:
        for name in nets.TARGETS:
            layer = getattr(seen, name)
            unit = torch.eye(layer.in_features, requires_grad=True)
            (layer(unit) * gradients[name].float().T).sum().backward()

    preprocess_loraga(seen, config, step)
    inject_adapter_in_model(config, seen)
    # PEFT takes its start out of the base weight: what is missing there is the start.
    return {name: before[name] - getattr(seen, name).base_layer.weight for name in nets.TARGETS}
