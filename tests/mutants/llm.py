"""Faults of the language task: what is learned, what stands in a batch, what is asked, what is written."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from dreamrie.llm import encoding, evaluate, targets, task, templates
from dreamrie.lora import LowRank
from tests.llm import test_evaluate as asking
from tests.llm import test_targets as layers
from tests.llm import test_task as laws
from tests.llm import test_templates as words
from tests.llm import test_train_llm as command
from tests.mutants import Law, Mutant, each, replaced

_collate, _losses, _change = task.collate, task.token_losses, task.change_of
_Task, _Renderer, _Encoder = task.CausalLmTask, templates.Renderer, encoding.Encoder
_example, _accuracy = _Task._example, evaluate.Accuracy
_PACKED = each(laws.law_ll2_packing_changes_neither_loss_nor_gradient, ["llama"])


def in_task(**wrong: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: replaced(task, **wrong)


@contextmanager
def _method(**wrong: Any) -> Iterator[Any]:
    """The module of the task while a method of its class is wrong."""
    with replaced(_Task, **wrong):
        yield task


# ---------------------------------------------------------------------------- the loss


def prompt_learned(examples: Any, **options: Any) -> Any:
    """The last token of each longer prompt is a target too."""
    moved = [
        dataclasses.replace(e, prompt=e.prompt[:-1], answer=e.prompt[-1:] + e.answer)
        if len(e.prompt) > 1
        else e
        for e in examples
    ]
    return _collate(moved, **options)


def end_not_learned(examples: Any, **options: Any) -> Any:
    batch = _collate(examples, **options)
    ends = torch.ones_like(batch.weights)
    ends[batch.targets == 2] = 0
    return dataclasses.replace(batch, weights=batch.weights * ends)


def by_tokens(examples: Any, **options: Any) -> Any:
    """Mean over the tokens of the batch: long answers count more."""
    batch = _collate(examples, **options)
    return dataclasses.replace(
        batch, weights=torch.full_like(batch.weights, 1 / len(batch.weights))
    )


def not_shifted(examples: Any, **options: Any) -> Any:
    """A token is predicted from itself."""
    batch = _collate(examples, **options)
    return dataclasses.replace(
        batch, columns=(batch.columns + 1).clamp(max=batch.tokens.shape[1] - 1)
    )


def one_position(examples: Any, **options: Any) -> Any:
    """Positions go on through a row: its examples see each other."""
    batch = _collate(examples, **options)
    positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.positions)
    return dataclasses.replace(batch, positions=positions)


# ------------------------------------------------------------------------- the streams


class Counting(_Task):
    """Takes the next rows, whatever is asked for."""

    def batch(self, step: int, micro: int) -> Any:
        self.__dict__.setdefault("counter", itertools.count(1))
        return super().batch(next(self.counter), 0)


class StepsOnly(_Task):
    """Every micro-batch of a step holds the same rows."""

    def batch(self, step: int, micro: int) -> Any:
        return super().batch(step, 0)


def seedless(self: Any, stream: str, position: int) -> Any:
    self._seed = 0
    return _example(self, stream, position)


def with_replacement(self: Any, stream: str, position: int) -> Any:
    generator = torch.Generator().manual_seed(1000 * self._seed + position)
    return self.examples[int(torch.randint(len(self.examples), (), generator=generator))]


def one_order(self: Any, stream: str, position: int) -> Any:
    return _example(self, stream, position % len(self.examples))


# ------------------------------------------------------------------------ the adapter


def without_anchor(pair: Any) -> LowRank:
    """X instead of X - X0."""
    left = pair.left_matrix().detach().clone()
    left[:, pair.rank :] = 0
    return LowRank(left, pair.right_matrix().detach())


def half_of_it(pair: Any) -> LowRank:
    change = _change(pair)
    return LowRank(change.left / 2, change.right)


# ------------------------------------------------------------------- targets and words


def all_linear(model: Any, wanted: Any) -> list[str]:
    return sorted({n for n, m in model.named_modules() if isinstance(m, nn.Linear)})


def queries_and_values(model: Any, wanted: Any) -> list[str]:
    return ["self_attn.q_proj", "self_attn.v_proj"]


class OpenEnd(_Renderer):
    """The mark of the assistant's turn is missing in the prompt."""

    def prompt(self, turns: Any) -> str:
        return super().prompt(turns).removesuffix("<|im_start|>assistant\n")

    def answer(self, turns: Any, text: str) -> str:
        return f"{text}<|im_end|>\n"


