"""Faults of reading text encoders' layers and PEFT's settings by layer."""

from __future__ import annotations

from typing import Any

from dreamrie import (
    adapter_container,
    adapter_names,
    adapter_open,
    adapter_peft,
    adapter_reading,
    adapter_scaling,
    adapter_spelling,
)
from dreamrie.errors import AdapterError
from dreamrie.lora import LoraPair, place
from dreamrie.lora.patterns import StatedStrength
from tests import test_adapter_reading_text as texts
from tests import test_adapter_scaling as scalings
from tests import test_adapter_spelling as spellings
from tests.mutants import Mutant
from tests.mutants.adapter_files import faulty, in_folder

good_place, good_one_name = adapter_spelling.place_in_text_encoder, adapter_spelling.one_name


def as_it_stands(name: str) -> str:
    """Each layout under its own name."""
    return name


def by_its_end(name: str) -> str:
    """Layers of any model that end like CLIP's."""
    found = name.find("encoder.layers.")
    return good_one_name(name if found < 0 else name[found:])


def exact_place(stem: str, layers: Any) -> str | None:
    """The layout of the file must be that of the model."""
    found = good_place(stem, layers)
    return found if stem.removeprefix("text_encoder.") == found else None


def first_place(stem: str, layers: Any) -> str | None:
    """Numbers do not count."""
    found = good_place(stem, layers)
    return None if found is None else min(layers)


def one_after_another(placings: Any, adapter_name: str) -> list[list[LoraPair]]:
    """The first model stays adapted when the second fails."""
    return [
        place.place_lora(placing.model, placing.changes, placing.scalings, adapter_name)
        for placing in placings
    ]


def without_text(placings: Any, adapter_name: str) -> list[list[LoraPair]]:
    """The text encoder's layers are looked over."""
    return [*place.place_together(placings[:1], adapter_name), []][: len(placings)]


def divided_by_rank(stated: StatedStrength, path: str) -> tuple[float, float]:
    rank, _ = stated.of(path)
    alpha = stated.alphas.get(path, stated.alpha)
    return rank, alpha / rank


def without_alphas(stated: StatedStrength, path: str) -> tuple[float, float]:
    return StatedStrength(stated.rank, stated.alpha, stated.ranks, {}, stated.by_root).of(path)


def by_common_rank(stated: StatedStrength, path: str) -> tuple[float, float]:
    """Alpha of a layer over r of the others."""
    rank, scaling = stated.of(path)
    return rank, scaling * (rank / stated.rank) ** (0.5 if stated.by_root else 1.0)


def by_equal_names(stated: StatedStrength, path: str) -> tuple[float, float]:
    """Patterns are not matched but compared."""
    rank, _ = stated.of(path)
    alpha = stated.alphas.get(path, stated.alpha)
    return rank, alpha / (rank**0.5 if stated.by_root else rank)


def last_pattern(stated: StatedStrength, path: str) -> tuple[float, float]:
    """Of several that fit, PEFT takes the first."""
    turned = dict(reversed(list(stated.alphas.items())))
    return StatedStrength(stated.rank, stated.alpha, stated.ranks, turned, stated.by_root).of(path)


def sorted_everywhere(settings: Any) -> str:
    return adapter_peft.json.dumps(settings, sort_keys=True)


def case(name: str) -> Any:
    return in_folder(scalings.law_settings_of_peft_count_as_in_peft, name)


def file_of(how: str) -> Any:
    return in_folder(texts.law_a_file_fits_both_layouts, how)


def spelled(how: str) -> Any:
    return in_folder(texts.law_every_spelling_is_one_change, how)


NAMES, PLACE = (
    spellings.law_both_layouts_have_one_name,
    spellings.law_a_stem_finds_its_place_in_either_layout,
)
TOGETHER = in_folder(texts.law_a_failure_in_the_second_model_undoes_the_first)


def of_text(name: str, law: Any, why: str, *swaps: Any, raises: Any = ()) -> Mutant:
    """A mutant of reading text encoders."""
    found = faulty(name, law, why, *swaps, impl=texts.REAL)
    return Mutant(found.name, found.law, found.broken, found.why, raises)


def stated(name: str, law: Any, why: str, wrong: Any) -> Mutant:
    """A mutant of the strength of a layer."""
    return faulty(name, law, why, (adapter_scaling, {"strength_of": wrong}), impl=scalings.REAL)


MUTANTS = [
    faulty("text layers under two names", NAMES, "one layer, two changes",
           (adapter_spelling, {"one_name": as_it_stands}), impl=spellings.REAL),
    faulty("any encoder is CLIP", NAMES, "another model's layer is renamed",
           (adapter_spelling, {"one_name": by_its_end}), impl=spellings.REAL),
    faulty("text layers in the layout of the file alone", PLACE, "transformers 5.6 took a level away",
           (adapter_spelling, {"place_in_text_encoder": exact_place}), impl=spellings.REAL),
    faulty("text layers of another number", PLACE, "numbers count",
           (adapter_spelling, {"place_in_text_encoder": first_place}), impl=spellings.REAL),
    of_text("files of one layout alone", file_of("text_model"), "no layer is found",
            (adapter_names, {"place_in_text_encoder": exact_place}), raises=(AdapterError,)),
    of_text("text encoder left as it was", file_of("kohya"), "half of the adapter",
            (adapter_reading, {"place_together": without_text})),
    of_text("flattened names as they stand", spelled("flattened"), "universal files would differ by transformers",
            (adapter_open, {"one_name": as_it_stands})),
    of_text("models adapted one after another", TOGETHER, "the U-Net keeps half an adapter",
            (adapter_reading, {"place_together": one_after_another})),
    stated("rank-stabilized divided by the rank", case("root"), "sqrt(r) times too weak", divided_by_rank),
    stated("alpha_pattern looked over", case("alphas"), "another strength by layer", without_alphas),
    stated("alpha over the common rank", case("ranks"), "r of the layer counts", by_common_rank),
    stated("patterns compared, not matched", case("alphas"), "narrow is deep.narrow", by_equal_names),
    stated("the last pattern that fits", case("order"), "PEFT takes the first", last_pattern),
    faulty("patterns in the order of the alphabet", case("order"), "the first that fits counts",
           (adapter_container, {"settled": sorted_everywhere}), impl=scalings.REAL),
]  # fmt: skip
