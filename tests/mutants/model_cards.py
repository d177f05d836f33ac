"""Faults of the model card: text that is no YAML, names of this machine, pictures of another step."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dreamrie.diffusion import model_card
from tests.diffusion import test_model_card as laws
from tests.mutants import Mutant, replaced
from tests.mutants.adapter_files import in_folder

good_base, good_pictures = model_card._base, model_card._pictures
good_samples, good_training = model_card._samples, model_card._training

YAML, MACHINE, BYTES, LINKS = map(in_folder, laws.LAWS)


def wrong(name: str, law: Any, why: str, **changed: Any) -> Mutant:
    """A mutant with functions of the card replaced."""

    @contextlib.contextmanager
    def broken() -> Iterator[Any]:
        with replaced(model_card, **changed):
            yield model_card

    return Mutant(name, law, broken, why, raises=(laws.yaml.YAMLError,))


def bare(text: str) -> str:
    return text


def quotes_only(text: str) -> str:
    return f'"{text}"'


def as_json(text: str) -> str:
    """Line separators of Unicode stay, which YAML folds."""
    return json.dumps(text, ensure_ascii=False)


def as_ascii_json(text: str) -> str:
    """Beyond the first plane JSON writes two halves, which YAML does not put together."""
    return json.dumps(text)


def markup(text: str) -> str:
    return " ".join(text.split())


def named_folder(source: Any) -> Any:
    found = good_base(source)
    return found if found.hub_id else model_card.Base("", "", source["resolved"], '""')


def folder_as_base_model(source: Any) -> Any:
    return model_card.Base(source["resolved"], "", "a model", '""')


def named_pictures(run: Any) -> str:
    return f"{good_pictures(run)} ({', '.join(run.record['pictures']['concept'])})"


def dated(run: Any) -> list[str]:
    return [*good_training(run), f"| started | {run.record['started']} |"]


def timed(run: Any) -> list[str]:
    return [*good_training(run), f"| start | {run.record['initialization']} |"]


def absolute(folder: Path, settings: Any) -> Any:
    step, samples = good_samples(folder, settings)
    return step, tuple((text, str(folder / path)) for text, path in samples)


def first_step(folder: Path, settings: Any) -> Any:
    _, samples = good_samples(folder, settings)
    return 0, tuple((text, path.replace("000020", "000000")) for text, path in samples)


def one_a_prompt(folder: Path, settings: Any) -> Any:
    return good_samples(folder, {**settings, "num_validation_images": 1})


MUTANTS = [
    wrong("card: bare scalars", YAML, "a colon starts a mapping", _quoted=bare),
    wrong("card: quotes in quotes", YAML, "the text has quotes of its own", _quoted=quotes_only),
    wrong("card: JSON for YAML", YAML, "U+0085 and U+2028 end a line of YAML", _quoted=as_json),
    wrong("card: halves of characters", YAML, "an emoji is one character", _quoted=as_ascii_json),
    wrong("card: markup in a prompt", YAML, "a page would obey it", _plain=markup),
    wrong("card: the folder of the base", MACHINE, "it names the user", _base=named_folder),
    wrong("card: a folder as base model", MACHINE, "no hub has it", _base=folder_as_base_model),
    wrong("card: names of pictures", MACHINE, "they name people", _pictures=named_pictures),
    wrong("card: a date", BYTES, "the same run a day later", _training=dated),
    wrong("card: seconds", BYTES, "the same run on a busy machine", _training=timed),
    wrong("card: absolute links", LINKS, "they end with the machine", _samples=absolute),
    wrong("card: the base's pictures", LINKS, "step 0 is the base", _samples=first_step),
    wrong("card: prompts shifted", LINKS, "two pictures have one prompt", _samples=one_a_prompt),
]
