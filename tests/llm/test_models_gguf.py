"""A model in a GGUF file of one's own: named itself, or by the folder that holds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamrie.errors import ConfigError
from dreamrie.llm import models as real
from tests.llm import small


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the loaders of transformers were asked for, in a world with the package gguf."""
    seen: list[tuple[str, dict[str, Any]]] = []
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find("json") if name == "gguf" else find(name)
    )

    def loader(result: Any) -> Any:
        def load(folder: str, **options: Any) -> Any:
            seen.append((folder, options))
            return result

        return load

    monkeypatch.setattr(real.AutoTokenizer, "from_pretrained", loader(small.tokenizer()))
    monkeypatch.setattr(real.AutoModelForCausalLM, "from_pretrained", loader(small.model()))
    return seen


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_gguf_file_is_read(
    named: str, tmp_path: Path, asked: list[tuple[str, dict[str, Any]]]
) -> None:
    """Tokenizer and weights come from the same file."""
    file = tmp_path / "a.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    name = str(file if named == "file" else tmp_path)
    loaded = real.load_language_model(name, precision="bf16")
    gguf = {"gguf_file": "a.Q4_1.gguf"}
    folder = str(tmp_path)
    assert asked == [(folder, gguf), (folder, {**gguf, "dtype": torch.bfloat16})]
    assert loaded.name == name


def test_a_folder_of_transformers_stays_one(
    tmp_path: Path, asked: list[tuple[str, dict[str, Any]]]
) -> None:
    """A GGUF file beside the usual files is not what the folder is named for."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}", "utf-8")
    real.load_language_model(str(tmp_path))
    assert all("gguf_file" not in options for _, options in asked)


def test_one_of_several_must_be_named(
    tmp_path: Path, asked: list[tuple[str, dict[str, Any]]]
) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(
        ConfigError, match=r"holds 2 \.gguf files(.|\n)*name one of them: a\.gguf, b\.gguf"
    ):
        real.load_language_model(str(tmp_path))
    assert asked == []


def test_the_package_that_reads_gguf_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package gguf, not installed here"):
        real.load_language_model(str(tmp_path / "a.gguf"))


def test_a_file_that_is_missing_is_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the language model cannot be loaded"):
        real.load_language_model(str(tmp_path / "nowhere.gguf"))
