"""All settings of one training together: what goes with what, and the defaults that follow from other settings.

What stays None after `resolved` does not apply (the momentum of AdamW, a Hub revision); only the resolution waits for
the model, see `TrainConfig.with_resolution`.
"""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

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
    AdapterSettings,
    DataSettings,
    Group,
    ModelSettings,
    OptimizerSettings,
    OutputSettings,
    PriorSettings,
    RunSettings,
    ScheduleSettings,
    ScoreSettings,
    ValidationSettings,
)

# The embedded model's scores on its model card were measured at 4.
EMBEDDED_GUIDANCE, USUAL_GUIDANCE = 4.0, 7.5
# These do nothing without another setting, so giving one alone is a mistake.
PRIOR_ONLY = ("class_prompt", "class_data_dir", "num_class_images", "prior_loss_weight")
# These too, but `--score_steps 0` may switch off what a file says about scores, so they are only warned about.
SCORES_ONLY = tuple(name for name in ScoreSettings.model_fields if name != "score_steps")
# The rare word of the DreamBooth paper and of nearly every command since.
USUAL_WORD = "sks"


def usual_guidance(is_embedded: bool) -> float:
    """Guidance at which a model draws at its best, as far as is known."""
    return EMBEDDED_GUIDANCE if is_embedded else USUAL_GUIDANCE


GROUPS: dict[str, type[Group]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "prior": PriorSettings,
    "adapter": AdapterSettings,
    "optimizer": OptimizerSettings,
    "schedule": ScheduleSettings,
    "validation": ValidationSettings,
    "scores": ScoreSettings,
    "output": OutputSettings,
    "run": RunSettings,
}


