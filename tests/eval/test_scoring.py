"""From folders to the printed table, on the command line too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import eval.__main__ as command
from dreamrie.errors import ConfigError
from eval import scoring
from eval.encoders import load_encoder
from eval.encoders.preprocessing import TF_LITE, Preprocessing
from eval.encoders.registry import small_vision_encoder
from eval.pictures import read_folder
from tests.contracts.sources import ROOT
from tests.eval.test_pictures import write_pictures

CONCEPTS = ROOT / "examples" / "concepts"


def by_name(scores: list[scoring.Score]) -> dict[str, scoring.Score]:
    return {score.name: score for score in scores}


def test_a_concept_scores_higher_against_itself_than_against_another() -> None:
    """Pumpkins against pumpkins lie above owls against pumpkins, beyond both intervals; copies are seen."""
    encoder = load_encoder("effnet-lite2")
    pumpkin, owl = (read_folder(CONCEPTS / name, 2) for name in ("pumpkin", "owl"))
    right = by_name(scoring.score_folders(encoder, pumpkin, pumpkin))
    wrong = by_name(scoring.score_folders(encoder, owl, pumpkin))
    name = "effnet-lite2 image"
    assert right[name].interval is not None
    assert wrong[name].interval is not None
    assert right[name].interval[0] > wrong[name].interval[1]
    assert right[f"{name}, nearest real"].mean == pytest.approx(1, abs=1e-5)
    assert right[f"{name}, nearest, real to real"].mean < 0.99


def test_text_similarity_is_that_of_the_prompt_without_its_token() -> None:
    """E4: with and without the token in the prompt file the score is the same, if the token is named."""
    encoder = load_encoder("tiny-clip")
    pumpkin, owl = (read_folder(CONCEPTS / name, 2) for name in ("pumpkin", "owl"))
    plain = [f"an owl on a {color} background" for color in ("white", "gray", "blue", "red", "red")]
    rare = [prompt.replace("an owl", "an sks owl") for prompt in plain]
    found = [
        by_name(scoring.score_folders(encoder, owl, pumpkin, prompts, token))
        for prompts, token in ((plain, ""), (rare, "sks"), (rare, ""))
    ]
    means = [scores["tiny-clip text"].mean for scores in found]
    assert means[0] == pytest.approx(means[1], abs=1e-6)
    assert abs(means[2] - means[0]) > 1e-3


def test_the_command_prints_and_records_what_each_number_depends_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """E3, E7: encoder, hash, preprocessing and metric version; no offline score bears the name DINO or CLIP-T."""
    flags = ["--generated", str(CONCEPTS / "owl"), "--reference", str(CONCEPTS / "pumpkin")]
    rows = [{"file_name": f"{i}.png", "prompt": f"an owl on color {i}"} for i in range(5)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags += ["--prompts", str(tmp_path / "p.jsonl"), "--json", str(tmp_path / "s.json")]
    assert command.main(["score", *flags]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert written["prompts"]["3.png"] == "an owl on color 3"
    assert {row["encoder"] for row in written["scores"]} == {"effnet-lite2", "tiny-clip"}
    for row in written["scores"]:
        assert f"{row['mean']:.4f}" in printed
        assert row["weights_sha256"][:16] in printed
        assert row["metric"].endswith(" v1")
        assert "DINO" not in row["name"]
        assert "CLIP-" not in row["name"]
    assert "resize 224 bicubic" in printed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--encoders", "dnio"], "Did you mean 'dino'"),
        (["--encoders", ","], "names nothing"),
        (["--weights", "dino"], "expected NAME=FILE"),
        (["--weights", "tiny-clip=/nowhere"], "there is no weights file"),
        (["--prompts", "/nowhere.jsonl"], "there is no file"),
        (["--token", "sks"], "give them with --prompts"),
        (["--generated", "/nowhere"], "does not exist"),
    ],
)
def test_a_wrong_command_line_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], said: str
) -> None:
    ours, real = write_pictures(tmp_path / "a", 2), write_pictures(tmp_path / "b", 3)
    flags = ["score", "--generated", str(ours), "--reference", str(real)]
    assert command.main([*flags, *change]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_a_token_that_is_left_out_of_nothing_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt token, and a prompt that is nothing else."""
    ours, real = write_pictures(tmp_path / "a", 1), write_pictures(tmp_path / "b", 2)
    (tmp_path / "p.jsonl").write_text('{"file_name": "0.png", "prompt": "sks"}', encoding="utf-8")
    flags = ["score", "--generated", str(ours), "--reference", str(real)]
    for token, said in (("skz", "in none of the prompts"), ("sks", "is all that one")):
        assert command.main([*flags, "--prompts", str(tmp_path / "p.jsonl"), "--token", token]) == 2
        assert said in capsys.readouterr().err


def test_an_encoder_of_two_sizes_averages_their_cosines() -> None:
    """Joined without norm 1 of each part, the larger picture would count for more."""
    pictures = [
        Image.effect_mandelbrot((80, 80), (-3, -2.5, 2, 2.5), q).convert("RGB") for q in (9, 60)
    ]
    views = [Preprocessing(side, side, TF_LITE, "TensorFlow") for side in (64, 96)]
    cosines = []
    for part in (views[:1], views[1:], views):
        ours = small_vision_encoder("effnet", part).embed_images(pictures)
        cosines.append(float(ours[0] @ ours[1]))
    assert abs(cosines[0] - cosines[1]) > 1e-3
    assert cosines[2] == pytest.approx((cosines[0] + cosines[1]) / 2, abs=1e-6)


def test_an_unknown_encoder_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="known: clip, clip-l14, dino"):
        load_encoder("vgg")


@pytest.mark.parametrize("name", ["effnet-lite2", "effnet-lite2-64-160", "tiny-clip"])
def test_an_offline_score_bears_its_own_name(name: str) -> None:
    """E7: without the weights of DINO or CLIP no column is called after them; the same network at two sizes is two."""
    encoder = load_encoder(name)
    for title in (encoder.image_score, encoder.text_score or ""):
        assert not title or title.startswith(name)
        assert "DINO" not in title
        assert "CLIP" not in title
    assert ("64" in encoder.preprocessing) == (name != "effnet-lite2")
