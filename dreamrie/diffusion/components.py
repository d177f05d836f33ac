"""The parts of a Stable Diffusion model: loaded, checked against each other, frozen."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from dreamrie.diffusion.source import FLAG, ModelSource, quiet_libraries, resolve_model
from dreamrie.errors import ConfigError

_log = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "v_prediction")
# What a model can be kept in while it is trained.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Components:
    """A Stable Diffusion model in parts, all frozen and in evaluation mode.

    Attributes:
        source: where it came from.
        unet: the network to adapt.
        vae: AutoencoderKL or AutoencoderTiny, always fp32: its half-precision pictures go black.
        text_encoder: CLIP's text tower.
        tokenizer: CLIP's tokenizer, of the size that the text encoder expects.
        noise_scheduler: adds noise in training; holds `alphas_cumprod`.
        scheduler_config: as saved with the model, with the prediction type always present.
        prediction_type: "epsilon" or "v_prediction", read from the model.
    """

    source: ModelSource
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    noise_scheduler: Any
    scheduler_config: dict[str, Any]
    prediction_type: str

    @property
    def device(self) -> torch.device:
        """Device of the U-Net."""
        return next(iter(self.unet.parameters())).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the U-Net's base weights."""
        return self.unet.conv_in.weight.dtype

    @property
    def scale_factor(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures that the model was trained on."""
        return int(self.unet.config.sample_size) * self.scale_factor


def load_components(
    name_or_path: str | Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prediction_type: str | None = None,
) -> Components:
    """Load a Stable Diffusion 1.x or 2.x model, frozen.

    Args:
        name_or_path: folder, alias, Hub id, or None for the embedded model.
        revision: branch, tag or commit on the Hub.
        variant: weight variant, such as "fp16".
        dtype: precision of the U-Net and the text encoder.
        device: where to put everything.
        prediction_type: what the caller believes; needed only where the model does not say.

    Returns:
        The parts, with `requires_grad` off everywhere. A model that cannot be had, is damaged, of another
        kind, or contradicts `prediction_type` is a `ConfigError`.
    """
    source = resolve_model(name_or_path, revision, variant=variant)
    folder = source.directory
    unet = _load_model(UNet2DConditionModel, folder, "unet", variant, dtype)
    vae_class = _vae_class(folder)
    vae = _load_model(vae_class, folder, "vae", variant, torch.float32)
    text_encoder = _load_model(CLIPTextModel, folder, "text_encoder", variant, dtype)
    tokenizer = _load_part(CLIPTokenizer, folder, "tokenizer")
    raw_scheduler = _read_scheduler_config(folder)
    prediction = read_prediction_type(
        raw_scheduler, linear_projection=_uses_linear_projection(unet), stated=prediction_type
    )
    # The two settings that StableDiffusionPipeline itself forces on every scheduler, said here so
    # that it need not complain: clip_sample is for pixels, steps_offset=1 is how SD was trained.
    scheduler_config = {
        **raw_scheduler,
        "prediction_type": prediction,
        "clip_sample": False,
        "steps_offset": 1,
    }
    components = Components(
        source=source,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        noise_scheduler=DDPMScheduler.from_config(scheduler_config),
        scheduler_config=scheduler_config,
        prediction_type=prediction,
    )
    _check_fit(components, folder)
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False).eval().to(device)
    return components


def read_prediction_type(
    scheduler_config: dict[str, Any], *, linear_projection: bool, stated: str | None = None
) -> str:
    """Decide what the U-Net predicts, from the model and never from habit.

    Training a v model towards epsilon (or the reverse) yields noise.

    Args:
        scheduler_config: as read from the file, without filled-in defaults.
        linear_projection: whether the U-Net has SD2's linear projections. SD1 models, which have not, were
            saved before the setting existed, and all of them predict epsilon.
        stated: what the caller believes, or None.

    Returns:
        "epsilon" or "v_prediction".

    Raises:
        ConfigError: the model does not say, says something else than `stated`, or says neither of the two.
    """
    allowed = " or ".join(PREDICTION_TYPES)
    if stated is not None and stated not in PREDICTION_TYPES:
        raise ConfigError(f"prediction type {stated!r} is unknown; allowed: {allowed}.")
    found = scheduler_config.get("prediction_type")
    if found is None:
        if stated is not None:
            return stated
        if not linear_projection:
            _log.info("the scheduler names no prediction type; SD1 models predict epsilon")
            return "epsilon"
        raise ConfigError(
            "scheduler/scheduler_config.json has no `prediction_type`, and SD2 models come in both "
            f"kinds. Add it to the file: {allowed}."
        )
    if found not in PREDICTION_TYPES:
        raise ConfigError(
            f"scheduler/scheduler_config.json: prediction_type {found!r} cannot be trained; "
            f"allowed: {allowed}."
        )
    if stated is not None and stated != found:
        raise ConfigError(
            f"prediction type {stated!r} was asked for, but the model's scheduler_config.json says "
            f"{found!r}. Training to the wrong one yields noise; drop the setting."
        )
    return str(found)


def _load_model(
    loader: Any, folder: Path, part: str, variant: str | None, dtype: torch.dtype
) -> Any:
    """A network with every weight from the file, none made up."""
    # A variant may be missing for one part only; the plain file is then the right one.
    has_variant = variant is not None and any((folder / part).glob(f"*.{variant}*.safetensors"))
    model, report = _load_part(
        loader,
        folder,
        part,
        dtype=dtype,
        use_safetensors=True,
        variant=variant if has_variant else None,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"{folder / part}: {len(missing)} tensors are missing from the weights, the first is "
            f"{missing[0]}. The download is incomplete or of another kind of model."
        )
    return model


def _load_part(loader: Any, folder: Path, part: str, **options: Any) -> Any:
    """`from_pretrained` on one subfolder, with its failures under one name."""
    try:
        with quiet_libraries():
            return loader.from_pretrained(folder, subfolder=part, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / part} cannot be loaded as {loader.__name__}: {error}. Check {FLAG}."
        ) from error


def _read_scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler's settings as they stand in the file."""
    try:
        return dict(DDPMScheduler.load_config(folder, subfolder="scheduler"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'scheduler'} cannot be read: {error}.") from error


def _vae_class(folder: Path) -> Any:
    """AutoencoderKL or AutoencoderTiny, by the folder's own word."""
    try:
        name = AutoencoderKL.load_config(folder, subfolder="vae").get("_class_name")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'vae'} cannot be read: {error}.") from error
    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    if name not in classes:
        raise ConfigError(
            f"{folder / 'vae'}: {name} is not supported; allowed: {', '.join(classes)}."
        )
    return classes[name]


def _uses_linear_projection(unet: Any) -> bool:
    """Whether the U-Net has SD2's layout."""
    return bool(unet.config.use_linear_projection)


def _check_fit(components: Components, folder: Path) -> None:
    """The parts must belong together."""
    unet, vae = components.unet, components.vae
    text = components.text_encoder.config
    # CLIPTokenizer(vocab_file=...) of transformers 5 silently has two tokens.
    if len(components.tokenizer) != text.vocab_size:
        raise ConfigError(
            f"{folder / 'tokenizer'} has {len(components.tokenizer)} tokens, but the text encoder expects "
            f"{text.vocab_size}. The tokenizer files are damaged or belong to another model."
        )
    if unet.config.cross_attention_dim != text.hidden_size:
        raise ConfigError(
            f"{folder}: the U-Net reads text of width {unet.config.cross_attention_dim}, the text "
            f"encoder gives {text.hidden_size}. The parts come from different models."
        )
    if unet.config.in_channels != vae.config.latent_channels:
        raise ConfigError(
            f"{folder}: the U-Net takes {unet.config.in_channels} channels, the VAE gives "
            f"{vae.config.latent_channels}. Inpainting, depth and edit models are not supported."
        )
