"""Answers by likelihood and by generation, and how sure an accuracy is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from dreamrie.errors import CheckpointError, ConfigError
from dreamrie.llm import commonsense
from dreamrie.llm import evaluate as real
from dreamrie.llm.data import Example
from dreamrie.llm.encoding import Encoder
from dreamrie.llm.evaluate import Accuracy
from dreamrie.llm.templates import Renderer, ask
from tests.llm import small

LENGTHS = ("A", "B is a much longer answer", "C, too")


def encoder() -> Encoder:
    return Encoder(Renderer(small.tokenizer()), 700)


def examples() -> list[Example]:
    found = []
    for number, row in enumerate(small.ROWS):
        turns, answers = ask(row)
        found.append(Example(turns, answers[row["answer"]], answers, row["task"], f"row {number}"))
    odd = [Example((("user", f"{i}?"),), LENGTHS[0], LENGTHS, "odd", f"odd {i}") for i in range(8)]
    return found + odd


def log_probability(network: Any, text: str, answer: str) -> float:
    """Of the answer behind the text, token by token, by one plain forward pass."""
    tokenizer = small.tokenizer()
    head = tokenizer(text, add_special_tokens=False)["input_ids"]
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([head + tail])).logits[0].double()
    places = range(len(head) - 1, len(head) + len(tail) - 1)
    return sum(
        float(log_softmax(logits[place], 0)[token])
        for place, token in zip(places, tail, strict=True)
    )


def law_ll9_the_likeliest_answer_is_chosen(impl: Any) -> None:
    """The choice whose whole answer is the most probable behind its prompt, whatever stands in the same batch."""
    network, asked = small.model(), examples()
    renderer = Renderer(small.tokenizer())
    wanted = []
    for example in asked:
        prompt = renderer.prompt(example.turns)
        values = [
            log_probability(network, prompt, renderer.answer(example.turns, choice))
            for choice in example.choices
        ]
        wanted.append(values.index(max(values)))
    assert len(set(wanted)) > 1
    for size in (1, 5):
        assert impl.choose(network, encoder(), asked, batch_size=size) == wanted


def test_ll9() -> None:
    law_ll9_the_likeliest_answer_is_chosen(real)


def law_lb5_a_batch_changes_no_probability(impl: Any) -> None:
    """Log-probabilities of all choices are those of one plain forward pass each, whatever pads their batch."""
    network, asked = small.model(), examples()
    questions = [impl.encode_choices(encoder(), example) for example in asked]
    assert len({len(one.tokens) for question in questions for one in question}) > 10
    renderer = Renderer(small.tokenizer())
    wanted = [
        [
            log_probability(network, renderer.prompt(e.turns), renderer.answer(e.turns, choice))
            for choice in e.choices
        ]
        for e in asked
    ]
    for size in (1, 4, None):
        found = impl.log_probabilities(network, questions, batch_size=size)
        for one, other in zip(found, wanted, strict=True):
            assert one == pytest.approx(other, rel=1e-5)  # measured 2e-7


def test_lb5() -> None:
    law_lb5_a_batch_changes_no_probability(real)


CHOICES = tuple(f"The correct answer is Answer{n}" for n in range(1, 13))
NAMED = [
    ("The correct answer is Answer2", CHOICES, 1),
    ("answer2.", CHOICES, 1),
    ("Answer12", CHOICES, 11),
    ("not Answer3 but Answer1", CHOICES, 2),
    ("Answer", CHOICES, None),
    ("", CHOICES, None),
    ("Answer20", CHOICES, None),
    ("it is true", ("the correct answer is true", "the correct answer is false"), 0),
    ("untrue", ("the correct answer is true", "the correct answer is false"), None),
    ("The correct answer is B", tuple(f"The correct answer is {x}" for x in "ABC"), 1),
    ("big cat", ("big", "big cat"), 1),
]


def law_ll10_a_text_names_a_choice(impl: Any) -> None:
    """The first name that stands alone, upper and lower case apart, the longer of two at one place; else none."""
    for text, choices, wanted in NAMED:
        assert impl.named(text, choices) == wanted, text


def test_ll10() -> None:
    law_ll10_a_text_names_a_choice(real)


class Scripted(torch.nn.Module):
    """Writes a given answer for each prompt, as `generate` returns it."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.answers, self.tokenizer = answers, small.tokenizer()

    def generate(self, input_ids: Any, attention_mask: Any, generation_config: Any) -> Any:
        assert not generation_config.do_sample
        rows = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(row[mask.bool()].tolist())
            assert prompt.endswith("<|im_start|>assistant\n")
            (text,) = [a for q, a in self.answers.items() if q in prompt]
            tail = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            tail = (tail + [2] + [0] * 99)[: generation_config.max_new_tokens]
            rows.append(torch.cat([row, torch.tensor(tail)]))
        return torch.stack(rows)


def test_generation_reads_what_was_written() -> None:
    asked = examples()[2:4] + examples()[4:5]
    network = Scripted({"open": "The correct answer is Solution2", "wash": "what?", "Al won": "C!"})
    assert real.choose(network, encoder(), asked, method="generation") == [1, None, 2]


def test_generation_does_not_depend_on_the_batch() -> None:
    """A small real model writes the same behind padding as alone."""
    network, asked = small.model(), examples()
    alone = real.choose(network, encoder(), asked, method="generation", batch_size=1)
    assert real.choose(network, encoder(), asked, method="generation", batch_size=6) == alone


