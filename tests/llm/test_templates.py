"""Table 3 in words, and chat templates around them."""

from __future__ import annotations

from typing import Any

import pytest

from dreamrie.errors import ConfigError
from dreamrie.llm import encoding as real_encoding
from dreamrie.llm import templates as real
from dreamrie.llm.data import Example
from tests.llm import small

TURNS = (("system", "Be brief."), ("user", "Hi?"))
END = "Follow the answer format, full answer not needed."


def rows(task: str) -> dict[str, Any]:
    return next(row for row in small.ROWS if row["task"] == task)


TABLE = {
    "boolq": (
        f"Please answer the following question with True or False. {END}",
        "Question: is ice cold\nAnswer format: True/False",
        ("True", "False"),
    ),
    "piqa": (
        f"Please choose the correct solution to the question. {END}",
        "Question: open\nSolution1: pull\nSolution2: push\nAnswer format: Solution1/Solution2",
        ("Solution1", "Solution2"),
    ),
    "siqa": (
        f"Please choose the correct answer to the question based on the context provided. {END}",
        "Context: Al won.\nQuestion: How is Al?\nA: sad\nB: glad\nC: mad\nAnswer format: A/B/C",
        ("A", "B", "C"),
    ),
    "hellaswag": (
        f"Please choose the correct ending to complete the given sentence. {END}",
        "Rowing: They\nEnding1: a\nEnding2: bb\nEnding3: c\nEnding4: d\n"
        "Answer format: Ending1/Ending2/Ending3/Ending4",
        ("Ending1", "Ending2", "Ending3", "Ending4"),
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence. "
        + END,
        "Sentence: Jo met Di. _ ran.\nOption1: Jo\nOption2: Di\nAnswer format: Option1/Option2",
        ("Option1", "Option2"),
    ),
    "arc_easy": (
        f"Please choose the correct answer to the question. {END}",
        "Question: hot?\nAnswer1: sun\nAnswer2: mud\nAnswer3: oil\n"
        "Answer format: Answer1/Answer2/Answer3",
        ("Answer1", "Answer2", "Answer3"),
    ),
    "arc_challenge": (
        f"Please choose the correct answer to the question. {END}",
        "Question: hot?\nAnswer1: sun\nAnswer2: mud\nAnswer format: Answer1/Answer2",
        ("Answer1", "Answer2"),
    ),
    "obqa": (
        f"Please choose the correct answer to the question. {END}",
        "Question: cold?\nAnswer1: sun\nAnswer2: mud\nAnswer3: ice\nAnswer4: air\n"
        "Answer format: Answer1/Answer2/Answer3/Answer4",
        ("Answer1", "Answer2", "Answer3", "Answer4"),
    ),
}
"""Written out from the paper by hand."""


@pytest.mark.parametrize("task", sorted(TABLE))
def test_a_task_is_asked_in_the_words_of_the_table(task: str) -> None:
    system, user, labels = TABLE[task]
    turns, answers = real.ask(rows(task))
    assert turns == (("system", system), ("user", user))
    assert answers == tuple(f"The correct answer is {label}" for label in labels)


def test_the_table_has_the_eight_tasks() -> None:
    assert set(real.FORMS) == set(TABLE)


def law_ll7_prompt_and_answer_are_the_conversation(impl: Any) -> None:
    """The prompt ends where the assistant begins, and both together are what the chat template writes of all turns."""
    for template in (small.CHATML, small.GEMMA):
        tokenizer = small.tokenizer(template)
        renderer = impl.Renderer(tokenizer)
        prompt, answer = renderer.prompt(TURNS), renderer.answer(TURNS, "Yes.")
        turns = [{"role": role, "content": text} for role, text in TURNS]
        if template is small.GEMMA:
            turns = [{"role": "user", "content": "Be brief.\nHi?"}]
        turns.append({"role": "assistant", "content": "Yes."})
        assert prompt + answer == tokenizer.apply_chat_template(turns, tokenize=False)
        assert answer == "Yes.<|im_end|>\n"


def test_ll7() -> None:
    law_ll7_prompt_and_answer_are_the_conversation(real)


def test_plain_text_needs_no_template() -> None:
    renderer = real.Renderer(small.tokenizer(None))
    assert renderer.template == "plain"
    assert renderer.prompt(TURNS) == "<|im_start|>Be brief.\nHi?\n"
    assert renderer.answer(TURNS, "Yes.") == "Yes.<|im_end|>"


def test_a_chat_without_a_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        real.Renderer(small.tokenizer(None), "chat")


def test_a_template_that_refuses_is_one_message() -> None:
    """One that takes no question at all, at once; one that takes a single question, at a longer conversation."""
    never = "{{ raise_exception('no!') }}"
    with pytest.raises(ConfigError, match="refuses the turns user: no!"):
        real.Renderer(small.tokenizer(never))
    short = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}x"
    renderer = real.Renderer(small.tokenizer(short))
    with pytest.raises(ConfigError, match="refuses the turns user, assistant, user: too long"):
        renderer.prompt([("user", "a"), ("assistant", "b"), ("user", "c")])


def test_a_template_that_rewrites_prompts_is_refused() -> None:
    """Some templates number the turns or drop the thinking of earlier ones; the answer could not be told apart."""
    odd = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    renderer = real.Renderer(small.tokenizer(odd))
    with pytest.raises(ConfigError, match="in another way once it is answered"):
        renderer.answer(TURNS, "Yes.")


def law_ll8_the_answer_is_never_cut(impl: Any) -> None:
    """A prompt that is too long loses its beginning; the answer and the end of the prompt stay whole."""
    renderer = real.Renderer(small.tokenizer())
    example = Example((("user", "x" * 50 + "end?"),), "Yes.", (), "t", "row 1")
    whole = impl.Encoder(renderer, 200).encode(example)
    cut = impl.Encoder(renderer, 40).encode(example)
    assert len(whole.tokens) > 60
    assert (whole.lost, len(cut.tokens)) == (0, 40)
    assert cut.answer == whole.answer
    assert cut.prompt == whole.prompt[cut.lost :]
    decoded = renderer.tokenizer.decode(list(whole.tokens))
    assert decoded == renderer.prompt(example.turns) + renderer.answer(example.turns, "Yes.")


def test_ll8() -> None:
    law_ll8_the_answer_is_never_cut(real_encoding)


def test_how_many_prompts_were_cut_is_said(caplog: pytest.LogCaptureFixture) -> None:
    renderer = real.Renderer(small.tokenizer())
    examples = [Example((("user", "x" * n),), "Yes.", (), "t", f"row {n}") for n in (1, 90, 95)]
    real_encoding.Encoder(renderer, 50).encode_all(examples)
    assert (
        "2 of 3 prompts lost their beginnings to --max_length 50; the first is row 90"
        in caplog.text
    )


def test_an_answer_longer_than_the_context_is_one_message() -> None:
    renderer = real.Renderer(small.tokenizer())
    example = Example((("user", "why?"),), "y" * 50, (), "t", "rows.jsonl row 7")
    with pytest.raises(ConfigError, match="an answer of 52 tokens") as caught:
        real_encoding.Encoder(renderer, 40).encode(example)
    assert "rows.jsonl row 7" in str(caught.value)


def test_the_context_is_that_of_the_model() -> None:
    network = small.model()
    assert real_encoding.context_length(network, None) == 768
    assert real_encoding.context_length(network, 100) == 100
    with pytest.raises(ConfigError, match="context of the model, 768 tokens"):
        real_encoding.context_length(network, 769)