class Endless(_Renderer):
    """Nobody learns when to stop."""

    def answer(self, turns: Any, text: str) -> str:
        return text


class CutBehind(_Encoder):
    """Cut from the end."""

    def encode_choice(self, example: Any, answer: str) -> Any:
        whole = _Encoder(self.renderer, 10_000).encode_choice(example, answer)
        tokens, start = whole.tokens[: self.max_length], len(whole.prompt)
        return encoding.Encoded(tokens[:start], tokens[start:], whole.where)


class CutInFront(_Encoder):
    """The prompt loses its end, which holds the question."""

    def encode_choice(self, example: Any, answer: str) -> Any:
        whole = _Encoder(self.renderer, 10_000).encode_choice(example, answer)
        room = self.max_length - len(whole.answer)
        lost = max(0, len(whole.prompt) - room)
        return encoding.Encoded(whole.prompt[:room], whole.answer, whole.where, lost)


# ---------------------------------------------------------------------------- answers


_by_likelihood = evaluate._by_likelihood


def _negated(model: Any, encoder: Any, examples: Any) -> list[int | None]:
    with replaced(evaluate, token_losses=lambda m, b: -_losses(m, b)):
        return _by_likelihood(model, encoder, examples)


def per_token(model: Any, encoder: Any, examples: Any) -> list[int | None]:
    """Mean over tokens: long answers are favoured."""

    def mean(model: Any, batch: Any) -> Any:
        counts = torch.bincount(batch.rows)
        return _losses(model, batch) / counts[batch.rows]

    with replaced(evaluate, token_losses=mean):
        return _by_likelihood(model, encoder, examples)


def in_given_order(examples: Any, **options: Any) -> Any:
    return _collate(list(reversed(examples)), **options)


def part_of_a_word(text: str, choices: Any) -> int | None:
    label = [choice.split(" ")[-1].lower() for choice in choices]
    hits = [
        (text.lower().find(name), place) for place, name in enumerate(label) if name in text.lower()
    ]
    return min(hits)[1] if hits else None


def last_named(text: str, choices: Any) -> int | None:
    label = [re.escape(choice.split(" ")[-1]) for choice in choices]
    hits = [
        (match.start(), place)
        for place, name in enumerate(label)
        for match in re.finditer(rf"(?<!\w){name}(?!\w)", text, re.IGNORECASE)
    ]
    return max(hits)[1] if hits else None


class Wald(_accuracy):
    """No width at 0 and 1."""

    def interval(self) -> tuple[float, float]:
        half = 1.959964 * math.sqrt(self.share * (1 - self.share) / self.total)
        return max(0.0, self.share - half), min(1.0, self.share + half)


_batch = _Task.batch


def _counted(self: Any, step: int, micro: int) -> Any:
    self.__dict__.setdefault("counter", itertools.count(1))
    return _batch(self, next(self.counter) if step else 0, micro)