class TrainConfig(Group):
    """All settings of one training; `resolved` fills in those that follow from others."""

    model: ModelSettings
    data: DataSettings
    prior: PriorSettings
    adapter: AdapterSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    validation: ValidationSettings
    scores: ScoreSettings
    output: OutputSettings
    run: RunSettings

    @model_validator(mode="after")
    def _combinations(self) -> TrainConfig:
        """Refuse what is fine alone but not together; the first word of a message is the setting."""
        name, adapter, prior = self.optimizer.optimizer, self.adapter, self.prior
        check_method(adapter, self.optimizer)
        if adapter.orthogonal_to and name != "riemannion":
            raise ValueError(
                f"orthogonal_to is not a setting of {name}, whose steps would leave the directions that are kept; "
                "leave it out, or use --optimizer riemannion"
            )
        if prior.with_prior_preservation and not (prior.class_data_dir and prior.class_prompt):
            missing = "class_prompt" if prior.class_data_dir else "class_data_dir"
            raise ValueError(f"{missing} must be given together with with_prior_preservation")
        given = prior.model_fields_set | adapter.model_fields_set
        given |= {"preview_from_export"} if self.validation.preview_from_export else set()
        for setting, remedy in self.idle().items():
            if setting in given:
                raise ValueError(
                    f"{setting} does nothing here; add {remedy}, or leave --{setting} out"
                )
        if self.data.aspect_buckets and self.data.center_crop:
            raise ValueError(
                "aspect_buckets keeps the aspect of each picture, center_crop cuts it to a square; leave one of "
                "them out"
            )
        self._check_scores()
        check_warmup(self.schedule)
        return self

    def idle(self) -> dict[str, str]:
        """Settings that do nothing because of another one; name to the flag that would change that."""
        found: dict[str, str] = {}
        if not self.prior.with_prior_preservation:
            found |= dict.fromkeys(PRIOR_ONLY, "--with_prior_preservation")
        found |= idle_method(self.adapter, self.optimizer, self.output)
        if not self.validation.validation_prompt:
            found["validation_steps"] = "--validation_prompt"
        if not self.scores.score_steps:
            found |= dict.fromkeys(SCORES_ONLY, "--score_steps")
            if not self.validation.validation_prompt:
                found["preview_from_export"] = "--validation_prompt or --score_steps"
        if not self.output.push_to_hub:
            found["hub_model_id"] = "--push_to_hub"
        return found

    def with_resolution(self, resolution: int) -> TrainConfig:
        """The same settings with the side in pixels that was left to the model."""
        data = self.data.model_copy(update={"resolution": resolution})
        return self.model_copy(update={"data": data})

    def samples_per_step(self, processes: int = 1) -> int:
        """Pictures of the concept that one optimizer step sees."""
        return self.data.train_batch_size * self.schedule.gradient_accumulation_steps * processes

    def picture_values(self, unit: int) -> dict[str, Any]:
        """Arguments of `dreamrie.diffusion.data.ConceptSet` that say how pictures are cut and weighed.

        Args:
            unit: pixels that the model needs the sides of a picture to be multiples of.

        Returns:
            By name.
        """
        data = self.data
        return {
            "center_crop": data.center_crop,
            "random_flip": data.random_flip,
            "bucket_unit": unit if data.aspect_buckets else None,
            "background": data.background_rgb,
            "mask": data.alpha == "mask",
        }

    def task_values(self, processes: int) -> dict[str, Any]:
        """Arguments of `dreamrie.diffusion.task.DreamBoothTask`, beside the model and the pictures."""
        checks = self.validation
        return {
            "batch_size": self.data.train_batch_size,
            "seed": self.schedule.seed,
            "samples_per_step": self.samples_per_step(processes),
            "prior_loss_weight": self.prior.prior_loss_weight,
            "gradient_checkpointing": self.schedule.gradient_checkpointing,
            "validation_prompts": checks.validation_prompt,
            "num_validation_images": checks.num_validation_images,
            "inference_steps": checks.num_inference_steps,
            "guidance_scale": checks.guidance_scale,
            "sample_batch_size": self.prior.sample_batch_size,
            "facts": self.file_facts(),
            "preview_from_export": checks.preview_from_export,
        }

    def file_facts(self) -> dict[str, str]:
        """What the header of the adapter says about settings: hash of those that decide, and the kind of start."""
        return {"config_hash": settings_hash(dict(self)), "init": start_facts(self.adapter)}

    def loop_values(self) -> dict[str, Any]:
        """Arguments of `dreamrie.trainer.LoopSettings`."""
        return {
            "max_steps": self.schedule.max_train_steps,
            "accumulation": self.schedule.gradient_accumulation_steps,
            "scheduler": self.schedule.lr_scheduler,
            "warmup_steps": self.schedule.lr_warmup_steps,
            "max_grad_norm": self.optimizer.max_grad_norm or None,
            "validation_steps": (
                self.validation.validation_steps if self.validation.validation_prompt else None
            ),
            "score_steps": self.scores.score_steps or None,
            "spectrum_steps": self.output.spectrum_steps,
            "seed": self.schedule.seed,
        }

    def compile_values(self, taken: int) -> dict[str, Any]:
        """Arguments of `dreamrie.trainer.compiling.compile_network` about the length of the training.

        Args:
            taken: optimizer steps that are behind it.

        Returns:
            By name.
        """
        schedule = self.schedule
        steps = schedule.max_train_steps - taken
        return {"steps": steps, "micros": schedule.gradient_accumulation_steps}

    @staticmethod
    def default_warmup(steps: int) -> int:
        """Optimizer steps of warm-up for a training of so many steps."""
        return min(20, steps // 10)

    def resolved(self) -> TrainConfig:
        """Fill in every value that follows from others."""
        is_embedded = self.model.pretrained_model_name_or_path is None
        steps = self.schedule.max_train_steps
        follow: dict[str, dict[str, object]] = {
            **follow_method(self.adapter, self.optimizer),
            "schedule": {"lr_warmup_steps": self.default_warmup(steps)},
            "validation": {"guidance_scale": usual_guidance(is_embedded)},
            "scores": self._resolved_scores(is_embedded) if self.scores.score_steps else {},
        }
        return self.model_copy(update=filled(self, follow))

    def _resolved_scores(self, is_embedded: bool) -> dict[str, object]:
        """What the scores are computed with."""
        return {
            "score_prompts": "embedded" if is_embedded else "objects",
            "score_encoders": ["effnet-lite2-64-160", "tiny-clip"]
            if is_embedded
            else ["dino", "clip"],
            "score_inference_steps": 10 if is_embedded else 25,
            "token": self._token(),
            "subject_class": self._words_after_token(),
        }

    def _token(self) -> str:
        """The rare word of the instance prompt."""
        return self.scores.token or USUAL_WORD

    def _words_after_token(self) -> str:
        """What the instance prompt says behind the rare word; "" if that is nothing, or it is not there."""
        words = self.data.instance_prompt.split()
        return " ".join(words[words.index(self._token()) + 1 :]) if self._token() in words else ""

    def _check_scores(self) -> None:
        """Refuse scores that do not know which word to leave out, or what the concept is."""
        if not self.scores.score_steps:
            return
        if self._token() not in self.data.instance_prompt.split():
            raise ValueError(
                f"token {self._token()!r} is not a word of the instance prompt {self.data.instance_prompt!r}; scores "
                "leave the rare word out of their prompts, so name it with --token"
            )
        if not (self.scores.subject_class or self._words_after_token()):
            raise ValueError(
                f"subject_class is needed for scores: nothing stands behind {self._token()!r} in the instance "
                "prompt; name what the concept is, such as dog"
            )
