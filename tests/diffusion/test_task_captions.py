"""Captions reach the loss: each row of a batch has the text of its own picture."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from dreamrie.config import parse_config
from dreamrie.diffusion import task as task_module
from dreamrie.diffusion.pipeline import encode_prompts
from dreamrie.diffusion.prepare import run_facts
from tests.diffusion.test_task import make_task
from tests.small_models import write_pictures
from tests.small_settings import NEEDED


def captioned(folder: Path) -> dict[str, str]:
    """Three pictures with three captions; name to caption."""
    names = [path.name for path in write_pictures(folder, 3)]
    places = ("on grass", "at night", "in a house")
    found = {
        name: f"a photo of a sks dog {place}" for name, place in zip(names, places, strict=True)
    }
    rows = [{"file_name": name, "text": text} for name, text in found.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return found


def law_each_row_has_the_text_of_its_own_picture(impl: Any) -> None:
    """Whatever the order of an epoch, and for class pictures their own prompt, to 1e-6."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "concept"
        wanted = captioned(folder)
        task = make_task(impl, folder=folder)
        texts = dict(
            zip(wanted, encode_prompts(task.components, list(wanted.values())), strict=True)
        )
        (of_class,) = encode_prompts(task.components, ["a photo of a dog"])
        first, second, _ = texts.values()
        assert float((first - second).abs().max()) > 1e-3
        seen = set()
        for step in range(1, 5):
            batch = task.batch(step, 0)
            for row, name in enumerate(batch.names[:2]):
                torch.testing.assert_close(batch.text[row], texts[name], rtol=0, atol=1e-5)
                seen.add(name)
            for row in (2, 3):
                torch.testing.assert_close(batch.text[row], of_class, rtol=0, atol=1e-5)
        assert seen == set(wanted)


def test_each_row_has_the_text_of_its_own_picture() -> None:
    law_each_row_has_the_text_of_its_own_picture(task_module)


def test_captions_are_recorded_with_the_run(tmp_path: Path) -> None:
    """run.json holds them; without captions it says so."""
    config = parse_config(NEEDED)
    wanted = captioned(tmp_path / "concept")
    assert run_facts(config, make_task(folder=tmp_path / "concept"))["captions"] == wanted
    assert run_facts(config, make_task())["captions"] is None
