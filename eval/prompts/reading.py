"""Where a set of prompts comes from: shipped, DreamBooth's own file, or a text file of the user's."""

from __future__ import annotations

import difflib
import re
from importlib.resources import files
from pathlib import Path

from dreamrie.errors import ConfigError
from eval.palette import COLORS
from eval.prompts.sets import KINDS, SUBJECT, Prompt, PromptSet

# Content hashes of the shipped sets. A changed prompt makes another set, which needs another name.
FROZEN = {
    "drift": "d1faff272f7814c782bcfb4c017e9a0133917241f1ad70068085fd8505099863",
    "drift-embedded": "c23f50d95d45375066961945cb45e4fb8698e44cdbde53f56ef495bacf6ae676",
    "embedded": "7bae782ad016a2dcda6208908b3f67353b5ded3f8a70250c28301fe9b3144dc6",
    "living": "17abc410c0a42e3232be6a754320938f1ce7d8f1da6a43b85c13360e7c06c683",
    "objects": "529b1d8827be47dc0450d152f3c36ad9c30e3cc248e7ecb59a461289816173c3",
}
_WITHOUT_SUBJECT = ("drift", "drift-embedded")

_BACKGROUND = re.compile(r"^(?P<template>.*\S)\s+\|\s*background=(?P<color>\S*)$")
# DreamBooth's file: headings, a table `name,class`, and two lists of Python expressions, which are read as text.
_SECTION = re.compile(r"^(Object|Live Subject) Prompts\s*$", re.MULTILINE)
_CLASS = re.compile(r"^(\w+),([\w ]+?)\s*$", re.MULTILINE)
_EXPRESSION = re.compile(
    r"""^\s*(['"])(?P<text>[^'"\n]*)\1\.format\(unique_token,\s*class_token\)""", re.MULTILINE
)
_PLACES = "{0} {1}"
_LIVE_CLASSES = frozenset({"cat", "dog"})


def load_prompts(
    name_or_path: str | Path, kind: str = "object", *, subject_class: str | None = None
) -> PromptSet:
    """Read a set of prompts.

    Args:
        name_or_path: a key of `FROZEN`, DreamBooth's prompts_and_classes.txt, or a text file with a prompt a line.
        kind: "object" or "living": which of DreamBooth's two lists, for a class that is not in its table.
        subject_class: "dog"; looked up in DreamBooth's table.

    Returns:
        The set.

    Raises:
        ConfigError: there is no such set or file, it is empty, or a line cannot be a prompt; the line is named.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind of subject {kind!r} is unknown; allowed: {', '.join(KINDS)}.")
    name = str(name_or_path)
    if name in FROZEN:
        return _shipped(name)
    path = Path(name_or_path)
    if not path.is_file():
        near = difflib.get_close_matches(name, FROZEN, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"prompts {name!r}: neither a shipped set ({', '.join(sorted(FROZEN))}) nor a file.{hint} A file holds one "
            f'prompt a line, such as "a {SUBJECT} in the snow".'
        )
    text = _read(path)
    if _SECTION.search(text):
        return _dreambooth(text, path, kind, subject_class)
    return PromptSet(path.stem, _parse_lines(text, str(path), with_subject=True))


def read_classes(path: Path) -> dict[str, str]:
    """Class word of every subject in DreamBooth's table.

    Args:
        path: prompts_and_classes.txt.

    Returns:
        "dog6": "dog", ...

    Raises:
        ConfigError: there is no such file, or it holds no table.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no {path}. It belongs to the DreamBooth data set (google/dreambooth) and holds class words "
            "and prompts."
        )
    classes = _classes(_read(path))
    if not classes:
        raise ConfigError(
            f"{path} holds no table `subject_name,class`; it is not DreamBooth's file."
        )
    return classes


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}). Save it as UTF-8.") from error


def _shipped(name: str) -> PromptSet:
    """A set of this checkout; an edited one must not go by its old name."""
    text = (files("eval.prompts") / f"{name}.txt").read_text(encoding="utf-8")
    found = PromptSet(name, _parse_lines(text, name, with_subject=name not in _WITHOUT_SUBJECT))
    if found.sha256 != FROZEN[name]:
        raise ConfigError(
            f"the shipped prompts {name!r} were changed: their hash is {found.sha256[:16]}, not {FROZEN[name][:16]}. "
            "Restore the file, and give your own prompts as a file of your own."
        )
    return found


def _parse_lines(text: str, source: str, *, with_subject: bool) -> tuple[Prompt, ...]:
    """One prompt a line; blank lines and those that begin with # are left out."""
    found: dict[str, int] = {}
    prompts = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line, where = raw.strip(), f"prompts {source}, line {number}"
        if not line or line.startswith("#"):
            continue
        match = _BACKGROUND.match(line)
        template, color = (match["template"], match["color"]) if match else (line, None)
        if color is not None and color not in COLORS:
            raise ConfigError(
                f"{where}: {color!r} is no background color; known: {', '.join(COLORS)}."
            )
        if with_subject and template.count(SUBJECT) != 1:
            raise ConfigError(
                f"{where}: {line!r} must hold {SUBJECT} once, where the subject goes, as in "
                f'"a {SUBJECT} in the snow".'
            )
        if template in found:
            raise ConfigError(
                f"{where}: {line!r} stands in line {found[template]} already. Remove one: a prompt that is drawn "
                "twice counts twice."
            )
        found[template] = number
        prompts.append(Prompt(template, color))
    if not prompts:
        raise ConfigError(
            f'prompts {source}: the file is empty. Write one prompt a line, such as "a {SUBJECT} in the snow".'
        )
    return tuple(prompts)


def _classes(text: str) -> dict[str, str]:
    head = text[: section.start()] if (section := _SECTION.search(text)) else text
    rows = dict(_CLASS.findall(head))
    rows.pop("subject_name", None)
    return rows


def _dreambooth(text: str, path: Path, kind: str, subject_class: str | None) -> PromptSet:
    """One of the two lists of DreamBooth's file."""
    known = set(_classes(text).values())
    if subject_class in known:
        kind = "living" if subject_class in _LIVE_CLASSES else "object"
    heading = {"object": "Object", "living": "Live Subject"}[kind]
    parts = _SECTION.split(text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    lines = [match["text"] for match in _EXPRESSION.finditer(sections.get(heading, ""))]
    odd = [line for line in lines if line.count(_PLACES) != 1]
    if odd or not lines:
        what = f"{odd[0]!r} does not hold {_PLACES}" if odd else "there is no prompt"
        raise ConfigError(
            f"prompts {path}, {heading} Prompts: {what}. Expected are lines such as "
            "'a {0} {1} in the jungle'.format(unique_token, class_token)."
        )
    templates = "\n".join(line.replace(_PLACES, SUBJECT) for line in lines)
    prompts = _parse_lines(templates, f"{path}, {heading} Prompts", with_subject=True)
    return PromptSet(f"dreambooth-{kind}", prompts)
