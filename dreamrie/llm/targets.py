"""Names of the layers that carry adapters, found from what a decoder layer holds, not from a list of models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dreamrie.errors import ConfigError
from dreamrie.lora import candidate_names

# What Llama, Qwen, Mistral, Gemma, SmolLM, Phi and their like call the two halves of a decoder layer.
PARTS: dict[str, tuple[str, ...]] = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn"),
}


def target_modules(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Endings of layer names for `dreamrie.attach_lora`.

    Args:
        model: a causal language model without adapters.
        wanted: "attention" and "mlp" stand for all linear layers of these parts; anything else is a name itself.

    Returns:
        Sorted; such as "self_attn.q_proj" and "mlp.down_proj".

    Raises:
        ConfigError: the model has no such part.
    """
    found: set[str] = set()
    for word in wanted:
        if word not in PARTS:
            found.add(word)
            continue
        names = _linear_layers(model, PARTS[word])
        if not names:
            raise ConfigError(
                f"{type(model).__name__} has no {word} layers of a known name ({', '.join(PARTS[word])})\n"
                f"  where: --target_modules {word}\n"
                f"  what to do: name layers themselves; those that can be adapted: {candidate_names(model)}"
            )
        found |= names
    return sorted(found)


def _linear_layers(model: nn.Module, parts: Sequence[str]) -> set[str]:
    """Part and rest of the name of each linear layer below a part; numbers of experts stay in the name."""
    found = set()
    for name, module in model.named_modules():
        pieces = name.split(".")
        below = [place for place, piece in enumerate(pieces[:-1]) if piece in parts]
        if below and isinstance(module, nn.Linear):
            found.add(".".join(pieces[below[-1] :]))
    return found
