"""Riemannion inside transformers' own Trainer: it saves, resumes, and matches a run that was never stopped."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import dreamrie
from dreamrie.llm.targets import target_modules
from tests.llm import small

STEPS, STOP = 6, 4


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """Warnings of transformers and PEFT about each other, and about a loader without an accelerator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rows() -> list[dict[str, torch.Tensor]]:
    found = []
    for number in range(8):
        tokens = torch.randint(3, 250, (12,), generator=torch.Generator().manual_seed(number))
        found.append({"input_ids": tokens, "labels": tokens})
    return found


def trainer(model: Any, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    optimizer = dreamrie.Riemannion(dreamrie.lora_pairs(model), lr=1e-2)
    return Trainer(model=model, args=arguments, train_dataset=rows(), optimizers=(optimizer, None))


def with_pissa() -> Any:
    """A PeftModel whose start is a point of the manifold: PEFT's own pissa."""
    base = small.model()
    targets = target_modules(base, ["attention", "mlp"])
    config = LoraConfig(
        r=3, lora_alpha=3, lora_dropout=0.1, target_modules=targets, init_lora_weights="pissa"
    )
    return get_peft_model(base, config)


def losses(made: Trainer) -> list[float]:
    return [record["loss"] for record in made.state.log_history if "loss" in record]


def factors(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for q in dreamrie.lora_pairs(model) for p in (q.left, q.right)]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Losses and factors to the bit, with dropout, warm-up-free linear decay and momentum."""
    whole = with_pissa()
    start = factors(whole)
    straight = trainer(whole, tmp_path / "a")
    straight.train()
    moved = max(
        float((a - b).norm() / b.norm()) for a, b in zip(factors(whole), start, strict=True)
    )
    assert moved > 0.01
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / f"checkpoint-{STOP}", tmp_path / "b" / f"checkpoint-{STOP}")
    again = with_pissa()
    resumed = trainer(again, tmp_path / "b")
    torch.rand(17)  # whatever the process did before must not matter
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert len(losses(straight)) == STEPS
    for first, second in zip(factors(again), factors(whole), strict=True):
        assert torch.equal(first, second)


def test_an_anchored_adapter_trains_in_five_lines(tmp_path: Path) -> None:
    """The losses are those of a loop by hand, and the Trainer saves the adapter with its anchor."""
    model = small.model()
    dreamrie.attach_lora(model, 3, target_modules(model, ["attention", "mlp"]))
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    made = trainer(model, tmp_path)
    made.train()
    by_hand = small.model()
    pairs = dreamrie.attach_lora(by_hand, 3, target_modules(by_hand, ["attention", "mlp"]))
    optimizer = dreamrie.Riemannion(pairs, lr=1e-2)
    wanted = []
    for number, tokens in enumerate(seen):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - number / STEPS)
        loss = by_hand(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for q in pairs for p in (q.left, q.right)], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    assert losses(made) == pytest.approx(wanted, rel=1e-5)
    saved = load_file(tmp_path / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    left = next(value for name, value in saved.items() if "lora_B" in name)
    assert left.shape[1] == 6
