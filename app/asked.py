"""What a user may ask for, checked on the server: what the page would not let through may come all the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from app import names
from dreamrie.errors import DreamrieError

MOST_ADAPTERS = 4
LARGEST_SEED = 2**32 - 1
_ADAPTER = re.compile(r"(?:example|run|upload):[a-z0-9][a-z0-9_-]{0,39}(?:@[0-9]{1,7})?")
# Control characters, halves of pairs, line and paragraph separators, code points that mean nothing.
_UNWANTED = frozenset({"Cc", "Cs", "Zl", "Zp", "Cn"})
# These turn the direction of the text around them.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_LONGEST_QUOTE = 40


class AskError(DreamrieError):
    """Something that cannot be asked for; one readable line for each wrong value."""


@dataclass(frozen=True)
class Limits:
    """What the model and the machine allow.

    Attributes:
        sizes: sides of a picture in pixels.
        max_pixels: width times height.
    """

    sizes: tuple[int, ...]
    max_pixels: int


def _clean(text: str) -> str:
    if any(unicodedata.category(c) in _UNWANTED or c in _TURNING for c in text):
        raise PydanticCustomError("unclean", "")
    return text


def _said(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "")
    return _clean(text)


def _adapter_id(text: str) -> str:
    if not _ADAPTER.fullmatch(text):
        raise PydanticCustomError("off_list", "")
    return text


def _folder(text: str) -> str:
    if not names.is_folder_name(text):
        raise PydanticCustomError("off_list", "")
    return text


def _side(value: int, info: ValidationInfo) -> int:
    limits = cast(Limits, info.context)
    if value not in limits.sizes:
        raise PydanticCustomError("off_list", "")
    return value


_Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
_Side = Annotated[int, AfterValidator(_side)]


class _Asked(BaseModel):
    """No number is read from text, no text from a number; what is not known is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class AdapterChoice(_Asked):
    """An adapter in a picture.

    Attributes:
        id: see `app.gallery.Entry`.
        scale: 1 is as trained.
        rank: to which every layer is cut; None: as it is.
    """

    id: Annotated[str, AfterValidator(_adapter_id)]
    scale: Annotated[float, Field(ge=-2, le=2)] = 1.0
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None


class Generate(_Asked):
    """Pictures to draw.

    Attributes:
        prompt: what they show.
        negative_prompt: what they do not show.
        adapters: each once.
        steps: of denoising.
        guidance: weight of the prompt.
        width: in pixels.
        height: in pixels.
        seed: of the first picture; None: any.
        count: how many.
    """

    prompt: Annotated[str, Field(max_length=1000), AfterValidator(_said)]
    negative_prompt: Annotated[str, Field(max_length=1000), AfterValidator(_clean)] = ""
    adapters: Annotated[list[AdapterChoice], Field(max_length=MOST_ADAPTERS)] = Field(
        default_factory=list
    )
    steps: Annotated[int, Field(ge=1, le=100)]
    guidance: Annotated[float, Field(ge=0, le=30)]
    width: _Side
    height: _Side
    seed: _Seed | None = None
    count: Annotated[int, Field(ge=1, le=8)] = 1

    @model_validator(mode="after")
    def _together(self, info: ValidationInfo) -> Generate:
        """What is fine alone but not together."""
        ids = [choice.id for choice in self.adapters]
        if len(set(ids)) < len(ids):
            raise PydanticCustomError(
                "twice", "adapters: one was chosen twice; each is allowed once."
            )
        limits = cast(Limits, info.context)
        if self.width * self.height > limits.max_pixels:
            raise PydanticCustomError(
                "too_large",
                "width and height: {width} x {height} was given; at most {most} pixels are allowed in all.",
                {"width": self.width, "height": self.height, "most": limits.max_pixels},
            )
        return self


class Train(_Asked):
    """A concept to learn.

    Attributes:
        title: for people.
        subject: class word or words, such as "dog".
        living: people or animals, for the prompts of the scores.
        photos: folder of the storage.
        steps: of training.
        rank: of the adapter.
        learning_rate: of the optimizer.
        seed: of the run.
        prior: pictures of the class keep the model from forgetting it.
    """

    title: Annotated[str, Field(max_length=60), AfterValidator(_said)]
    subject: Annotated[str, Field(max_length=40), AfterValidator(_said)]
    living: bool
    photos: Annotated[str, AfterValidator(_folder)]
    steps: Annotated[int, Field(ge=10, le=5000)]
    rank: Annotated[int, Field(ge=1, le=64)]
    learning_rate: Annotated[float, Field(ge=1e-6, le=1)]
    seed: _Seed
    prior: bool = False


