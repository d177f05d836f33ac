"""The language task: loss on answers only, packing, streams, the adapter file. Laws take the module as an argument."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dreamrie.adapter_reading import load_adapter
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.llm import task as real
from dreamrie.llm.encoding import Encoded
from dreamrie.llm.targets import target_modules
from dreamrie.loi import locally_optimal_init
from dreamrie.lora import LoraPair, attach_lora
from tests.llm import small

EXAMPLES = [
    Encoded((5, 6, 7), (8,), "row 1"),
    Encoded((9, 10), (11, 12, 13, 2), "row 2"),
    Encoded((14,), (15, 2), "row 3"),
    Encoded((20, 21, 22, 23, 24), (25, 26, 2), "row 4"),
    Encoded((30, 31), (32, 33), "row 5"),
]


def adapted(kind: str = "llama", **changes: Any) -> tuple[Any, list[LoraPair]]:
    """A small model in fp64 whose adapter has moved off its anchor."""
    network = small.model(kind, **changes).double()
    pairs = attach_lora(network, 3, target_modules(network, ["attention", "mlp"]))
    generator = torch.Generator().manual_seed(1)
    for pair in pairs:
        for factor in (pair.left, pair.right):
            factor.data = factor.data.double()
            noise = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
            half = (slice(None), slice(3)) if factor is pair.left else (slice(3),)
            factor.data[half] += 0.2 * noise[half]
    return network.eval(), pairs


def made(impl: Any, pairs: list[LoraPair], network: Any, **settings: Any) -> real.CausalLmTask:
    known: dict[str, Any] = {"batch_size": 5, "seed": 4, "max_length": 24}
    return impl.CausalLmTask(network, pairs, EXAMPLES, **(known | settings))


def loss_by_hand(network: Any, examples: list[Encoded]) -> Tensor:
    """Each example alone, by the loss that transformers computes from labels; then their mean."""
    losses = []
    for example in examples:
        tokens = torch.tensor([example.tokens])
        labels = tokens.clone()
        labels[0, : len(example.prompt)] = -100
        losses.append(network(input_ids=tokens, labels=labels).loss)
    return torch.stack(losses).mean()


def of_batch(batch: real.TextBatch) -> list[Encoded]:
    by_name = {example.where: example for example in EXAMPLES}
    return [by_name[name] for name in batch.names]


def law_ll1_the_loss_is_that_of_the_answers(impl: Any) -> None:
    """Mean over examples of the mean over the tokens of the answer, prompts not learned; as by hand."""
    network, pairs = adapted()
    for packing in (False, True):
        task = made(impl, pairs, network, packing=packing, batch_size=4)
        batch = task.batch(1, 0)
        assert len({len(e.answer) for e in of_batch(batch)}) > 2
        wanted, found = loss_by_hand(network, of_batch(batch)).item(), task.loss(batch).item()
        # transformers takes the loss in fp32: measured 3e-8
        assert abs(found - wanted) < 4e-7 * wanted


def test_ll1() -> None:
    law_ll1_the_loss_is_that_of_the_answers(real)


def law_ll2_packing_changes_neither_loss_nor_gradient(impl: Any, kind: str) -> None:
    """Examples in one row are blind to each other, also where attention has a window."""
    gradients = []
    for packing in (False, True):
        network, pairs = adapted(kind)
        task = made(impl, pairs, network, packing=packing)
        batch = task.batch(1, 0)
        assert len(batch.tokens) == (2 if packing else 5)
        loss = task.loss(batch)
        loss.backward()
        gradients.append(
            [loss.detach(), *(p.left.grad for p in pairs), *(p.right.grad for p in pairs)]
        )
    for first, second in zip(*gradients, strict=True):
        # measured 2e-15; 1e-7 where a model computes its positions in fp32
        assert float((first - second).norm()) < 1e-6 * float(second.norm())


@pytest.mark.parametrize("kind", sorted(small.KINDS))
def test_ll2(kind: str) -> None:
    law_ll2_packing_changes_neither_loss_nor_gradient(real, kind)


def test_a_model_that_lets_packed_examples_see_each_other_is_refused() -> None:
    """An attention mask of ones is what such a model makes of missing ones."""
    network, pairs = adapted()

    def open_mask(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}

    made(real, pairs, network, packing=True)
    network.register_forward_pre_hook(open_mask, with_kwargs=True)
    made(real, pairs, network, packing=False)
    with pytest.raises(
        ConfigError, match="LlamaForCausalLM lets examples in one row see each other"
    ):
        made(real, pairs, network, packing=True)
    assert not network.training


def law_ll3_a_batch_is_a_function_of_its_place(impl: Any) -> None:
    """Asked again, in any order, by any task of this seed: the same rows; four micro-batches of one are one of four."""
    network, pairs = adapted()

    def names(steps: list[int], **settings: Any) -> dict[int, list[str]]:
        task = made(impl, pairs, network, samples_per_step=4, **settings)
        count = 4 // settings["batch_size"]
        return {
            step: [name for micro in range(count) for name in task.batch(step, micro).names]
            for step in steps
        }

    forwards = names([1, 2, 3, 4, 5], batch_size=4)
    assert names([5, 3, 1, 4, 2], batch_size=4) == forwards
    assert names([2, 5, 2], batch_size=1) == {step: forwards[step] for step in (2, 5)}
    assert names([1, 2], batch_size=4, seed=5) != {step: forwards[step] for step in (1, 2)}
    initial = names([0], batch_size=4)[0]
    assert sorted(initial) != sorted(forwards[1]) or initial != forwards[1]


def test_ll3() -> None:
    law_ll3_a_batch_is_a_function_of_its_place(real)


def law_ll4_each_run_through_the_rows_sees_each_once(impl: Any) -> None:
    """Five rows, steps of four: in twenty places each row stands four times, once in every five; in another order."""
    network, pairs = adapted()
    task = made(impl, pairs, network, batch_size=4)
    seen = [name for step in range(1, 6) for name in task.batch(step, 0).names]
    rounds = [seen[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(each) == [e.where for e in EXAMPLES] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_ll4() -> None:
    law_ll4_each_run_through_the_rows_sees_each_once(real)


def logits_of(network: Any) -> Tensor:
    with torch.no_grad():
        return network(input_ids=torch.tensor([[5, 9, 200, 31, 77]])).logits


def stock_peft(kind: str, folder: Path) -> Any:
    """As any user of PEFT loads it."""
    with warnings.catch_warnings():
        # PEFT asks transformers for a name that it is about to drop.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(small.model(kind).double(), str(folder))


def law_ll5_stock_peft_reads_the_adapter(impl: Any) -> None:
    """PeftModel.from_pretrained on the stock base, and merge_and_unload: the logits of the trained model; alpha = r."""
    for kind in ("llama", "gemma"):
        network, pairs = adapted(kind)
        wanted, bare = logits_of(network), logits_of(small.model(kind).double())
        assert float((wanted - bare).norm()) > 0.05 * float(bare.norm())
        with tempfile.TemporaryDirectory() as name:
            made(impl, pairs, network).save(Path(name), {"steps": "3"})
            loaded = stock_peft(kind, Path(name))
            config = loaded.peft_config["default"]
            assert config.r == config.lora_alpha == 6
            merged = loaded.merge_and_unload() if kind == "gemma" else loaded
            # the file is fp32: measured 5e-8
            assert float((logits_of(merged) - wanted).norm()) < 1e-6 * float(wanted.norm())


def test_ll5() -> None:
    law_ll5_stock_peft_reads_the_adapter(real)


def test_the_file_is_read_strictly(tmp_path: Path) -> None:
    """Back onto its base it is the same function; another base, and one changed byte, are refused."""
    network, pairs = adapted()
    made(real, pairs, network, facts={"base_model": "small"}).save(tmp_path, {"steps": "3"})
    fresh = small.model().double()
    loaded = load_adapter(fresh, tmp_path)
    assert loaded.facts["steps"] == "3"
    assert loaded.facts["base_model"] == "small"
    assert loaded.unchecked == ()
    assert float((logits_of(fresh) - logits_of(network)).norm()) < 1e-6 * float(
        logits_of(network).norm()
    )
    other = small.model().double()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(AdapterError, match="are not those of the model"):
        load_adapter(other, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(AdapterError):
        load_adapter(small.model().double(), tmp_path)


def test_checkpointed_gradients_are_the_same() -> None:
    found = []
    for switch in (False, True):
        network, pairs = adapted()
        task = made(real, pairs, network, gradient_checkpointing=switch)
        network.train()
        calls: list[int] = []
        network.model.layers[0].mlp.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        task.loss(task.batch(2, 0)).backward()
        found.append(pairs[0].left.grad)
        assert len(calls) == (2 if switch else 1)
    assert torch.allclose(*found, rtol=1e-12)


def test_the_sketch_finds_the_start_of_the_full_gradient() -> None:
    """LOI by sketch, whose width covers these small layers, holds the most energy, by the full gradient."""
    reports = {}
    for estimator in ("sketch", "mean_gradient"):
        network = small.model()
        pairs = attach_lora(network, 3, target_modules(network, ["attention", "mlp"]))
        task = made(real, pairs, network)
        reports[estimator] = locally_optimal_init(
            network, pairs, task.model_loss, task.loi_batches(3), estimator=estimator
        )
    for first, second in zip(*(report.layers for report in reports.values()), strict=True):
        assert first.captured > 0.999
        assert first.energy == pytest.approx(second.energy, rel=1e-3)


def test_a_bad_loss_names_its_rows() -> None:
    network, pairs = adapted()
    task = made(real, pairs, network, batch_size=2)
    batch = task.batch(1, 0)
    assert task.describe(batch) == ", ".join(batch.names)


def test_without_examples_there_is_no_task() -> None:
    network, pairs = adapted()
    with pytest.raises(ConfigError, match="no example"):
        real.CausalLmTask(network, pairs, [], batch_size=1, seed=0, max_length=8)
