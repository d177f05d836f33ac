"""Pictures of many trainings drawn side by side, and their scores by `eval`.

The prompts are those of the embedded set, the noise that every picture starts from depends on its number alone. Means
over the pictures are kept: image similarity, prompt margin, text similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from benchmarks.convergence.subjects import PICTURES, TOKEN, words_of
from dreamrie.diffusion.components import Components
from dreamrie.diffusion.images import list_images, load_image_and_alpha
from dreamrie.diffusion.pipeline import encode_prompts
from dreamrie.streams import derive_seed
from eval import metrics
from eval.encoders import Encoder, load_encoder
from eval.pictures import is_blank
from eval.prompts import load_prompts

ENCODERS = ("effnet-lite2-64-160", "tiny-clip")
SAMPLING_STEPS, GUIDANCE = 10, 4.0
# Pictures that the decoder takes at a time.
_DECODED = 256


@dataclass(frozen=True)
class Found:
    """Means over the pictures of one training at one step."""

    image: float
    margin: float
    text: float


def moved(encoder: Encoder, device: torch.device) -> Encoder:
    """The same encoder with its networks on a device; pictures and embeddings stay on the processor."""
    image, text = encoder._encode_images, encoder._encode_texts
    network: Any = getattr(image, "__self__", image)
    network.to(device)

    def encode(pixels: Tensor) -> Tensor:
        return image(pixels.to(device)).cpu()

    def read(texts: list[str]) -> Tensor:
        # Texts are embedded once, before the network has moved.
        raise RuntimeError("texts are embedded before the encoder is moved")

    return Encoder(
        encoder.name,
        encoder.image_score,
        encoder.text_score,
        encoder.preprocessing,
        encoder.weights_sha256,
        encoder._views,
        encode,
        None if text is None else read,
    )


class Judge:
    """Draws and scores with everything prepared once.

    Args:
        components: the model; the U-Net to draw with is given each time.
        concepts: whatever may be scored.
        count: pictures of each training.
    """

    def __init__(self, components: Components, concepts: Sequence[str], count: int) -> None:
        self._parts, self._count = components, count
        device = components.device
        looker, reader = (load_encoder(name) for name in ENCODERS)
        self._prompts = load_prompts("embedded").spread(count)
        self._texts = {name: self._read(reader, words_of(name)) for name in concepts}
        self._looker, self._reader = moved(looker, device), moved(reader, device)
        self._real = {name: self._look(name) for name in concepts}
        self._embedded = {name: self._embed(name) for name in concepts}
        self._empty = encode_prompts(components, [""]).float()
        channels, side = components.unet.config.in_channels, components.unet.config.sample_size
        generators = (torch.Generator().manual_seed(self.seed(i)) for i in range(count))
        self._noise = torch.stack(
            [torch.randn(channels, side, side, generator=generator) for generator in generators]
        ).to(device)
        self._processor = VaeImageProcessor()
        self.facts = {
            "pictures": count,
            "sampling": [SAMPLING_STEPS, GUIDANCE],
            "prompts": load_prompts("embedded").sha256[:16],
            "encoders": {e.name: e.weights_sha256[:16] for e in (looker, reader)},
            "metrics": {
                name: metrics.VERSIONS[name]
                for name in ("image_similarity", "prompt_margin", "text_similarity", "ceiling")
            },
        }

    @staticmethod
    def seed(number: int) -> int:
        """Seed of the noise of a picture, the same for every training."""
        return derive_seed(2, "convergence", number)

    def prompts(self, concept: str) -> list[str]:
        """What is drawn, token included."""
        return [prompt.text(f"{TOKEN} {words_of(concept)}") for prompt in self._prompts]

    def _read(self, reader: Encoder, words: str) -> tuple[Tensor, Tensor, list[int]]:
        """Texts of the pictures, every different one of them, and which is whose."""
        texts = [prompt.text(words) for prompt in self._prompts]
        distinct = list(dict.fromkeys(texts))
        own = [distinct.index(text) for text in texts]
        return reader.embed_texts(texts), reader.embed_texts(distinct), own

    def _look(self, concept: str) -> Tensor:
        """Embeddings of the real pictures."""
        paths = list_images(PICTURES / concept)
        return self._looker.embed_images([load_image_and_alpha(path)[0] for path in paths])

    def _embed(self, concept: str) -> Tensor:
        """Text embeddings of the prompts, (count, tokens, width)."""
        return encode_prompts(self._parts, self.prompts(concept)).float()

    def ceiling(self, concept: str) -> float:
        """How similar the real pictures are to each other."""
        return float(metrics.ceiling(self._real[concept]).mean())

    @torch.no_grad()
    def draw(
        self, unet: Any, concepts: Sequence[str], guidance: float = GUIDANCE
    ) -> list[list[Image.Image] | None]:
        """Pictures of every training of a stack; None where the numbers are not finite."""
        runs, count = len(concepts), self._count
        text = torch.cat(
            [
                part
                for name in concepts
                for part in (self._empty.expand(count, -1, -1), self._embedded[name])
            ]
        )
        scheduler = DDIMScheduler.from_config(self._parts.scheduler_config)
        scheduler.set_timesteps(SAMPLING_STEPS)
        latents = self._noise.repeat(runs, 1, 1, 1) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            # Of each training the pictures without text, then those with text.
            halves = latents.view(runs, 1, count, *latents.shape[1:]).expand(-1, 2, *[-1] * 4)
            output = unet(
                halves.reshape(-1, *latents.shape[1:]), timestep, encoder_hidden_states=text
            ).sample
            plain, led = output.view(runs, 2, count, *latents.shape[1:]).unbind(1)
            guided = (plain + guidance * (led - plain)).flatten(0, 1)
            latents = scheduler.step(guided, timestep, latents).prev_sample
        finite = latents.view(runs, -1).isfinite().all(1).tolist()
        vae = self._parts.vae
        scaled = (latents / vae.config.scaling_factor).nan_to_num()
        pixels = [vae.decode(part, return_dict=False)[0] for part in scaled.split(_DECODED)]
        pictures = self._processor.postprocess(torch.cat(pixels), output_type="pil")
        return [
            pictures[count * run : count * (run + 1)] if good else None
            for run, good in enumerate(finite)
        ]

    def __call__(
        self, unet: Any, concepts: Sequence[str], guidance: float = GUIDANCE
    ) -> list[Found | None]:
        """Scores of every training of a stack.

        Args:
            unet: row k of the stack belongs to the k-th concept.
            concepts: of the trainings.
            guidance: of the pictures.

        Returns:
            Means; None where a picture is blank or not finite.
        """
        unet.eval()
        drawn = [
            None if pictures is None or any(map(is_blank, pictures)) else pictures
            for pictures in self.draw(unet, concepts, guidance)
        ]
        every = [picture for pictures in drawn for picture in pictures or []]
        if not every:
            return [None] * len(concepts)
        looks = iter(self._looker.embed_images(every).split(self._count))
        reads = iter(self._reader.embed_images(every).split(self._count))
        return [
            None if pictures is None else self._score(name, next(looks), next(reads))
            for name, pictures in zip(concepts, drawn, strict=True)
        ]

    def _score(self, concept: str, look: Tensor, seen: Tensor) -> Found:
        """Means of one training from the embeddings of its pictures."""
        texts, distinct, own = self._texts[concept]
        values = (
            metrics.image_similarity(look, self._real[concept]),
            metrics.prompt_margin(seen, distinct, own),
            metrics.text_similarity(seen, texts),
        )
        return Found(*(float(value.mean()) for value in values))
