"""Riemannion inside TRL's SFTTrainer: it trains, saves, resumes, and matches a run that was never stopped.

TRL is no dependency; with it comes `datasets`, without which it cannot be imported.
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dreamrie
from dreamrie.llm.targets import target_modules
from tests.llm import small
from tests.llm.test_hf_trainer import factors, losses, with_pissa

MISSING = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
STEPS, STOP = 4, 2
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"is {word} cold?"}],
        "completion": [{"role": "assistant", "content": answer}],
    }
    for word, answer in (("ice", "yes"), ("fire", "no"), ("snow", "yes"), ("tea", "no"))
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Warnings of three libraries about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sft_trainer(model: Any, folder: Path) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_steps=STOP,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=64,
        seed=3,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=small.tokenizer(),
        optimizers=(dreamrie.Riemannion(dreamrie.lora_pairs(model), lr=1e-2), None),
    )


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Losses and factors to the bit, with dropout, linear decay and momentum."""
    whole = with_pissa()
    start = factors(whole)
    straight = sft_trainer(whole, tmp_path / "a")
    straight.train()
    moved = [float((a - b).norm() / b.norm()) for a, b in zip(factors(whole), start, strict=True)]
    assert max(moved) > 0.01
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / f"checkpoint-{STOP}", tmp_path / "b" / f"checkpoint-{STOP}")
    again = with_pissa()
    resumed = sft_trainer(again, tmp_path / "b")
    torch.rand(17)  # whatever the process did before must not matter
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert len(losses(straight)) == STEPS
    for first, second in zip(factors(again), factors(whole), strict=True):
        assert torch.equal(first, second)


def test_an_anchored_adapter_is_saved_with_its_anchor(tmp_path: Path) -> None:
    """The file holds both halves, and its change is that of the model."""
    model = small.model()
    pairs = dreamrie.attach_lora(model, 3, target_modules(model, ["attention"]))
    made = sft_trainer(model, tmp_path)
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    saved = load_file(tmp_path / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    assert len(saved) == 2 * len(pairs)
    for pair in pairs:
        left, right = (
            next(v for k, v in saved.items() if f"{pair.name}.lora_{part}." in k)
            for part in ("B", "A")
        )
        assert left.shape[1] == 6
        assert torch.equal(left, pair.left)
        assert torch.equal(right, pair.right)
        assert float(pair.delta().norm()) > 0.01
