"""One model for many adapters: what is put on is off again, completely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dreamrie.errors import NumericalError
from dreamrie.llm import borrowed as real
from dreamrie.lora import attach_lora, base_fingerprint
from dreamrie.lora.place import adapted_layer
from tests.llm import small


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 20)[None]).logits
    return found


def put_on(model: Any, init: str = "gaussian") -> None:
    """An adapter that changes what the model says."""
    for pair in attach_lora(model, 2, ["q_proj", "down_proj"], init=init):
        pair.left.data += 0.3
        pair.right.data += 0.1


def law_lb3_a_borrowed_model_comes_back(impl: Any) -> None:
    """Logits to the bit, names of parameters, gradient flags and mode are those from before, also after an error."""
    model = small.model().requires_grad_(False)
    names, before, print_ = (
        [n for n, _ in model.named_parameters()],
        logits(model),
        base_fingerprint(model),
    )
    for error in (None, ZeroDivisionError()):
        try:
            with impl.borrowed(model):
                put_on(model)
                model.train()
                assert not torch.equal(logits(model), before)
                if error is not None:
                    raise error
        except ZeroDivisionError:
            assert error is not None
        assert torch.equal(logits(model), before)
        assert adapted_layer(model) is None
        assert [n for n, _ in model.named_parameters()] == names
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        assert base_fingerprint(model) == print_


def test_lb3() -> None:
    law_lb3_a_borrowed_model_comes_back(real)


def law_lb4_a_written_base_is_noticed(impl: Any) -> None:
    """One number of one weight that is not what it was ends the work."""
    model = small.model()
    with pytest.raises(NumericalError, match="the base weights of LlamaForCausalLM are not those"):
        with impl.borrowed(model):
            put_on(model)
            weight = model.model.layers[1].mlp.down_proj.base_layer.weight
            weight.data[3, 4] += 1e-4


def test_lb4() -> None:
    law_lb4_a_written_base_is_noticed(real)


def test_adapters_of_other_ranks_follow_each_other(tmp_path: Path) -> None:
    """A borrowed model can be saved as if nothing had been."""
    model = small.model()
    for rank in (2, 5):
        with real.borrowed(model):
            pairs = attach_lora(model, rank, ["q_proj"], init="orthonormal")
            assert {pair.rank for pair in pairs} == {rank}
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