def test_a_row_without_choices_cannot_be_scored() -> None:
    open_row = Example((("user", "Say hi"),), "hi", (), "t", "x.jsonl row 3")
    with pytest.raises(ConfigError, match=r"needs choices(.|\n)*x\.jsonl row 3"):
        real.choose(small.model(), encoder(), [open_row])


def test_accuracies_count_each_task() -> None:
    asked = examples()[:4]
    found = real.accuracies(asked, [0, 0, None, 0])
    assert found == {"boolq": Accuracy(1, 2), "piqa": Accuracy(1, 2)}


def law_ll11_the_interval_of_a_share(impl: Any) -> None:
    """Wilson: each end p solves (share - p)^2 = z^2 p (1 - p) / n, also at 0 and 1."""
    for right, total in ((0, 10), (10, 10), (3, 7), (61, 100), (500, 1000)):
        accuracy = impl.Accuracy(right, total)
        low, high = accuracy.interval()
        assert 0.0 <= low <= accuracy.share <= high <= 1.0
        assert high - low > 0
        for end in (low, high):
            difference = (accuracy.share - end) ** 2 - 1.959964**2 * end * (1 - end) / total
            assert abs(difference) < 1e-7


def test_ll11() -> None:
    law_ll11_the_interval_of_a_share(real)


def student_mass(freedom: int, end: float) -> float:
    """Integral of Student's density from -end to end, by Simpson's rule."""
    count = 20_000
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)
    x = torch.linspace(-end, end, count + 1, dtype=torch.float64)
    y = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    weights = torch.ones(count + 1, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((weights * y).sum() * (2 * end / count) / 3)


def law_ll12_the_interval_over_seeds(impl: Any) -> None:
    """Mean and half-width t s / sqrt(n), where t holds 95 % of Student's distribution of n - 1 degrees."""
    for count in (2, 3, 5, 10, 12, 40):
        values = [0.5 + 0.01 * (n % 4) for n in range(count)]
        mean, low, high = impl.over_seeds(values)
        assert mean == pytest.approx(sum(values) / count)
        spread = torch.tensor(values, dtype=torch.float64).std().item() / math.sqrt(count)
        assert high - mean == pytest.approx(mean - low)
        assert student_mass(count - 1, (high - mean) / spread) == pytest.approx(0.95, abs=1e-4)


def test_ll12() -> None:
    law_ll12_the_interval_over_seeds(real)


def test_one_seed_has_no_interval() -> None:
    mean, low, high = real.over_seeds([0.25])
    assert (mean, math.isnan(low), math.isnan(high)) == (0.25, True, True)
    with pytest.raises(ConfigError, match="no value"):
        real.over_seeds([])


# ------------------------------------------------------------------------- the benchmark


def test_a_measurement_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Tasks in the record are not asked again; another model, method or question is."""
    record, asked, network = tmp_path / "a" / "record.json", examples(), small.model()
    first = commonsense.measure(network, encoder(), asked[:4], record=record, model_digest="x")

    def fail(*_: Any) -> None:
        raise AssertionError

    known = json.loads(record.read_text("utf-8"))
    silent = small.model()
    silent.register_forward_pre_hook(fail)
    again = commonsense.measure(silent, encoder(), asked[:4], record=record, model_digest="x")
    assert again == first
    assert list(again) == ["boolq", "piqa"]
    for changes in (
        {"model_digest": "y"},
        {"model_digest": "x", "method": "generation"},
    ):
        with pytest.raises(AssertionError):
            commonsense.measure(silent, encoder(), asked[:4], record=record, **changes)
    with pytest.raises(AssertionError):
        commonsense.measure(silent, encoder(), asked[:3], record=record, model_digest="x")
    assert json.loads(record.read_text("utf-8")) == known
    whole = commonsense.measure(network, encoder(), asked, record=record, model_digest="x")
    assert list(whole) == [*commonsense.TASKS, "odd"]


def test_a_damaged_record_is_one_message(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    for text in ("{", "[]", '{"a": {"task": "b"}}'):
        record.write_text(text, "utf-8")
        with pytest.raises(CheckpointError, match="record of earlier measurements cannot be read"):
            commonsense.measure(small.model(), encoder(), examples()[:1], record=record)


def test_the_mean_counts_each_task_once() -> None:
    found = {"boolq": Accuracy(1, 10), "piqa": Accuracy(9, 1000)}
    assert commonsense.mean_accuracy(found) == pytest.approx((0.1 + 0.009) / 2)


def test_the_table_has_an_interval_over_seeds() -> None:
    text = commonsense.table(
        {
            "raw": [{"boolq": Accuracy(1, 2), "arc_easy": Accuracy(1, 4)}],
            "ours": [
                {"boolq": Accuracy(3, 4), "arc_easy": Accuracy(1, 4)},
                {"boolq": Accuracy(4, 4), "arc_easy": Accuracy(1, 4)},
            ],
        }
    )
    lines = text.splitlines()
    assert lines[0] == "| method | BoolQ | ARC-E | mean |"
    assert lines[2] == "| raw | 50.0 | 25.0 | 37.5 |"
    # half-width 12.7062 * 8.8388 / sqrt(2)
    assert lines[3] == "| ours | 87.5 | 25.0 | 56.2 (-23.2 to 135.7) |"
