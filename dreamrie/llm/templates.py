"""From a row of a data set to turns of a conversation (Table 3 of arXiv:2507.12142, or bare), and from turns to text.

The line with the answer format ends the user's turn, for all tasks: behind the answer it could not be followed. The
paper's BoolQ shows no passage, so a passage in a row is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from dreamrie.errors import ConfigError

Turn = tuple[str, str]
"""Role (system, user, assistant) and text."""
Answers = Literal["name", "text"]
"""name: the choices are listed, and the answer is the name of one. text: the question alone, and a choice itself."""

ENDING = " Follow the answer format, full answer not needed."
ANSWER = "The correct answer is "
_QUESTION = "Please choose the correct answer to the question."


@dataclass(frozen=True)
class Form:
    """How a task is asked.

    Attributes:
        sentence: first sentence of the system turn.
        fields: label and column of each line before the choices; "{column}" in a label is filled in.
        choice: name of a choice, followed by its number; "letter" for A, B, C; None: the choices are the answers.
    """

    sentence: str
    fields: tuple[tuple[str, str], ...]
    choice: str | None


_ARC = Form(_QUESTION, (("Question", "question"),), "Answer")
FORMS: dict[str, Form] = {
    "boolq": Form(
        "Please answer the following question with True or False.",
        (("Question", "question"),),
        None,
    ),
    "piqa": Form(
        "Please choose the correct solution to the question.",
        (("Question", "question"),),
        "Solution",
    ),
    "siqa": Form(
        "Please choose the correct answer to the question based on the context provided.",
        (("Context", "context"), ("Question", "question")),
        "letter",
    ),
    "hellaswag": Form(
        "Please choose the correct ending to complete the given sentence.",
        (("{activity}", "context"),),
        "Ending",
    ),
    "winogrande": Form(
        "Please choose the correct answer to fill in the blank to complete the given sentence.",
        (("Sentence", "sentence"),),
        "Option",
    ),
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "obqa": _ARC,
}
"""The eight tasks of Table 1, by the name in the column `task`."""


def ask(
    row: Mapping[str, Any], answers: Answers = "name"
) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Put a commonsense row into the words of Table 3, or ask it in its own words alone.

    Args:
        row: `task` is one of `FORMS`, `choices` a list of texts; the columns of the task are texts.
        answers: "name": as in Table 3; a model must have learned to refer to a list. "text": no list and no
            instruction, so that any language model has an opinion.

    Returns:
        The turns before the answer, the user's last; and the assistant's turn for each choice.
    """
    form, choices = FORMS[row["task"]], [str(choice) for choice in row["choices"]]
    if answers == "text":
        # A label that is filled in says something: the activity of HellaSwag.
        said = [
            f"{label.format(**row)}: {row[column]}" if "{" in label else row[column]
            for label, column in form.fields
        ]
        return (("user", "\n".join(said)),), tuple(choices)
    lines = [f"{label.format(**row)}: {row[column]}" for label, column in form.fields]
    labels = choices
    if form.choice is not None:
        labels = [
            chr(ord("A") + place) if form.choice == "letter" else f"{form.choice}{place + 1}"
            for place in range(len(choices))
        ]
        lines += [f"{label}: {text}" for label, text in zip(labels, choices, strict=True)]
    lines.append(f"Answer format: {'/'.join(labels)}")
    turns = (("system", form.sentence + ENDING), ("user", "\n".join(lines)))
    return turns, tuple(ANSWER + label for label in labels)


class RefusedError(ConfigError):
    """A chat template does not take the turns that it was given."""


class Renderer:
    """Turns as the text of a prompt and of its answer.

    Args:
        tokenizer: of the model.
        template: "chat": the tokenizer's own chat template; "plain": the turns as lines. None: chat if it has one.

    Attributes:
        template: the one that is used.
        joins_system: the chat template knows no system turn (Gemma), so its text leads the user's turn.

    Raises:
        ConfigError: the tokenizer has no chat template.
        RefusedError: it has one that refuses a single question.
    """

    def __init__(self, tokenizer: Any, template: Literal["chat", "plain"] | None = None) -> None:
        own = tokenizer.chat_template is not None
        if template == "chat" and not own:
            raise ConfigError(
                "the tokenizer of this model has no chat template\n"
                "  where: --template chat\n"
                "  what to do: use --template plain, or the instruct version of the model"
            )
        self.tokenizer = tokenizer
        self.template = template or ("chat" if own else "plain")
        self.joins_system = False
        if self.template == "chat":
            try:
                self._chat([("system", "a"), ("user", "b")], open_end=True)
            except RefusedError:
                self.joins_system = True
                self._chat([("system", "a"), ("user", "b")], open_end=True)

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Everything before the answer.

        Args:
            turns: the last one is the user's.

        Returns:
            Text with the template's marks.
        """
        if self.template == "chat":
            return self._chat(turns, open_end=True)
        start = self.tokenizer.bos_token or ""
        return start + "".join(f"{text}\n" for _, text in turns)

    def answer(self, turns: Sequence[Turn], text: str) -> str:
        """The answer as it follows the prompt, with the mark that ends it.

        Args:
            turns: those before it.
            text: of the assistant.

        Returns:
            What the model has to say, exactly.

        Raises:
            ConfigError: the chat template writes a finished conversation in another way than an open one.
        """
        if self.template == "plain":
            return text + (self.tokenizer.eos_token or "")
        before = self.prompt(turns)
        whole = self._chat([*turns, ("assistant", text)], open_end=False)
        if not whole.startswith(before):
            raise ConfigError(
                "the chat template of this model writes a prompt in another way once it is answered, so the loss "
                "cannot be kept to the answer\n"
                "  where: --template chat\n"
                "  what to do: use --template plain"
            )
        return whole[len(before) :]

    def _chat(self, turns: Sequence[Turn], *, open_end: bool) -> str:
        """The tokenizer's chat template."""
        known = list(turns)
        if self.joins_system and len(known) > 1 and known[0][0] == "system":
            (_, system), (role, text), *rest = known
            known = [(role, f"{system}\n{text}"), *rest]
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in known],
                tokenize=False,
                add_generation_prompt=open_end,
            )
        except TemplateError as error:
            roles = ", ".join(role for role, _ in known)
            raise RefusedError(
                f"the chat template of this model refuses the turns {roles}: {error}\n"
                "  where: --template chat\n"
                "  what to do: give rows whose turns it takes, or use --template plain"
            ) from error
        return str(text)
