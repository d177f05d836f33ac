"""A language model as the training loop sees it: batches, the loss on answers, accuracy, the adapter file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dreamrie.adapter_file import base_facts
from dreamrie.adapter_magnitudes import magnitudes_of
from dreamrie.adapter_peft import save_peft
from dreamrie.errors import ConfigError
from dreamrie.llm.encoding import Encoded
from dreamrie.lora import LoraPair, change_of
from dreamrie.streams import stream_generator


@dataclass(frozen=True)
class TextBatch:
    """Rows of tokens, and what is to be learned in them.

    Attributes:
        tokens: (rows, length), int64.
        positions: (rows, length); an example begins at 0, which also keeps it blind to the one before it.
        columns: (k,), places that some target is predicted from.
        rows: (t,), row of each target.
        places: (t,), index of its column in `columns`.
        targets: (t,), the tokens of the answers.
        weights: (t,), fp64; 1 / (tokens of its answer x examples of the batch).
        names: where each example stands.
    """

    tokens: Tensor
    positions: Tensor
    columns: Tensor
    rows: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor
    names: tuple[str, ...]


class CausalLmTask:
    """Fine-tune a language model on answers; implements `dreamrie.trainer.Task`.

    Loss of a micro-batch: the mean over its examples of the mean cross-entropy over the tokens of the answer. Prompts
    are not learned. An example counts the same whatever it stands beside, so packing, padding and micro-batches do not
    change the loss: four micro-batches of one example are one micro-batch of four.

    Which example stands where is a function of (seed, stream, position), where position counts examples since the
    start; each run through them is a new permutation.

    Args:
        model: carries the adapters.
        pairs: the adapted layers.
        examples: at least one.
        batch_size: examples in a micro-batch.
        seed: of the run.
        samples_per_step: examples in one optimizer step, all micro-batches together; default one micro-batch.
        packing: put several examples into a row of `max_length`.
        max_length: tokens of a row.
        pad: token that fills rows.
        gradient_checkpointing: recompute activations in the backward pass.
        facts: for the header of the adapter: the base model, and what the settings were.

    Attributes:
        name: "causal-lm".
        model: as given.
        pairs: as given.

    Raises:
        ConfigError: there is no example, or the model lets packed examples see each other.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[LoraPair],
        examples: Sequence[Encoded],
        *,
        batch_size: int,
        seed: int,
        max_length: int,
        samples_per_step: int | None = None,
        packing: bool = False,
        pad: int = 0,
        gradient_checkpointing: bool = False,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        if not examples:
            raise ConfigError("there is no example to learn from")
        self.name, self.model, self.pairs = "causal-lm", model, list(pairs)
        self.examples = list(examples)
        self._batch_size, self._seed = batch_size, seed
        self._samples_per_step = samples_per_step or batch_size
        self._packing, self._max_length, self._pad = packing, max_length, pad
        self._facts = dict(facts or {})
        self._order: tuple[tuple[str, int], list[int]] | None = None
        if packing:
            check_packing(model, self.examples, max_length, self.device)
        if gradient_checkpointing:
            network: Any = model
            network.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pairs[0].left.device

    def batch(self, step: int, micro: int) -> TextBatch:
        """Micro-batch `micro` (0, 1, ...) of optimizer step `step` (1, 2, ...).

        Args:
            step: optimizer step; 0 is a stream of its own, for locally optimal initialization.
            micro: number inside the step.

        Returns:
            The same tensors for the same arguments, on the model's device.
        """
        stream = "initialization" if step == 0 else "training"
        start = max(step - 1, 0) * self._samples_per_step + micro * self._batch_size
        chosen = [self._example(stream, start + place) for place in range(self._batch_size)]
        length = self._max_length if self._packing else 0
        return collate(chosen, fill=length, pad=self._pad, device=self.device)

    def loi_batches(self, count: int) -> Iterator[TextBatch]:
        """Batches for locally optimal initialization, from a stream that training never uses.

        Args:
            count: how many.

        Yields:
            `batch(0, 0)`, `batch(0, 1)`, ...
        """
        for micro in range(count):
            yield self.batch(0, micro)

    def loss(self, batch: TextBatch) -> Tensor:
        """Mean cross-entropy of the answers of one micro-batch.

        Args:
            batch: from `batch`.

        Returns:
            Scalar, fp32, differentiable.
        """
        return self.model_loss(self.model, batch)

    def model_loss(self, model: Any, batch: TextBatch) -> Tensor:
        """The same loss for an explicit model, as `locally_optimal_init` wants it.

        Args:
            model: bare or wrapped.
            batch: from `batch`.

        Returns:
            Scalar, fp32 (fp64 for an fp64 model), differentiable.
        """
        losses = token_losses(model, batch)
        return (losses * batch.weights.to(losses.dtype)).sum()

    def used_places(self, batch: TextBatch) -> Tensor:
        """Places that the loss depends on: of each example up to the last one that a target is predicted from.

        Args:
            batch: from `batch`.

        Returns:
            (rows, length) of bool; padding is False.
        """
        height, width = batch.tokens.shape
        places = torch.arange(width, device=batch.tokens.device)
        # An example is a number of its own: its row, and how many began in it so far.
        example = (batch.positions == 0).cumsum(dim=1)
        example += (width + 1) * torch.arange(height, device=places.device)[:, None]
        froms = batch.columns[batch.places]
        last = torch.full((height * (width + 1),), -1, device=places.device)
        last.scatter_reduce_(0, example[batch.rows, froms], froms, "amax")
        return places <= last[example]

    def describe(self, batch: TextBatch) -> str:
        """Name the rows of a batch, for a message about its loss."""
        return ", ".join(batch.names)

    def validate(self, step: int, directory: Path) -> dict[str, float]:
        """There is nothing to look at on the way; what is measured is a scorer's, see `dreamrie.llm.scorer`.

        Args:
            step: optimizer step.
            directory: stays as it is.

        Returns:
            Nothing.
        """
        return {}

    def save(self, directory: Path, metadata: dict[str, str]) -> None:
        """Write the adapter as a PEFT folder; errors are those of `save_peft`.

        Args:
            directory: gets `adapter_model.safetensors` and `adapter_config.json`.
            metadata: joins the header.
        """
        known = {
            "rank_trained": str(max(pair.rank for pair in self.pairs)),
            **self._facts,
            **metadata,
            **base_facts(self.model),
        }
        changes = {pair.name: change_of(pair) for pair in self.pairs}
        save_peft(directory, changes, known, magnitudes=magnitudes_of(self.pairs))

    def _example(self, stream: str, position: int) -> Encoded:
        """Example at a position of an endless stream."""
        epoch, place = divmod(position, len(self.examples))
        if self._order is None or self._order[0] != (stream, epoch):
            generator = stream_generator(self._seed, f"{stream}/order", epoch)
            order = torch.randperm(len(self.examples), generator=generator).tolist()
            self._order = (stream, epoch), order
        return self.examples[self._order[1][place]]


