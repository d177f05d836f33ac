"""Examples as numbers of tokens, cut to the context; the answer is never cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dreamrie.errors import ConfigError
from dreamrie.llm.data import Example
from dreamrie.llm.templates import Renderer

_log = logging.getLogger(__name__)

# What a prompt is trained on at most where nothing else is said.
USUAL_LENGTH = 1024


@dataclass(frozen=True)
class Encoded:
    """An example as tokens.

    Attributes:
        prompt: numbers of its tokens; not learned.
        answer: numbers of its tokens with the one that ends it; learned.
        where: for messages.
        lost: tokens cut off from the beginning of the prompt.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    where: str
    lost: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return self.prompt + self.answer


def context_length(model: Any, wanted: int | None) -> int:
    """Tokens of a prompt with its answer.

    Args:
        model: with a `config`.
        wanted: as set; None: 1024, or the context of the model if that is shorter.

    Returns:
        The number.

    Raises:
        ConfigError: more than the model has positions for.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if wanted is None:
        return min(USUAL_LENGTH, limit or USUAL_LENGTH)
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"--max_length {wanted} is longer than the context of the model, {limit} tokens; give at most {limit}."
        )
    return wanted


class Encoder:
    """Turns examples into tokens.

    Args:
        renderer: writes the text.
        max_length: tokens of a prompt with its answer.
    """

    def __init__(self, renderer: Renderer, max_length: int) -> None:
        self.renderer, self.max_length = renderer, max_length

    def _tokens(self, text: str) -> tuple[int, ...]:
        """The template has written every special token."""
        return tuple(self.renderer.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, example: Example) -> Encoded:
        """One example with its own answer.

        Args:
            example: any.

        Returns:
            See `encode_choice`. Errors are the same.
        """
        return self.encode_choice(example, example.answer)

    def encode_choice(self, example: Example, answer: str) -> Encoded:
        """One example with a given answer; prompt and answer are cut into tokens apart, as generation sees them.

        Args:
            example: any.
            answer: text of the assistant.

        Returns:
            At most `max_length` tokens; a longer prompt loses its beginning.

        Raises:
            ConfigError: the answer leaves no room for any token of the prompt.
        """
        prompt = self._tokens(self.renderer.prompt(example.turns))
        ending = self._tokens(self.renderer.answer(example.turns, answer))
        room = self.max_length - len(ending)
        if room < 1 or not ending or not prompt:
            raise ConfigError(
                f"an answer of {len(ending)} tokens behind a prompt of {len(prompt)} does not fit into "
                f"{self.max_length} tokens\n"
                f"  where: {example.where}\n"
                "  what to do: raise --max_length (up to the context of the model), or shorten or remove the row; "
                "neither may be empty"
            )
        return Encoded(prompt[-room:], ending, example.where, max(0, len(prompt) - room))

    def encode_all(self, examples: Sequence[Example]) -> list[Encoded]:
        """All examples; says how many prompts were cut.

        Args:
            examples: any.

        Returns:
            In the same order. Errors are those of `encode_choice`.
        """
        found = [self.encode(example) for example in examples]
        cut = [encoded for encoded in found if encoded.lost]
        if cut:
            _log.warning(
                "%d of %d prompts lost their beginnings to --max_length %d; the first is %s",
                len(cut),
                len(found),
                self.max_length,
                cut[0].where,
            )
        return found
