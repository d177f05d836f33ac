"""Small adapters, prompts and command lines for the tests of generated pictures."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamrie.adapter_file import save_diffusers_lora
from dreamrie.diffusion import pipeline
from dreamrie.diffusion.components import load_components
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS
from dreamrie.lora import attach_lora
from eval import encoders
from tests.small_models import small_components, small_folder
from tests.test_adapter_file import train_by_hand

PROMPTS = "a {subject} in the snow\na {subject} on a red background | background=red\n"
KIND = "sd2-eps"
_load_encoder = functools.cache(encoders.load_encoder)


def save_adapter(folder: Path, seed: int = 1) -> Path:
    """An adapter of the small model, away from its base; another seed gives another one."""
    parts = small_components(KIND)
    pairs = attach_lora(
        parts.unet, 2, ATTENTION_TARGETS, generator=torch.Generator().manual_seed(0)
    )
    train_by_hand(pairs, seed=seed)
    facts = {"base_model": str(small_folder(KIND).resolve()), "instance_prompt": "a sks owl"}
    save_diffusers_lora(folder, pairs, facts)
    return folder


def _load_components(model: str | Path | None, **how: Any) -> Any:
    """A fresh copy of the small model, which is not read from the disk again."""
    small = model is not None and Path(model).resolve() == small_folder(KIND).resolve()
    return small_components(KIND) if small else load_components(model, **how)


def write_prompts(folder: Path) -> Path:
    path = folder / "two.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


class SampleSpy:
    """Counts what is drawn; everything else is the real thing."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.seeds: list[int] = []

    def __call__(self, parts: Any, prompts: Sequence[str], seeds: Sequence[int], **how: Any) -> Any:
        self.prompts += prompts
        self.seeds += seeds
        return pipeline.sample(parts, prompts, seeds, **how)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> SampleSpy:
    """What the code under test asks `sample` for."""
    found = SampleSpy()
    monkeypatch.setattr("eval.generation.sample", found)
    return found


@pytest.fixture
def no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report and no LPIPS: they have tests of their own; encoders and models are loaded once."""

    def write_report(result: Any) -> Path:
        path: Path = result.folder / "report.html"
        path.write_text("report", encoding="utf-8")
        return path

    monkeypatch.setattr("eval.report.write_report", write_report)
    monkeypatch.setattr("eval.encoders.load_encoder", _load_encoder)
    monkeypatch.setattr("eval.running.load_components", _load_components)
    monkeypatch.setattr("eval.run.load_diversity", lambda file: (None, "diversity is left out: no"))


class FakeAccelerator:
    """Process `process_index` of two, in one process."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, index: int) -> None:
        self.process_index = index
        self.is_main_process = index == 0
        self.waited = 0

    def wait_for_everyone(self) -> None:
        self.waited += 1

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every picture of a run."""
    return {path.name: path.read_bytes() for path in sorted((folder / "pictures").iterdir())}
