"""Faults of asking: probabilities, bare questions, models that are lent out, and the comparison of two models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from dreamrie.llm import borrowed, evaluate, evaluating, paired, templates
from dreamrie.lora.stacking import unstack_lora
from tests.llm import test_answers as bare
from tests.llm import test_borrowed as lending
from tests.llm import test_evaluate as asking
from tests.llm import test_evaluate_llm as command
from tests.llm import test_paired as comparing
from tests.mutants import Law, Mutant, replaced

_collate, _losses, _values = evaluate.collate, evaluate.token_losses, evaluate.log_probabilities
_ask, _put_back, _mcnemar = templates.ask, borrowed.put_back, paired.mcnemar


def padded_in_front(examples: Any, **options: Any) -> Any:
    """Padding is part of what the model reads."""
    width = max(len(e.tokens) for e in examples)
    wide = [
        dataclasses.replace(e, prompt=(0,) * (width - len(e.tokens)) + e.prompt) for e in examples
    ]
    return _collate(wide, **options)


def for_each_token(model: Any, batch: Any) -> Any:
    counts = torch.bincount(batch.rows)
    return _losses(model, batch) / counts[batch.rows]


def in_order_of_length(model: Any, questions: Any, *, batch_size: int | None = None) -> Any:
    order = sorted(range(len(questions)), key=lambda i: max(len(e.tokens) for e in questions[i]))
    return _values(model, [questions[i] for i in order], batch_size=batch_size)


def with_a_list(row: Any, answers: str = "name") -> Any:
    """The choices are shown, though a choice is the answer."""
    turns, _ = _ask(row, "name")
    return turns[1:], tuple(row["choices"])


def without_context(row: Any, answers: str = "name") -> Any:
    """The last field alone."""
    turns, choices = _ask(row, "text")
    return (("user", turns[0][1].split("\n")[-1]),), choices


def only_unstacked(model: Any, layers: Any, name: str, flags: Any) -> None:
    """PEFT's layers stay, empty."""
    unstack_lora(model, name)


def flags_forgotten(model: Any, layers: Any, name: str, flags: Any) -> None:
    _put_back(model, layers, name, {n: True for n in flags})


@contextmanager
def _without_finally(model: Any) -> Iterator[None]:
    """An error leaves the adapter where it is."""
    layers = {name: each for name, each in model.named_modules() if not any(each.children())}
    flags, training = borrowed.trainable_flags(model), model.training
    yield
    _put_back(model, layers, borrowed.ADAPTER, flags)
    model.train(training)


def one_sided(before: Any, after: Any) -> float:
    return _mcnemar(before, after) / 2


def of_all_questions(before: Any, after: Any) -> float:
    """Questions without a change are counted for one of the two."""
    padded = {task: [*after[task], True] for task in after}
    return _mcnemar({task: [*before[task], False] for task in before}, padded)


def unpaired(before: Any, after: Any, *, draws: int = 4000, seed: int = 0) -> Any:
    """Both models are asked other questions."""
    generator = torch.Generator().manual_seed(seed)
    whole, drawn = 0.0, torch.zeros(draws, dtype=torch.float64)
    for task in before[0]:
        for models, sign in ((before, -1), (after, 1)):
            own = torch.tensor([m[task] for m in models], dtype=torch.float64).mean(0)
            picks = torch.randint(len(own), (draws, len(own)), generator=generator)
            whole += sign * float(own.mean()) / len(before[0])
            drawn += sign * own[picks].mean(dim=1) / len(before[0])
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return whole, low, high


def by_questions(before: Any, after: Any, **options: Any) -> Any:
    """A task with many questions counts more."""
    joined = [
        [{"all": [x for task in m for x in m[task]]} for m in models] for models in (before, after)
    ]
    return _difference(*joined, **options)


_difference = paired.difference


class Nothing:
    """An adapter that was read, and never put on."""

    pairs = ()


