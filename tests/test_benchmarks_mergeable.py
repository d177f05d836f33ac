"""The table of merged pairs: its arithmetic by hand, PEFT's merges by identity, and one small run from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import mergeable, responses
from dreamrie.lora import LowRank, combine
from tests.reference.nets import relative
from tests.strategies import F64, noise


def adapter(seed: int, rank: int = 3) -> dict[str, LowRank]:
    """Two layers of other sides."""
    return {
        "mid.to_q": LowRank(noise(seed, 9, rank), noise(seed + 1, rank, 14)),
        "mid.to_k": LowRank(noise(seed + 2, 11, rank), noise(seed + 3, rank, 8)),
    }


@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_pefts_merges_are_asked_for_the_sum() -> None:
    """Nothing dropped, the SVD methods are the plain sum; so is linear's product of sums, which is another matrix."""
    first, second = adapter(0), adapter(10)
    found = mergeable.peft_merge([first, second], "dare_linear_svd", 1.0, seed=0)
    factors = mergeable.peft_merge([first, second], "dare_linear", 1.0, seed=0)
    assert sorted(found) == sorted(first)
    for layer, change in found.items():
        truth = combine([first[layer], second[layer]]).dense()
        assert relative(change.dense(), truth) < 1e-5
        product = (first[layer].left + second[layer].left) @ (
            first[layer].right + second[layer].right
        )
        assert relative(factors[layer].dense(), product) < 1e-5


def test_dare_drops_by_its_seed_and_leaves_the_global_stream() -> None:
    parts = [adapter(0), adapter(10)]
    state = torch.get_rng_state()
    runs = [
        mergeable.peft_merge(parts, "dare_linear_svd", 0.5, seed)["mid.to_q"].dense()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0], runs[1])
    assert relative(runs[2], runs[0]) > 0.1


@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_adapters_of_unequal_rank_are_padded() -> None:
    first, second = adapter(0, 2), adapter(10, 4)
    found = mergeable.peft_merge([first, second], "dare_linear_svd", 1.0, seed=0)
    truth = combine([first["mid.to_q"], second["mid.to_q"]]).dense()
    assert relative(found["mid.to_q"].dense(), truth) < 1e-5


def test_the_overlap_is_that_of_input_directions() -> None:
    """A change within the other's row space has 1, one outside 0, whatever their outputs; half of it, sqrt(1/2)."""
    rows = torch.eye(6, dtype=F64)
    ones = LowRank(torch.ones(5, 1, dtype=F64), rows[:1])
    other = {"a": LowRank(noise(0, 5, 2), noise(1, 2, 2) @ rows[:2])}
    assert mergeable.overlap({"a": ones}, other) == pytest.approx(1.0)
    assert mergeable.overlap({"a": ones._replace(right=rows[5:])}, other) == pytest.approx(0.0)
    mixed = ones._replace(right=rows[:1] + rows[5:])
    assert mergeable.overlap({"a": mixed}, other) == pytest.approx(0.5**0.5)


