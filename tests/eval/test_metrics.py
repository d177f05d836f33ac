"""E1, E2, E3, E5: the scores worked out by hand, and the tempting wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamrie.errors import ConfigError, NumericalError
from eval import metrics


def unit(rows: list[list[float]]) -> Tensor:
    """Rows of norm 1, fp32 as encoders give them."""
    return F.normalize(torch.tensor(rows), dim=1)


def random_rows(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 7, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_golden_values_and_their_versions() -> None:
    """Two generated, three real: every number worked by hand; a changed value demands a new version."""
    ours, real = unit([[1, 0], [0.6, 0.8]]), unit([[1, 0], [0, 1], [0.8, 0.6]])
    close = {"rtol": 0, "atol": 1e-6, "check_dtype": False}
    image = metrics.image_similarity(ours, real)
    torch.testing.assert_close(image, torch.tensor([1.8 / 3, (0.6 + 0.8 + 0.96) / 3]), **close)
    torch.testing.assert_close(
        metrics.ceiling(real), torch.tensor([0.8 / 2, 0.6 / 2, 1.4 / 2]), **close
    )
    nearest, among = metrics.copy_score(ours, real)
    torch.testing.assert_close(nearest, torch.tensor([1.0, 0.96]), **close)
    torch.testing.assert_close(among, torch.tensor([0.8, 0.6, 0.8]), **close)
    paired = metrics.text_similarity(ours, real[:2])
    torch.testing.assert_close(paired, torch.tensor([1.0, 0.8]), **close)
    drift = metrics.prior_drift(ours, real[:2])
    torch.testing.assert_close(drift, torch.tensor([0.0, 0.1]), **close)
    found = metrics.prompt_retrieval(ours, real, [0, 1])
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]), **close)
    margin = metrics.prompt_margin(ours, real, [0, 1])
    expected = [1 - (0 + 0.8) / 2, 0.8 - (0.6 + 0.96) / 2]
    torch.testing.assert_close(margin, torch.tensor(expected), **close)
    assert metrics.VERSIONS == {
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


def test_equal_pictures_give_one_and_orthogonal_ones_zero() -> None:
    """E1, to 1e-6."""
    same = unit([[3.0, 4.0]]).expand(4, 2)
    for value in (metrics.image_similarity(same, same), metrics.ceiling(same)):
        assert float((value - 1).abs().max()) < 1e-6
    across = metrics.image_similarity(unit([[1.0, 0.0]]), unit([[0.0, 1.0], [0.0, -1.0]]))
    assert float(across.abs().max()) < 1e-6


def test_the_order_of_the_pictures_does_not_matter() -> None:
    """E2: each picture keeps its score wherever it stands, to 1e-12."""
    ours, real = random_rows(9, 1), random_rows(5, 2)
    turn, other = torch.randperm(9), torch.randperm(5)
    first, again = (
        metrics.image_similarity(ours, real),
        metrics.image_similarity(ours[turn], real[other]),
    )
    assert float(first.std()) > 0.05
    torch.testing.assert_close(again, first[turn], rtol=0, atol=1e-12)


def test_a_ceiling_with_the_diagonal_would_be_higher() -> None:
    """A picture compared with itself flatters the real ones: the tempting mean is 0.14 or more above."""
    real = random_rows(5, 3)
    tempting = (real @ real.T).mean(1)
    assert float((tempting - metrics.ceiling(real)).min()) > 0.1


def test_scores_without_normalized_features_are_refused() -> None:
    """The tempting dot product of raw features is an error, not a number."""
    with pytest.raises(ConfigError, match="norm 1"):
        metrics.image_similarity(2 * random_rows(2, 1), random_rows(3, 2))


def test_a_value_that_is_not_finite_is_named() -> None:
    """Row 1 is broken; it is not averaged away."""
    rows = random_rows(3, 1)
    rows[1, 0] = math.nan
    with pytest.raises(NumericalError, match=r"generated: embeddings \[1\]"):
        metrics.image_similarity(rows, random_rows(3, 2))


def test_pairs_must_be_complete() -> None:
    """A missing picture is an error, not a smaller mean."""
    with pytest.raises(ConfigError, match="3 pictures, 2 prompts"):
        metrics.text_similarity(random_rows(3, 1), random_rows(2, 2))


def test_one_real_picture_has_no_ceiling() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        metrics.ceiling(random_rows(1, 1))


def _interval_width(values: Tensor, groups: list[str]) -> float:
    low, high = metrics.bootstrap_interval(values, groups)
    return high - low


def test_the_interval_is_drawn_over_prompts() -> None:
    """Four equal pictures a prompt are one observation: drawn over pictures, the interval would be half as wide."""
    values = torch.randn(12, generator=torch.Generator().manual_seed(5)).repeat_interleave(4)
    prompts = [f"prompt {index // 4}" for index in range(48)]
    pictures = [f"picture {index}" for index in range(48)]
    assert 1.7 < _interval_width(values, prompts) / _interval_width(values, pictures) < 2.3


def test_the_interval_is_that_of_the_mean_over_pictures() -> None:
    """Nine pictures of each good prompt, one of each bad: the interval holds 0.82, not 0.5, the mean of prompts."""
    values = torch.tensor(([0.9] * 9 + [0.1]) * 20)
    prompts = [f"{kind} {index}" for index in range(20) for kind in ["good"] * 9 + ["bad"]]
    low, high = metrics.bootstrap_interval(values, prompts)
    assert 0.7 < low < float(values.mean()) < high < 0.9


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Of 200 samples of 30 normal scores, 95 % intervals hold the true mean 0 in 88 % to 99 %."""
    generator = torch.Generator().manual_seed(8)
    names = [str(index) for index in range(30)]
    held = 0
    for _ in range(200):
        low, high = metrics.bootstrap_interval(
            torch.randn(30, generator=generator), names, samples=400
        )
        held += low <= 0 <= high
    assert 176 <= held <= 198


