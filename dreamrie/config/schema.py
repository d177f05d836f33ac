"""What can be set, with type, range, default and one sentence each; the command line is made from this.

Types are strict: `true` is not a number, `"7"` is not 7, NaN and infinity are never accepted. `None` as a default means
that the value follows from the others, and `TrainConfig.resolved` fills it in.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dreamrie.init_table import INITS
from dreamrie.optimizer_table import CORE_MAP_NAMES, OPTIMIZERS

if TYPE_CHECKING:
    InitName = str
    OptimizerName = str
    CoreMapName = str
else:
    # Types are static, the tables are not: --help and the check follow them all the same.
    InitName = Literal[tuple(INITS)]
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    CoreMapName = Literal[CORE_MAP_NAMES]

COLORS = {"white": "#ffffff", "black": "#000000", "grey": "#808080", "gray": "#808080"}


def _no_blank(value: object) -> object:
    """Refuse text without a visible character."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("must not be empty")
    if isinstance(value, str) and any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
        raise ValueError("must be valid text (it contains half a surrogate pair)")
    if isinstance(value, str) and "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


def _as_path(value: object) -> object:
    """Text from a flag or a file becomes a path; anything else is left for the type check."""
    value = _no_blank(value)
    return Path(value).expanduser() if isinstance(value, str) else value


def _as_list(value: object) -> object:
    """One text stands for a list of one."""
    return [value] if isinstance(value, str) else value


def _as_color(value: object) -> object:
    """Refuse text that names no color."""
    if isinstance(value, str) and not re.fullmatch(r"#[0-9a-f]{6}", COLORS.get(value, value), re.I):
        raise ValueError("must be white, black, grey or #rrggbb with hexadecimal digits, in quotes")
    return value


