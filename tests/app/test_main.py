"""The command line, and what no file of the app may do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import __main__ as command
from dreamrie.errors import ConfigError
from tests.contracts.sources import ROOT

FILES = sorted((ROOT / "app").rglob("*.py"))
PAGE = {"main.py", "style.py", "visitor.py", "__main__.py"}
# These join, resolve and open paths; of the rest each is given paths by them, or names its own files.
PLACES = {"storage.py", "names.py", "places.py", "receiving.py"}


# ------------------------------------------------------------------------------------------------- command line


def test_without_flags_the_page_is_for_this_computer_only() -> None:
    options = command.make_parser().parse_args([])
    assert (options.host, options.share, options.auth, options.port) == (
        "127.0.0.1",
        False,
        [],
        7860,
    )
    assert options.data == Path("runs/app")
    assert options.pretrained_model_name_or_path is None
    assert command.read_auth(options.auth, options.share, options.host) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["anna:password"], [("anna", "password")]),
        (["anna:pass:word:x"], [("anna", "pass:word:x")]),
        (["a:12345678", "b:87654321"], [("a", "12345678"), ("b", "87654321")]),
    ],
)
def test_names_and_passwords(words: list[str], expected: list[tuple[str, str]]) -> None:
    """Several people; a password may hold colons."""
    assert command.read_auth(words, True, "0.0.0.0") == expected
    assert command.read_auth(words, False, "127.0.0.1") == expected


@pytest.mark.parametrize(
    "word", ["anna", "anna:", "anna:short", ":password", "", ":", "anna:1234567"]
)
def test_weak_or_broken_logins_are_refused(word: str) -> None:
    """Never with the password in the message."""
    with pytest.raises(ConfigError, match="--auth is NAME:PASSWORD") as caught:
        command.read_auth([word], False, "127.0.0.1")
    assert "short" not in str(caught.value)
    assert "1234567" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_who_opens_the_page_to_others_must_name_them(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host} lets others reach this page"):
        command.read_auth([], False, host)


def test_sharing_needs_a_login() -> None:
    with pytest.raises(ConfigError, match="--share lets others reach this page"):
        command.read_auth([], True, "127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_computer_needs_none(host: str) -> None:
    assert command.read_auth([], False, host) == []


def test_a_refusal_ends_with_2_before_anything_is_loaded(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """In words, and no data folder is made."""
    data = tmp_path / "data"
    assert command.main(["--share", "--data", str(data)]) == 2
    assert "--auth NAME:PASSWORD" in caplog.text
    assert not data.exists()


# --------------------------------------------------------------------------------------------------- every file


def state_of(tree: ast.Module) -> Iterator[str]:
    """Names of a module that something may be put into, and functions that rebind one."""
    kinds = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    makers = {"list", "dict", "set", "deque", "defaultdict", "OrderedDict", "Counter"}
    for node in tree.body:
        value = getattr(node, "value", None)
        made = isinstance(value, ast.Call) and getattr(value.func, "id", "") in makers
        if isinstance(node, ast.Assign | ast.AnnAssign) and (isinstance(value, kinds) or made):
            yield ast.unparse(node)
    for inner in ast.walk(tree):
        if isinstance(inner, ast.Global):
            yield ast.unparse(inner)
        for decorator in getattr(inner, "decorator_list", []):
            if "cache" in ast.unparse(decorator):
                yield ast.unparse(decorator)


def changes_of(tree: ast.Module) -> Iterator[str]:
    """Where a name of the module is written into."""
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    writing = {
        "append",
        "add",
        "update",
        "setdefault",
        "pop",
        "clear",
        "extend",
        "insert",
        "remove",
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            if isinstance(node.value, ast.Name) and node.value.id in names:
                yield ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            held = node.func.value
            if isinstance(held, ast.Name) and held.id in names and node.func.attr in writing:
                yield ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_keeps_anything_between_requests(path: Path) -> None:
    """W4: tables that are only read are fine; nothing is ever put into one, no `global`, no cache."""
    tree = ast.parse(path.read_text("utf-8"))
    assert list(changes_of(tree)) == []
    assert [line for line in state_of(tree) if "global" in line or "cache" in line] == []
    assert [line for line in state_of(tree) if line.endswith(("= []", "= {}", "()"))] == []


@pytest.mark.parametrize(
    "source",
    ["seen = []", "seen: dict[str, int] = {}", "seen = set()", "import x\nseen = deque()"],
)
def test_module_state_is_found(source: str) -> None:
    """Mutants of the test above."""
    assert len(list(state_of(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    "source",
    ["T = {'a': 1}\ndef f(k): T[k] = 2", "T = {1}\ndef f(k): T.add(k)", "T = [1]\ndel T[0]"],
)
def test_a_table_that_is_written_into_is_found(source: str) -> None:
    assert len(list(changes_of(ast.parse(source)))) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_gradio_is_for_the_page_alone(path: Path) -> None:
    """W6: whatever decides about files, jobs and limits can be tested, and reused, without a page."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    is_page = path.name in PAGE or path.parent.name == "tabs"
    assert is_page or "gradio" not in imported


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_from_names_are_made_in_the_storage_alone(path: Path) -> None:
    """W6: outside of it nothing is taken from `users/` or `incoming/`, and the page knows no paths at all."""
    tree = ast.parse(path.read_text("utf-8"))
    if path.name in PLACES:
        return
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert "users" not in texts
    # The flag that tells gradio where to put uploads.
    assert "incoming" not in texts or path.name == "__main__.py"
    if path.parent.name == "tabs":
        calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
        names = {getattr(call, "id", getattr(call, "attr", "")) for call in calls}
        forbidden = {"Path", "open", "write_bytes", "write_text", "read_bytes", "read_text"}
        assert not names & {*forbidden, "unlink", "rmtree", "joinpath"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_shell_and_no_pickle(path: Path) -> None:
    """W6: processes get lists of words; nothing is run that was read from a file."""
    source = path.read_text("utf-8")
    assert "shell=True" not in source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {
                "eval",
                "exec",
                "os.system",
                "os.popen",
                "torch.load",
                "pickle.load",
            }
