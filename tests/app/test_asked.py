"""W3: what comes from a browser is checked again on the server, and refused in words that name what is allowed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import app.asked
from app.asked import AskError, Generate, Limits, Train, asked

LIMITS = Limits(sizes=(64, 96, 128), max_pixels=128 * 96)
PICTURE = {"prompt": "a sks dog", "steps": 25, "guidance": 4, "width": 64, "height": 96}
TRAINING = {
    "title": "Rex",
    "subject": "dog",
    "living": True,
    "photos": "rex-2",
    "steps": 400,
    "rank": 4,
    "learning_rate": 0.02,
    "seed": 0,
}
DOG: dict[str, Any] = {"id": "run:dog-2@300"}
BIG = 10**400
NAN, INF = float("nan"), float("inf")

# Values that no form of the page can give, and what the refusal must name.
REFUSED: list[tuple[type[Any], dict[str, Any], str]] = [
    (Generate, {"steps": 0}, "steps: 0 .* 1 to 100"),
    (Generate, {"steps": -5}, "steps: -5 .* 1 to 100"),
    (Generate, {"steps": 101}, "steps: 101 .* 1 to 100"),
    (Generate, {"steps": 10**9}, "steps: 1000000000 .* 1 to 100"),
    (Generate, {"steps": 1e9}, r"steps: 1e\+09 .* whole number"),
    (Generate, {"steps": BIG}, "steps: a huge number .* 1 to 100"),
    (Generate, {"steps": 2.5}, "steps: 2.5 .* whole number"),
    (Generate, {"steps": 25.0}, "steps: 25 .* whole number"),
    (Generate, {"steps": "25"}, 'steps: "25" .* whole number'),
    (Generate, {"steps": True}, "steps: yes .* whole number"),
    (Generate, {"steps": None}, "steps: nothing .* whole number"),
    (Generate, {"steps": [25]}, "steps: a list of 1 .* whole number"),
    (Generate, {"guidance": NAN}, "guidance: nan .* 0 to 30"),
    (Generate, {"guidance": INF}, "guidance: inf .* 0 to 30"),
    (Generate, {"guidance": -0.1}, "guidance: -0.1 .* 0 to 30"),
    (Generate, {"guidance": 31}, "guidance: 31 .* 0 to 30"),
    (Generate, {"guidance": BIG}, "guidance: a huge number .* 0 to 30"),
    (Generate, {"guidance": "4"}, 'guidance: "4" .* 0 to 30'),
    (Generate, {"guidance": False}, "guidance: no .* 0 to 30"),
    (Generate, {"guidance": {}}, "guidance: a table .* 0 to 30"),
    (Generate, {"width": 65}, "width: 65 .* 64, 96, 128"),
    (Generate, {"width": 10**9}, "width: 1000000000 .* 64, 96, 128"),
    (Generate, {"height": -64}, "height: -64 .* 64, 96, 128"),
    (Generate, {"height": 64.0}, "height: 64 .* 64, 96, 128"),
    (Generate, {"width": 128, "height": 128}, "128 x 128 .* 12288 pixels"),
    (Generate, {"seed": -1}, "seed: -1 .* 0 to 4294967295"),
    (Generate, {"seed": 2**32}, "seed: 4294967296 .* 0 to 4294967295"),
    (Generate, {"seed": True}, "seed: yes .* whole number"),
    (Generate, {"seed": 0.5}, "seed: 0.5 .* whole number"),
    (Generate, {"count": 0}, "count: 0 .* 1 to 8"),
    (Generate, {"count": 9}, "count: 9 .* 1 to 8"),
    (Generate, {"prompt": ""}, 'prompt: "" .* 1 to 1000'),
    (Generate, {"prompt": " \t "}, "prompt: .* 1 to 1000"),
    (Generate, {"prompt": "x" * 1001}, r'prompt: "x{40}\.\.\." .* 1 to 1000'),
    (Generate, {"prompt": "a\0b"}, r'prompt: "a\?b" .* control'),
    (Generate, {"prompt": "a\x1b[31m"}, "prompt: .* control"),
    (Generate, {"prompt": "a\ud800"}, r'prompt: "a\?" .* control'),
    (Generate, {"prompt": "a\u202eb"}, "prompt: .* control"),
    (Generate, {"prompt": ["a dog"]}, "prompt: a list of 1 .* text"),
    (Generate, {"prompt": 7}, "prompt: 7 .* text"),
    (Generate, {"prompt": b"a dog"}, "prompt: something else .* text"),
    (Generate, {"negative_prompt": None}, "negative_prompt: nothing .* text"),
    (Generate, {"negative_prompt": "x" * 1001}, "negative_prompt: .* 1000"),
    (Generate, {"adapters": "run:dog"}, 'adapters: "run:dog" .* list'),
    (Generate, {"adapters": [{"id": f"run:{n}"} for n in "abcde"]}, "adapters: a list of 5 .* 4"),
    (Generate, {"adapters": [DOG, DOG]}, "adapters: .* twice"),
    (Generate, {"adapters": ["run:dog"]}, "adapters, number 1: .* adapter"),
    (Generate, {"adapters": [{}]}, "adapters, number 1, id: nothing .* gallery"),
    (Generate, {"adapters": [{"id": "../etc"}]}, "number 1, id: .* gallery"),
    (Generate, {"adapters": [{"id": "run:a/b"}]}, "number 1, id: .* gallery"),
    (Generate, {"adapters": [{"id": "upload:"}]}, "number 1, id: .* gallery"),
    (Generate, {"adapters": [{**DOG, "scale": NAN}]}, "number 1, scale: nan .* -2 to 2"),
    (Generate, {"adapters": [{**DOG, "scale": 2.1}]}, "number 1, scale: 2.1 .* -2 to 2"),
    (Generate, {"adapters": [{**DOG, "rank": 0}]}, "number 1, rank: 0 .* 1 to 1024"),
    (Generate, {"adapters": [{**DOG, "rank": 1.5}]}, "number 1, rank: 1.5 .* whole"),
    (Generate, {"adapters": [{**DOG, "path": "/etc"}]}, "number 1, path: there is no such"),
    (Generate, {"device": "cuda"}, "device: there is no such"),
    (Train, {"title": ""}, "title: .* 1 to 60"),
    (Train, {"title": "x" * 61}, "title: .* 1 to 60"),
    (Train, {"subject": "do\ng"}, "subject: .* control"),
    (Train, {"subject": "x" * 41}, "subject: .* 1 to 40"),
    (Train, {"living": "yes"}, 'living: "yes" .* yes or no'),
    (Train, {"living": 1}, "living: 1 .* yes or no"),
    (Train, {"photos": "../x"}, "photos: .* set of photos"),
    (Train, {"photos": "con"}, "photos: .* set of photos"),
    (Train, {"photos": None}, "photos: nothing .* set of photos"),
    (Train, {"steps": 9}, "steps: 9 .* 10 to 5000"),
    (Train, {"steps": 10**9}, "steps: .* 10 to 5000"),
    (Train, {"rank": 65}, "rank: 65 .* 1 to 64"),
    (Train, {"rank": -1}, "rank: -1 .* 1 to 64"),
    (Train, {"learning_rate": 0}, "learning_rate: 0 .* 0.000001 to 1"),
    (Train, {"learning_rate": NAN}, "learning_rate: nan .* 0.000001 to 1"),
    (Train, {"learning_rate": 1.5}, "learning_rate: 1.5 .* 0.000001 to 1"),
    (Train, {"seed": None}, "seed: nothing .* whole number"),
    (Train, {"prior": "no"}, "prior: .* yes or no"),
    (Train, {"resume": True}, "resume: there is no such"),
]


def base_of(model: type[Any]) -> dict[str, Any]:
    return dict(PICTURE if model is Generate else TRAINING)


def law_what_the_page_cannot_send_is_refused(impl: Any) -> None:
    """W3: each wrong value, in an order that is fine without it, is refused by one line with what is allowed."""
    for model in (Generate, Train):
        impl.asked(model, base_of(model), LIMITS)
    for model, values, words in REFUSED:
        with pytest.raises(AskError) as caught:
            impl.asked(model, {**base_of(model), **values}, LIMITS)
        assert re.search(words, str(caught.value)), (values, str(caught.value))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250
        assert str(caught.value).isprintable()


def test_what_the_page_cannot_send_is_refused() -> None:
    assert len(REFUSED) >= 40
    law_what_the_page_cannot_send_is_refused(app.asked)


def test_the_ends_of_what_is_allowed_are_allowed() -> None:
    """And whole numbers stand for numbers; everything comes back as it was."""
    adapters = [{"id": "example:puzzle_cube", "scale": -2, "rank": 1024}, DOG]
    wide = {"prompt": "🙂" * 1000, "steps": 100, "guidance": 0, "seed": 2**32 - 1, "count": 8}
    found = asked(Generate, {**PICTURE, **wide, "adapters": adapters, "width": 128}, LIMITS)
    assert (found.prompt, found.steps, found.seed, found.count) == ("🙂" * 1000, 100, 2**32 - 1, 8)
    assert [choice.id for choice in found.adapters] == ["example:puzzle_cube", "run:dog-2@300"]
    assert (found.adapters[0].scale, found.adapters[1].scale, found.adapters[1].rank) == (
        -2,
        1,
        None,
    )
    assert isinstance(found.guidance, float)
    assert asked(Generate, PICTURE, LIMITS).seed is None
    learned = asked(Train, {**TRAINING, "learning_rate": 1, "steps": 5000, "rank": 64}, LIMITS)
    assert (learned.photos, learned.learning_rate, learned.prior) == ("rex-2", 1.0, False)


def test_every_wrong_value_has_a_line() -> None:
    with pytest.raises(AskError) as caught:
        asked(Train, {"title": "Rex", "steps": 1, "rank": 1.5, "x\n": 3}, LIMITS)
    lines = str(caught.value).split("\n")
    names = ["learning_rate", "living", "photos", "rank", "seed", "steps", "subject", "x?"]
    assert sorted(line.split(":")[0] for line in lines) == names


@pytest.mark.parametrize("values", [None, [], "prompt", 3, {3: 4}, {None: 1}])
def test_what_is_no_table_of_names_is_refused(values: Any) -> None:
    with pytest.raises(AskError, match="could not be read"):
        asked(Generate, values, LIMITS)


ANYTHING: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(values=st.dictionaries(st.sampled_from([*Generate.model_fields, "else"]), ANYTHING))
def test_anything_is_refused_in_words_or_is_what_was_given(values: dict[str, Any]) -> None:
    """No other error comes out, whatever goes in."""
    given_values = {**PICTURE, **values}
    try:
        found, said = asked(Generate, given_values, LIMITS), ""
    except AskError as error:
        found, said = None, str(error)
    assert found is not None or said
    if found is not None:
        for name in PICTURE:
            assert getattr(found, name) == given_values[name]
            assert isinstance(getattr(found, name), float | type(PICTURE[name]))


def test_a_message_stays_short_and_printable() -> None:
    """What was given is quoted: it must neither flood nor break the page."""
    for value in ("\n" * 10**6, "\ud800" * 99, ["x"] * 10**6, {"a": "b" * 10**6}, 10**5000):
        with pytest.raises(AskError) as caught:
            asked(Generate, {**PICTURE, "steps": value}, LIMITS)
        assert len(str(caught.value)) < 200
        assert str(caught.value).isprintable()