Text = Annotated[str, BeforeValidator(_no_blank)]
PathText = Annotated[Path, BeforeValidator(_as_path)]
Texts = Annotated[list[Text], BeforeValidator(_as_list)]
Color = Annotated[str, BeforeValidator(_as_color)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Group(BaseModel):
    """Common rules of all groups: strict types, finite numbers, no unknown key, no change afterwards."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Group):
    """The base model, which is never changed."""

    pretrained_model_name_or_path: Text | None = Field(
        None,
        description="Hub id, short alias (sd2-base, sd2, sd2.1-base, sd2.1) or local diffusers folder; "
        "default: the small model that comes with dreamrie, which is a toy",
    )
    revision: Text | None = Field(None, description="branch, tag or commit of the Hub repository")
    variant: Text | None = Field(None, description="variant of the weight files, such as fp16")
    base_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision in which the U-Net and the text encoder are kept in memory; the adapter stays fp32",
    )
    torch_compile: bool = Field(
        False,
        description="run the U-Net through torch.compile while training; what compiling takes and what it gains is "
        "measured and said before the first step",
    )


class DataSettings(Group):
    """The pictures of the concept."""

    instance_data_dir: PathText = Field(description="folder with the pictures of the concept")
    instance_prompt: Text = Field(description='names the concept: "a photo of a sks dog"')
    resolution: Count | None = Field(
        None, description="side of the training pictures in pixels; default: the model's own"
    )
    center_crop: bool = Field(False, description="crop the middle instead of a random square")
    aspect_buckets: bool = Field(
        False,
        description="keep the aspect of each picture, at most 2 to 1, with about as many pixels as the square",
    )
    random_flip: bool = Field(False, description="mirror half of the pictures left to right")
    alpha: Literal["background", "mask"] = Field(
        "background",
        description="transparent parts. background: learned as the background color; mask: shown in it, but "
        "not counted in the loss",
    )
    background_color: Color = Field(
        "white",
        description='behind transparent pictures: white, black, grey or "#rrggbb", in quotes',
    )
    train_batch_size: Count = Field(4, description="pictures in one micro-batch")

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """Red, green and blue of the background color, 0 to 255."""
        digits = COLORS.get(self.background_color, self.background_color)[1:]
        return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)


class PriorSettings(Group):
    """Prior preservation: keep the class as it was while learning one member of it."""

    with_prior_preservation: bool = Field(
        False, description="also train on pictures that the base model makes of the class"
    )
    class_data_dir: PathText | None = Field(
        None, description="folder of the class pictures; missing ones are made"
    )
    class_prompt: Text | None = Field(None, description='names the class: "a photo of a dog"')
    prior_loss_weight: Amount = Field(1.0, description="weight of the class pictures in the loss")
    num_class_images: Count = Field(100, description="how many class pictures to use")
    sample_batch_size: Count = Field(
        4, description="class pictures, or samples of a validation, made at a time"
    )


class StartSettings(Group):
    """The low-rank change of each adapted layer, and where it starts."""

    rank: Count = Field(4, description="rank of the trained change of a layer")
    init: InitName | None = Field(
        None,
        description="start of the adapter, over an untouched base: loi: locally optimal, from gradients; the others "
        "are in docs/inits.md. When left out: loi with riemannion, else the start called default, which is the "
        "usual LoRA",
    )
    start_scale: float | None = Field(
        None,
        description="singular value of the starts loi and orthonormal, not 0; default a tenth of the learning rate for "
        "riemannion, the learning rate for riemann_adam, imuon, lora_muon and lora_rite, else 0.1 / sqrt(rank)",
    )
    loi_estimator: Literal["mean_gradient", "sketch", "backprop_rsvd"] = Field(
        "mean_gradient", description="how loi estimates the gradient of the whole matrix"
    )
    loi_batches: Count | None = Field(
        None,
        description="micro-batches that loi, corda, lora_ga and eva look at; default 8 for loi, 32 for the others",
    )
    use_rslora: bool = Field(
        False,
        description="count the product of the factors sqrt(rank) times, as PEFT does with alpha = rank; for "
        "optimizers that move the factors",
    )
    use_dora: bool = Field(
        False,
        description="DoRA: train the norms of the rows of each weight too, as PEFT does; for adamw, sgd, loraplus and "
        "rprec_adamw, with a start that has no anchor",
    )

    @property
    def batches(self) -> int:
        """Micro-batches that the start looks at, of resolved settings; 0 where it looks at none."""
        return self.loi_batches or 0

    @property
    def attach_init(self) -> str:
        """Start to attach with: one that is computed from batches replaces a random one of its layout."""
        name = self.init or "loi"
        return INITS[name].layout if INITS[name].needs == "batches" else name

    @property
    def layout(self) -> dict[str, Any]:
        """Arguments of `attach_lora` that follow from these settings."""
        switches = {"use_rslora": self.use_rslora, "use_dora": self.use_dora}
        alpha = self.start_scale if self.init == "orthonormal" else None
        return {"rank": self.rank, "init": self.attach_init, "alpha": alpha, **switches}

    @property
    def is_anchored(self) -> bool:
        """Whether the start is a point of the manifold, balanced by a frozen copy of itself."""
        return INITS[self.init or "loi"].anchored


class AdapterSettings(StartSettings):
    """The low-rank change of each attention layer."""

    orthogonal_to: Texts = Field(
        default_factory=list,
        description="adapter files, or folders of trainings, that this one is to be added to: its change stays away "
        "from the input directions of theirs; with riemannion and the loi start only",
    )

    @property
    def other_adapters(self) -> list[Path]:
        """Paths of `orthogonal_to`."""
        return [Path(text).expanduser() for text in self.orthogonal_to]


class OptimizerSettings(Group):
    """How a step is made from gradients."""

    optimizer: OptimizerName = Field(
        "riemannion",
        description="riemannion: Muon on the fixed-rank manifold; the others are in docs/optimizers.md",
    )
    learning_rate: Positive | None = Field(
        None,
        description="peak; for riemannion the spectral norm of the change of a layer per step; unit and default of "
        "the others are in docs/optimizers.md",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="not for adamw and its relatives; default 0.5 for riemannion, imuon, lora_muon and muon, 0.9 for "
        "the others",
    )
    core_map: CoreMapName | None = Field(
        None,
        description="riemannion only: what becomes of the spectrum of the momentum; default msign",
    )
    bias_correction: bool | None = Field(
        None, description="riemann_adam only: correct both averages for their start; default yes"
    )
    weight_decay: Amount = Field(
        0.0, description="decoupled decay; with riemannion it shrinks the change of the model"
    )
    max_grad_norm: Amount | None = Field(
        None,
        description="clip the global gradient norm (riemannion: of the tangent gradient); 0: do "
        "not clip; default 0 where the gradient's size does not matter, as for riemannion, else 1.0",
    )

    @property
    def step_of_factors(self) -> float | None:
        """Learning rate where it is the size of a step that is added to the factors, which a small start forbids."""
        entry = OPTIMIZERS[self.optimizer]
        return self.learning_rate if entry.bounded_step and not entry.retracts else None

    @property
    def values(self) -> dict[str, Any]:
        """Arguments of `build_optimizer` beside the name; only after `resolved`."""
        return {
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "core_map": self.core_map,
            "bias_correction": self.bias_correction,
        }


class ScheduleSettings(Group):
    """How long and how fast."""

    max_train_steps: Count = Field(400, description="optimizer steps")
    gradient_accumulation_steps: Count = Field(1, description="micro-batches per optimizer step")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="shape after the warm-up; linear and cosine end at 0"
    )
    lr_warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="optimizer steps of linear warm-up; default 20, at most a tenth of all"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        "no", description="precision of the forward pass; adapter and optimizer stay fp32"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="decides pictures, noise, timesteps, start and samples"
    )


class ValidationSettings(Group):
    """Pictures to look at on the way."""

    validation_prompt: Texts = Field(
        default_factory=list,
        description="one or more prompts, each in quotes; none: no validation",
    )
    num_validation_images: Count = Field(4, description="pictures per prompt")
    validation_steps: Count = Field(
        100, description="make them before training, every so many steps, and at the end"
    )
    num_inference_steps: Count = Field(25, description="sampling steps of a picture")
    guidance_scale: Amount | None = Field(
        None, description="classifier-free guidance; default 7.5, for the embedded model 4"
    )
    preview_from_export: bool = Field(
        False,
        description="make validation pictures and scores from the saved file, loaded as any user of diffusers loads "
        "it, instead of from the adapter in training",
    )


class ScoreSettings(Group):
    """Scores on the way, and the best adapter by them; needs the packages of the eval extra."""

    score_steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="score before training, every so many steps, and at the end, and keep the best adapter in "
        "best/; 0: no scores",
    )
    score_images: Annotated[int, Field(ge=4)] = Field(
        16, description="pictures per scoring, on prompts and seeds that stay the same"
    )
    score_prompts: Text | None = Field(
        None,
        description="prompt set by name (objects, living, embedded) or a file of prompts with {subject}; "
        "default objects, for the embedded model embedded",
    )
    score_encoders: Texts | None = Field(
        None,
        description="encoders by name, weights from a file as NAME=FILE; default dino clip, for the "
        "embedded model effnet-lite2-64-160 tiny-clip",
    )
    score_inference_steps: Count | None = Field(
        None,
        description="sampling steps of a scored picture; default 25, for the embedded model 10",
    )
    token: Text | None = Field(
        None, description="rare word of the instance prompt; default sks if it stands there"
    )
    subject_class: Text | None = Field(
        None, description="what the concept is, such as dog; default the words after the token"
    )


class RecordSettings(Group):
    """What is written, and where."""

    output_dir: PathText = Field(
        Path("runs/dreambooth"), description="folder for the adapter, samples, settings and metrics"
    )
    report_to: Literal["none", "tensorboard"] = Field(
        "none", description="metrics.jsonl is always written; this adds TensorBoard"
    )
    logging_dir: PathText = Field(
        Path("logs"), description="TensorBoard folder, relative to the output folder"
    )
    spectrum_steps: Count = Field(
        10, description="write the singular values to spectrum.jsonl every so many steps"
    )
    checkpointing_steps: Annotated[int, Field(ge=0)] = Field(
        100,
        description="save all that is needed to go on every so many steps, when stopped, and at the end; 0: never",
    )
    checkpoints_total_limit: Annotated[int, Field(ge=0)] = Field(
        2, description="how many checkpoints to keep, the oldest goes first; 0: all"
    )


class OutputSettings(RecordSettings):
    """What is written, and where."""

    push_to_hub: bool = Field(
        False,
        description="after the last step push the adapter, the model card and its pictures to the Hugging Face Hub; a "
        "repository that does not exist yet becomes a private one. Photos, prompts and settings stay here",
    )
    hub_model_id: Text | None = Field(
        None,
        description="repository to push to, OWNER/NAME; default: the name of the output folder, below your own name",
    )


class RunSettings(Group):
    """How this one command behaves; not part of the recorded configuration."""

    dry_run: bool = Field(False, description="check everything, say what would happen, and stop")
    resume_from_checkpoint: Text | None = Field(
        None,
        description="go on from a checkpoint of the output folder: latest, or its name, such as checkpoint-200; "
        "the other settings must be those of that run",
    )
    verbose: bool = Field(False, description="log more, and show tracebacks")
