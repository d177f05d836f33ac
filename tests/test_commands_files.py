"""What the commands share: names that fit, shares that do not lie, what may be overwritten, whose base it is."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dreamrie import __main__ as command
from dreamrie.commands import files, table
from dreamrie.errors import ConfigError
from tests.small_adapters import save_small


def options(to: str, output: Path, force: bool = False) -> Any:
    return SimpleNamespace(to=to, output=output, force=force)


def test_layers_names_fit_their_column() -> None:
    layer = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
    assert table.short(layer) == "down.0.att.1.tb.0.attn1.to_out.0"
    assert table.short("mid_block.resnets.1.conv1") == "mid.res.1.conv1"
    assert table.short("my_up_blocks.x") == "my_up_blocks.x"
    long = table.short("a." * 30 + "to_q", 20)
    assert (len(long), long[:2], long[-4:]) == (20, "..", "to_q")
    assert table.short("a\x1b[2Jb") == "a\\x1b[2Jb"


def test_abbreviations_are_explained_where_they_are_used() -> None:
    assert table.names_note(["mix", "my_up_blocks.x"]) == []
    (line,) = table.names_note(["mix", "mid_block.resnets.1.conv1"])
    assert "mid mid_block" in line


def test_a_share_that_is_not_all_does_not_read_as_all() -> None:
    assert table.percent(1.0) == "100.0 %"
    assert table.percent(0.0) == "0.0 %"
    assert table.percent(0.985) == "98.5 %"
    assert table.percent(0.99995) == "99.9950 %"
    assert table.percent(1 - 1e-9) == "99.9999 %"
    assert table.percent(3e-5) == "3.00e-03 %"


def test_tables_are_aligned() -> None:
    lines = table.table(["a", "number"], [["long name", "1"], ["b", "22.5"]])
    assert lines == ["a          number", "long name       1", "b            22.5"]
    lines = table.facts_table([("one", "x " * 80), ("longer", "y")])
    assert max(map(len, lines)) <= table.COLUMNS
    assert lines[0].startswith("one     x")
    assert lines[1].startswith("        x")


def test_sizes_are_read_by_people() -> None:
    assert files.size_text(999) == "1 kB"
    assert files.size_text(532_224) == "532 kB"
    assert files.size_text(999_600) == "1.0 MB"


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """Folder or file, of each format; --force replaces, but never a folder by a file."""
    given = save_small(tmp_path / "run")
    for to, output in (("diffusers", given), ("diffusers", given.parent), ("universal", given)):
        with pytest.raises(ConfigError, match=f"{given} is there already.*--force"):
            files.check_output(options(to, output))
        files.check_output(options(to, output, force=True))
    folder = tmp_path / "peft"
    files.check_output(options("peft", folder))
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors is there already"):
        files.check_output(options("peft", folder))
    with pytest.raises(ConfigError, match="writes a folder"):
        files.check_output(options("peft", tmp_path / "a.safetensors"))
    with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
        files.check_output(options("universal", tmp_path / "a"))
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        files.check_output(options("diffusers", tmp_path / "b.safetensors", force=True))
    (tmp_path / "taken").write_text("mine", "utf-8")
    with pytest.raises(ConfigError, match="needs a folder here"):
        files.check_output(options("peft", tmp_path / "taken", force=True))


def test_fingerprints_decide_about_bases_before_names() -> None:
    one = {"base_model": "a", "dreamrie_base_float16": "1", "dreamrie_base_bfloat16": "2"}
    assert files.bases_differ(one, {**one, "base_model": "b"}) is False
    assert files.bases_differ(one, {"base_model": "a", "dreamrie_base_float16": "3"}) is True
    assert files.bases_differ(one, {**one, "dreamrie_base_float16": "3"}) is False
    assert files.bases_differ(one, {"base_model": "a"}) is False
    assert files.bases_differ(one, {"base_model": "b"}) is True
    assert files.bases_differ(one, {"base_model": ""}) is None
    assert files.bases_differ(one, {}) is None


def test_facts_that_last() -> None:
    """What the training was stays, what the old file was goes; energies multiply, commands are listed."""
    facts = {"base_model": "a", "rank_exported": "16", "dreamrie_digest": "0" * 64}
    once = files.lasting_facts(facts, "truncate to rank 4", 0.5)
    assert once == {"base_model": "a", "made_by": "truncate to rank 4", "energy_kept": "0.5"}
    twice = files.lasting_facts(once, "truncate to rank 2", 0.5)
    assert twice["energy_kept"] == "0.25"
    assert twice["made_by"] == "truncate to rank 4; truncate to rank 2"
    strange = files.lasting_facts({"energy_kept": "much"}, "x", 0.5)
    assert strange["energy_kept"] == "0.5"


def test_every_command_has_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Help for each, and 2 for a command line that cannot be read."""
    wanted = ["doctor", "info", "convert", "truncate", "merge", "diff", "verify"]
    wanted += ["merge-into-base", "card", "push", "generate", "train-llm", "evaluate-llm", "sweep"]
    assert list(command.COMMANDS) == wanted
    for name in wanted:
        with pytest.raises(SystemExit) as ended:
            command.main([name, "--help"])
        assert ended.value.code == 0
        assert re.search(rf"python -m dreamrie {name}", capsys.readouterr().out)
        # Settings of a training come from a file as well, so its flags are not argparse's business.
        if name == "train-llm":
            assert command.main([name]) == 2
            continue
        with pytest.raises(SystemExit) as ended:
            command.main([name])
        assert ended.value.code == 2


def test_a_command_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT, which adapters need, takes seconds to import."""
    asked: list[str] = []
    real = importlib.import_module

    def recorded(name: str) -> Any:
        asked.append(name)
        return real(name)

    monkeypatch.setattr(command.importlib, "import_module", recorded)
    with pytest.raises(SystemExit):
        command.main(["doctor", "--help"])
    assert asked == ["dreamrie.diffusion.doctor"]
