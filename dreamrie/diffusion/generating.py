"""Draw with any number of adapters at once, without ever touching the weights of the base.

Each adapter is read strictly (`dreamrie.adapter_reading`) and lies on the U-Net as PEFT layers of its own, so that
pictures with A and B at scales a and b are those of the base weights + a * change of A + b * change of B. DoRA has
magnitudes in the place of a change that could be scaled or added: it draws alone, and as it was trained. A few
adapters stay on the U-Net between drawings, at rest; nothing of an earlier drawing can be seen in a later one.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreamrie.adapter_container import find_adapter
from dreamrie.adapter_peft import PEFT_FILE, PEFT_SETTINGS
from dreamrie.adapter_reading import AdapterContents, read_adapter
from dreamrie.config.train_config import usual_guidance
from dreamrie.diffusion.adapters import remove_adapter
from dreamrie.diffusion.components import Components
from dreamrie.diffusion.images import contact_sheet
from dreamrie.diffusion.pipeline import DrawRequest, check_prompt, draw
from dreamrie.diffusion.source import EMBEDDED
from dreamrie.diffusion.task import picture_unit
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.files import new_folder
from dreamrie.lora import LowRank
from dreamrie.lora.comparing import truncate
from dreamrie.lora.place import adapted_layer
from dreamrie.lora.stacking import rest_lora, stack_lora, unstack_lora

_log = logging.getLogger(__name__)

__all__ = [
    "AdapterUse",
    "DrawRequest",
    "Drawer",
    "activate",
    "adapter_digest",
    "changes_of",
    "check_use",
    "save_drawings",
    "settled",
]

PNG_KEY = "dreamrie"
LARGEST_SCALE = 4.0
LARGEST_GUIDANCE = 100.0
# Attention takes memory with the fourth power of a side.
LARGEST_SIDE = 4


@dataclass(frozen=True)
class AdapterUse:
    """An adapter as a drawing uses it.

    Attributes:
        path: file, or folder of a run or of PEFT, see `dreamrie.adapter_container.find_adapter`.
        scale: what its change counts, from -4 to 4; 0 switches it off.
        rank: of the nearest change of that rank, layer by layer, which is drawn with instead; None: as it is.
    """

    path: Path
    scale: float = 1.0
    rank: int | None = None


class Drawer:
    """Draws with a model and any adapters, one drawing at a time.

    Args:
        components: the base model; its U-Net carries no adapter, and belongs to the drawer until `close`.
        keep: how many adapters stay on the U-Net; the one that was not used for longest goes first.
    """

    def __init__(self, components: Components, *, keep: int = 4) -> None:
        if keep < 1:
            raise ConfigError(f"keep must be at least 1; got {keep}.")
        place = adapted_layer(components.unet)
        if place is not None:
            raise AdapterError(
                f"the model carries an adapter already (at {place}); draw with a fresh copy of the base model."
            )
        self._components, self._keep = components, keep
        # The reader checks files against a U-Net without adapters. This one shares all weights and takes no memory.
        tensors = [*components.unet.parameters(), *components.unet.buffers()]
        self._bare = copy.deepcopy(components.unet, {id(tensor): tensor for tensor in tensors})
        # Whether each is DoRA.
        self._loaded: OrderedDict[str, bool] = OrderedDict()

    def __enter__(self) -> Drawer:
        """Nothing more to open."""
        return self

    def __exit__(self, *error: object) -> None:
        """As `close`."""
        self.close()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the adapters on the U-Net, the one that goes first in front."""
        return tuple(self._loaded)

    def draw(
        self,
        request: DrawRequest,
        adapters: Sequence[AdapterUse] = (),
        *,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw one picture for each prompt.

        A picture depends on its prompt, its seed and the adapters with their scales alone: not on their order, on
        what was drawn before, or on its neighbours.

        Args:
            request: what to draw.
            adapters: none draws the base. The same one twice counts the sum of its scales.
            on_step: called with (done, total) after every denoising step of all batches together. What it raises
                ends the drawing at once and goes through; the drawer can draw again.

        Returns:
            RGB pictures. What cannot be drawn or loaded is a `ConfigError` or an `AdapterError`, a picture that is
            not finite a `NumericalError`.
        """
        wanted = settled(request, self._components)
        with self.using(adapters):
            return draw(self._components, wanted, on_step=on_step)

    @contextmanager
    def using(self, adapters: Sequence[AdapterUse]) -> Iterator[None]:
        """Inside, the U-Net is base + sum of scale * change; afterwards it computes what its base does.

        Args:
            adapters: see `draw`.

        Yields:
            Nothing.

        Raises:
            ConfigError: a scale, a rank or the number of adapters cannot be used.
        """
        for use in adapters:
            check_use(use)
        scales: dict[str, float] = {}
        sources: dict[str, AdapterUse] = {}
        for use in adapters:
            if use.scale:
                name = _name(use)
                scales[name], sources[name] = scales.get(name, 0.0) + use.scale, use
        # Sums are rounded, so their order must not be that of the caller.
        scales = {name: scale for name, scale in sorted(scales.items()) if scale}
        if len(scales) > self._keep:
            raise ConfigError(
                f"{len(scales)} adapters at once are too many; at most {self._keep} can act together."
            )
        for name in scales:
            if name not in self._loaded:
                self._load(name, sources[name], set(scales))
            self._loaded.move_to_end(name)
            if self._loaded[name] and (
                len(scales) > 1 or scales[name] != 1.0 or sources[name].rank
            ):
                raise ConfigError(
                    f"{sources[name].path} is DoRA, whose magnitudes can be neither scaled nor added nor cut to a "
                    "rank. Draw with it alone, at scale 1 and without a rank; or use merge-into-base."
                )
        unet = self._components.unet
        try:
            if scales:
                activate(unet, scales)
            yield
        finally:
            if self._loaded:
                rest_lora(unet)

    def close(self) -> None:
        """Give the U-Net back as it was; drawing again loads adapters anew."""
        self._loaded.clear()
        remove_adapter(self._components)

    def _load(self, name: str, use: AdapterUse, needed: set[str]) -> None:
        """Read a file and put it on the U-Net, in the place of the one that was not used for longest."""
        contents = read_adapter(self._bare, use.path, use_dora=True)
        _check_prediction(contents, self._components)
        changes = changes_of(contents, use.rank)
        highest = max(int(change.right.shape[0]) for change in contents.changes.values())
        if use.rank is not None and use.rank > highest:
            _log.warning(
                "%s has rank %d, so rank %d leaves nothing out", use.path, highest, use.rank
            )
        while len(self._loaded) >= self._keep:
            oldest = next(known for known in self._loaded if known not in needed)
            unstack_lora(self._components.unet, oldest)
            del self._loaded[oldest]
        stack_lora(self._components.unet, changes, name, contents.magnitudes)
        self._loaded[name] = bool(contents.magnitudes)


def activate(unet: Any, scales: Mapping[str, float]) -> None:
    """Let some of the adapters of a U-Net act, and no others.

    Args:
        unet: carries them.
        scales: name in PEFT to what the adapter counts; at least one.
    """
    unet.set_adapters(list(scales), weights=list(scales.values()))


def changes_of(contents: AdapterContents, rank: int | None) -> dict[str, LowRank]:
    """The changes of a file with scaling 1, as `python -m dreamrie truncate --rank` writes them if a rank is given.

    Args:
        contents: of a file.
        rank: of every layer; None: as in the file.

    Returns:
        By layer; fp64 where they were computed with.
    """
    found = {}
    for layer, (left, right) in contents.changes.items():
        scaling = contents.scalings[layer]
        change = LowRank(left if scaling == 1.0 else scaling * left.double(), right)
        found[layer] = change if rank is None else truncate(change, rank)
    return found


def adapter_digest(path: Path) -> str:
    """What tells one adapter from another, wherever it lies and whatever it is called.

    Args:
        path: see `AdapterUse`.

    Returns:
        SHA-256 of the file, and of PEFT's settings beside it: 64 hexadecimal digits.

    Raises:
        AdapterError: there is no such file, or it cannot be read.
    """
    file = find_adapter(path)
    settings = file.with_name(PEFT_SETTINGS)
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        if file.name == PEFT_FILE and settings.is_file():
            digest.update(settings.read_bytes())
    except OSError as error:
        raise AdapterError(f"the adapter {file} cannot be read: {error}.") from error
    return digest.hexdigest()


def settled(request: DrawRequest, components: Components) -> DrawRequest:
    """Check a request, and fill in what is the model's to say.

    Args:
        request: what to draw.
        components: what to draw it with.

    Returns:
        The request with guidance, width and height.

    Raises:
        ConfigError: something of it cannot be drawn.
    """
    count = len(request.prompts)
    if count < 1 or count != len(request.seeds):
        raise ConfigError(
            f"each picture needs a prompt and a seed; got {count} prompts and {len(request.seeds)} seeds."
        )
    for prompt in dict.fromkeys(request.prompts):
        check_prompt(components.tokenizer, prompt, "prompt")
    if request.negative_prompt.strip():
        check_prompt(components.tokenizer, request.negative_prompt, "negative prompt")
    for seed in request.seeds:
        _check_number("seed", seed, 0, 2**63 - 1)
    # More steps than the noise schedule has cannot differ from each other.
    _check_number(
        "steps", request.steps, 1, int(components.noise_scheduler.config.num_train_timesteps)
    )
    _check_number("batch_size", request.batch_size, 1, 1024)
    guidance = request.guidance_scale
    if guidance is None:
        guidance = usual_guidance(components.source.resolved == EMBEDDED)
    if not (math.isfinite(guidance) and 0.0 <= guidance <= LARGEST_GUIDANCE):
        raise ConfigError(f"guidance_scale must be from 0 to {LARGEST_GUIDANCE:g}; got {guidance}.")
    if request.negative_prompt.strip() and guidance <= 1.0:
        raise ConfigError(
            f"a negative prompt does nothing at a guidance_scale of {guidance:g}: raise it above 1, or leave the "
            "negative prompt out."
        )
    width = components.resolution if request.width is None else request.width
    height = components.resolution if request.height is None else request.height
    _check_side("width", width, components)
    _check_side("height", height, components)
    return dataclasses.replace(request, guidance_scale=float(guidance), width=width, height=height)


def save_drawings(
    folder: Path,
    pictures: Sequence[Image.Image],
    records: Sequence[Mapping[str, Any]],
    *,
    columns: int,
) -> None:
    """Write pictures with the settings that made them, all files or none.

    Args:
        folder: does not exist, or is empty; gets `000.png`, `001.png`, ..., each with its record as JSON in a text
            chunk named "dreamrie"; `settings.json` with all records; and `grid.png` if there are several pictures.
        pictures: at least one, all of one size.
        records: settings of each picture, fit for JSON.
        columns: pictures in a row of the grid.

    Raises:
        ConfigError: the folder cannot be written, or something has taken its name.
    """
    files = [f"{number:03d}.png" for number in range(len(pictures))]
    listed = [{"file": file, **record} for file, record in zip(files, records, strict=True)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as place:
            for file, picture, record in zip(files, pictures, records, strict=True):
                notes = PngInfo()
                # JSON in ASCII: that kind of chunk holds Latin-1 only, and every program reads it.
                notes.add_text(PNG_KEY, json.dumps(record))
                picture.save(place / file, format="PNG", pnginfo=notes)
            text = json.dumps(listed, indent=2, ensure_ascii=False)
            (place / "settings.json").write_bytes(f"{text}\n".encode())
            if len(pictures) > 1:
                contact_sheet(pictures, columns).save(place / "grid.png", format="PNG")
    except OSError as error:
        raise ConfigError(f"the pictures cannot be written to {folder}: {error}.") from error


def check_use(use: AdapterUse) -> None:
    """Refuse numbers that no adapter can be used with.

    Args:
        use: of an adapter.

    Raises:
        ConfigError: scale or rank are out of range.
    """
    if not (math.isfinite(use.scale) and abs(use.scale) <= LARGEST_SCALE):
        raise ConfigError(
            f"the scale of {use.path} must be a number from {-LARGEST_SCALE:g} to {LARGEST_SCALE:g}; got {use.scale}."
        )
    if use.rank is not None:
        _check_number(f"the rank of {use.path}", use.rank, 1, 2**31)


def _name(use: AdapterUse) -> str:
    """By contents, so that a file that was written again is another adapter, and a copy is not."""
    return f"{adapter_digest(use.path)[:40]}-{use.rank or 'whole'}"


def _check_prediction(contents: AdapterContents, components: Components) -> None:
    """The same weights under a scheduler that reads them otherwise draw noise."""
    trained, now = contents.facts.get("prediction_type"), components.prediction_type
    if trained and trained != now:
        raise AdapterError(
            f"the adapter {contents.path} was trained to predict {trained}, and the scheduler of the model "
            f"{components.source.resolved} says {now}. Give the base model that it was trained on."
        )


def _check_number(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}; got {value!r}.")


def _check_side(name: str, side: int, components: Components) -> None:
    unit, most = picture_unit(components), LARGEST_SIDE * components.resolution
    _check_number(name, side, unit, most)
    if side % unit:
        raise ConfigError(
            f"{name} must be a multiple of {unit} pixels for this model; got {side}. It was trained on "
            f"{components.resolution}."
        )
