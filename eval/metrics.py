"""The scores, as pure functions of normalized embeddings; each has a version that its golden test pins.

Embeddings have shape (n, d) and rows of norm 1. A changed definition demands a new version: numbers of two versions
must not share a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamrie.errors import ConfigError, NumericalError

VERSIONS = {
    "image_similarity": 1,
    "text_similarity": 1,
    "ceiling": 1,
    "copy_score": 1,
    "prior_drift": 1,
    "prompt_retrieval": 1,
    "prompt_margin": 1,
    "diversity": 1,
    "background_color": 1,
}
_NORM_TOLERANCE = 1e-3


def _check(what: str, embeddings: Tensor, least: int = 1) -> Tensor:
    """Return the embeddings in fp64, or say what is wrong with them."""
    if embeddings.ndim != 2 or len(embeddings) < least:
        raise ConfigError(
            f"{what}: at least {least} embeddings (n, d) are needed, got {tuple(embeddings.shape)}."
        )
    if not bool(torch.isfinite(embeddings).all()):
        rows = (~torch.isfinite(embeddings).all(1)).nonzero().flatten().tolist()
        raise NumericalError(f"{what}: embeddings {rows} are not finite.")
    norms = embeddings.double().norm(dim=1)
    if float((norms - 1).abs().max()) > _NORM_TOLERANCE:
        raise ConfigError(
            f"{what}: embeddings must have norm 1, got norms up to {norms.max():.4g}."
        )
    return embeddings.double()


def image_similarity(generated: Tensor, reference: Tensor) -> Tensor:
    """Mean cosine to all reference pictures (DreamBooth, Ruiz et al. 2023), one value for each generated one.

    Args:
        generated: (n, d).
        reference: (m, d).

    Returns:
        (n,) in [-1, 1]; its mean is the mean over all pairs.

    Raises:
        ConfigError: an empty or not normalized side. NumericalError: a value that is not finite.
    """
    left, right = _check("generated", generated), _check("reference", reference)
    return (left @ right.T).mean(1)


def text_similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each picture and its own prompt, whose rare token has been left out.

    Args:
        images: (n, d).
        texts: (n, d), row i belongs to picture i.

    Returns:
        (n,) in [-1, 1].

    Raises:
        ConfigError: unequal numbers, an empty or not normalized side. NumericalError: a value that is not finite.
    """
    left, right = _check("images", images), _check("texts", texts)
    if left.shape != right.shape:
        raise ConfigError(
            f"each picture needs its own prompt: {len(left)} pictures, {len(right)} prompts."
        )
    return (left * right).sum(1)


def ceiling(reference: Tensor) -> Tensor:
    """How similar the real pictures are to each other: mean cosine to the others, for each one.

    Args:
        reference: (m, d), at least two.

    Returns:
        (m,); a picture is never compared with itself.

    Raises:
        ConfigError: fewer than two, or not normalized. NumericalError: a value that is not finite.
    """
    rows = _check("reference", reference, 2)
    cosines = rows @ rows.T
    return (cosines.sum(1) - cosines.diagonal()) / (len(rows) - 1)


