"""E4, E6: prompts are frozen by hash, the subject goes where it belongs, and a bad file is named by its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamrie.errors import ConfigError
from eval.palette import COLORS
from eval.prompts import FROZEN, Prompt, PromptSet, load_prompts, reading
from eval.prompts.reading import read_classes
from tests.contracts.sources import ROOT
from tests.test_real_photos import PHOTOS
from tools.pretrain_tiny import backgrounds, objects

HASHES = {
    "drift": "d1faff272f7814c782bcfb4c017e9a0133917241f1ad70068085fd8505099863",
    "drift-embedded": "c23f50d95d45375066961945cb45e4fb8698e44cdbde53f56ef495bacf6ae676",
    "embedded": "7bae782ad016a2dcda6208908b3f67353b5ded3f8a70250c28301fe9b3144dc6",
    "living": "17abc410c0a42e3232be6a754320938f1ce7d8f1da6a43b85c13360e7c06c683",
    "objects": "529b1d8827be47dc0450d152f3c36ad9c30e3cc248e7ecb59a461289816173c3",
}

DREAMBOOTH = """Classes

subject_name,class
backpack,backpack
bear_plushie,stuffed animal
dog6,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a {0} {1} in a chef outfit'.format(unique_token, class_token)
]
"""


def dreambooth(folder: Path, text: str = DREAMBOOTH) -> Path:
    path = folder / "prompts_and_classes.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_sets_are_those_of_the_list() -> None:
    """A changed prompt must be given a new name: hashes stand here and in the code."""
    assert FROZEN == HASHES
    assert {name: load_prompts(name).sha256 for name in FROZEN} == HASHES


def test_the_hash_sees_prompts_order_and_backgrounds() -> None:
    """And not the name."""
    one, two = Prompt("a {subject} on a red background", "red"), Prompt("a {subject} at night")
    sets = [(one, two), (two, one), (one,), (Prompt(one.template), two)]
    assert len({PromptSet("x", prompts).sha256 for prompts in sets}) == len(sets)
    assert PromptSet("x", (one, two)).sha256 == PromptSet("y", (one, two)).sha256


def test_an_edited_set_is_not_read_under_its_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reading.FROZEN, "objects", "0" * 64)
    with pytest.raises(ConfigError, match="'objects' were changed"):
        load_prompts("objects")


def test_sets_for_photos_are_our_own_and_large_enough() -> None:
    for name in ("objects", "living"):
        prompts = load_prompts(name)
        assert len(prompts.prompts) == 20
        assert prompts.has_subject
        if PHOTOS.is_dir():
            theirs = load_prompts(PHOTOS / "prompts_and_classes.txt", "object").prompts
            theirs += load_prompts(PHOTOS / "prompts_and_classes.txt", "living").prompts
            assert not set(prompts.prompts) & set(theirs)


def test_the_embedded_set_is_what_the_embedded_model_knows() -> None:
    """11 colors that name their background, 11 scenes in the first words of the toy world."""
    prompts = load_prompts("embedded").prompts
    colors = [prompt for prompt in prompts if prompt.background]
    scenes = {prompt.template for prompt in prompts if not prompt.background}
    assert {prompt.background for prompt in colors} == set(COLORS)
    assert all(prompt.template.endswith(f" {prompt.background} background") for prompt in colors)
    assert scenes == {f"a {{subject}} {scene.phrases[0]}" for scene in backgrounds.SCENES}


@pytest.mark.parametrize("count", range(2, 23))
def test_a_part_of_the_embedded_set_mixes_colors_and_scenes(count: int) -> None:
    """Half of each, however many are taken."""
    part = load_prompts("embedded").spread(count)
    colors = sum(prompt.background is not None for prompt in part)
    assert len(set(part)) == count
    assert abs(2 * colors - count) <= 1


def test_a_spread_is_even_repeatable_and_cycles() -> None:
    prompts = PromptSet("x", tuple(Prompt(f"{n} {{subject}}") for n in range(6)))
    assert [prompt.template[0] for prompt in prompts.spread(3)] == ["0", "2", "4"]
    assert [prompt.template[0] for prompt in prompts.spread(8)] == list("01234501")
    assert prompts.spread(4) == prompts.spread(4)
    with pytest.raises(ConfigError, match="at least 1"):
        prompts.spread(0)


def test_drift_prompts_name_nothing_that_is_learned() -> None:
    """The embedded ones are of nouns in the toy world, and no set holds an example concept."""
    concepts = {path.name.replace("_", " ") for path in (ROOT / "examples" / "concepts").iterdir()}
    nouns = set(objects.TRAIN.values())
    for name in ("drift", "drift-embedded"):
        prompts = load_prompts(name)
        assert len(prompts.prompts) == 8
        assert not prompts.has_subject
        assert prompts.full("sks", "dog") == prompts.plain("owl")
        words = " ".join(f" {text} " for text in prompts.plain("dog"))
        assert [concept for concept in concepts if f" {concept} " in words] == []
    for text in load_prompts("drift-embedded").plain("dog"):
        thing = text.split(" on ")[0].split(" in ")[0]
        assert thing.removeprefix("a ") in nouns, text


@pytest.mark.parametrize(
    ("template", "subject", "text"),
    [
        ("a {subject} in the snow", "sks owl", "a sks owl in the snow"),
        ("a {subject} in the snow", "owl", "an owl in the snow"),
        ("a photo of an {subject}", "dog", "a photo of a dog"),
        ("A {subject}", "apple", "An apple"),
        ("a {subject}", "unicorn", "a unicorn"),
        ("an {subject}", "European robin", "a European robin"),
        ("a {subject}", "umbrella", "an umbrella"),
        ("a {subject}", "hourglass", "an hourglass"),
        ("a red {subject}", "owl", "a red owl"),
        ("banana {subject}", "owl", "banana owl"),
    ],
)
def test_articles_follow_the_sound(template: str, subject: str, text: str) -> None:
    assert Prompt(template).text(subject) == text


def test_the_token_stands_in_the_drawn_prompts_only() -> None:
    """E4: the plain text is a sentence of its own, not the prompt with a hole."""
    prompts = PromptSet("x", (Prompt("a {subject} at night"),))
    assert prompts.full("sks", "owl") == ["a sks owl at night"]
    assert prompts.full("", "owl") == prompts.plain("owl") == ["an owl at night"]


@pytest.mark.parametrize(
    ("word", "kind", "last"),
    [
        ("dog", "object", "a {subject} in a chef outfit"),
        ("stuffed animal", "living", "a cube shaped {subject}"),
        ("parrot", "living", "a {subject} in a chef outfit"),
        ("parrot", "object", "a cube shaped {subject}"),
        (None, "object", "a cube shaped {subject}"),
    ],
)
def test_dreambooths_list_is_chosen_by_its_table(
    tmp_path: Path, word: str | None, kind: str, last: str
) -> None:
    """A class of the table decides; any other is as the caller says."""
    prompts = load_prompts(dreambooth(tmp_path), kind, subject_class=word).prompts
    assert [prompt.template for prompt in prompts] == ["a {subject} in the jungle", last]


def test_dreambooths_file_is_read_and_not_run(tmp_path: Path) -> None:
    """An expression of another form is no prompt, and one without the places is named."""
    trap = "__import__('os').abort()\n'a {0} {1}'.format(unique_token, class_token)\n"
    text = f"Object Prompts\n{trap}Live Subject Prompts\n"
    assert load_prompts(dreambooth(tmp_path, text)).plain("dog") == ["a dog"]
    odd = text.replace("{0} {1}", "{0.__class__} {1}")
    with pytest.raises(ConfigError, match=r"Object Prompts: .*does not hold \{0\} \{1\}"):
        load_prompts(dreambooth(tmp_path, odd))
    with pytest.raises(ConfigError, match="Live Subject Prompts: there is no prompt"):
        load_prompts(dreambooth(tmp_path, text), "living")


def test_the_table_of_classes(tmp_path: Path) -> None:
    classes = {"backpack": "backpack", "bear_plushie": "stuffed animal", "dog6": "dog"}
    assert read_classes(dreambooth(tmp_path)) == classes
    with pytest.raises(ConfigError, match="no table"):
        read_classes(dreambooth(tmp_path, "nothing here"))
    with pytest.raises(ConfigError, match="there is no"):
        read_classes(tmp_path / "absent.txt")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the photos are not at {PHOTOS}")
def test_the_real_file_of_dreambooth() -> None:
    """30 subjects of 15 classes, 25 prompts of each kind."""
    path = PHOTOS / "prompts_and_classes.txt"
    classes = read_classes(path)
    assert (len(classes), len(set(classes.values()))) == (30, 15)
    objects_, living = (load_prompts(path, subject_class=word) for word in ("vase", "cat"))
    assert (len(objects_.prompts), len(living.prompts)) == (25, 25)
    assert objects_.full("sks", "vase")[13] == "a sks vase floating on top of water"
    assert living.plain("cat")[19] == "a cat in a purple wizard outfit"
    assert objects_.sha256 != living.sha256


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    """Comments and blank lines are left out; a background is read off."""
    path = tmp_path / "mine.txt"
    path.write_text(
        "# mine\n\na {subject} by the sea\na {subject} on red | background=red\n", "utf-8"
    )
    prompts = load_prompts(path)
    assert prompts.name == "mine"
    assert prompts.prompts == (
        Prompt("a {subject} by the sea"),
        Prompt("a {subject} on red", "red"),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a {subject}\na dog\n", r"line 2: 'a dog' must hold \{subject\} once"),
        ("a {subject} and a {subject}\n", "line 1: .* once"),
        ("", "is empty"),
        ("# only this\n", "is empty"),
        ("a {subject}\n\na {subject}\n", "line 3: .* stands in line 1 already"),
        ("a {subject} on mauve | background=mauve\n", "line 1: 'mauve' is no background color"),
    ],
)
def test_a_bad_file_is_named_by_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        load_prompts(path)


def test_an_unknown_name_a_missing_file_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'objects'"):
        load_prompts("objcts")
    with pytest.raises(ConfigError, match="neither a shipped set"):
        load_prompts(tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="object, living"):
        load_prompts("objects", "thing")
    (tmp_path / "picture.txt").write_bytes(b"\xff\xfe\xff{subject}")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_prompts(tmp_path / "picture.txt")
