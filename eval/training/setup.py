"""From the settings of a training to its scorer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dreamrie.config import TrainConfig
from dreamrie.diffusion.images import list_images, load_image_and_alpha
from dreamrie.diffusion.pipeline import Components, check_prompt
from dreamrie.diffusion.source import EMBEDDED
from dreamrie.errors import ConfigError
from eval.encoders import Encoder, load_encoder
from eval.prompts import SUBJECT, load_prompts
from eval.training.scorer import ConceptScorer, Plan

_DRIFT_PROMPTS = 4
# The embedded model is small enough for all pictures at a time.
_BATCH = 16


def make_scorer(config: TrainConfig, components: Components, folder: Path) -> ConceptScorer:
    """Build the scorer of a run.

    Args:
        config: resolved settings, with `score_steps`.
        components: the model in training, with its adapter.
        folder: output folder of the run.

    Returns:
        The scorer; it has drawn nothing yet.

    Raises:
        ConfigError: an encoder cannot be had, prompts cannot be read, or there is one picture only.
    """
    scores = config.scores
    # As the training sees them: what is transparent lies on the same color.
    paths, background = list_images(config.data.instance_data_dir), config.data.background_rgb
    pictures = tuple(load_image_and_alpha(path, background)[0] for path in paths)
    if len(pictures) < 2:
        raise ConfigError(
            f"scores need at least two pictures of the concept, because they are judged by how similar the pictures "
            f"are to each other; {config.data.instance_data_dir} holds {len(pictures)}\n"
            "  where: --score_steps\n"
            "  what to do: add a picture, or leave --score_steps out"
        )
    token, subject = str(scores.token), str(scores.subject_class)
    prompt_set = load_prompts(str(scores.score_prompts), subject_class=subject)
    if not prompt_set.has_subject or len(prompt_set.prompts) < 2:
        raise ConfigError(
            f"the prompts {prompt_set.name} cannot be scored: there must be at least two, each with {SUBJECT}\n"
            "  where: --score_prompts\n"
            f"  what to do: name another set, or write one prompt a line, such as 'a {SUBJECT} in the snow'"
        )
    chosen = prompt_set.spread(scores.score_images)
    is_embedded = components.source.resolved == EMBEDDED
    drift_set = "drift-embedded" if is_embedded else "drift"
    drift = load_prompts(drift_set).spread(_DRIFT_PROMPTS)
    prompts = tuple(prompt.text(f"{token} {subject}") for prompt in chosen)
    for prompt in prompts:
        check_prompt(components.tokenizer, prompt, "--score_prompts")
    image_encoder, text_encoder = encoder_pair(scores.score_encoders or [])
    plan = Plan(
        prompt_set=f"{prompt_set.name} {prompt_set.sha256}",
        prompts=prompts,
        texts=tuple(prompt.text(subject) for prompt in chosen),
        drift_prompts=tuple(prompt.text("") for prompt in drift),
        reference=pictures,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        steps=scores.score_inference_steps or 25,
        guidance_scale=float(config.validation.guidance_scale or 0.0),
        batch_size=max(config.prior.sample_batch_size, _BATCH if is_embedded else 1),
        max_steps=config.schedule.max_train_steps,
        from_export=config.validation.preview_from_export,
    )
    return ConceptScorer(components, plan, folder)


def encoder_pair(entries: Sequence[str]) -> tuple[Encoder, Encoder | None]:
    """The encoder of pictures, which is the first, and the first that reads texts.

    Args:
        entries: one or two of `NAME` or `NAME=FILE`.

    Returns:
        Both; the second is None if none reads texts.

    Raises:
        ConfigError: weights cannot be had, or an encoder would not be used.
    """
    loaded = []
    for entry in entries:
        name, _, file = entry.partition("=")
        loaded.append(load_encoder(name, Path(file) if file else None))
    reader = next((encoder for encoder in loaded if encoder.text_score is not None), None)
    idle = [encoder.name for encoder in loaded if encoder not in (loaded[0], reader)]
    if idle:
        raise ConfigError(
            f"encoder {idle[0]} would not be used: the first is for pictures, the first that reads texts for prompts\n"
            "  where: --score_encoders\n"
            "  what to do: give one for pictures and one that reads texts; python -m eval run takes any number"
        )
    return loaded[0], reader
