"""A U-Net that starts by copying: before training it predicts that all of the picture is noise.

Epsilon prediction asks for the noise to about a percent where nearly all is noise: what is left of it there is the picture that
the prompt decides. The normalization before the last convolution divides by a standard deviation that is estimated from
the very noise to be copied, so with few numbers in a group the copy is off by ten percent. Large groups and the exact path
that is written here leave the network to learn the picture only: silu(x) - silu(-x) = x.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import nn


def _center(layer: nn.Conv2d) -> torch.Tensor:
    return layer.weight[:, :, layer.kernel_size[0] // 2, layer.kernel_size[1] // 2]


@torch.no_grad()
def write_copy(model: UNet2DConditionModel) -> None:
    """Make the output of an untrained model nearly its noisy input, whatever the prompt and the noise level.

    Args:
        model: of equal input and output channels n, first width at least 2 n, and one group in its normalizations.
    """
    channels, width = model.config.in_channels, model.config.block_out_channels[0]
    last = model.up_blocks[-1]
    model.conv_in.weight[:channels] = 0.0
    model.conv_in.bias[:channels] = 0.0
    shortcut = last.resnets[-1].conv_shortcut
    shortcut.weight[: 2 * channels] = 0.0
    shortcut.bias.zero_()
    model.conv_out.weight.zero_()
    model.conv_out.bias.zero_()
    for index in range(channels):
        _center(model.conv_in)[index, index] = 1.0
        # The last block sees its own features first, then those of conv_in.
        _center(shortcut)[index, width + index] = 1.0
        _center(shortcut)[channels + index, width + index] = -1.0
        _center(model.conv_out)[index, index] = 1.0
        _center(model.conv_out)[index, channels + index] = -1.0
    for layer in (last.resnets[-1].conv2, last.attentions[-1].proj_out):
        layer.weight.zero_()
        layer.bias.zero_()
    noise = torch.randn(
        (64, channels, 8, 8), generator=torch.Generator().manual_seed(0)
    )  # what the last steps see
    words = torch.zeros(64, 1, model.config.cross_attention_dim)
    copied = model(noise, torch.zeros(64), words).sample
    gain = (copied * noise).sum() / copied.square().sum()
    model.conv_out.weight.mul_(gain)
