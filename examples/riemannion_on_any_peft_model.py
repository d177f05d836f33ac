"""Riemannion on a plain language model: ten lines between the model and the trained adapter.

    python examples/riemannion_on_any_peft_model.py

The model is a small Llama built from its configuration, so nothing is downloaded; any
`transformers`, `diffusers` or plain PyTorch model takes its place. The task is to learn one fixed
sequence of tokens.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dreamrie


def build_model() -> LlamaForCausalLM:
    """Build a Llama of 0.1 M parameters with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,  # a frozen random output layer must be able to speak up
    )
    return LlamaForCausalLM(config)


def language_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy; tokens is (batch, length) of int64."""
    return model(input_ids=tokens, labels=tokens).loss


def train(model: torch.nn.Module, batches: list[torch.Tensor], steps: int) -> list[float]:
    """Train a rank-4 adapter on every linear layer and return the loss before each step."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    pairs = dreamrie.attach_lora(model, rank=4, target_modules=targets)
    dreamrie.locally_optimal_init(model, pairs, language_loss, batches, alpha=0.003)
    optimizer = dreamrie.Riemannion(pairs, lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = language_loss(model, batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train on one sequence and print the first and the last loss."""
    tokens = torch.randint(2, 256, (1, 32), generator=torch.Generator().manual_seed(1))
    losses = train(build_model(), [tokens], steps=60)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} after {len(losses)} steps")


if __name__ == "__main__":
    main()