def test_answers_are_norms_of_what_a_change_does_to_inputs() -> None:
    """Two calls of a layer add up; the hooks are gone afterwards; a layer that only one adapter has is its alone."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 5), "b": torch.nn.Linear(6, 4)}).double()
    first = {"a": LowRank(noise(0, 5, 2), noise(1, 2, 6))}
    second = {
        "a": LowRank(noise(2, 5, 3), noise(3, 3, 6)),
        "b": LowRank(noise(4, 4, 1), noise(5, 1, 6)),
    }
    inputs = noise(6, 2, 7, 6)

    def run() -> None:
        for x in inputs:
            model["a"](x[None])
            model["b"](2 * x)

    found = responses.answers(model, [first, second], run)
    assert set(found[0]) == {"a"}
    flat = inputs.flatten(0, 1)
    assert found[0]["a"] == pytest.approx(float((flat @ first["a"].dense().T).norm()))
    assert found[1]["a"] == pytest.approx(float((flat @ second["a"].dense().T).norm()))
    assert found[1]["b"] == pytest.approx(float((2 * flat @ second["b"].dense().T).norm()))
    assert not any(layer._forward_pre_hooks for layer in model.values())


def rows_of(scores: dict[str, tuple[float, float]], seed: int = 0) -> list[dict[str, Any]]:
    """Scores of A and B by method; NaN leaves a row out."""
    return [
        {"pair": "cup+dog", "seed": seed, "method": m, "concept": c, "image": v, "text": v / 2}
        for m, values in scores.items()
        for c, v in zip(("cup", "dog"), values, strict=True)
        if v == v
    ]


NAN = float("nan")
SCORES = {
    "base model": (0.3, 0.3),
    "alone": (0.5, 0.4),
    mergeable.APART_ALONE: (NAN, 0.38),
    mergeable.PLAIN: (0.46, 0.34),
    mergeable.APART: (0.48, 0.36),
}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ways = [mergeable.PLAIN, mergeable.APART]
    return {
        "pictures": 5,
        "ways": ways,
        "tuning": [],
        "overlaps": [[0.6, 1e-6]],
        "responses": [[0.9, 0.7]],
        "rows": rows,
    }


def test_differences_are_paired_and_averaged_over_both_concepts() -> None:
    """-0.04 and -0.06 are -0.05; a method with B alone is compared with B alone."""
    again = {method: (a + 0.1, b) for method, (a, b) in SCORES.items()}
    rows = rows_of(SCORES) + rows_of(again | {mergeable.PLAIN: (0.6, 0.4)}, seed=1)
    gaps = mergeable.differences(rows, mergeable.PLAIN, "alone", "image")
    assert gaps.tolist() == pytest.approx([-0.05, 0.0])
    text = mergeable.differences(rows, mergeable.APART_ALONE, "alone", "text")
    assert text.tolist() == pytest.approx([-0.01, -0.01])
    assert mergeable.side(rows_of(SCORES), mergeable.PLAIN, 0) == pytest.approx(-0.04)
    assert mergeable.side(rows_of(SCORES), mergeable.PLAIN, 1) == pytest.approx(-0.06)


def test_the_table_is_made_from_the_summary_alone() -> None:
    """Through JSON: -0.05 of a gain of 0.15 leaves 67 %, and the orthogonal sum is 0.02 better."""
    content = json.loads(json.dumps(summary(rows_of(SCORES))))
    lines = mergeable.report(content).splitlines()
    assert lines[0].startswith("1 pairs and seeds, 5 pictures")
    assert "alone is +0.150 above the base model" in lines[1]
    table = {name: line for name in SCORES for line in lines[4:] if line.startswith(f"{name} ")}
    assert table[mergeable.PLAIN].split()[2:] == [
        *("-0.050", "[-0.050", "-0.050]", "+-", "0.000", "-0.040", "-0.060", "67%"),
        *("-0.025", "[-0.025", "-0.025]"),
    ]
    assert "80%" in table[mergeable.APART]
    assert "-0.020 [-0.020 -0.020]" in table[mergeable.APART_ALONE]
    assert any(
        line == f"{mergeable.APART}, against plain sum: image similarity +0.020 [+0.020 +0.020]"
        for line in lines
    )
    assert lines[-2].endswith("over layers: 0.6; trained orthogonal: 1e-06")
    assert lines[-1].endswith("over layers: 0.9; trained orthogonal: 0.7")


def test_the_density_that_keeps_most_is_chosen() -> None:
    scores = {f"ties_svd {d:g}": (0.4 + g, 0.3) for d, g in ((0.3, 0.0), (0.5, 0.2), (0.7, 0.1))}
    assert mergeable.best_density(rows_of(SCORES | scores), "ties_svd") == 0.5


def test_sums_of_other_adapters_are_not_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that was trained again is merged again; as long as it is the same, nothing is lost."""
    adapter, kept = tmp_path / "adapter", tmp_path / "a+b-0" / "plain sum" / mergeable.DONE
    monkeypatch.setattr(mergeable, "open_adapter", lambda _: SimpleNamespace(path=adapter))
    job = ("a", 0, tmp_path, [])
    cell = mergeable.Cell("a", "b", 0, (job, job, job))

    def opened(content: bytes) -> mergeable.Bench:
        adapter.write_bytes(content)
        return mergeable.Bench(cell, None, tmp_path)

    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"sum")
    first = opened(b"one")
    first.content["rows"]["plain sum: a"] = {"image": 0.5}
    first.path.write_text(json.dumps(first.content), "utf-8")
    assert opened(b"one").content == first.content
    assert kept.exists()
    assert opened(b"two").content["rows"] == {}
    assert not kept.exists()


@pytest.mark.slow
def test_a_small_run_trains_merges_and_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two concepts on the embedded model; a second call trains and draws nothing."""
    monkeypatch.setattr(mergeable, "PICTURES", 4)
    monkeypatch.setattr(mergeable, "DENSITIES", (0.5,))
    monkeypatch.setattr(mergeable, "PEFT_METHODS", ("ties_svd",))
    monkeypatch.setattr(mergeable, "RANKS", (4,))
    path = tmp_path / "results" / "summary.json"
    flags = ["--output", str(tmp_path / "merged"), "--runs", str(tmp_path), "--summary", str(path)]
    flags += ["--pairs", "pumpkin+owl", "--seeds", "1", "--max_train_steps", "2"]
    flags += ["--score_steps", "2", "--score_images", "4", "--score_inference_steps", "1"]
    flags += ["--loi_batches", "1", "--num_inference_steps", "1"]
    mergeable.main(flags)
    first = capsys.readouterr().out
    for name in ("pumpkin-0", "owl-0", "owl-apart-from-pumpkin-0"):
        assert f"{name}: trained" in first
    content = json.loads(path.read_text("utf-8"))
    assert content["ways"] == [mergeable.PLAIN, mergeable.APART, "rank 4", "ties_svd 0.5"]
    # Base, alone and the ways draw both concepts; the orthogonal B its own.
    assert len(content["rows"]) == 2 + 2 + 1 + 2 * 4
    before, after = content["overlaps"][0]
    assert before > 0.1
    assert after < 1e-5
    assert all(0.5 < share < 2 for share in content["responses"][0])
    assert mergeable.report(content) in first
    monkeypatch.setattr(mergeable, "train_one", None)
    monkeypatch.setattr(mergeable.Examiner, "scores", None)
    mergeable.main(flags)
    assert mergeable.report(content) in capsys.readouterr().out
    monkeypatch.setattr(mergeable, "PICTURES", 5)
    with pytest.raises(TypeError):  # scores of four pictures are none of five
        mergeable.main(flags)
