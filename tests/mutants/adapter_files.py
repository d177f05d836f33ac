"""Faults of writing and reading adapter files: checks left out, half a load, an old file overwritten in place."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamrie import adapter_container, adapter_file, adapter_names, adapter_reading
from dreamrie.adapter_file import DIGEST_KEY
from dreamrie.errors import AdapterError
from dreamrie.lora import LoraPair, fingerprint, lora_pairs, place
from tests import test_adapter_container as containers
from tests import test_adapter_names as names
from tests import test_adapter_reading as reading
from tests.fuzz import test_mutated_adapters as fuzz
from tests.lora import test_fingerprint as prints
from tests.mutants import Law, Mutant, each, instead, replaced
from tests.small_adapters import TARGETS


def faulty(
    name: str, law: Law, why: str, *swaps: tuple[Any, dict[str, Any]], impl: Any = reading.REAL
) -> Mutant:
    """A mutant with attributes of some modules replaced; the law calls `impl`, which looks them up."""

    @contextlib.contextmanager
    def broken() -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            for owner, wrong in swaps:
                stack.enter_context(replaced(owner, **wrong))
            yield impl

    return Mutant(name=name, law=law, broken=broken, why=why)


def printing(name: str, law: Law, why: str, **wrong: Any) -> Mutant:
    """A mutant of the fingerprint."""
    return Mutant(name, law, lambda: replaced(fingerprint, **wrong), why)


def in_folder(law: Callable[..., Any], *arguments: Any) -> Law:
    """`law(impl, *arguments, folder)` as `law(impl)`, in an empty folder."""

    @functools.wraps(law)
    def run(impl: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            law(impl, *arguments, Path(folder))

    return run


# ------------------------------------------------------------------------------------------------------ wrong parts


def digest_of_names(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    known = [sorted(tensors), sorted({*facts} - {DIGEST_KEY})]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def digest_of_tensors(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    return _digest(tensors, {})


def digest_of_facts(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    return _digest({}, facts)


def digest_of_sums(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    """Values added up: a last bit is lost."""
    sums = {name: tensor.double().abs().sum()[None].float() for name, tensor in tensors.items()}
    return _digest(sums, facts)


def digest_that_is_there(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    return facts.get(DIGEST_KEY, "")


def whole_layers_only(container: Any, *models: Any) -> Any:
    """Layers that lack a factor are left out, as if they had never been trained."""
    stems = [name.rsplit(".lora_", 1)[0] for name in container.entries]
    whole = {
        name: entry
        for name, entry in container.entries.items()
        if stems.count(name.rsplit(".lora_", 1)[0]) > 1
    }
    return _arrange(dataclasses.replace(container, entries=whole), *models)


def all_but_one(placings: list[Any], adapter_name: str) -> list[list[LoraPair]]:
    short = [
        dataclasses.replace(placing, changes=dict(list(placing.changes.items())[1:]))
        for placing in placings
    ]
    return _place(short, adapter_name)


def from_the_callers_stream(model: nn.Module, seed: int) -> Any:
    return contextlib.nullcontext()


def scaling_one(container: Any, places: Any, tensors: Any) -> Any:
    found, unknown = _scalings(container, places, tensors)
    return dict.fromkeys(found, 1.0), unknown


def alpha_for_scaling(container: Any, places: Any, tensors: Any) -> Any:
    found, unknown = _scalings(container, places, tensors)
    ranks = {layer: container.entries[down].shape[0] for layer, (_, down) in places.factors.items()}
    return {layer: scaling * ranks[layer] for layer, scaling in found.items()}, unknown


def no_words(container: Any, places: Any, tensors: Any) -> Any:
    return _scalings(container, places, tensors)[0], ()


def in_place(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def exact_digests(model: nn.Module) -> dict[str, str]:
    return dict.fromkeys(("float16", "bfloat16"), fingerprint.base_fingerprint(model))


def digests_of_adapted(model: nn.Module) -> dict[str, str]:
    """Only the layers that LoRA usually sits on."""
    kept = {n: t for n, t in fingerprint.base_tensors(model).items() if "mix" in n}
    return fingerprint._rounded(kept)


def rounded_twice(tensors: dict[str, Tensor]) -> dict[str, str]:
    """bf16 by way of fp16: not what a load in bf16 does."""
    return _rounded({name: tensor.half().float() for name, tensor in tensors.items()})


def naive_reader(model: Any, path: Path, **options: Any) -> Any:
    """What loads is taken as it is."""
    tensors = {name.removeprefix("unet."): tensor for name, tensor in load_file(path).items()}
    inject_adapter_in_model(LoraConfig(r=6, lora_alpha=6, target_modules=TARGETS), model)
    set_peft_model_state_dict(model, tensors)
    return SimpleNamespace(pairs=lora_pairs(model), facts={}, unchecked=())


def library_reader(model: Any, path: Path, **options: Any) -> Any:
    """The same, with every failure of the libraries under our name."""
    try:
        return naive_reader(model, path)
    except Exception as error:
        raise AdapterError(str(error)) from error


def nothing(*arguments: Any, **options: Any) -> None:
    return None


def no_layout(path: Path, entries: Any, space: int) -> None:
    """A plain reader looks at what the table names, and at nothing else."""


_digest = adapter_file.content_digest
_arrange, _scalings = adapter_reading.arrange, adapter_reading.foreign_scalings
_place, _rounded = adapter_reading.place_together, fingerprint._rounded

FIT = each(reading.law_a6_what_does_not_fit_is_refused, reading.STRUCTURE)
CHANGED = each(reading.law_a6_any_change_breaks_the_digest, reading.CHANGES)
BYTES = each(containers.law_a6_each_byte_of_the_file_counts, containers.BYTES)
FOREIGN = in_folder(names.law_a4_foreign_spellings_are_read, "kohya")
BARE = in_folder(names.law_a4_foreign_spellings_are_read, "PEFT")
DAMAGED = in_folder(fuzz.law_f1_identical_or_refused, 150)
AS_IT_STANDS = in_folder(fuzz.law_f1_foreign_files_load_as_they_stand, 150)
LOST, BASE = reading.law_a6_lost_layers_are_named, reading.law_a6_another_base_is_refused
UNDONE, OLD = (
    reading.law_a6_a_failure_inside_leaves_nothing,
    reading.law_a7_saving_never_writes_into_the_old_file,
)
WHOLE = reading.law_a3_loaded_is_the_trained_model
SAME, OTHER = (
    prints.law_a6_fingerprint_survives_the_precision,
    prints.law_a6_fingerprint_sees_other_weights,
)


def digests(wrong: Callable[..., str]) -> tuple[tuple[Any, dict[str, Any]], ...]:
    """Writer and reader agree on a wrong digest."""
    return (adapter_file, {"content_digest": wrong}), (adapter_container, {"content_digest": wrong})


READER = adapter_reading
MUTANTS = [
    faulty(
        "digest skipped", CHANGED, "it is only written",
        (adapter_container, {"content_digest": digest_that_is_there}),
    ),
    faulty("digest over names only", CHANGED, "values change unseen", *digests(digest_of_names)),
    faulty("digest ignoring metadata", CHANGED, "prompt and base change unseen", *digests(digest_of_tensors)),
    faulty("digest ignoring tensors", CHANGED, "values change unseen", *digests(digest_of_facts)),
    faulty("digest over sums", CHANGED, "a bit, or two values swapped", *digests(digest_of_sums)),
    faulty("extra keys ignored", FIT, "part of the file is not loaded", (adapter_names, {"_refuse_strange": nothing})),
    faulty("partial load", FIT, "layers with one factor are dropped", (READER, {"arrange": whole_layers_only})),
    faulty("lost layers not missed", LOST, "all that is left fits", (READER, {"check_layers": nothing})),
    faulty("NaN check skipped", FIT, "black pictures", (READER, {"_check_finite": nothing})),
    faulty("shapes left to PEFT", FIT, "no tensor is named", (READER, {"_check_shapes": nothing})),
    faulty("base fingerprint skipped", BASE, "pictures that are nobody's", (READER, {"_check_base": lambda *a: ()})),
    faulty(
        "fingerprint of the adapted layers alone", BASE, "the rest of the base is another",
        (READER, {"rounded_fingerprints": digests_of_adapted}),
        (adapter_file, {"rounded_fingerprints": digests_of_adapted}),
    ),
    faulty(
        "trailing bytes ignored", BYTES, "what is it that follows?",
        (adapter_container, {"_check_layout": no_layout}), impl=containers.REAL,
    ),
    faulty("in-place overwrite at save", OLD, "a crash leaves half a file", (adapter_file, {"write_atomic": in_place})),
    faulty("failure leaves layers adapted", UNDONE, "a half-loaded model", (place, {"put_back": nothing})),
    faulty("one layer not placed", WHOLE, "a weaker picture", (READER, {"place_together": all_but_one})),
    faulty("load draws random numbers", WHOLE, "the next run differs", (place, {"seeded": from_the_callers_stream})),
    faulty("alpha of a foreign file ignored", FOREIGN, "wrong strength", (READER, {"foreign_scalings": scaling_one})),
    faulty("alpha not divided by the rank", FOREIGN, "r times", (READER, {"foreign_scalings": alpha_for_scaling})),
    faulty("unknown strength not said", BARE, "a guess in silence", (READER, {"foreign_scalings": no_words})),
    printing("fingerprint of bytes", SAME, "no load in fp16 fits", rounded_fingerprints=exact_digests),
    printing("bf16 fingerprint by way of fp16", SAME, "ties round twice", _rounded=rounded_twice),
    printing("fingerprint of some layers", OTHER, "a changed norm", rounded_fingerprints=digests_of_adapted),
    Mutant("naive reader", DAMAGED, lambda: instead(SimpleNamespace(load_adapter=naive_reader)), "PEFT as it is"),
    Mutant("libraries' checks", DAMAGED, lambda: instead(SimpleNamespace(load_adapter=library_reader)), "no digest"),
    faulty(
        "misspelt layers dropped", AS_IT_STANDS, "a partial load",
        (READER, {"arrange": whole_layers_only}), (adapter_names, {"_refuse_strange": nothing}),
    ),
]  # fmt: skip
