"""Prompts with a place for the subject, and sets of them that are known by their content."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from dreamrie.errors import ConfigError

SUBJECT = "{subject}"
KINDS = ("object", "living")

_ARTICLE = re.compile(rf"\b([Aa])n? (?={re.escape(SUBJECT)})")
# Written with a vowel but spoken with a consonant ("a unicorn", "a European robin"), and the reverse ("an hourglass").
_LIKE_A = re.compile(r"(uni(?!n|m)|us[aeu]|eu|one\b|ufo|ukulele|u-)", re.IGNORECASE)
_LIKE_AN = re.compile(r"(hour|heir|honest|honou?r)", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        template: text in which `{subject}` stands for "sks dog" or "dog"; prompts about other things have none.
        background: color of `eval.palette` that the picture is to have for background, or None.
    """

    template: str
    background: str | None = None

    def text(self, subject: str) -> str:
        """Put a subject in; "a" or "an" before it follows its first sound.

        Args:
            subject: "sks dog", "owl".

        Returns:
            "a sks dog in the snow", "an owl in the snow".
        """
        article = "n" if _takes_an(subject) else ""
        return _ARTICLE.sub(rf"\g<1>{article} ", self.template).replace(SUBJECT, subject)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order.

    Attributes:
        name: of a shipped set, or after the file it was read from.
        prompts: at least one.
    """

    name: str
    prompts: tuple[Prompt, ...]

    @property
    def sha256(self) -> str:
        """Hash of the content: templates and backgrounds in their order, whatever file they came in."""
        lines = [f"{prompt.template}\t{prompt.background or ''}\n" for prompt in self.prompts]
        return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()

    @property
    def has_subject(self) -> bool:
        """Whether the subject stands in every prompt."""
        return all(SUBJECT in prompt.template for prompt in self.prompts)

    def full(self, token: str, subject_class: str) -> list[str]:
        """The prompts that are drawn.

        Args:
            token: "sks"; an empty one is left out.
            subject_class: "dog".

        Returns:
            "a sks dog in the snow", ...
        """
        return [prompt.text(f"{token} {subject_class}".strip()) for prompt in self.prompts]

    def plain(self, subject_class: str) -> list[str]:
        """The prompts as text similarity reads them, without the rare token.

        Args:
            subject_class: "dog".

        Returns:
            "a dog in the snow", ...
        """
        return [prompt.text(subject_class) for prompt in self.prompts]

    def spread(self, count: int) -> list[Prompt]:
        """Some prompts, evenly spaced over the set; the same ones each time.

        Args:
            count: how many; more than there are begin again at the first.

        Returns:
            `count` prompts.

        Raises:
            ConfigError: `count` is below 1.
        """
        if count < 1:
            raise ConfigError(f"{count} prompts of the set {self.name!r}: ask for at least 1.")
        total = len(self.prompts)
        if count > total:
            return [self.prompts[index % total] for index in range(count)]
        return [self.prompts[index * total // count] for index in range(count)]


def _takes_an(subject: str) -> bool:
    """Whether "an" stands before the words."""
    if _LIKE_AN.match(subject):
        return True
    return subject[:1].lower() in set("aeiou") and _LIKE_A.match(subject) is None
