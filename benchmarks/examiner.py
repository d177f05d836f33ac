"""Draws with the base model or a saved adapter, and scores what was drawn, on seeds that no training has used."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dreamrie.config import TrainConfig
from dreamrie.diffusion.adapters import load_saved_adapter
from dreamrie.diffusion.components import load_components
from dreamrie.diffusion.images import contact_sheet, list_images, load_image, save_png
from dreamrie.diffusion.pipeline import sample
from dreamrie.streams import derive_seed
from eval import metrics
from eval.encoders import Encoder
from eval.pictures import is_blank
from eval.prompts import load_prompts
from eval.training import StepScores, Yardstick


class Examiner:
    """Draws and scores on seeds that neither training nor its scores have used.

    Args:
        encoders: for image similarity and for text similarity.
        sampling: steps, guidance and batch size.
    """

    def __init__(self, encoders: tuple[Encoder, Encoder], sampling: tuple[int, float, int]) -> None:
        self.image, self.reader = encoders
        self.sampling = sampling

    def draw(
        self, config: TrainConfig, adapter: Path | None, count: int, stream: str
    ) -> tuple[int, list[Image.Image]]:
        """Draw `count` pictures of the embedded prompts with the base model or an adapter; also returns its step."""
        components = load_components(config.model.pretrained_model_name_or_path)
        step = 0
        if adapter is not None:
            step = int(load_saved_adapter(components, adapter)["steps"])
        token, subject = str(config.scores.token), str(config.scores.subject_class)
        prompts = load_prompts("embedded").spread(count)
        steps, guidance, batch = self.sampling
        pictures = sample(
            components,
            [prompt.text(f"{token} {subject}") for prompt in prompts],
            [derive_seed(1, stream, number) for number in range(count)],
            steps=steps,
            guidance_scale=guidance,
            batch_size=batch,
        )
        blank = [number for number, picture in enumerate(pictures) if is_blank(picture)]
        if blank:
            raise SystemExit(
                f"{adapter}: {len(blank)} blank pictures, the first is number {blank[0]}"
            )
        return step, pictures

    def scores(
        self, config: TrainConfig, adapter: Path | None, count: int, stream: str, sheet: Path
    ) -> tuple[StepScores, Yardstick]:
        """Score the base model or an adapter on `count` pictures of the embedded prompts."""
        step, pictures = self.draw(config, adapter, count, stream)
        prompts = load_prompts("embedded").spread(count)
        subject = str(config.scores.subject_class)
        sheet.parent.mkdir(parents=True, exist_ok=True)
        save_png(contact_sheet(pictures[:22], columns=11), sheet)
        paths = list_images(config.data.instance_data_dir)
        real = self.image.embed_images([load_image(path) for path in paths])
        ours = self.image.embed_images(pictures)
        texts = [prompt.text(subject) for prompt in prompts]
        seen = self.reader.embed_images(pictures)
        nearest, nearest_real = metrics.copy_score(ours, real)
        distinct = list(dict.fromkeys(texts))
        own = [distinct.index(text) for text in texts]
        row = StepScores(
            step,
            metrics.image_similarity(ours, real),
            metrics.text_similarity(seen, self.reader.embed_texts(texts)),
            metrics.prompt_margin(seen, self.reader.embed_texts(distinct), own),
            nearest,
        )
        return row, Yardstick(tuple(texts), float(metrics.ceiling(real).mean()), nearest_real)