def test_the_interval_is_reproducible_and_complete() -> None:
    """Same seed, same interval; one group or missing groups are errors."""
    values, names = torch.tensor([0.1, 0.4, 0.9]), ["a", "b", "c"]
    assert metrics.bootstrap_interval(values, names) == metrics.bootstrap_interval(values, names)
    for groups in (["a", "a", "a"], ["a", "b"]):
        with pytest.raises(ConfigError, match="groups"):
            metrics.bootstrap_interval(values, groups)


def test_what_all_prompts_share_cancels_in_the_margin() -> None:
    """Pictures of a subject that its class word does not fit lose text similarity, and keep their margin."""
    subject, places = torch.zeros(5), torch.eye(5)[1:4]
    subject[0] = 1.0
    other = torch.zeros(5)
    other[4] = 1.0
    texts = F.normalize(subject + places, dim=1)
    fits, does_not = F.normalize(subject + places, dim=1), F.normalize(other + places, dim=1)
    own = [0, 1, 2]
    assert float(metrics.text_similarity(fits, texts).mean()) == pytest.approx(1.0)
    assert float(metrics.text_similarity(does_not, texts).mean()) == pytest.approx(0.5)
    for pictures in (fits, does_not):
        margin = metrics.prompt_margin(pictures, texts, own)
        assert float(margin.min()) == pytest.approx(0.5, abs=1e-6)
    alike = F.normalize(subject + places.sum(0), dim=0).expand(3, 5)
    assert float(metrics.prompt_margin(alike, texts, own).abs().max()) < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: metrics.prior_drift(a, b[:2]),
        lambda a, b: metrics.prompt_retrieval(a, b, [0]),
        lambda a, b: metrics.prompt_margin(a, b, [0]),
        lambda a, b: metrics.prompt_margin(a, b[:1], [0, 0, 0]),
    ],
)
def test_numbers_that_do_not_fit_are_named(wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"needs its|at least 2"):
        wrong(random_rows(3, 1), random_rows(3, 2))
