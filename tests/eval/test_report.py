"""The page about a run: everything in it, nothing outside it, and no text of a run that becomes HTML."""

from __future__ import annotations

import dataclasses
import html.parser
import itertools
import re
from pathlib import Path

import pytest

from dreamrie.errors import ConfigError
from eval.report import facts, thumbnails, write_report
from eval.report.html import LIMIT_BYTES
from eval.results import Result
from tests.eval.results_by_hand import make_result, write_files

EVIL = "a sks owl <script>alert('x')</script> & \"friends\" <img src=https://x.test/a.png>"


class Reader(html.parser.HTMLParser):
    """Collects tags with attributes, and the text a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "source"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report(result: Result) -> Reader:
    return Reader(write_report(result).read_text(encoding="utf-8"))


def test_the_main_numbers_stand_on_top(tmp_path: Path) -> None:
    """By hand: mean of .70 to .75 is .725, ceiling .82, five of six retrieved, .86 to .90 are above the bar of .85."""
    page = report(write_files(make_result(tmp_path / "run")))
    assert page.open == []
    top = page.text[: page.text.index("numbered as in the table below")]
    for words in (
        "Image similarity 0.725 0.700 to 0.750 (95 %)",
        "Real against real 0.820",
        "88 % of the ceiling",
        "Text similarity 0.275",
        "Prompt retrieval 83 % 5 of 6",
        "Drift 0.0123",
        "Copies 3 of 6",
        "002-01.png , 002-00.png , 001-01.png",
    ):
        assert words in top
    assert "Background" not in top
    assert "Adapter owl · 6 pictures of 3 prompts" in top


def test_a_score_above_the_ceiling_is_called_copying(tmp_path: Path) -> None:
    page = report(write_files(make_result(tmp_path / "run", image=lambda i: 0.9 + 0.001 * i)))
    assert "Above the ceiling. That is copying rather than success" in page.text


def test_everything_that_a_number_depends_on_is_there(tmp_path: Path) -> None:
    """Encoder, hash, preprocessing and metric version of every score; every setting of the protocol."""
    result = write_files(make_result(tmp_path / "run"))
    page = report(result)
    for score in result.scores:
        for words in (score.name, f"{score.mean:.4f}", score.metric, score.weights_sha256[:16]):
            assert words in page.text
        assert score.preprocessing in page.text
    for name, value in facts.flatten(result.protocol).items():
        assert f"{name} " in page.text
        if isinstance(value, str):
            assert value in page.text


def test_texts_of_a_run_stay_texts(tmp_path: Path) -> None:
    """A prompt with tags and quotes is shown as it is, wherever it stands, and makes no element."""
    result = make_result(tmp_path / "run", (EVIL, "a sks owl", "an sks owl at sea"))
    odd = {**result.protocol, "<u>": "</table><script>", "adapter": "<u>a"}
    page = report(write_files(dataclasses.replace(result, protocol=odd)))
    assert page.open == []
    assert not {"script", "u"} & {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) == 2  # in the table and above its row
    assert "</table><script>" in page.text
    assert any(f"{EVIL}, seed 0" == image["alt"] for image in page.attributes("img"))


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    """No script, no link to anything but itself, a policy that forbids the rest."""
    result = write_files(make_result(tmp_path / "run", (EVIL, "a sks owl", "b sks owl")))
    page = report(result)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        for name in {"src", "srcset", "href"} & attributes.keys():
            assert str(attributes[name]).startswith(("data:image/", "#"))
    raw = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "@import" not in raw
    assert "url(" not in raw
    assert {found.lower() for found in re.findall(r"https?://[\w.]+", raw)} == {"https://x.test"}
    policies = [entry.get("content") for entry in page.attributes("meta") if "http-equiv" in entry]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_page_can_be_read_without_eyes_and_in_the_dark(tmp_path: Path) -> None:
    page = report(write_files(make_result(tmp_path / "run")))
    assert all(image["alt"] for image in page.attributes("img"))
    assert page.attributes("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = {str(attributes["id"]) for _, attributes in page.tags if "id" in attributes}
    assert {str(link["href"])[1:] for link in page.attributes("a")} <= ids
    sources = page.attributes("source")
    assert {entry["media"] for entry in sources} == {"(prefers-color-scheme: dark)"}
    assert len(sources) == 2


def test_the_pictures_carry_their_scores_and_marks(tmp_path: Path) -> None:
    """Best and worst of the run, copies, and the picture that is taken for another prompt; drift side by side."""
    page = report(write_files(make_result(tmp_path / "run")))
    text = page.text[page.text.index("Real pictures 0.png 1.png 2.png") :]
    first = text[: text.index("000-01.png")]
    assert "image 0.700 text 0.300 nearest real 0.800 000-00.png" in first
    assert "worst image best text wrong prompt" in first
    last = text[text.index("002-01.png") :]
    assert last.startswith("002-01.png best image worst text copy?")
    assert text.count("copy?") == 3
    assert "a <b>cup</b> drift 0.0123 base model with adapter" in text


def test_300_pictures_of_noise_stay_below_5_mb(tmp_path: Path) -> None:
    """Nothing shrinks noise; all 300 are shown, smaller, and the page says so."""
    result = make_result(tmp_path / "run", [f"a sks owl, number {i}" for i in range(75)], 4)
    page = report(write_files(result, 256, noise=True))
    assert 1_000_000 < (result.folder / "report.html").stat().st_size < 5_000_000 == LIMIT_BYTES
    shown = [image for image in page.attributes("img") if "seed" in str(image["alt"])]
    assert len(shown) == 300
    assert re.search(r"reduced to at most (128|160|96) pixels", page.text)


def test_what_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 40 pictures, marked ones are shown first and the page says how many are not."""
    monkeypatch.setattr("eval.report.html._ROOMS", (40,))
    result = make_result(tmp_path / "run", [f"a sks owl, number {i}" for i in range(10)], 12)
    page = report(write_files(result, 16))
    assert (
        "30 of 120 generated pictures are shown, of 10 of 10 prompts; marked ones first"
        in page.text
    )
    assert "best image" in page.text


