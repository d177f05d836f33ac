"""Wrong captions: the first for all, the instance prompt for all, by place in the batch instead of by picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dreamrie.diffusion.task import DreamBoothTask
from tests.diffusion.test_task_captions import law_each_row_has_the_text_of_its_own_picture
from tests.mutants import Mutant, instead


class FirstCaption(DreamBoothTask):
    def _row(self, stream: str, kind: int, position: int) -> Any:
        row = super()._row(stream, kind, position)
        return (*row[:4], row[4] if kind else 0, *row[5:])


class ByPlace(DreamBoothTask):
    def _row(self, stream: str, kind: int, position: int) -> Any:
        row = super()._row(stream, kind, position)
        return (*row[:4], row[4] if kind else position % len(self.concept.instance), *row[5:])


class CaptionForTheClassToo(DreamBoothTask):
    def _row(self, stream: str, kind: int, position: int) -> Any:
        row = super()._row(stream, kind, position)
        return (*row[:4], 0 if kind else row[4], *row[5:])


def _mutant(name: str, task: type[DreamBoothTask], why: str) -> Mutant:
    return Mutant(
        name,
        law_each_row_has_the_text_of_its_own_picture,
        lambda: instead(SimpleNamespace(DreamBoothTask=task)),
        why,
    )


MUTANTS = [
    _mutant("the first caption for every picture", FirstCaption, "the others are never learned"),
    _mutant("captions by place in the stream", ByPlace, "an epoch is a permutation"),
    _mutant("a caption for class pictures", CaptionForTheClassToo, "the class has its own prompt"),
]
