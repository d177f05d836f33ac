"""Faults of the universal file and of PEFT's folder: another strength, lost names, halves cast as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dreamrie import (
    adapter_container,
    adapter_file,
    adapter_peft,
    adapter_scaling,
    adapter_universal,
)
from dreamrie.adapter_file import DIGEST_KEY
from dreamrie.lora import LowRank
from tests import test_adapter_peft as peft
from tests import test_adapter_universal as universal
from tests.mutants import Law, Mutant
from tests.mutants.adapter_files import digest_that_is_there, faulty, nothing

Tensors = dict[str, Tensor]
Changes = Mapping[str, LowRank]


def stored(change: Callable[[str, Tensor], tuple[str, Tensor]]) -> dict[str, Any]:
    """The file's tensors, each under another name or with another value."""

    def wrong(balanced: Changes, dtype: torch.dtype) -> Tensors:
        return dict(change(name, tensor) for name, tensor in _stored(balanced, dtype).items())

    return {"_stored": wrong}


def alpha_times(factor: float) -> dict[str, Any]:
    return stored(lambda n, t: (n, factor * t if n.endswith(".alpha") else t))


def flipped(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    other = {"_down": "_up", "_up": "_down"}
    part = next((part for part in other if f"lora{part}.weight" in name), None)
    return (name if part is None else name.replace(f"lora{part}", f"lora{other[part]}")), tensor


def as_they_are(changes: Changes) -> dict[str, LowRank]:
    """The naive concatenation: lora_B = [left, -anchor]."""
    return dict(sorted(changes.items()))


def cast_first(changes: Changes) -> dict[str, LowRank]:
    return _balanced({n: LowRank(c.left.half(), c.right.half()) for n, c in changes.items()})


def trained_half(changes: Changes) -> dict[str, LowRank]:
    """X instead of X - X0, for pairs with an anchor."""
    found = {}
    for name, (left, right) in changes.items():
        rank = left.shape[1] // 2 or 1
        found[name] = LowRank(left[:, :rank], right[:rank])
    return _balanced(found)


def one_column_less(changes: Changes) -> dict[str, LowRank]:
    """The smallest singular value of each layer is dropped without a word."""
    cut = {n: LowRank(c.left[:, :-1], c.right[:-1]) for n, c in _balanced(changes).items()}
    return {n: c if c.left.shape[1] else changes[n] for n, c in cut.items()}


def version_as_json(*arguments: Any) -> dict[str, str]:
    return {**_kohya_facts(*arguments), "ss_v2": "true"}


def with_settings(tensors: Tensors, header: Mapping[str, str]) -> bytes:
    return _bytes(
        tensors, {**header, "lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 4}'}
    )


def digest_without(*prefixes: str) -> Callable[..., str]:
    """A digest that leaves some facts out."""

    def wrong(tensors: Tensors, facts: Mapping[str, str]) -> str:
        return _digest(tensors, {k: v for k, v in facts.items() if not k.startswith(prefixes)})

    return wrong


def digests(wrong: Callable[..., str]) -> tuple[tuple[Any, dict[str, Any]], ...]:
    """Writers and reader agree on a wrong digest."""
    owners = (adapter_file, adapter_universal, adapter_container)
    return tuple((owner, {"content_digest": wrong}) for owner in owners)


def any_name(header: Mapping[str, str]) -> dict[str, str]:
    """Spellings are mixed as they come."""
    return {adapter_universal._plain_name(key): value for key, value in header.items()}


def unchecked(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to("cpu", dtype).contiguous()


def settings_without(key: str) -> dict[str, Any]:
    def wrong(*arguments: Any) -> dict[str, Any]:
        return {name: value for name, value in _settings(*arguments).items() if name != key}

    return {"peft_settings": wrong}


def of_file(name: str, law: Law, why: str, **wrong: Any) -> Mutant:
    """A fault of the universal file's writer."""
    return faulty(name, law, why, (adapter_universal, wrong), impl=universal.REAL)


def of_folder(
    name: str, law: Law, why: str, *swaps: tuple[Any, dict[str, Any]], raises: Any = ()
) -> Mutant:
    """A fault of the folder's writer or reader."""
    found = faulty(name, law, why, *swaps, impl=peft.REAL)
    return Mutant(found.name, found.law, found.broken, found.why, raises)


_stored, _balanced = adapter_universal._stored, adapter_universal.balanced_changes
_kohya_facts, _bytes = adapter_universal._kohya_facts, adapter_universal.stable_bytes
_digest, _settings = adapter_file.content_digest, adapter_peft.peft_settings

ALL = universal.law_a4_every_loader_gets_the_whole_change
STOCK = universal.law_a4_stock_diffusers_reads_the_universal_file
HALF = universal.law_a11_half_precision_keeps_the_change
FACT = universal.law_a6_no_fact_of_the_universal_file_can_change
NONE = universal.law_n1_no_broken_universal_file_appears
PEFT, BACK, SETTING = (
    peft.law_a4_peft_reads_the_folder,
    peft.law_a3_the_folder_comes_back,
    peft.law_a6_no_setting_can_change,
)
WRITER, FOLDER = adapter_universal, adapter_peft
READ = universal.REAL

MUTANTS = [
    of_file("alpha half the rank", ALL, "half the strength everywhere", **alpha_times(0.5)),
    of_file("alpha doubled in the universal file", STOCK, "twice the strength", **alpha_times(2.0)),
    of_file("ranks left mixed", ALL, "diffusers takes one alpha for all attention", one_rank=as_they_are),
    of_file("factors under each other's kohya name", ALL, "out is not in", **stored(flipped)),
    of_file("dots kept in kohya's names", ALL, "no loader knows them",
            kohya_name=lambda layer: f"lora_unet_{layer}"),
    of_file("names of two text encoders", ALL, "A1111 knows te, not te1", TEXT_PREFIX="lora_te1_"),
    of_file("text encoder as transformers 5.6 spells it", ALL, "ComfyUI and A1111 want text_model",
            canonical=lambda name: name.replace("text_model.", "")),
    of_file("alphas left out of one group", ALL, "alpha of 1 is taken for the rank",
            **stored(lambda n, t: (n, torch.ones(()) if n.endswith("proj_in.alpha") else t))),
    of_file("ss_v2 as JSON says it", ALL, "the file is hidden", _kohya_facts=version_as_json),
    of_file("smallest singular value lost", ALL, "an error of a hundredth", balanced_changes=one_column_less),
    Mutant("settings beside alphas", STOCK, of_file("", STOCK, "", stable_bytes=with_settings).broken,
           "diffusers refuses the file", raises=(ValueError,)),
    of_file("anchor left out of the universal file", STOCK, "X for X - X0", balanced_changes=trained_half),
    of_file("halves of an anchored adapter cast to fp16 as they are", HALF,
            "they nearly cancel: 1 to 7 % of the change is lost", balanced_changes=as_they_are),
    of_file("cast to fp16 before it is balanced", HALF, "what is lost stays lost", balanced_changes=cast_first),
    faulty("digest of the universal file skipped", FACT, "it is only written",
           (adapter_container, {"content_digest": digest_that_is_there}), impl=READ),
    faulty("digest over dreamrie's group alone", FACT, "ss_v2 changes unseen",
           *digests(digest_without("ss_", "modelspec.")), impl=READ),
    faulty("spellings of the header mixed", FACT, "a renamed fact is taken for the same",
           (adapter_container, {"plain_facts": any_name}), impl=READ),
    of_file("overflow of fp16 written", NONE, "infinity draws black", rounded=unchecked),
    faulty("universal file of no change", NONE, "an adapter that does nothing",
           (adapter_file, {"_refuse_dust": nothing}), impl=READ),
    of_folder("lora_alpha left to PEFT", PEFT, "8 / r is another strength",
              (FOLDER, settings_without("lora_alpha"))),
    of_folder("PEFT's names without their prefix", PEFT, "PEFT loads none of them",
              (FOLDER, {"PEFT_PREFIX": ""}), raises=(UserWarning,)),
    of_folder("alpha of PEFT not divided by the rank", BACK, "r times as strong",
              (adapter_scaling, {"strength_of": lambda stated, path: (stated.rank, 6.0)})),
    of_folder("settings outside the digest", SETTING, "lora_alpha 16 for 160",
              *digests(digest_without(adapter_peft.PEFT_SETTINGS))),
    of_folder("lost settings not missed", SETTING, "the strength is guessed",
              (adapter_container, {"SETTINGS_KEY": DIGEST_KEY[:-1]})),
]  # fmt: skip
