"""Each picture is drawn once, from noise that its number decides, whatever interrupts the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreamrie.diffusion.adapters import load_saved_adapter
from dreamrie.diffusion.components import Components
from dreamrie.diffusion.images import save_png
from dreamrie.diffusion.pipeline import sample
from dreamrie.errors import ConfigError, ImageError
from eval import generation
from eval.generation import Sampling, claim_output, draw, plan_concept, plan_drift, read_drawn
from eval.prompts import Prompt, PromptSet
from eval.results import Picture
from tests.eval.small_runs import SampleSpy, contents, save_adapter, spy
from tests.small_models import small_components, write_pictures

__all__ = ["spy"]

TWO = PromptSet("two", (Prompt("a {subject} in the snow"), Prompt("a {subject} at night")))
OTHER = PromptSet("other", (Prompt("a car on grass"), Prompt("a banana in space")))
QUICK = Sampling(1, 3.0, 3)
PROTOCOL = {"adapter": "here/a", "adapter_sha256": "1", "steps": 25, "prompts": [{"name": "two"}]}


def plan(token: str = "sks", word: str = "owl", seed: int = 0, count: int = 2) -> list[Picture]:
    return [*plan_concept(TWO, count, token, word, seed), *plan_drift(OTHER, seed)]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Components:
    parts = small_components("sd2-eps")
    load_saved_adapter(parts, save_adapter(tmp_path_factory.mktemp("adapter")))
    return parts


@pytest.fixture(scope="module")
def finished(adapted: Components, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Pictures of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    claim_output(output, PROTOCOL)
    assert draw(adapted, plan(), output, QUICK) == 8
    return contents(output)


def test_the_plan_names_prompts_texts_and_files() -> None:
    """E4: the text is recorded as it is judged, a sentence without the token."""
    concept = plan_concept(TWO, 2, "sks", "owl", 0, first=5)
    assert [picture.file for picture in concept] == [
        "005-00.png",
        "005-01.png",
        "006-00.png",
        "006-01.png",
    ]
    assert (concept[2].prompt, concept[2].text) == ("a sks owl at night", "an owl at night")
    assert {picture.kind for picture in concept} == {"concept"}


def test_noise_follows_from_the_numbers_alone() -> None:
    """Another token, class or number of pictures: the same seeds. Another first seed: others."""
    seeds = {picture.file: picture.seed for picture in plan()}
    assert {picture.file: picture.seed for picture in plan("zwx", "teapot")} == seeds
    more = {picture.file: picture.seed for picture in plan(count=3)}
    assert {file: more[file] for file in seeds} == seeds
    assert not set(seeds.values()) & {picture.seed for picture in plan(seed=1)}
    assert len({picture.seed for picture in plan_concept(TWO, 4, "", "owl", 0)}) == 8


def test_drift_pairs_share_prompt_and_noise() -> None:
    drift = plan_drift(OTHER, 0)
    with_adapter, base = drift[:2], drift[2:]
    assert [picture.kind for picture in drift] == ["drift"] * 2 + ["drift-base"] * 2
    for one, other in zip(with_adapter, base, strict=True):
        assert (one.prompt, one.seed) == (other.prompt, other.seed)
        assert one.file != other.file


def test_base_pictures_are_drawn_without_the_adapter(
    adapted: Components, finished: dict[str, bytes], tmp_path: Path
) -> None:
    """To the byte what the untouched model draws; the others are not."""
    drift = plan_drift(OTHER, 0)[2:]
    prompts, seeds = [p.prompt for p in drift], [p.seed for p in drift]
    images = sample(small_components("sd2-eps"), prompts, seeds, steps=1, guidance_scale=3.0)
    for picture, image in zip(drift, images, strict=True):
        save_png(image, tmp_path / picture.file)
        assert finished[picture.file] == (tmp_path / picture.file).read_bytes()
        assert finished[picture.file.replace("-base", "")] != finished[picture.file]


@pytest.mark.parametrize("saves", [0, 2, 4, 6])
def test_a_killed_run_goes_on_to_the_same_bytes(
    adapted: Components,
    finished: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spy: SampleSpy,
    saves: int,
) -> None:
    """Killed between any two files: complete batches are not drawn again, the rest is what it would have been."""
    claim_output(tmp_path, PROTOCOL)
    left = [saves]

    def killed(image: Image.Image, path: Path) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save_png(image, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generation, "save_png", killed)
        draw(adapted, plan(), tmp_path, QUICK)
    assert len(contents(tmp_path)) == saves
    spy.seeds.clear()
    claim_output(tmp_path, PROTOCOL)
    assert draw(adapted, plan(), tmp_path, QUICK) == 8 - saves
    # Batches of the plan: three, three, and the two of the base model.
    assert len(spy.seeds) == 8 - saves // 3 * 3
    assert contents(tmp_path) == finished
    spy.seeds.clear()
    assert draw(adapted, plan(), tmp_path, QUICK) == 0
    assert spy.seeds == []


def test_a_damaged_or_deleted_picture_comes_back_the_same(
    adapted: Components, finished: dict[str, bytes], tmp_path: Path
) -> None:
    claim_output(tmp_path, PROTOCOL)
    for name, content in finished.items():
        (tmp_path / "pictures" / name).write_bytes(content)
    damaged = tmp_path / "pictures" / "000-01.png"
    damaged.write_bytes(finished["000-01.png"][:-40])
    (tmp_path / "pictures" / "drift-base-001.png").unlink()
    assert draw(adapted, plan(), tmp_path, QUICK) == 2
    assert contents(tmp_path) == finished


def test_processes_share_the_pictures(adapted: Components, tmp_path: Path, spy: SampleSpy) -> None:
    """Disjoint, and together complete."""
    for count in (2, 3):
        shares = []
        output = tmp_path / str(count)
        claim_output(output, PROTOCOL)
        for process in range(count):
            spy.seeds.clear()
            before = set(contents(output))
            draw(adapted, plan(), output, QUICK, (process, count))
            shares.append(set(contents(output)) - before)
            assert len(spy.seeds) == len(shares[-1]) == len(plan()[process::count])
        assert set.union(*shares) == {picture.file for picture in plan()}
        assert shares[0] == {picture.file for picture in plan()[::count]}


def test_a_second_protocol_is_refused_by_its_differences(tmp_path: Path) -> None:
    """All of them; a moved adapter is the same adapter, as its hash says."""
    claim_output(tmp_path, PROTOCOL)
    claim_output(tmp_path, {**PROTOCOL, "adapter": "elsewhere/a"})
    changed = {**PROTOCOL, "steps": 30, "adapter_sha256": "2", "seed": 1}
    with pytest.raises(ConfigError, match="another protocol") as caught:
        claim_output(tmp_path, changed)
    for said in ("steps was 25 and is 30", "adapter_sha256 was '1'", "seed was 'not given'"):
        assert said in str(caught.value)
    assert "prompts" not in str(caught.value).split("Pictures of both")[0]
    claim_output(tmp_path, PROTOCOL)


def test_a_folder_with_other_things_is_not_taken(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a" / "pictures", 1)
    with pytest.raises(ConfigError, match="does not say how"):
        claim_output(tmp_path / "a", PROTOCOL)
    (tmp_path / "b").write_text("a file", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        claim_output(tmp_path / "b", PROTOCOL)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "protocol.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"protocol\.json cannot be read"):
        claim_output(tmp_path / "c", PROTOCOL)


def _remove(folder: Path) -> None:
    (folder / "001-00.png").unlink()


def _blacken(folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder / "001-00.png")


def _cut(folder: Path) -> None:
    whole = (folder / "001-00.png").read_bytes()
    (folder / "001-00.png").write_bytes(whole[: len(whole) // 2])


def _add(folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder / "mine.png")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_remove, r"1 of 8 pictures are missing: 001-00\.png"),
        (_blacken, r"black or of one color: 001-00\.png"),
        (_cut, r"001-00\.png: cannot be decoded"),
        (_add, r"mine\.png are not of this run"),
    ],
)
def test_what_cannot_be_scored_is_named(
    finished: dict[str, bytes], tmp_path: Path, change: Callable[[Path], Any], said: str
) -> None:
    """E5: a missing picture is an error, not a smaller mean."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in finished.items():
        (folder / name).write_bytes(content)
    gallery = read_drawn(tmp_path, plan())
    assert [p.file for p in gallery.of("drift").pictures] == ["drift-000.png", "drift-001.png"]
    change(folder)
    with pytest.raises(ImageError, match=said):
        read_drawn(tmp_path, plan())