def collate(
    examples: Sequence[Encoded], *, fill: int = 0, pad: int = 0, device: torch.device | str = "cpu"
) -> TextBatch:
    """Examples as rows.

    Args:
        examples: at least one.
        fill: put the next example into the same row while that stays within so many tokens; 0: a row for each.
        pad: token behind the last example of a row. No token sees a later one, so nothing depends on it.
        device: where the tensors are to be.

    Returns:
        The batch.
    """
    rows: list[list[Encoded]] = []
    for example in examples:
        used = sum(len(other.tokens) for other in rows[-1]) if rows else 0
        if fill and rows and used + len(example.tokens) <= fill:
            rows[-1].append(example)
        else:
            rows.append([example])
    width = max(sum(len(example.tokens) for example in row) for row in rows)
    tokens = torch.full((len(rows), width), pad)
    positions = torch.zeros((len(rows), width), dtype=torch.int64)
    spots: list[tuple[int, int, int, float]] = []
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example.tokens)
            tokens[number, start:end] = torch.tensor(example.tokens)
            positions[number, start:] = torch.arange(width - start)
            weight = 1.0 / (len(example.answer) * len(examples))
            first = end - len(example.answer)
            # A token is predicted from the place before it.
            spots += [
                (number, first + i - 1, token, weight) for i, token in enumerate(example.answer)
            ]
            start = end
    where, froms, targets, weights = zip(*spots, strict=True)
    columns, places = torch.tensor(froms).unique(return_inverse=True)
    return TextBatch(
        tokens=tokens.to(device),
        positions=positions.to(device),
        columns=columns.to(device),
        rows=torch.tensor(where, device=device),
        places=places.to(device),
        targets=torch.tensor(targets, device=device),
        weights=torch.tensor(weights, dtype=torch.float64, device=device),
        names=tuple(example.where for row in rows for example in row),
    )


def token_losses(model: Any, batch: TextBatch) -> Tensor:
    """Cross-entropy of each target.

    Args:
        model: a causal language model of transformers. It is given no attention mask: it derives from the positions
            which tokens belong together.
        batch: any.

    Returns:
        (t,), fp32 (fp64 for an fp64 model), differentiable.
    """
    logits = model(
        input_ids=batch.tokens,
        position_ids=batch.positions,
        use_cache=False,
        # Logits of a whole row would be the largest tensor of a step.
        logits_to_keep=batch.columns,
    ).logits
    chosen = logits[batch.rows, batch.places]
    return cross_entropy(
        chosen.to(torch.promote_types(chosen.dtype, torch.float32)), batch.targets, reduction="none"
    )


@torch.no_grad()
def check_packing(
    model: nn.Module, examples: Sequence[Encoded], fill: int, device: torch.device
) -> None:
    """Change one example of a row and look at the next: not every model tells from positions where one begins.

    Args:
        model: in any mode; it is in the same one afterwards.
        examples: two of them; fewer, or two that do not fit into a row, show nothing.
        fill: tokens of a row.
        device: of the model.

    Raises:
        ConfigError: the loss of the second depends on the first.
    """
    if len(examples) < 2 or sum(len(example.tokens) for example in examples[:2]) > fill:
        return
    first, second = examples[:2]
    other = replace(first, prompt=tuple(token - 1 if token else 1 for token in first.prompt))
    was_training = model.training
    model.eval()
    losses = [
        token_losses(model, collate(pair, fill=fill, device=device))[-len(second.answer) :]
        for pair in ((first, second), (other, second))
    ]
    model.train(was_training)
    # What is masked enters with a weight of exactly zero, in any precision.
    if float((losses[0] - losses[1]).abs().max()) > 1e-6:
        raise ConfigError(
            f"{type(model).__name__} lets examples in one row see each other\n"
            "  where: --packing\n"
            "  what to do: leave --packing out"
        )
