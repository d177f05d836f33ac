"""Which scores a run gets: every encoder on the pictures of the subject, drift, background, diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from eval import metrics, scoring
from eval.encoders import Encoder
from eval.generation import CONCEPT, DRIFT, DRIFT_BASE, Gallery
from eval.palette import background_color
from eval.pictures import Folder
from eval.scoring import Score, make_score


class Pixels:
    """The measure that looks at pixels."""

    name = "pixels"
    weights_sha256 = "none"
    preprocessing = "mean of the outer 5 %, nearest of 11 colors"


def image_scores(
    encoder: Encoder, gallery: Gallery, ours: Tensor, reference: Folder, real: Tensor
) -> list[Score]:
    """Likeness to the real pictures, and whether it is copying.

    Args:
        encoder: what the embeddings were made with.
        gallery: n pictures of the subject.
        ours: (n, d), their embeddings.
        reference: m real pictures.
        real: (m, d), their embeddings.

    Returns:
        Image similarity, its ceiling, and the nearest real picture of generated and of real ones.
    """
    nearest, nearest_real = metrics.copy_score(ours, real)
    files, prompts = files_of(gallery), [picture.prompt for picture in gallery.pictures]
    name, names = encoder.image_score, reference.names
    likeness, best = metrics.image_similarity(ours, real), metrics.ceiling(real)
    rows: list[tuple[str, Tensor, Sequence[str], str, list[str] | None]] = [
        (name, likeness, files, "image_similarity", prompts),
        (f"{name}, real against real", best, names, "ceiling", None),
        (f"{name}, nearest real", nearest, files, "copy_score", prompts),
        (f"{name}, nearest, real to real", nearest_real, names, "copy_score", None),
    ]
    return [make_score(*row[:4], encoder, row[4]) for row in rows]


def text_scores(encoder: Encoder, gallery: Gallery, ours: Tensor) -> list[Score]:
    """How well the prompts are followed, judged by the prompts without the rare token.

    Args:
        encoder: what the embeddings were made with.
        gallery: n pictures of the subject.
        ours: (n, d), their embeddings.

    Returns:
        Text similarity, the share of pictures that are nearer to their own prompt than to every other one of the set,
        and the margin; nothing if the encoder reads no texts.
    """
    if encoder.text_score is None:
        return []
    texts = list(dict.fromkeys(picture.text for picture in gallery.pictures))
    embedded = encoder.embed_texts(texts)
    own = [texts.index(picture.text) for picture in gallery.pictures]
    files, prompts = files_of(gallery), [picture.prompt for picture in gallery.pictures]
    name = encoder.text_score
    values = metrics.text_similarity(ours, embedded[own])
    scores = [make_score(name, values, files, "text_similarity", encoder, prompts)]
    if len(texts) > 1:
        values = metrics.prompt_retrieval(ours, embedded, own)
        title = f"{name}, own prompt nearest of {len(texts)}"
        scores.append(make_score(title, values, files, "prompt_retrieval", encoder, prompts))
        values = metrics.prompt_margin(ours, embedded, own)
        title = f"{name}, margin over the other prompts"
        scores.append(make_score(title, values, files, "prompt_margin", encoder, prompts))
    return scores


def drift_score(encoder: Encoder, gallery: Gallery) -> list[Score]:
    """How far pictures of unrelated prompts moved, if they were drawn.

    Args:
        encoder: what to embed them with.
        gallery: all pictures of the run.

    Returns:
        One score, keyed by the pictures with the adapter, or none.
    """
    adapted, base = gallery.of(DRIFT), gallery.of(DRIFT_BASE)
    if not adapted.pictures:
        return []
    values = metrics.prior_drift(
        encoder.embed_images(base.images), encoder.embed_images(adapted.images)
    )
    prompts = [picture.prompt for picture in adapted.pictures]
    title = f"{encoder.image_score}, drift of other prompts"
    return [make_score(title, values, files_of(adapted), "prior_drift", encoder, prompts)]


def background_score(gallery: Gallery, backgrounds: Mapping[str, str]) -> list[Score]:
    """Share of pictures on the plain color that was asked for.

    Args:
        gallery: pictures of the subject.
        backgrounds: color by prompt, for the prompts that name one.

    Returns:
        One score, or none if no prompt names a color.
    """
    part = gallery.keep([picture.prompt in backgrounds for picture in gallery.pictures])
    if not part.pictures:
        return []
    prompts = [picture.prompt for picture in part.pictures]
    values = background_color(part.images, [backgrounds[prompt] for prompt in prompts])
    files = files_of(part)
    return [make_score("background color", values, files, "background_color", Pixels(), prompts)]


def concept_scores(
    encoders: Sequence[Encoder],
    gallery: Gallery,
    reference: Folder,
    backgrounds: Mapping[str, str],
) -> list[Score]:
    """Every score that needs no further network.

    Args:
        encoders: at least one; the first measures the drift.
        gallery: all pictures of the run.
        reference: at least two real pictures.
        backgrounds: color by prompt.

    Returns:
        Scores by encoder, then those that belong to the run as a whole.
    """
    concept = gallery.of(CONCEPT)
    scores: list[scoring.Score] = []
    for encoder in encoders:
        ours, real = encoder.embed_images(concept.images), encoder.embed_images(reference.images)
        scores += image_scores(encoder, concept, ours, reference, real)
        scores += text_scores(encoder, concept, ours)
    return [*scores, *drift_score(encoders[0], gallery), *background_score(concept, backgrounds)]


def files_of(gallery: Gallery) -> list[str]:
    """Names of the pictures."""
    return [picture.file for picture in gallery.pictures]
