"""A model of a few hundred numbers, its adapter files, and a hash of everything that a load may not change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dreamrie import adapter_file
from dreamrie.adapter_file import stable_bytes
from dreamrie.lora import LoraPair, attach_lora
from tests.test_adapter_file import train_by_hand

TARGETS = ["mix", "deep.cut", "deep.narrow"]
FACTS = {"base_model": "small", "instance_prompt": "a sks øwl", "prediction_type": "epsilon"}


class Small(nn.Module):
    """A convolution, two linear layers of other sides, a norm with buffers, a frozen parameter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mix = nn.Linear(7, 6)
            self.deep = nn.ModuleDict(
                {
                    "cut": nn.Conv2d(3, 5, (3, 2)),
                    "norm": nn.BatchNorm2d(5),
                    "narrow": nn.Linear(8, 4),
                }
            )
            self.scale = nn.Parameter(torch.randn(2), requires_grad=False)
        self.deep["norm"].eval()

    def forward(self, rows: Tensor, picture: Tensor) -> Tensor:
        layers: Any = self.deep
        return torch.cat(
            [
                self.mix(rows).flatten(),
                layers.narrow(rows.new_ones(1, 8)).flatten(),
                layers.cut(picture).flatten(),
            ]
        )


def output(model: nn.Module) -> Tensor:
    """Output on fixed inputs, in the precision of the model."""
    generator = torch.Generator().manual_seed(3)
    dtype = next(model.parameters()).dtype
    rows = torch.randn(2, 7, generator=generator).to(dtype)
    picture = torch.randn(1, 3, 4, 5, generator=generator).to(dtype)
    with torch.no_grad():
        found: Tensor = model(rows, picture)
    return found


def trained_small(seed: int = 1) -> tuple[Small, list[LoraPair]]:
    """The model with anchored adapters of unequal rank, away from its base."""
    model = Small()
    pairs = attach_lora(model, 3, TARGETS, generator=torch.Generator().manual_seed(0))
    assert len({pair.rank for pair in pairs}) == 2
    train_by_hand(pairs, seed=seed)
    return model, pairs


def save_small(folder: Path, seed: int = 1, *, impl: Any = adapter_file) -> Path:
    """A file of dreamrie with digest and fingerprint."""
    model, pairs = trained_small(seed)
    path: Path = impl.save_diffusers_lora(folder, pairs, FACTS, base=model)
    return path


def state_of(model: nn.Module) -> str:
    """Hash of every tensor, flag, mode and module, and of PEFT's books."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {id(module)} {type(module)} {module.training}\n".encode())
        assert not isinstance(module, BaseTunerLayer)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {id(tensor)} {tensor.dtype} {tensor.requires_grad}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    books = [getattr(model, key, None) for key in ("peft_config", "_hf_peft_config_loaded")]
    digest.update(repr(books).encode())
    digest.update(torch.get_rng_state().numpy().data)
    return digest.hexdigest()


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join(table: Mapping[str, Any], data: bytes) -> bytes:
    """The file of a header, whatever it says, and data."""
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts, by hand."""
    table, data = split(path.read_bytes())
    facts = table.pop("__metadata__", {})
    types = {"F32": torch.float32}
    return {
        name: torch.frombuffer(
            bytearray(data[slice(*row["data_offsets"])]), dtype=types[row["dtype"]]
        ).reshape(row["shape"])
        for name, row in table.items()
    }, facts


def rewrite(
    path: Path,
    change: Callable[[dict[str, Tensor], dict[str, str]], None],
    *,
    digest: Callable[..., str] | None = None,
    foreign: bool = False,
) -> Path:
    """The same file with tensors or facts changed.

    Args:
        path: written by `save_small`.
        change: works on tensors and facts in place.
        digest: computes a fitting digest for the changed contents; None keeps the old one.
        foreign: take everything out of the header but what other programs write.
    """
    tensors, facts = read(path)
    change(tensors, facts)
    if foreign:
        facts = {"format": "pt"}
    elif digest is not None:
        facts[adapter_file.DIGEST_KEY] = digest(tensors, facts)
    path.write_bytes(stable_bytes({n: t.contiguous() for n, t in tensors.items()}, facts))
    return path
