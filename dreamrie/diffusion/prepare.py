"""Before a training: check what needs the model, get the class pictures, say what the run would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamrie.config import TrainConfig, to_yaml
from dreamrie.diffusion.pipeline import Components, check_prompt
from dreamrie.diffusion.prior import ensure_class_images, own_class_images
from dreamrie.diffusion.task import DreamBoothTask, check_resolution
from dreamrie.optimizers import describe_optimizer, trained_numbers
from dreamrie.publishing.hub import check_hub
from dreamrie.run_folder import folder_for_older_run


def check_request(components: Components, config: TrainConfig) -> int:
    """Check resolution and prompts against the model, and the way to the Hub, before minutes are spent on pictures.

    Args:
        components: the model.
        config: settings of the run.

    Returns:
        Side of the training pictures in pixels: as given, else the model's own.

    Raises:
        ConfigError: the U-Net cannot take the resolution, or the text encoder a prompt; or the result is to be pushed
            to the Hub and cannot be.
    """
    resolution = config.data.resolution or components.resolution
    check_resolution(components, resolution)
    check_hub(config.output)
    if config.prior.with_prior_preservation:  # without, the task checks them a moment later
        prompts = [("--instance_prompt", config.data.instance_prompt)]
        prompts += [("--class_prompt", config.prior.class_prompt or "")]
        prompts += [("--validation_prompt", text) for text in config.validation.validation_prompt]
        for flag, prompt in prompts:
            check_prompt(components.tokenizer, prompt, flag)
    return resolution


def class_pictures(components: Components, config: TrainConfig) -> list[Path]:
    """Pictures of the class for prior preservation; a dry run makes none.

    Args:
        components: the model, its U-Net with adapters attached.
        config: settings of the run.

    Returns:
        Their paths; none without prior preservation.

    Raises:
        ConfigError: the folder cannot hold pictures.
    """
    prior, folder = config.prior, config.prior.class_data_dir
    if not prior.with_prior_preservation or folder is None:
        return []
    if config.run.dry_run:
        return own_class_images(folder)[: prior.num_class_images]
    # A start without change is zero but for rounding, and other runs use these pictures too.
    components.unet.disable_adapters()
    try:
        return ensure_class_images(
            components,
            prior.class_prompt or "",
            folder,
            prior.num_class_images,
            seed=config.schedule.seed,
            batch_size=prior.sample_batch_size,
        )
    finally:
        components.unet.enable_adapters()


def run_facts(config: TrainConfig, task: DreamBoothTask) -> dict[str, Any]:
    """What decides the result beside the settings: model, method, pictures.

    Args:
        config: settings of the run.
        task: ready to train.

    Returns:
        For `RunLog.manifest`.
    """
    sets = zip(("concept", "class"), task.concept.sets, strict=False)
    own = task.concept.instance
    captions = dict(zip((path.name for path in own.paths), own.prompts, strict=True))
    return {
        "base_model": vars(task.components.source),
        "prediction_type": task.components.prediction_type,
        "optimizer": describe_optimizer(config.optimizer.optimizer, task.pairs),
        "pictures": {kind: [path.name for path in pictures.paths] for kind, pictures in sets},
        "captions": captions if set(own.prompts) != {own.prompt} else None,
    }


def missing_for_scores(package: str) -> str:
    """Message about scores without their networks.

    Args:
        package: what could not be imported.

    Returns:
        What is missing, and what to do.
    """
    return (
        f"scores need {package}, which is not installed\n"
        "  where: --score_steps\n"
        '  what to do: pip install -e ".[eval]" in the checkout and run from there, or leave --score_steps out'
    )


def explain(config: TrainConfig, task: DreamBoothTask) -> str:
    """Say what a run with these settings would do.

    Args:
        config: settings of the run.
        task: made from them in a dry run.

    Returns:
        YAML that is itself a valid --config, with remarks.
    """
    components, pictures = task.components, len(task.concept.instance)
    steps, samples = config.schedule.max_train_steps, config.samples_per_step()
    name, folder = config.optimizer.optimizer, config.output.output_dir
    numbers = trained_numbers(name, task.pairs)
    lines = [f"  {pair.name} ({pair.out} x {pair.in_}), rank {pair.rank}" for pair in task.pairs]
    lines += [
        f"base model: {components.source.resolved}, {components.prediction_type}",
        f"adapters: {len(task.pairs)} layers, {numbers:,} trainable parameters",
        f"optimizer: {describe_optimizer(name, task.pairs)}",
        f"pictures: {pictures}, all readable, used at {_explain_sizes(config, task)}",
        f"transparency: {_explain_alpha(config, task)}",
        *[
            f"caption: {text}"
            for text in task.concept.instance.prompts
            if text != config.data.instance_prompt
        ],
        f"prior preservation: {_explain_prior(config, task)}",
        f"scores: {_explain_scores(config)}",
        f"length: {steps} steps of {samples} pictures = {steps * samples / pictures:.1f} epochs",
    ]
    older = folder_for_older_run(folder)
    if config.run.resume_from_checkpoint:
        lines.append(f"goes on from {config.run.resume_from_checkpoint} in {folder}")
    elif older is not None:
        lines.append(f"{folder} holds an older run, which would be moved to {older}")
    return to_yaml(config) + "\n" + "\n".join(f"# {line}" for line in lines)


def _explain_sizes(config: TrainConfig, task: DreamBoothTask) -> str:
    """The sizes of the concept's pictures in words."""
    if not config.data.aspect_buckets:
        return f"{task.concept.resolution} px"
    sizes = task.concept.instance.sizes().items()
    return ", ".join(f"{width} x {height} px ({count})" for (height, width), count in sizes)


def _explain_alpha(config: TrainConfig, task: DreamBoothTask) -> str:
    """What becomes of transparent parts, in words."""
    own, data = task.concept.instance, config.data
    if not own.transparent:
        return "none"
    counted = "learned as" if data.alpha == "background" else "not counted in the loss, shown as"
    return f"{len(own.transparent)} of {len(own)} pictures, {counted} {data.background_color}"


def _explain_scores(config: TrainConfig) -> str:
    """The scores on the way in words."""
    scores = config.scores
    if not scores.score_steps:
        return "off"
    return (
        f"every {scores.score_steps} steps, {scores.score_images} pictures of the set {scores.score_prompts}, with "
        f"{' and '.join(scores.score_encoders or [])}; the best adapter goes to {config.output.output_dir / 'best'}"
    )


def _explain_prior(config: TrainConfig, task: DreamBoothTask) -> str:
    """The class pictures of a dry run in words."""
    prior = config.prior
    if not prior.with_prior_preservation:
        return "off"
    own = 0 if task.concept.prior is None else len(task.concept.prior)
    return (
        f"{own} own class pictures in {prior.class_data_dir}, {prior.num_class_images - own} more "
        f"made by the base model for {prior.class_prompt!r} (those of an earlier run are used again)"
    )