_TEXT = "text without line breaks or other control characters, "
_ALLOWED = {
    "prompt": f"{_TEXT}1 to 1000 characters, is allowed",
    "negative_prompt": f"{_TEXT}at most 1000 characters, is allowed",
    "adapters": f"a list of at most {MOST_ADAPTERS} different adapters is allowed",
    "id": "an adapter of the gallery is allowed",
    "scale": "a number from -2 to 2 is allowed",
    "guidance": "a number from 0 to 30 is allowed",
    "seed": f"a whole number from 0 to {LARGEST_SEED}, or nothing, is allowed",
    "count": "a whole number from 1 to 8 is allowed",
    "title": f"{_TEXT}1 to 60 characters, is allowed",
    "subject": f"{_TEXT}1 to 40 characters, is allowed",
    "living": "yes or no is allowed",
    "prior": "yes or no is allowed",
    "photos": "a set of photos of your own is allowed",
    "learning_rate": "a number from 0.000001 to 1 is allowed",
}
_STEPS = {"Generate": (1, 100), "Train": (10, 5000)}
_RANKS = {"Generate": (1, 1024), "Train": (1, 64)}
_Model = TypeVar("_Model", Generate, Train)


def asked(model: type[_Model], values: Mapping[str, Any], limits: Limits) -> _Model:
    """Check what somebody asks for.

    Args:
        model: `Generate` or `Train`.
        values: by name, as they came from outside.
        limits: of the present model.

    Returns:
        The model; no value was converted, but whole numbers where any number is allowed.

    Raises:
        AskError: some values are wrong; it has one line for each.
    """
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise AskError("what was asked for could not be read. Reload the page.")
    try:
        return model.model_validate(dict(values), context=limits)
    except ValidationError as error:
        lines = [_sentence(model, row, limits) for row in error.errors(include_url=False)]
        raise AskError("\n".join(dict.fromkeys(lines))) from error


def _sentence(model: type[BaseModel], row: ErrorDetails, limits: Limits) -> str:
    """One wrong value: its name, what was given, what is allowed."""
    if not row["loc"]:
        return str(row["msg"])
    # "adapters, number 2, scale"; pydantic also names the members of unions, which are nobody's business.
    words = [
        f"number {part + 1}" if isinstance(part, int) else _quoted(part, quotes=False)
        for part in row["loc"]
    ]
    place, last = ", ".join(words), row["loc"][-1]
    if row["type"] == "extra_forbidden":
        return f"{place}: there is no such setting."
    if row["type"] == "missing":
        return f"{place}: nothing was given; {_allowed(model, last, limits)}."
    return f"{place}: {_quoted(row['input'])} was given; {_allowed(model, last, limits)}."


def _allowed(model: type[BaseModel], name: int | str, limits: Limits) -> str:
    if name in {"width", "height"}:
        return f"one of {', '.join(map(str, limits.sizes))} is allowed"
    if isinstance(name, int):
        return "an adapter with its strength and rank is allowed"
    if name in {"steps", "rank"}:
        low, high = (_STEPS if name == "steps" else _RANKS)[model.__name__]
        return f"a whole number from {low} to {high} is allowed"
    return _ALLOWED[name]


def _quoted(value: object, *, quotes: bool = True) -> str:
    """What was given, short and harmless: whatever it is, it is shown to somebody."""
    if isinstance(value, str):
        cut = value if len(value) <= _LONGEST_QUOTE else f"{value[:_LONGEST_QUOTE]}..."
        shown = "".join(c if c.isprintable() else "?" for c in cut)
        return f'"{shown}"' if quotes else shown
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**15 else "a huge number"
    if isinstance(value, float):
        return f"{value:g}"
    kinds = {"list": "a list", "tuple": "a list", "dict": "a table"}
    kind = kinds.get(type(value).__name__, "something else")
    size = f" of {len(value)}" if isinstance(value, list) else ""
    return kind + size
