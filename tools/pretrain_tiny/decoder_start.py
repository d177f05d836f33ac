"""A decoder that starts as the linear decoder of the patch code.

A convolution after nearest-neighbour upsampling cannot tell an even from an odd pixel, so a linear patch decoder is not among
the linear functions of this network. It is among its ReLU functions: zero padding tells the border, a chain of convolutions
carries that to a ramp over the 8 x 8 cells, a ramp minus its neighbour tells even from odd at the next size, and a large
negative bias switches a channel off at the wrong parity. Each size then decodes its cells into four finer ones by one gated
block: 8 x 8 patch code -> 4 x 4 patch code -> 2 x 2 patch code -> pixels.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

LATENT_SHIFT = 1.5  # keeps signed latents, then codes, positive through ReLU
CODE_SHIFT = 4.0
GATE = 16.0  # larger than any shifted code
CODES = (32, 24, 12)  # numbers per cell at 8 x 8, 16 x 16, 32 x 32
BOOST = (1.0, 2.0)  # of the 4 x 4 and 2 x 2 codes, so that they stay inside CODE_SHIFT
RAMP = (60, 61)  # x, y
EVEN = (62, 63)
EDGE = ((54, 55), (56, 57), (58, 59))  # one pair for each of the three blocks
_LEFT = ((1, 0), (0, 1))  # kernel tap of the left (x) and upper (y) neighbour


def _quarters(basis: Tensor, factor: int) -> Tensor:
    """(4, 3 f f, k): the four quarter patches of each column (3 (2f)(2f), k), in order (row, column) parity."""
    whole = basis.reshape(3, 2, factor, 2, factor, -1).permute(1, 3, 0, 2, 4, 5)
    return whole.reshape(4, 3 * factor * factor, -1)


def _sub_basis(weighted: Tensor, count: int, factor: int) -> tuple[Tensor, Tensor]:
    """Principal directions (3 f f, count) of the quarters of weighted columns, and their weights (count,)."""
    quarters = _quarters(weighted, factor).permute(1, 0, 2).flatten(1)
    left, weights, _ = torch.linalg.svd(quarters, full_matrices=False)
    return left[:, :count], weights[:count]


def _center(layer: nn.Conv2d) -> Tensor:
    return layer.weight[:, :, 1, 1]


def _write_ramps(blocks: list[nn.Module]) -> None:
    """Three blocks, seven shifts of the border in x and in y, summed into ramps 1..8 over the 8 x 8 cells."""
    for number, block in enumerate(blocks):
        shifts = 3 if number < 2 else 1
        for axis in (0, 1):
            ramp, left = RAMP[axis], _LEFT[axis]
            edge = EDGE[number][axis]
            for index in range(3):
                layer = block.conv[2 * index]
                if index < shifts:
                    is_last = index == 2
                    target = EDGE[number + 1][axis] if is_last else edge
                    layer.weight[target, edge, left[0], left[1]] = 1.0
                    layer.weight[ramp, edge, left[0], left[1]] = 1.0
                if index > 0:
                    _center(layer)[ramp, ramp] = 1.0


def _write_gated_block(
    block: nn.Module, maps: Tensor, source: slice, target: slice, shift: float
) -> None:
    """Write sum over parities of [this parity] * (maps[parity] @ code), plus CODE_SHIFT, to `target`.

    Args:
        block: an AutoencoderTinyBlock of width 64.
        maps: (4, outputs, inputs), acting on unshifted codes.
        source: channels that hold code + `shift`.
        target: channels that are zero so far.
        shift: see `source`.
    """
    first, second, third = (block.conv[index] for index in (0, 2, 4))
    outputs = maps.shape[1]
    for parity in range(4):
        hidden = slice(parity * outputs, (parity + 1) * outputs)
        matrix = maps[parity].float()
        _center(first)[hidden, source] = matrix
        bias = CODE_SHIFT - shift * matrix.sum(1)
        for is_odd, even in ((parity % 2, EVEN[0]), (parity // 2, EVEN[1])):
            _center(first)[hidden, even] = -GATE if is_odd else GATE
            bias = bias - (0.0 if is_odd else GATE)
        first.bias[hidden] = bias
        for index in range(outputs):
            channel = parity * outputs + index
            _center(second)[channel, channel] = 1.0
            _center(third)[target.start + index, channel] = 1.0


def _write_upsampled(layer: nn.Conv2d, source: slice, target: slice) -> None:
    """The convolution after upsampling: move the code to `target`, refine ramps, tell even from odd."""
    for index in range(source.stop - source.start):
        _center(layer)[target.start + index, source.start + index] = 1.0
    for ramp, even, left in zip(RAMP, EVEN, _LEFT, strict=True):
        # The ramp is 1, 1, 2, 2, ... here. Minus its left neighbour it is 1 at even pixels; plus it, 1, 2, 3, 4, ...
        _center(layer)[even, ramp] = 1.0
        layer.weight[even, ramp, left[0], left[1]] = -1.0
        _center(layer)[ramp, ramp] = 1.0
        layer.weight[ramp, ramp, left[0], left[1]] = 1.0


def _wake_free_channels(block: nn.Module, generator: torch.Generator) -> None:
    """Random weights into the hidden channels that the start leaves unused, zero weights out: exact, and able to learn."""
    first, second = block.conv[0], block.conv[2]
    free = (first.weight.abs().sum((1, 2, 3)) == 0) & (second.weight.abs().sum((1, 2, 3)) == 0)
    scale = (2.0 / first.weight[0].numel()) ** 0.5
    first.weight[free] = (
        torch.randn(first.weight[free].shape, generator=generator) * scale / CODE_SHIFT
    )
    first.weight[:, EDGE[0][0] :][free] = 0.0  # positions are far larger than codes
    inner = torch.randn(second.weight.shape, generator=generator) * scale
    second.weight.copy_(
        torch.where(free[:, None, None, None] & free[None, :, None, None], inner, second.weight)
    )


@torch.no_grad()
def write_decoder(
    model: AutoencoderTiny, mean: Tensor, basis: Tensor, std: Tensor, gain: Tensor
) -> None:
    """Make `model.decoder` the decoder x = mean + basis (z / gain), up to the squash 3 tanh(z / 3).

    Args:
        model: AutoencoderTiny with decoder blocks (3, 2, 1, 1) of width 64.
        mean: (192,) of patches in [-1, 1], order of pixel_unshuffle(8); used as one mean color.
        basis: (192, 32) orthonormal. std: (32,) of the PCA coordinates. gain: (32,) latent per PCA coordinate.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.decoder.parameters():
        parameter.zero_()
    layers = list(model.decoder.layers)
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    blocks = [layer for layer in layers if hasattr(layer, "fuse")]

    # Patches in [0, 1] from latents, then the maps from a code to the codes of its four quarters.
    to_patch = basis * (0.5 / gain)
    basis4, weights4 = _sub_basis(basis * std, CODES[1], 4)
    basis2, _ = _sub_basis(basis4 * weights4, CODES[2], 2)
    to4 = torch.einsum("pfk,fc->pck", _quarters(to_patch, 4), basis4) * BOOST[0]
    to2 = torch.einsum("pfk,fc->pck", _quarters(basis4, 2), basis2) * (BOOST[1] / BOOST[0])
    to1 = _quarters(basis2, 1) / BOOST[1]

    for index in range(CODES[0]):
        _center(convs[0])[index, index] = 1.0
    convs[0].bias[: CODES[0]] = LATENT_SHIFT
    convs[0].bias[[*RAMP, *EDGE[0]]] = 1.0
    _write_ramps(blocks[:3])
    latents, code4, code2 = slice(0, 32), slice(32, 32 + CODES[1]), slice(32, 32 + CODES[2])
    _write_upsampled(convs[1], latents, latents)
    half = CODES[1] // 2
    for block, start in ((blocks[3], 0), (blocks[4], half)):
        target = slice(code4.start + start, code4.start + start + half)
        _write_gated_block(block, to4[:, start : start + half], latents, target, LATENT_SHIFT)
    _write_upsampled(convs[2], code4, slice(0, CODES[1]))
    _write_gated_block(blocks[5], to2, slice(0, CODES[1]), code2, CODE_SHIFT)
    _write_upsampled(convs[3], code2, slice(0, CODES[2]))
    _write_gated_block(blocks[6], to1, slice(0, CODES[2]), slice(32, 35), CODE_SHIFT)
    for block in blocks:
        _wake_free_channels(block, generator)
    mean_color = (mean.reshape(3, 64).mean(1) + 1) / 2
    for color in range(3):
        _center(convs[4])[color, 32 + color] = 1.0
        convs[4].bias[color] = mean_color[color].float() - CODE_SHIFT
