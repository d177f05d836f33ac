"""A language model of a few thousand parameters, a tokenizer of bytes, and rows of the eight tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token for each byte, and three marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: place for place, text in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 768,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen": (Qwen2Config, Qwen2ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 16}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 8}),
    "smollm": (SmolLM3Config, SmolLM3ForCausalLM, {}),
}


def model(kind: str = "llama", **changes: Any) -> Any:
    """A model with the same random weights every time."""
    config, network, own = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = network(config(**{**SIZES, **own, **changes})).eval()
    if not made.config.tie_word_embeddings:
        # A frozen random output layer must be able to speak up.
        made.lm_head.weight.data *= 5
    return made


def save_model(folder: Path, kind: str = "llama", template: str | None = CHATML) -> Path:
    """A folder as `save_pretrained` writes it."""
    model(kind).save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


ROWS: list[dict[str, Any]] = [
    {"task": "boolq", "choices": ["True", "False"], "answer": 0, "question": "is ice cold"},
    {"task": "boolq", "choices": ["True", "False"], "answer": 1, "question": "is fire cold"},
    {"task": "piqa", "choices": ["pull", "push"], "answer": 1, "question": "open"},
    {"task": "piqa", "choices": ["soap", "sand"], "answer": 0, "question": "wash"},
    {
        "task": "siqa",
        "choices": ["sad", "glad", "mad"],
        "answer": 1,
        "context": "Al won.",
        "question": "How is Al?",
    },
    {
        "task": "hellaswag",
        "choices": ["a", "bb", "c", "d"],
        "answer": 3,
        "activity": "Rowing",
        "context": "They",
    },
    {"task": "winogrande", "choices": ["Jo", "Di"], "answer": 1, "sentence": "Jo met Di. _ ran."},
    {"task": "arc_easy", "choices": ["sun", "mud", "oil"], "answer": 0, "question": "hot?"},
    {"task": "arc_challenge", "choices": ["sun", "mud"], "answer": 0, "question": "hot?"},
    {"task": "obqa", "choices": ["sun", "mud", "ice", "air"], "answer": 2, "question": "cold?"},
]


def write_rows(path: Path, rows: Sequence[Any] = ROWS) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
