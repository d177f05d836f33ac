"""P4, P11: what README and CONTRIBUTING tell people to type exists and works."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

import app.__main__ as app_command
import dreamrie.__main__ as dreamrie_command
from dreamrie.config import build_parser, parse_config
from eval.__main__ import make_parser
from eval.encoders import NAMES
from tests.contracts.sources import ROOT
from tests.contracts.test_counts import TESTS, functions_of

README = (ROOT / "README.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of the README in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Commands of the README's shell blocks, continued lines joined."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def test_the_first_screen_is_a_picture_and_two_commands() -> None:
    """The picture comes first, then `make demo` and `make test`, all within 20 lines."""
    top = "\n".join(README.splitlines()[:20])
    places = [top.index(text) for text in ("docs/demo-grid.png", "make demo", "make test")]
    assert places == sorted(places)


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_each_make_target_exists(text: str) -> None:
    """`make X` in a text is a target of the Makefile."""
    named = set(re.findall(r"\bmake ([a-z-]+)\b", text)) & set(re.findall(r"`make ([a-z-]+)", text))
    named |= set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert named
    assert named <= targets


def test_the_commands_without_make_are_those_of_the_makefile() -> None:
    """One recipe, written twice: each `.venv/bin/python -m ...` of the README is in the Makefile."""
    without = [words[1:] for words in commands() if words[0] == ".venv/bin/python"]
    recipes = [shlex.split(line) for line in MAKEFILE.splitlines() if "$(PY) -m" in line]
    known = [[word for word in words if word not in {"$(PY)", "-q"}] for words in recipes]
    known = [[word for word in words if "=" not in word] for words in known]
    assert len(without) == 2
    for words in without:
        assert words in known


def test_each_training_command_is_accepted() -> None:
    """The settings on a command line of the README are read without complaint."""
    trainings = [words for words in commands() if "train_dreambooth.py" in words]
    assert trainings
    for words in trainings:
        config = parse_config(words[words.index("train_dreambooth.py") + 1 :])
        assert config.adapter.rank > 0


def test_each_scoring_command_is_accepted() -> None:
    """The command lines of the scores parse, and name encoders that exist."""
    scorings = [words for words in commands() if words[1:3] == ["-m", "eval"]]
    assert scorings
    for words in scorings:
        options = make_parser().parse_args(words[3:])
        named = set((getattr(options, "encoders", None) or NAMES[0]).split(","))
        assert named <= set(NAMES)


def test_each_command_on_files_is_accepted() -> None:
    """The command lines of `python -m dreamrie` parse."""
    tools = [words for words in commands() if words[1:3] == ["-m", "dreamrie"]]
    assert tools
    for words in tools:
        assert dreamrie_command.make_parser().parse_args(words[3:]).command == words[3]


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Every flag that a command line knows, those of its commands included."""
    known = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            known |= {flag for sub in action.choices.values() for flag in flags_of(sub)}
    return known


def test_each_flag_in_the_prose_exists() -> None:
    """A flag in backticks is known to the training, to the scores or to the commands on files."""
    flags = set(re.findall(r"`(--[a-z_\-]+)", README))
    known = flags_of(build_parser()) | flags_of(make_parser())
    known |= flags_of(dreamrie_command.make_parser()) | flags_of(app_command.make_parser())
    assert "--optimizer" in flags
    assert "--never_there" not in known
    assert {
        flag for flag in flags if not {flag, flag.replace("-", "_").replace("__", "--")} & known
    } == set()


def test_the_python_example_runs() -> None:
    """The block is executed as it stands; the adapter moves by at least one learning rate."""
    (source,) = blocks("python")
    scope: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), scope)
    pairs = scope["pairs"]
    assert isinstance(pairs, list)
    assert len(pairs) == 4
    assert all(float(pair.delta().norm()) > 1e-3 for pair in pairs)


def test_other_code_is_python() -> None:
    """Blocks that need a downloaded model at least compile."""
    for source in blocks("py"):
        compile(source, "README.md", "exec")


def test_each_link_leads_somewhere() -> None:
    """Files that are linked or shown are in the checkout."""
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [name for name in targets if "://" not in name and not (ROOT / name).exists()]
    assert len(targets) > 5
    assert missing == []


def test_each_promise_names_tests_that_exist() -> None:
    """P11: rows of the table of promises point at test functions by file and name."""
    known = {
        f"{path.relative_to(ROOT).as_posix()}::{name}"
        for path in TESTS.rglob("test_*.py")
        for name in functions_of(path)
    }
    named = set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", README))
    assert len(named) >= 6
    assert named - known == set()
