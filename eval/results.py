"""What `python -m eval run` leaves in scores.json, and how it is read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamrie.errors import ConfigError
from dreamrie.files import write_atomic
from eval.scoring import Score

FORMAT = 1
FILE = "scores.json"
PICTURES = "pictures"


@dataclass(frozen=True)
class Picture:
    """One generated picture.

    Attributes:
        file: name inside the folder of pictures. prompt: what the model was asked for.
        text: the same without the rare token, as text similarity reads it.
        seed: of its noise.
        kind: "concept", or "drift" and "drift-base" for an unrelated prompt with and without adapter.
    """

    file: str
    prompt: str
    text: str
    seed: int
    kind: str


@dataclass(frozen=True)
class Result:
    """Everything about one scored run.

    Attributes:
        protocol: whatever decides the pictures: base model, adapter and its hash, token, class, prompt set and its
            hash, sampler, steps, guidance, size, first seed, pictures per prompt.
        reference: folder of real pictures. pictures: in order. scores: see `Score`.
        folder: where it was read from or is to be written.
    """

    folder: Path
    protocol: Mapping[str, Any]
    reference: str
    pictures: tuple[Picture, ...]
    scores: tuple[Score, ...]


def save_result(result: Result) -> Path:
    """Write `scores.json` into the folder of a result, whole or not at all.

    Args:
        result: what to write.

    Returns:
        Path of the file.
    """
    content = {
        "format": FORMAT,
        "protocol": dict(result.protocol),
        "reference": result.reference,
        "pictures": [dataclasses.asdict(picture) for picture in result.pictures],
        "scores": [dataclasses.asdict(score) for score in result.scores],
    }
    path = result.folder / FILE
    write_atomic(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def load_result(folder: Path) -> Result:
    """Read the result of a run.

    Args:
        folder: output folder of `python -m eval run`.

    Returns:
        The result.

    Raises:
        ConfigError: there is none, or the file is damaged or of another format.
    """
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no {FILE}: it is not a finished run. Finish it with python -m eval run, same command."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ConfigError(
                f"{path} has format {content['format']!r}; this version reads {FORMAT}."
            )
        scores = [
            Score(**{**row, "interval": row["interval"] and tuple(row["interval"])})
            for row in content["scores"]
        ]
        pictures = [Picture(**row) for row in content["pictures"]]
        return Result(
            folder, content["protocol"], content["reference"], tuple(pictures), tuple(scores)
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}). Run python -m eval run again.") from error
