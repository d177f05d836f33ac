"""What every encoder offers, and the hash that tells its weights apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from dreamrie.errors import ConfigError

_BATCH = 32


@dataclass(frozen=True)
class Encoder:
    """A frozen network with its preprocessing.

    Attributes:
        name: name in the registry.
        image_score: name under which image similarity is printed; text_score: the same for text similarity, or
            None if the network reads no texts. Only the real networks bear the names DINO and CLIP.
        preprocessing: what happens to a picture before the network sees it, in words; two ways separated by "; "
            give two embeddings, which are joined.
        weights_sha256: see `weights_sha256`.
    """

    name: str
    image_score: str
    text_score: str | None
    preprocessing: str
    weights_sha256: str
    _views: Sequence[Callable[[Image.Image], Tensor]]
    _encode_images: Callable[[Tensor], Tensor]
    _encode_texts: Callable[[list[str]], Tensor] | None = None

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed RGB pictures of any size.

        Args:
            images: at least one picture.

        Returns:
            (n, d) fp32, rows of norm 1.

        Raises:
            ConfigError: no picture was given.
        """
        if not images:
            raise ConfigError(f"encoder {self.name!r}: no pictures to embed.")
        rows = []
        for start in range(0, len(images), _BATCH):
            part = [image.convert("RGB") for image in images[start : start + _BATCH]]
            seen = [
                self._encode_images(torch.stack([view(image) for image in part])).float()
                for view in self._views
            ]
            # Each at norm 1 before they are joined: the cosine is then the mean of the cosines of all views.
            rows.append(torch.cat([normalize(view, dim=1) for view in seen], dim=1))
        return normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts into the space of the pictures.

        Args:
            texts: at least one text.

        Returns:
            (n, d) fp32, rows of norm 1.

        Raises:
            ConfigError: no text was given, or the network reads no texts.
        """
        if self._encode_texts is None:
            raise ConfigError(f"encoder {self.name!r} reads pictures only.")
        if not texts:
            raise ConfigError(f"encoder {self.name!r}: no texts to embed.")
        return normalize(self._encode_texts(list(texts)).float(), dim=1)


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash the content of weights, whatever file they came in.

    Args:
        state: names and tensors of a network.

    Returns:
        SHA-256 over name, dtype, shape and bytes of every tensor, sorted by name, as 64 hex digits.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
