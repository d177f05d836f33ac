"""How the judge of the toy model, a pretrained EfficientNet-Lite2 that has seen neither world nor model, sees it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.encoders.preprocessing import TF_LITE

_SIZE_PX = 160


@torch.no_grad()
def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Normalized features (n, 1280) of pictures (n, 3, h, w) in [-1, 1]."""
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in TF_LITE)
    rows = []
    for batch in images.split(32):
        large = F.interpolate(batch, size=(_SIZE_PX, _SIZE_PX), mode="bicubic", antialias=True)
        rows.append(model(((large.clamp(-1, 1) + 1) / 2 - mean) / std))
    return F.normalize(torch.cat(rows), dim=1)
