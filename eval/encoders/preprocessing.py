"""How a picture is brought to the size and statistics of a network: stated here, not left to a library's default."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.functional import pil_to_tensor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
TF_LITE = (
    (127 / 255,) * 3,
    (128 / 255,) * 3,
)  # the TensorFlow-trained Lite models take (x - 127) / 128
HALF = ((0.5,) * 3, (0.5,) * 3)


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side (bicubic, antialiased, on 8-bit pictures), crop the center, normalize.

    Attributes:
        resize_px: length of the shorter side; crop_px: side of the square that the network sees.
        statistics: mean and standard deviation of each channel, for values in [0, 1]; label: their name.
    """

    resize_px: int
    crop_px: int
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    label: str

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB picture to (3, crop_px, crop_px)."""
        geometry = Compose(
            [Resize(self.resize_px, InterpolationMode.BICUBIC), CenterCrop(self.crop_px)]
        )
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in self.statistics)
        return (pil_to_tensor(geometry(image)).float() / 255 - mean) / std

    def __str__(self) -> str:
        return f"resize {self.resize_px} bicubic, crop {self.crop_px}, {self.label} statistics"


DINO = Preprocessing(256, 224, IMAGENET, "ImageNet")
CLIP = Preprocessing(224, 224, OPENAI, "OpenAI")
EFFNET = Preprocessing(224, 224, TF_LITE, "TensorFlow")
# At 224 a picture of 64 pixels shows the grid of its codec first and its object second. Which sizes tell concepts
# apart: `python -m benchmarks.recognition`.
EFFNET_64 = Preprocessing(64, 64, TF_LITE, "TensorFlow")
EFFNET_160 = Preprocessing(160, 160, TF_LITE, "TensorFlow")
TINY = Preprocessing(64, 64, HALF, "0.5")
