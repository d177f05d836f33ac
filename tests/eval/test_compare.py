"""Runs against each other: paired by picture, refused where more than the adapter differs."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dreamrie.errors import ConfigError
from eval import compare, metrics
from eval.results import Result
from eval.scoring import Score
from tests.eval.results_by_hand import PROTOCOL, make_result, make_score, saved


def options(*flags: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args([str(flag) for flag in flags])


def with_score(result: Result, metric: str, /, **changes: Any) -> Result:
    """The result with the scores of one metric changed."""

    def change(score: Score) -> Score:
        fits = score.metric.split()[0] == metric
        return dataclasses.replace(score, **changes) if fits else score

    return dataclasses.replace(result, scores=tuple(map(change, result.scores)))


def test_a_shift_on_every_picture_is_the_difference(tmp_path: Path) -> None:
    """+0.1 on each: +0.1 exactly, and an interval without width, however far the prompts lie apart."""
    first = saved(make_result(tmp_path / "a", image=lambda i: 0.1 * i))
    second = saved(make_result(tmp_path / "b", image=lambda i: 0.1 * i + 0.1))
    text = compare.run(options(first, second, "--json", tmp_path / "out" / "c.json"))
    written = json.loads((tmp_path / "out" / "c.json").read_text(encoding="utf-8"))
    image, text_score, drift = written["differences"]
    assert image["mean"] == pytest.approx(0.1, abs=1e-12)
    assert image["interval"] == pytest.approx([0.1, 0.1], abs=1e-12)
    assert image["verdict"] == "higher"
    assert text_score["mean"] == drift["mean"] == 0
    assert text_score["verdict"] == "no difference beyond noise"
    line = "b  image similarity (effnet-lite2)  +0.1000  [+0.1000 +0.1000]  higher"
    assert line in text
    assert written["runs"]["b"]["protocol"]["steps"] == 25
    assert written["runs"]["a"]["scores"][0]["weights_sha256"] == "94" * 32


def test_pairing_sees_what_lies_below_the_noise_of_prompts(tmp_path: Path) -> None:
    """Twenty prompts that lie far apart, a small gain on each: intervals overlap by far, the paired one excludes 0."""
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(40, generator=generator) * 0.6
    gain = 0.02 + 0.01 * torch.rand(40, generator=generator)
    prompts = [f"a sks owl, number {i}" for i in range(20)]
    runs = [
        make_result(tmp_path / name, prompts, 2, values.__getitem__)
        for name, values in (("a", hard.tolist()), ("b", (hard + gain).tolist()))
    ]
    groups = [picture.text for picture in runs[0].pictures if picture.kind == "concept"]
    alone = [metrics.bootstrap_interval(values, groups) for values in (hard, hard + gain)]
    assert alone[0][1] - alone[1][0] > 3 * float(gain.mean())
    shown = compare.shown_encoders(runs[0], None)
    found = compare.differences({"a": runs[0], "b": runs[1]}, shown)[0]
    assert found.interval is not None
    assert 0.02 < found.interval[0] < found.mean < found.interval[1] < 0.03
    # Drawn over prompts, not over pictures.
    gains = torch.tensor(
        [b - a for a, b in zip(hard.tolist(), (hard + gain).tolist(), strict=True)]
    )
    files = [str(number) for number in range(40)]
    assert found.interval == pytest.approx(metrics.bootstrap_interval(gains, groups), abs=1e-6)
    assert found.interval != pytest.approx(metrics.bootstrap_interval(gains, files), abs=1e-4)
    assert found.verdict == "higher"


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.01, 0.02), "higher"),
        ((-0.02, -0.01), "lower"),
        ((-0.01, 0.02), "no difference beyond noise"),
        ((1e-8, 2e-8), "no difference beyond noise"),
        (None, "one prompt, so nothing can be said about noise"),
    ],
)
def test_the_verdict(interval: tuple[float, float] | None, words: str) -> None:
    assert compare.verdict(interval) == words


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    """A line a run with means, intervals, drift and copies; the plot lies above the first run, or where it is told."""
    folders = [saved(make_result(tmp_path / "x" / name)) for name in ("a", "b", "c")]
    text = compare.run(options(*folders))
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "run"
    assert (
        lines[1].split() == "a 0.7250 [0.7000 0.7500] 0.2750 [0.2000 0.3000] 0.0123 3 of 6".split()
    )
    assert [line.split()[0] for line in lines[1:4]] == ["a", "b", "c"]
    assert lines[4].split() == ["real", "against", "real", "0.8200"]
    assert f"plot: {tmp_path / 'x' / 'compare.png'}" in lines
    with Image.open(tmp_path / "x" / "compare.png") as image:
        assert image.format == "PNG"
    compare.run(options(*folders, "--output", tmp_path / "new" / "deep"))
    assert (tmp_path / "new" / "deep" / "compare.png").is_file()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [saved(make_result(tmp_path / part / "eval")) for part in ("x", "y")]
    reference = str(tmp_path / "real")
    for folder in folders:
        saved(make_result(folder), reference=reference)
    assert list(compare.load_runs(folders)) == ["x/eval", "y/eval"]


def test_a_run_is_not_compared_with_itself_or_with_nothing(tmp_path: Path) -> None:
    folder = saved(make_result(tmp_path / "a"))
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match="at least two runs, got 1"):
        compare.run(options(folder))
    with pytest.raises(ConfigError, match="named twice"):
        compare.run(options(folder, tmp_path / "link"))
    with pytest.raises(ConfigError, match=r"holds no scores\.json"):
        compare.run(options(folder, tmp_path))


def _protocol(**changes: Any) -> Callable[[Result], Result]:
    return lambda result: dataclasses.replace(result, protocol={**PROTOCOL, **changes})


def _picture(**changes: Any) -> Callable[[Result], Result]:
    def change(result: Result) -> Result:
        first = dataclasses.replace(result.pictures[0], **changes)
        return dataclasses.replace(result, pictures=(first, *result.pictures[1:]))

    return change


def _score(metric: str, /, **changes: Any) -> Callable[[Result], Result]:
    return lambda result: with_score(result, metric, **changes)


REFUSED = {
    "steps": (_protocol(steps=50), "steps: a has 25, b has 50"),
    "guidance": (_protocol(guidance=7.0), "guidance: a has 4.0, b has 7.0"),
    "base": (_protocol(base_model="sd2"), 'base_model: a has "embedded", b has "sd2"'),
    "prompt set": (_protocol(prompts=[{"sha256": "00"}]), "prompts: a has .*cdcd.*, b has .*00"),
    "drift set": (_protocol(drift_prompts={"name": "other"}), r"drift_prompts\.name"),
    "first seed": (_protocol(seed=1), "seed: a has 0, b has 1"),
    "seed of one": (_picture(seed=99), r"000-00\.png .* seed 0; b has .* seed 99"),
    "prompt of one": (_picture(text="a cat"), r"000-00\.png .*'an? owl in snow'.*'a cat'"),
    "file": (_picture(file="z.png"), r"000-00\.png has no counterpart: .* b has no such picture"),
    "weights": (_score("image_similarity", weights_sha256="00"), "weights_sha256 is"),
    "text weights": (_score("text_similarity", weights_sha256="00"), "weights_sha256 is"),
    "version": (_score("image_similarity", metric="image_similarity v2"), "metric is .* v1.* v2"),
    "drift version": (_score("prior_drift", metric="prior_drift v2"), "metric is"),
    "preprocessing": (_score("text_similarity", preprocessing="crop"), "preprocessing is"),
    "encoder": (_score("image_similarity", encoder="dino"), "b has no image_similarity of effnet"),
    "real pictures": (
        _score("ceiling", values={"0.png": 0.5, "1.png": 0.5, "2.png": 0.5}),
        "real pictures differ: .* compare run by run",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_differs_in_more_than_the_adapter_is_refused(tmp_path: Path, name: str) -> None:
    """It names what differs; nothing is written."""
    change, said = REFUSED[name]
    first, second = make_result(tmp_path / "a"), change(make_result(tmp_path / "b"))
    with pytest.raises(ConfigError, match=said):
        compare.run(options(saved(first), saved(second)))
    assert not (tmp_path / "compare.png").exists()


def test_other_adapters_and_the_base_model_are_compared(tmp_path: Path) -> None:
    """Adapter, its hash and the token may differ, drift may lack; other versions of libraries are said."""
    base = make_result(tmp_path / "base")
    pictures = tuple(
        dataclasses.replace(picture, prompt=picture.text)
        for picture in base.pictures
        if picture.kind == "concept"
    )
    changed = {"adapter": None, "adapter_sha256": None, "token": "", "drift_prompts": None}
    protocol = {**PROTOCOL, **changed, "versions": {"torch": "2.16"}}
    folders = [
        saved(base, protocol=protocol, pictures=pictures, scores=base.scores[:-1]),
        saved(make_result(tmp_path / "lora")),
    ]
    text = compare.run(options(*folders))
    assert "drift" not in text[text.index("Paired") :]
    assert 'Other versions of libraries: base {"torch": "2.16"}, lora {"torch": "2.15"}' in text


def test_the_folder_of_real_pictures_may_have_moved(tmp_path: Path) -> None:
    """The real pictures' scores tell that they are the same; without them the path decides."""
    first, second = make_result(tmp_path / "a"), make_result(tmp_path / "b")
    folders = [saved(first), saved(second, reference="/elsewhere/owl")]
    assert "higher" not in compare.run(options(*folders))
    no_ceiling = [score for score in first.scores if "ceiling" not in score.metric]
    folders = [
        saved(first, scores=no_ceiling),
        saved(second, scores=no_ceiling, reference="/elsewhere/owl"),
    ]
    with pytest.raises(ConfigError, match="real pictures differ"):
        compare.run(options(*folders))