FAULTS: list[tuple[str, Law, str, Callable[[], AbstractContextManager[Any]]]] = [
    ("llm: prompt learned", laws.law_ll1_the_loss_is_that_of_the_answers,
     "the loss is kept to the answer", in_task(collate=prompt_learned)),
    ("llm: end of the answer not learned", laws.law_ll1_the_loss_is_that_of_the_answers,
     "a model that does not stop cannot be scored by generation", in_task(collate=end_not_learned)),
    ("llm: mean over tokens", laws.law_ll1_the_loss_is_that_of_the_answers,
     "micro-batches with long answers would count more", in_task(collate=by_tokens)),
    ("llm: targets not shifted", laws.law_ll1_the_loss_is_that_of_the_answers,
     "the token to predict would be in sight", in_task(collate=not_shifted)),
    ("llm: packed examples see each other", _PACKED,
     "an answer would depend on its neighbours", in_task(collate=one_position, check_packing=lambda *_: None)),
    ("llm: batches by a counter", laws.law_ll3_a_batch_is_a_function_of_its_place,
     "a resumed run would see other rows", in_task(CausalLmTask=Counting)),
    ("llm: equal micro-batches", laws.law_ll3_a_batch_is_a_function_of_its_place,
     "accumulation would add nothing", in_task(CausalLmTask=StepsOnly)),
    ("llm: order without seed", laws.law_ll3_a_batch_is_a_function_of_its_place,
     "seeds would not differ", lambda: _method(_example=seedless)),
    ("llm: rows with replacement", laws.law_ll4_each_run_through_the_rows_sees_each_once,
     "some rows would never be seen", lambda: _method(_example=with_replacement)),
    ("llm: one order for all runs", laws.law_ll4_each_run_through_the_rows_sees_each_once,
     "the same rows would always share a batch", lambda: _method(_example=one_order)),
    ("llm: saved without its anchor", laws.law_ll5_stock_peft_reads_the_adapter,
     "the file would hold X, not X - X0", in_task(change_of=without_anchor)),
    ("llm: saved at half strength", laws.law_ll5_stock_peft_reads_the_adapter,
     "alpha = r means scaling 1", in_task(change_of=half_of_it)),
    ("llm: output layer adapted", each(layers.law_ll6_every_projection_and_nothing_else, ["llama"]),
     "it is neither attention nor MLP", lambda: replaced(targets, target_modules=all_linear)),
    ("llm: queries and values only", each(layers.law_ll6_every_projection_and_nothing_else, ["gemma"]),
     "the paper adapts attention and MLP", lambda: replaced(targets, target_modules=queries_and_values)),
    ("llm: assistant's mark not in the prompt", words.law_ll7_prompt_and_answer_are_the_conversation,
     "generation would begin in another place than training", lambda: replaced(templates, Renderer=OpenEnd)),
    ("llm: answer without an end", words.law_ll7_prompt_and_answer_are_the_conversation,
     "the model never learns to stop", lambda: replaced(templates, Renderer=Endless)),
    ("llm: answer cut", words.law_ll8_the_answer_is_never_cut,
     "there would be nothing to learn", lambda: replaced(encoding, Encoder=CutBehind)),
    ("llm: end of the prompt cut", words.law_ll8_the_answer_is_never_cut,
     "the question stands at the end", lambda: replaced(encoding, Encoder=CutInFront)),
    ("llm: least likely answer", asking.law_ll9_the_likeliest_answer_is_chosen,
     "a sign", lambda: replaced(evaluate, _by_likelihood=_negated)),
    ("llm: likelihood for each token", asking.law_ll9_the_likeliest_answer_is_chosen,
     "that is another measure, which favours long answers",
     lambda: replaced(evaluate, _by_likelihood=per_token)),
    ("llm: answers in another order", asking.law_ll9_the_likeliest_answer_is_chosen,
     "sums would belong to other choices", lambda: replaced(evaluate, collate=in_given_order)),
    ("llm: part of a word is a name", asking.law_ll10_a_text_names_a_choice,
     "Answer12 holds Answer1", lambda: replaced(evaluate, named=part_of_a_word)),
    ("llm: the last name counts", asking.law_ll10_a_text_names_a_choice,
     "the first one is the answer", lambda: replaced(evaluate, named=last_named)),
    ("llm: Wald's interval", asking.law_ll11_the_interval_of_a_share,
     "ten of ten would be certain", lambda: replaced(evaluate, Accuracy=Wald)),
    ("llm: normal instead of Student", asking.law_ll12_the_interval_over_seeds,
     "three seeds would look three times as sure", lambda: replaced(evaluate, _student=lambda _: 1.959964)),
    ("llm: resumed with other rows", command.law_ll13_resumed_equals_straight,
     "the state of a counter is in no checkpoint", lambda: _method(batch=_counted)),
]  # fmt: skip


MUTANTS = [Mutant(name=name, law=law, broken=broken, why=why) for name, law, why, broken in FAULTS]