def always_merged(model: Any, path: Any) -> Any:
    """What one adapter adds stays in the weights."""
    loaded = _load(model, path)
    with torch.no_grad():
        for pair in loaded.pairs:
            pair.base_weight += pair.delta()
            pair.left.zero_()
    return loaded


_load = evaluating.load_adapter


@contextmanager
def _unguarded(model: Any) -> Iterator[None]:
    with replaced(borrowed, base_fingerprint=lambda _: ""), _borrowed(model):
        yield


_borrowed = borrowed.borrowed


def in_evaluate(**wrong: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: replaced(evaluate, **wrong)


FAULTS: list[tuple[str, Law, str, Callable[[], AbstractContextManager[Any]]]] = [
    ("llm asking: padding is read", asking.law_lb5_a_batch_changes_no_probability,
     "an answer would depend on what shares its batch", in_evaluate(collate=padded_in_front)),
    ("llm asking: mean over tokens", asking.law_lb5_a_batch_changes_no_probability,
     "that is no probability of an answer", in_evaluate(token_losses=for_each_token)),
    ("llm asking: in order of length", asking.law_lb5_a_batch_changes_no_probability,
     "answers would belong to other questions", in_evaluate(log_probabilities=in_order_of_length)),
    ("llm asking: choices in a bare question", bare.law_lb6_a_bare_question_shows_no_choice,
     "a list is what small models cannot read", lambda: replaced(templates, ask=with_a_list)),
    ("llm asking: question without its context", bare.law_lb6_a_bare_question_shows_no_choice,
     "who is asked about stands there", lambda: replaced(templates, ask=without_context)),
    ("llm asking: adapter unstacked only", lending.law_lb3_a_borrowed_model_comes_back,
     "the next adapter could not be put on", lambda: replaced(borrowed, put_back=only_unstacked)),
    ("llm asking: base becomes trainable", lending.law_lb3_a_borrowed_model_comes_back,
     "the next training would move the base", lambda: replaced(borrowed, put_back=flags_forgotten)),
    ("llm asking: adapter stays after an error", lending.law_lb3_a_borrowed_model_comes_back,
     "a training that failed would spoil the next", lambda: replaced(borrowed, borrowed=_without_finally)),
    ("llm asking: base is not compared", lending.law_lb4_a_written_base_is_noticed,
     "every later number would be wrong", lambda: replaced(borrowed, base_fingerprint=lambda _: "")),
    ("llm asking: one-sided p", comparing.law_lb1_mcnemar_counts_the_ways_to_swap,
     "nobody knows beforehand who wins", lambda: replaced(paired, mcnemar=one_sided)),
    ("llm asking: unchanged questions counted", comparing.law_lb1_mcnemar_counts_the_ways_to_swap,
     "they say nothing about who is better", lambda: replaced(paired, mcnemar=of_all_questions)),
    ("llm asking: bootstrap of other questions", comparing.law_lb2_the_interval_of_a_difference_is_paired,
     "the same questions are asked, so most of the noise cancels", lambda: replaced(paired, difference=unpaired)),
    ("llm asking: tasks weighted by size", comparing.law_lb2_the_interval_of_a_difference_is_paired,
     "Table 1 counts each task once", lambda: replaced(paired, difference=by_questions)),
    ("llm asking: adapter never put on", command.law_lb7_each_adapter_is_asked_alone,
     "every line would be the raw model's", lambda: replaced(evaluating, load_adapter=lambda *_: Nothing)),
    ("llm asking: adapters add up", command.law_lb7_each_adapter_is_asked_alone,
     "the second would be asked on top of the first",
     lambda: replaced(evaluating, load_adapter=always_merged, borrowed=_unguarded)),
    ("llm asking: record by name alone", command.law_lb8_a_record_is_of_these_weights,
     "a new training would show the old numbers", lambda: replaced(evaluating, _digest=lambda *_: "")),
]  # fmt: skip


MUTANTS = [Mutant(name=name, law=law, broken=broken, why=why) for name, law, why, broken in FAULTS]