def test_encoders_are_chosen_by_name(tmp_path: Path) -> None:
    """The first of each score by default; all of the named ones; a name that scored nothing is refused."""
    result = make_result(tmp_path / "a")
    files = result.scores[0].values
    more = make_score(
        "DINO", "image_similarity", dict.fromkeys(files, 0.5), ("dino", "dd" * 32, "resize 256")
    )
    result = dataclasses.replace(result, scores=(*result.scores, more))
    image, text = ("image_similarity", "effnet-lite2"), ("text_similarity", "tiny-clip")
    dino = ("image_similarity", "dino")
    assert compare.shown_encoders(result, None) == [image, text]
    assert compare.shown_encoders(result, "dino, tiny-clip") == [dino, text]
    assert compare.shown_encoders(result, "dino,effnet-lite2") == [image, dino]
    for wrong in ("dnio", ","):
        with pytest.raises(ConfigError, match="was scored with effnet-lite2, dino, tiny-clip"):
            compare.shown_encoders(result, wrong)
    folders = [saved(result), saved(dataclasses.replace(result, folder=tmp_path / "b"))]
    text = compare.run(options(*folders, "--encoders", "dino"))
    assert "no text similarity, hence no plot" in text
    assert "DINO" not in text
    assert "image similarity (dino)" in text


def test_one_prompt_gives_no_interval(tmp_path: Path) -> None:
    folders = [
        saved(make_result(tmp_path / name, ["a sks owl"], 2, lambda i, s=s: s + 0.1 * i))
        for name, s in (("a", 0.1), ("b", 0.2))
    ]
    text = compare.run(options(*folders))
    assert text.count("one prompt, so nothing can be said about noise") == 3
