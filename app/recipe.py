"""The settings of a training that is started in the app: what the user chose, and what usually works for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.asked import Train

# Enough to see how it goes and where the best step is, not so often that scoring takes longer than training.
_SCORINGS, _LEAST_SCORE_STEPS = 4, 50
_PLACES = ("on grass", "in the snow", "at night")
_CHECKPOINT_STEPS = 50
# Spectra of large adapters are long; so many are enough for a curve.
_SPECTRA = 50


@dataclass(frozen=True)
class Usual:
    """Where the sliders of the page stand at first.

    Attributes:
        steps: optimizer steps. rank: of the adapter. learning_rate: spectral norm of a step.
    """

    steps: int
    rank: int
    learning_rate: float


def usual(embedded: bool) -> Usual:
    """What usually works.

    Args:
        embedded: the base model is the toy that comes along.

    Returns:
        The values.
    """
    return Usual(400, 4, 5e-2) if embedded else Usual(600, 4, 1e-3)


def prompt_of(subject: str) -> str:
    """The trigger of a concept."""
    return f"a sks {subject}"


def settings_of(
    train: Train, *, pictures: int, model: str | None, revision: str | None, device: str
) -> dict[str, Any]:
    """Settings by their names in `dreamrie.config`, but for the folders.

    Args:
        train: what the user asked for.
        pictures: how many photos there are.
        model: base model; None: the embedded one.
        revision: of the Hub.
        device: where it will run, as torch names it.

    Returns:
        Values that JSON can hold.
    """
    embedded = model is None
    prompt = prompt_of(train.subject)
    look_steps = max(_LEAST_SCORE_STEPS, train.steps // _SCORINGS)
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": model,
        "revision": revision,
        "instance_prompt": prompt,
        "center_crop": True,
        "optimizer": "riemannion",
        "init": "loi",
        "rank": train.rank,
        "learning_rate": train.learning_rate,
        "max_train_steps": train.steps,
        "seed": train.seed,
        "train_batch_size": 8 if embedded else 4,
        "validation_prompt": [prompt, *(f"{prompt} {place}" for place in _PLACES)],
        "num_validation_images": 1,
        "validation_steps": look_steps,
        "spectrum_steps": max(10, train.steps // _SPECTRA),
        "checkpointing_steps": _CHECKPOINT_STEPS,
        # Scores judge pictures by how similar the real ones are to each other, so one is not enough.
        "score_steps": look_steps if pictures > 1 else 0,
    }
    if embedded:
        values |= {"num_inference_steps": 30, "guidance_scale": 4.0}
    else:
        values["gradient_checkpointing"] = True
        values["mixed_precision"] = "bf16" if device.startswith("cuda") else "no"
        if values["score_steps"]:
            values["score_prompts"] = "living" if train.living else "objects"
    if train.prior:
        values |= {"with_prior_preservation": True, "class_prompt": f"a {train.subject}"}
        values["num_class_images"] = 48 if embedded else 100
    return {name: value for name, value in values.items() if value is not None}


def with_folders(settings: dict[str, Any], photos: Path, folder: Path) -> dict[str, Any]:
    """The settings with the folders as they are now: the data of the app may have moved since the start.

    Args:
        settings: from `settings_of`.
        photos: folder of the pictures.
        folder: of the run.

    Returns:
        For `dreamrie.config.make_config`.
    """
    values = {**settings, "instance_data_dir": str(photos), "output_dir": str(folder)}
    if settings.get("with_prior_preservation"):
        values["class_data_dir"] = str(folder / "class")
    return values
