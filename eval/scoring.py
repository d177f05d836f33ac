"""Scores of pictures that exist already: what is computed from which embeddings, and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from eval import metrics
from eval.encoders import Encoder
from eval.pictures import Folder, without_token


class Measure(Protocol):
    """What a score says about where it comes from; encoders say it, and so do LPIPS and pixels."""

    @property
    def name(self) -> str:
        """As printed below the table."""

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights; "none" without any."""

    @property
    def preprocessing(self) -> str:
        """What happens to a picture first, in words."""


@dataclass(frozen=True)
class Score:
    """One number with everything that it depends on.

    Attributes:
        name: as printed, for instance `DINO` or `tiny-clip text`.
        mean: over pictures. interval: 95 %, drawn over prompts, or None for a mean over real pictures.
        values: the single scores by file name, before any averaging.
        metric: name and version. encoder, weights_sha256, preprocessing: see `Encoder`.
    """

    name: str
    mean: float
    interval: tuple[float, float] | None
    values: Mapping[str, float]
    metric: str
    encoder: str
    weights_sha256: str
    preprocessing: str


def make_score(
    name: str,
    values: Tensor,
    of: Sequence[str],
    metric: str,
    encoder: Measure,
    groups: Sequence[str] | None,
) -> Score:
    """Summarize the single values of a metric.

    Args:
        name: as printed.
        values: (n,).
        of: what each value belongs to, mostly a file name.
        metric: key of `metrics.VERSIONS`.
        encoder: what the values were computed with.
        groups: prompt of each value, over which the interval is drawn; None: no interval.

    Returns:
        The score.
    """
    interval = None
    if groups is not None and len(set(groups)) > 1:
        interval = metrics.bootstrap_interval(values, groups)
    return Score(
        name,
        float(values.mean()),
        interval,
        dict(zip(of, values.tolist(), strict=True)),
        f"{metric} v{metrics.VERSIONS[metric]}",
        encoder.name,
        encoder.weights_sha256,
        encoder.preprocessing,
    )


def score_folders(
    encoder: Encoder,
    generated: Folder,
    reference: Folder,
    prompts: Sequence[str] | None = None,
    token: str = "",
) -> list[Score]:
    """Score one folder against another with one encoder.

    Args:
        encoder: see `load_encoder`.
        generated: generated pictures.
        reference: at least two real ones.
        prompts: prompt of each generated picture; gives text similarity and intervals over prompts.
        token: rare token that is left out of the prompts for text similarity.

    Returns:
        Image similarity, its ceiling (real against real), nearest real picture (generated and real), and text
        similarity where there are prompts and the encoder reads texts.
    """
    ours = encoder.embed_images(generated.images)
    real = encoder.embed_images(reference.images)
    groups = list(prompts) if prompts is not None else list(generated.names)
    nearest, nearest_real = metrics.copy_score(ours, real)
    image, name = metrics.image_similarity(ours, real), encoder.image_score
    scores = [
        make_score(name, image, generated.names, "image_similarity", encoder, groups),
        make_score(
            f"{name}, real against real",
            metrics.ceiling(real),
            reference.names,
            "ceiling",
            encoder,
            None,
        ),
        make_score(
            f"{name}, nearest real", nearest, generated.names, "copy_score", encoder, groups
        ),
        make_score(
            f"{name}, nearest, real to real",
            nearest_real,
            reference.names,
            "copy_score",
            encoder,
            None,
        ),
    ]
    if prompts is not None and encoder.text_score is not None:
        texts = encoder.embed_texts([without_token(prompt, token) for prompt in prompts])
        text = metrics.text_similarity(ours, texts)
        of = generated.names
        scores.append(make_score(encoder.text_score, text, of, "text_similarity", encoder, groups))
    return scores


def intervals(values: Tensor, groups: Sequence[str]) -> str:
    """Mean and 95 % interval over prompts as text.

    Args:
        values: (n,).
        groups: prompt of each value.

    Returns:
        "0.412 [0.389 0.435]".
    """
    low, high = metrics.bootstrap_interval(values, groups)
    return f"{float(values.mean()):.3f} [{low:.3f} {high:.3f}]"


def table(scores: Sequence[Score]) -> str:
    """A line for each score, and a line for each encoder saying what the numbers depend on."""
    width = max(len(score.name) for score in scores)
    lines = [f"{'score':<{width}}  {'mean':>7}  {'95 % interval':>16}  pictures  metric"]
    for score in scores:
        interval = "" if score.interval is None else "{:.4f} {:.4f}".format(*score.interval)
        lines.append(
            f"{score.name:<{width}}  {score.mean:7.4f}  {interval:>16}  {len(score.values):8d}  {score.metric}"
        )
    return "\n".join([*lines, "", *provenance(scores)])


def provenance(scores: Sequence[Score]) -> list[str]:
    """What numbers depend on, a line for each encoder: numbers that differ here do not share a table.

    Args:
        scores: any.

    Returns:
        Name, hash of the weights, preprocessing, metrics with their versions.
    """
    lines = []
    for name in dict.fromkeys(score.encoder for score in scores):
        own = [score for score in scores if score.encoder == name]
        versions = ", ".join(dict.fromkeys(score.metric for score in own))
        lines.append(
            f"{name}: weights {own[0].weights_sha256[:16]}, {own[0].preprocessing}; {versions}"
        )
    return lines