def copy_score(generated: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to the nearest training picture, and the same among the training pictures themselves.

    Args:
        generated: (n, d).
        training: (m, d), at least two.

    Returns:
        (n,) for the generated pictures, and (m,) with each training picture left out of its own neighbours. Generated
        pictures that lie nearer to one photo than the photos lie to each other are copies.

    Raises:
        ConfigError: too few, or not normalized. NumericalError: a value that is not finite.
    """
    left, right = _check("generated", generated), _check("training", training, 2)
    own = right @ right.T
    own.fill_diagonal_(-torch.inf)
    return (left @ right.T).amax(1), own.amax(1)


def prior_drift(base: Tensor, adapted: Tensor) -> Tensor:
    """How far pictures of unrelated prompts moved: (1 - cosine) / 2 of two pictures of one prompt and seed.

    Args:
        base: (n, d), of the base model.
        adapted: (n, d), row i has the prompt and seed of row i of `base`.

    Returns:
        (n,) in [0, 1]; 0 where nothing moved.

    Raises:
        ConfigError: unequal numbers, an empty or not normalized side. NumericalError: a value that is not finite.
    """
    left, right = _check("base", base), _check("adapted", adapted)
    if left.shape != right.shape:
        raise ConfigError(
            f"each picture needs its counterpart: {len(left)} of the base model, {len(right)} adapted."
        )
    return (1 - (left * right).sum(1)) / 2


def _cosines_to_prompts(images: Tensor, texts: Tensor, own: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines (n, k) of pictures to all prompts of a set, and the row of each picture's own prompt (n,)."""
    left, right = _check("images", images), _check("texts", texts, 2)
    if len(own) != len(left):
        raise ConfigError(
            f"each picture needs its own prompt: {len(left)} pictures, {len(own)} rows."
        )
    return left @ right.T, torch.tensor(list(own))


def prompt_retrieval(images: Tensor, texts: Tensor, own: Sequence[int]) -> Tensor:
    """Whether a picture is nearer to its own prompt than to any other prompt of the set.

    Args:
        images: (n, d).
        texts: (k, d), every different prompt once.
        own: row of `texts` that belongs to each picture.

    Returns:
        (n,), 1 or 0; its mean is the share of pictures that are recognized.

    Raises:
        ConfigError: numbers differ, fewer than two prompts, not normalized. NumericalError: not finite.
    """
    cosines, rows = _cosines_to_prompts(images, texts, own)
    return (cosines.argmax(1) == rows).double()


def prompt_margin(images: Tensor, texts: Tensor, own: Sequence[int]) -> Tensor:
    """How much nearer a picture is to its own prompt than to the other prompts of the set, on average.

    What all prompts share, such as the subject, cancels: the margin says whether the rest of the prompt is followed.
    It is 0 for pictures that ignore their prompts, with any encoder.

    Args:
        images: (n, d).
        texts: (k, d), every different prompt once.
        own: row of `texts` that belongs to each picture.

    Returns:
        (n,), cosine to the own prompt minus the mean cosine to the others.

    Raises:
        ConfigError: numbers differ, fewer than two prompts, not normalized. NumericalError: not finite.
    """
    cosines, rows = _cosines_to_prompts(images, texts, own)
    mine = cosines.gather(1, rows.unsqueeze(1)).squeeze(1)
    return mine - (cosines.sum(1) - mine) / (cosines.shape[1] - 1)


def bootstrap_weights(groups: Sequence[str], samples: int = 2000, seed: int = 0) -> Tensor:
    """Weights that turn single values into means over drawn prompts: pictures of one prompt are not independent.

    Args:
        groups: prompt of each of n values; without prompts each value is a group of its own.
        samples: number of draws.
        seed: of the draws; the same for every score of a table, so that differences are paired.

    Returns:
        (samples, n), rows of sum 1; `weights @ values` are the means.
    """
    names = sorted(set(groups))
    rows = torch.tensor([names.index(group) for group in groups])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(names), (samples, len(names)), generator=generator)
    counts = torch.zeros(samples, len(names), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    weights = counts[:, rows]
    return weights / weights.sum(1, keepdim=True)


def percentile_interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Interval that holds the middle of some draws.

    Args:
        values: (draws,).
        level: coverage in (0, 1).

    Returns:
        Lower and upper end.
    """
    tail = (1 - level) / 2
    low, high = torch.quantile(values.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)


def bootstrap_interval(
    values: Tensor,
    groups: Sequence[str],
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a mean, drawn over whole prompts.

    Args:
        values: (n,) scores of single pictures.
        groups: prompt of each picture; without prompts each picture is a group of its own.
        samples: number of draws.
        level: coverage in (0, 1).
        seed: of the draws.

    Returns:
        Lower and upper end for the mean over all pictures.

    Raises:
        ConfigError: numbers of values and groups differ, or there are fewer than two groups.
    """
    count = len(set(groups))
    if len(values) != len(groups) or count < 2:
        raise ConfigError(
            f"an interval needs at least two groups and one for each score; got {len(values)} scores in "
            f"{len(groups)} places of {count} groups."
        )
    means = bootstrap_weights(groups, samples, seed) @ values.double()
    return percentile_interval(means, level)