def test_a_page_that_is_too_large_shows_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit holds even if the estimate of a rung does not."""
    monkeypatch.setattr("eval.report.html.LIMIT_BYTES", 350_000)
    monkeypatch.setattr("eval.report.html._PICTURE_BYTES", 10_000_000)
    result = make_result(tmp_path / "run", [f"a sks owl, number {i}" for i in range(20)], 4)
    page = report(write_files(result, 96, noise=True))
    assert (result.folder / "report.html").stat().st_size < 350_000
    assert "of 80 generated pictures are shown" in page.text


def test_the_choice_keeps_marked_pictures_and_order() -> None:
    """Two of four: the marked last one and the first, in their order; without room, the first prompts alone."""
    pictures = make_result(Path("x"), ("a", "b", "c"), 4).pictures
    prompts = facts.by_prompt([picture for picture in pictures if picture.kind == "concept"])
    chosen = thumbnails.choose(prompts, ["001-03.png"], 6)
    assert [picture.file for picture in chosen["b"]] == ["001-00.png", "001-03.png"]
    assert [picture.file for picture in chosen["a"]] == ["000-00.png", "000-01.png"]
    assert list(thumbnails.choose(prompts, [], 2)) == ["a", "b"]
    assert thumbnails.choose(prompts, [], 0) == {}


def test_missing_pictures_are_an_error_and_a_missing_reference_is_said(tmp_path: Path) -> None:
    """A result may be read where the photos are not; its own pictures are another matter."""
    result = write_files(make_result(tmp_path / "run"))
    moved = dataclasses.replace(result, reference=str(tmp_path / "nowhere"))
    assert "The real pictures are not shown" in report(moved).text
    (result.folder / "pictures" / "001-00.png").unlink()
    with pytest.raises(ConfigError, match=r"1 of 8 pictures are missing: 001-00\.png"):
        write_report(result)
    with pytest.raises(ConfigError, match="no picture of the concept"):
        write_report(dataclasses.replace(result, pictures=()))


def test_a_base_model_without_text_scores_has_a_page_too(tmp_path: Path) -> None:
    result = make_result(tmp_path / "run")
    bare = dataclasses.replace(
        result,
        protocol={**result.protocol, "adapter": None},
        scores=result.scores[:1],
        pictures=tuple(picture for picture in result.pictures if picture.kind == "concept"),
    )
    page = report(write_files(bare))
    assert "base model alone" in page.text
    assert "no text similarity to draw" in page.text
    assert "Copies" not in page.text
    assert "Real against real" not in page.text


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    result = write_files(make_result(tmp_path / "run"))
    first = write_report(result).read_bytes()
    assert write_report(result).read_bytes() == first


def test_digits() -> None:
    shown = [facts.digits(value) for value in (0.71249, 0.0123, -0.3, -0.00001, 1.0)]
    assert shown == ["0.712", "0.0123", "-0.300", "0.0000", "1.000"]
