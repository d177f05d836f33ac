"""FSDP: the base spread over two processes, the adapter whole; what does not go with it is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors import safe_open
from torch import Tensor, nn

from dreamrie.config import LlmConfig, config_of, parse_config
from dreamrie.errors import ConfigError
from dreamrie.lora.fingerprint import base_fingerprint, rounded_fingerprints
from dreamrie.riemannion import Riemannion
from dreamrie.team import is_spread
from dreamrie.trainer import make_accelerator
from dreamrie.trainer.spreading import spread_base
from tests.contracts.sources import ROOT
from tests.contracts.test_counts import functions_of
from tests.distributed.gloo import on_processes
from tests.distributed.test_commands import flags, launch, settings_in
from tests.llm.small_task import LanguageTask
from tests.small_settings import NEEDED
from tests.strategies import F32, make_pairs

GOOD: dict[str, Any] = {"model": "m", "data": ["d"], "loi_batches": 4}
TWO: Any = SimpleNamespace(num_processes=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loi_batches": 3}, ("3 batches cannot be shared evenly by 2", "a multiple of 2")),
        ({"loi_estimator": "mean_gradient"}, ("loi by mean_gradient", "--loi_estimator sketch")),
        ({"validation_data": ["v"]}, ("made by one process", "leave validation")),
    ],
)
def test_settings_that_need_the_whole_base_are_refused(
    changes: dict[str, Any], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is spread, and by every process; without FSDP they are fine."""
    task: Any = None
    config = config_of(LlmConfig, GOOD | changes).resolved()
    spread_base(TWO, task, config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError) as caught:
        spread_base(TWO, task, config)
    for word in (*words, "where: FSDP", "examples/accelerate/ddp.yaml"):
        assert word in str(caught.value)


def test_a_compiled_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    task: Any = None
    with pytest.raises(ConfigError, match="leave --torch_compile out"):
        spread_base(TWO, task, parse_config([*NEEDED, "--torch_compile"]))


def test_a_quantized_base_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model = nn.Linear(2, 2)
    model.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    task: Any = SimpleNamespace(model=model, pairs=[])
    with pytest.raises(ConfigError, match="quantized"):
        spread_base(TWO, task, config_of(LlmConfig, GOOD).resolved())


def test_an_adapter_that_is_spread_is_refused() -> None:
    """By the optimizer itself: a transformers Trainer under FSDP spreads everything that it is not told to leave."""
    pairs = make_pairs(dtype=F32)
    pairs[1].right.placements = ()  # type: ignore[attr-defined]  what torch's spread tensors have
    with pytest.raises(
        ConfigError, match=f"{pairs[1].name} has factors that are spread over processes"
    ):
        Riemannion(pairs)


def spread() -> tuple[list[tuple[float, list[Tensor | None]]], float, list[bool], bool]:
    """Loss and gradients without and with FSDP, the share of the base in this process, what is whole."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    accelerator = make_accelerator()
    found = []
    for with_fsdp in (False, True):
        task = LanguageTask(batch_size=2, samples_per_step=4, dtype=F32)
        whole = sum(p.numel() for p in task.model.parameters())
        prints = base_fingerprint(task.model), rounded_fingerprints(task.model)
        if with_fsdp:
            spread_base(accelerator, task, config_of(LlmConfig, GOOD).resolved())  # type: ignore[arg-type]
        loss = task.loss(task.batch(1, accelerator.process_index))
        loss.backward()
        halves = [half for pair in task.pairs for half in (pair.left, pair.right)]
        found.append((float(loss.detach()), [half.grad for half in halves]))
    base = [p for p in task.model.parameters() if not p.requires_grad]
    here = sum(p.to_local().numel() for p in base) + sum(half.numel() for half in halves)
    whole_here = [is_spread(half) for half in halves] + [not is_spread(p) for p in base]
    whole_here += [not is_spread(pair.base_weight) for pair in task.pairs]
    same = prints == (base_fingerprint(task.model), rounded_fingerprints(task.model))
    return found, here / whole, whole_here, same


@pytest.mark.slow
def test_half_of_the_base_is_in_each_process_and_all_of_the_adapter() -> None:
    """Loss and gradients are those of the whole model; its fingerprints too."""
    for found, share, wrong, same in on_processes(2, spread):
        (loss, gradients), (loss_spread, gradients_spread) = found
        assert loss_spread == pytest.approx(loss, rel=1e-6)
        for one, other in zip(gradients_spread, gradients, strict=True):
            assert one is not None
            assert other is not None
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
        assert 0.5 <= share < 0.6
        assert not any(wrong)
        assert same


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_the_configurations_are_read_by_accelerate(name: str, kind: str) -> None:
    """Two processes, nothing that the commands decide themselves, and the FSDP that leaves parameters out."""
    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    assert (str(config.distributed_type), config.num_processes) == (f"DistributedType.{kind}", 2)
    assert config.mixed_precision == "no"
    assert config.fsdp_config == ({"fsdp_version": 2} if name == "fsdp" else {})


def test_the_page_on_scale_cites_tests_that_exist() -> None:
    """Each promise of docs/scale.md has its test, in this folder or in that of the sweeps."""
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    cited = set(re.findall(r"`((?:law|test)_\w+)`", page))
    assert len(cited) > 6
    files = [ROOT / "tests" / name for name in ("distributed", "sweeps")]
    here = [functions_of(path) for folder in files for path in folder.glob("*.py")]
    assert cited - {name for names in here for name in names} == set()


def adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


@pytest.mark.slow
def test_accelerate_launch_trains_the_same_adapter_with_both_configurations(tmp_path: Path) -> None:
    """From the command line, LOI included: DDP and FSDP write the same adapter, and the same facts of its base."""
    values = settings_in(tmp_path) | {"loi_batches": 4, "dropout": 0.0}
    found = {}
    for name in ("ddp", "fsdp"):
        process = launch(f"{name}.yaml", *flags(values | {"output_dir": tmp_path / name}))
        said, _ = process.communicate(timeout=280)
        assert process.returncode == 0, said
        assert said.count("5 steps in") == 1
        found[name] = adapter(tmp_path / name)
        facts = json.loads((tmp_path / name / "run.json").read_text("utf-8"))
        assert facts["initialization"].startswith("LOI (sketch, 4 batches")
    (ddp, facts), (fsdp, other) = found.values()
    assert facts == other
    assert ddp.keys() == fsdp.keys()
    downs = [name for name in ddp if "lora_A" in name]
    for name in downs:
        up = name.replace("lora_A", "lora_B")
        one, two = ddp[up] @ ddp[name], fsdp[up] @ fsdp[name]
        assert float((one - two).norm() / one.norm()) < 1e-3
