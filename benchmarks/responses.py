"""How strongly the change of an adapter answers the inputs that its layers get while a prompt is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dreamrie.diffusion.components import load_components
from dreamrie.diffusion.pipeline import sample
from dreamrie.lora import LowRank
from dreamrie.lora.comparing import as_matrix

SEEDS = (1, 2, 3)


def answers(
    model: nn.Module, changes: Sequence[Mapping[str, LowRank]], run: Callable[[], object]
) -> list[dict[str, float]]:
    """|D x| over all inputs x of each layer while the model runs.

    Args:
        model: with linear layers of these names, without adapter.
        changes: of several adapters, by layer.
        run: calls the model.

    Returns:
        For each adapter, by layer.
    """
    sums = [dict.fromkeys(part, 0.0) for part in changes]
    # |left (right x)| is |R (right x)| with left = Q R: no dense change is needed.
    thin = [{name: _thin(as_matrix(change)) for name, change in part.items()} for part in changes]
    hooks = []
    for layer in {name for part in changes for name in part}:

        def listen(_: nn.Module, inputs: tuple[Tensor, ...], layer: str = layer) -> None:
            x = inputs[0].detach().flatten(0, -2).double()
            for total, part in zip(sums, thin, strict=True):
                if layer in part:
                    total[layer] += float((x @ part[layer].T).square().sum())

        hooks.append(model.get_submodule(layer).register_forward_pre_hook(listen))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [{name: value**0.5 for name, value in total.items()} for total in sums]


def _thin(change: LowRank) -> Tensor:
    """(k, in), with the same |D x| as the change."""
    return torch.linalg.qr(change.left).R @ change.right


def shares_on_other(
    changes: Sequence[Mapping[str, LowRank]], own: str, other: str
) -> tuple[float, ...]:
    """Answer of each adapter to the prompt of the other concept over that to its own, median over layers.

    Args:
        changes: of adapters of one concept, on the embedded model.
        own: its prompt.
        other: the prompt of the other concept, drawn from the same seeds by the base model.

    Returns:
        For each adapter; 1 means that it does not tell the two prompts apart.
    """
    components = load_components(None)

    def drawn(prompt: str) -> list[dict[str, float]]:
        def run() -> object:
            return sample(
                components, [prompt] * len(SEEDS), list(SEEDS),
                steps=10, guidance_scale=4.0, batch_size=len(SEEDS),
            )  # fmt: skip

        return answers(components.unet, changes, run)

    ratios = [
        torch.tensor([there[name] / here[name] for name in here])
        for here, there in zip(drawn(own), drawn(other), strict=True)
    ]
    return tuple(float(values.median()) for values in ratios)
