"""Whether a public loader puts the same change on the base model as dreamrie's strict reader, and draws the same.

The base is loaded twice, one copy after the other, so that nothing of the one way can leak into the other. Compared
are the change of every layer, DoRA's magnitudes, and pictures of one prompt with the same seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dreamrie.adapter_container import find_adapter, read_metadata
from dreamrie.adapter_magnitudes import Magnitudes, magnitudes_of
from dreamrie.adapter_peft import PEFT_FILE
from dreamrie.adapter_reading import load_adapter
from dreamrie.diffusion.adapters import ADAPTER_NAME, _pipeline
from dreamrie.diffusion.components import Components, load_components
from dreamrie.diffusion.pipeline import check_prompt, sample
from dreamrie.diffusion.source import EMBEDDED, FLAG, quiet_libraries
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.lora import LoraPair, LowRank, lora_pairs
from dreamrie.lora.comparing import change_norm, distance
from dreamrie.lora.stock import load_with_peft

SEEDS = (0, 1)
# Both ways hold the same fp32 numbers (measured 8e-16); alpha over rank may be divided in another order.
LARGEST_DISTANCE = 1e-6
LARGEST_GREY = 1
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError)


@dataclass(frozen=True)
class Verification:
    """What was compared, and how far apart it is.

    Attributes:
        path: the adapter file.
        base: what it was put on.
        loader: the public one, "diffusers" or "PEFT".
        prompt: of the pictures.
        layers: adapted by dreamrie's reader.
        unchecked: what the file gave no means to check, in words.
        problems: what is wrong, in words; empty when all that was checked is right.
        worst_distance: largest relative distance of a layer's two changes; None if the loader failed.
        worst_layer: where.
        grey_between: largest difference of the two ways' pictures in grey levels; None if none were drawn.
        grey_from_base: the same between the public loader's pictures and those of the bare base.
    """

    path: Path
    base: str
    loader: str
    prompt: str
    layers: int
    unchecked: tuple[str, ...]
    problems: tuple[str, ...]
    worst_distance: float | None = None
    worst_layer: str = ""
    grey_between: int | None = None
    grey_from_base: int | None = None


def load_base(name: str, revision: str | None = None, *, flag: str = "--base") -> Components:
    """Load a base model by what a user or a file calls it.

    Args:
        name: alias, Hub id or folder, as in training; `dreamrie/tiny-sd` is the embedded model.
        revision: of the Hub.
        flag: what to call it in an error.

    Returns:
        The model in fp32, on the GPU if there is one.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        return load_components(
            None if name == EMBEDDED else name,
            revision=revision,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    except ConfigError as error:
        raise ConfigError(str(error).replace(FLAG, flag)) from error


def base_named_by(path: Path, facts: Mapping[str, str]) -> tuple[str, str | None]:
    """The base model that a file names.

    Args:
        path: the file, for the message.
        facts: of its header.

    Returns:
        Name and revision for `load_base`.

    Raises:
        ConfigError: it names none.
    """
    name = facts.get("base_model", "")
    if not name:
        raise ConfigError(f"{path} does not say which base model it is for. Give it: --base MODEL.")
    return name, facts.get("base_model_commit") or None


def verify(
    file: Path, base: str | None = None, *, prompt: str | None = None, steps: int = 10
) -> Verification:
    """Read a file strictly, load it in two ways, compare.

    Args:
        file: see `find_adapter`.
        base: alias, Hub id or folder; default what the file names.
        prompt: of the pictures; default the trigger phrase of the file.
        steps: denoising steps of the pictures.

    Returns:
        The findings; an adapter that is refused is one of them.

    Raises:
        ConfigError: base, prompt or steps cannot be used.
        AdapterError: there is no such file.
    """
    if steps < 1:
        raise ConfigError(f"--steps must be at least 1; got {steps}.")
    path = find_adapter(file)
    try:
        facts = read_metadata(path)
    except AdapterError as error:
        return Verification(path, base or "", _loader_of(path), prompt or "", 0, (), (str(error),))
    name, revision = (base, None) if base else base_named_by(path, facts)
    text = facts.get("instance_prompt") or "a photo" if prompt is None else prompt
    ours = load_base(name, revision)
    check_prompt(ours.tokenizer, text, "--prompt")
    known = Verification(path, ours.source.resolved, _loader_of(path), text, 0, (), ())
    kinds = facts.get("prediction_type", ours.prediction_type), ours.prediction_type
    if kinds[0] != kinds[1]:
        text = (
            f"it was trained to predict {kinds[0]}, and the scheduler of the base says {kinds[1]}"
        )
        return replace(known, problems=(text,))
    bare = _draw(ours, text, steps)
    try:
        loaded = load_adapter(ours.unet, path, adapter_name=ADAPTER_NAME)
    except AdapterError as error:
        return replace(known, problems=(str(error),))
    known = replace(known, layers=len(loaded.pairs), unchecked=loaded.unchecked)
    expected, wanted = _changes(loaded.pairs), _draw(ours, text, steps)
    norms = magnitudes_of(loaded.pairs)
    del ours, loaded  # a large model need not be in memory twice
    theirs = load_base(name, revision)
    try:
        pairs = public_pairs(theirs, path)
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return replace(known, problems=(f"{known.loader} does not load it: {reason}",))
    drawn = _draw(theirs, text, steps)
    distances = with_magnitudes(compared(expected, _changes(pairs)), norms, magnitudes_of(pairs))
    return judged(known, distances, grey(wanted, drawn), grey(bare, drawn))


def public_pairs(components: Components, path: Path) -> list[LoraPair]:
    """Put a file on a base as any user does, without dreamrie's checks.

    Args:
        components: carries no adapter.
        path: of the file.

    Returns:
        What the loader put there. What it raises goes through.
    """
    with quiet_libraries():
        if path.name == PEFT_FILE:
            return load_with_peft(components.unet, path.parent)
        _pipeline(components).load_lora_weights(
            str(path.parent),
            weight_name=path.name,
            adapter_name=ADAPTER_NAME,
            local_files_only=True,
            use_safetensors=True,
        )
    return lora_pairs(components.unet, ADAPTER_NAME, use_dora=True)


def compared(
    expected: Mapping[str, LowRank], found: Mapping[str, LowRank]
) -> dict[str, float | None]:
    """How far apart two sets of changes are.

    Args:
        expected: by layer.
        found: by layer.

    Returns:
        For each layer of either, the distance over the larger norm; None where one of them has no change.
    """
    distances: dict[str, float | None] = {}
    for layer in sorted({*expected, *found}):
        if layer not in expected or layer not in found:
            distances[layer] = None
            continue
        size = max(change_norm(expected[layer]), change_norm(found[layer]))
        distances[layer] = distance(expected[layer], found[layer]) / size if size else 0.0
    return distances


def with_magnitudes(
    distances: Mapping[str, float | None], expected: Magnitudes, found: Magnitudes
) -> dict[str, float | None]:
    """Distances of changes and of DoRA's magnitudes, the larger of each layer.

    Args:
        distances: see `compared`.
        expected: magnitudes by layer; empty for a plain LoRA.
        found: those of the other way.

    Returns:
        As `compared`; None also where only one of them has a magnitude.
    """
    joined = dict(distances)
    for layer in sorted({*expected, *found}):
        if layer not in expected or layer not in found:
            joined[layer] = None
        elif (apart := joined.get(layer)) is not None:
            one, other = expected[layer].double(), found[layer].double()
            size = max(float(one.norm()), float(other.norm()))
            joined[layer] = max(apart, float((one - other).norm()) / size if size else 0.0)
    return joined


def grey(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> int:
    """Largest difference of two rows of pictures.

    Args:
        first: pictures.
        second: as many, of the same sizes.

    Returns:
        In grey levels of any channel, 0 to 255.
    """
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in pairs)


def judged(
    known: Verification, distances: Mapping[str, float | None], between: int, from_base: int
) -> Verification:
    """Say what is wrong.

    Args:
        known: what was compared.
        distances: see `compared`.
        between: grey levels between the two ways.
        from_base: grey levels between the public loader's pictures and the base's.

    Returns:
        The findings with all problems.
    """
    lost = [layer for layer, apart in distances.items() if apart is None]
    both = {layer: apart for layer, apart in distances.items() if apart is not None}
    worst = max(both, key=lambda layer: both[layer], default="")
    apart = both.get(worst, 0.0)
    problems = []
    if lost:
        problems.append(
            f"{len(lost)} of {len(distances)} layers carry a change by one loader only: {lost[0]}"
        )
    # Not "greater": a distance that is not a number is no equality.
    if not apart <= LARGEST_DISTANCE:
        problems.append(f"{known.loader} puts another change on layer {worst} ({apart:.1e} off)")
    if between > LARGEST_GREY:
        problems.append(f"the two loaders' pictures differ by {between} grey levels")
    if from_base <= LARGEST_GREY:
        problems.append("the pictures are those of the base model: nothing can be seen of it")
    return replace(
        known,
        problems=tuple(problems),
        worst_distance=apart if both else None,
        worst_layer=worst,
        grey_between=between,
        grey_from_base=from_base,
    )


def _loader_of(path: Path) -> str:
    return "PEFT" if path.name == PEFT_FILE else "diffusers"


def _changes(pairs: Sequence[LoraPair]) -> dict[str, LowRank]:
    """Copies on the CPU, so that the model can go."""
    return {
        pair.name: LowRank(
            pair.scaling * pair.left_matrix().detach().cpu().double(),
            pair.right_matrix().detach().cpu().double(),
        )
        for pair in pairs
    }


def _draw(components: Components, prompt: str, steps: int) -> list[Image.Image]:
    return sample(components, [prompt] * len(SEEDS), SEEDS, steps=steps)
