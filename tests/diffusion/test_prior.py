"""D6: class pictures are counted, checked, and exactly what is missing is made."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamrie.diffusion import prior
from dreamrie.errors import ConfigError, ImageError
from tests.small_models import small_components, write_pictures


class Counting:
    """Stands in for the module; counts the pictures that are drawn."""

    def __init__(self, impl: Any) -> None:
        self.impl, self.made = impl, 0

    def __call__(self, directory: Path, count: int, prompt: str = "a dog", **options: Any) -> Any:
        """Ensure pictures and return (paths, how many were drawn)."""
        self.made = 0
        draw = self.impl.sample

        def counted(parts: Any, prompts: list[str], seeds: list[int], **rest: Any) -> Any:
            self.made += len(prompts)
            return draw(parts, prompts, seeds, **rest)

        self.impl.sample = counted
        try:
            parts = options.pop("parts", None) or small_components("tiny-vae")
            paths = self.impl.ensure_class_images(
                parts, prompt, directory, count, steps=1, **options
            )
        finally:
            self.impl.sample = draw
        return paths, self.made


def law_exactly_the_missing_are_made(impl: Any) -> None:
    """With k of n there, n - k are drawn; a lost or damaged one comes back the same."""
    ensure = Counting(impl)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        paths, made = ensure(directory, 3)
        assert (len(paths), made) == (3, 3)
        contents = [path.read_bytes() for path in paths]
        assert len(set(contents)) == 3
        assert ensure(directory, 3) == (paths, 0)
        assert [path.read_bytes() for path in paths] == contents
        more, made = ensure(directory, 5)
        assert (len(more), made) == (5, 2)
        assert more[:3] == paths
        paths[1].unlink()
        paths[2].write_bytes(contents[2][: len(contents[2]) // 2])
        drawn = [np.asarray(Image.open(io.BytesIO(content)), dtype=int) for content in contents]
        assert ensure(directory, 3) == (paths, 2)
        assert paths[0].read_bytes() == contents[0]
        for path, before in zip(paths, drawn, strict=True):
            assert path.exists()
            # Drawn in other company: sums may run in another order, by a level at most.
            assert np.abs(np.asarray(impl.load_image(path), dtype=int) - before).max() <= 1


def law_another_prompt_never_reuses(impl: Any) -> None:
    """A new prompt, seed or sampler setting means new pictures in a new folder."""
    ensure = Counting(impl)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        first, _ = ensure(directory, 2)
        before = [path.read_bytes() for path in first]
        for options in ({"prompt": "a cat"}, {"prompt": "A dog"}, {"seed": 9}):
            others, made = ensure(directory, 2, **options)
            assert made == 2, options
            assert not set(others) & set(first), options
        assert [path.read_bytes() for path in first] == before
        assert ensure(directory, 2) == (first, 0)


LAWS = (law_exactly_the_missing_are_made, law_another_prompt_never_reuses)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    law(prior)


def test_own_pictures_come_first_and_are_never_touched(tmp_path: Path) -> None:
    own = write_pictures(tmp_path, 2)
    before = [path.read_bytes() for path in own]
    paths, made = Counting(prior)(tmp_path, 3)
    assert made == 1
    assert paths[:2] == own
    assert paths[2].parent.parent == tmp_path
    assert Counting(prior)(tmp_path, 1) == (own[:1], 0)
    own[1].write_bytes(b"broken")
    with pytest.raises(ImageError, match=own[1].name):
        Counting(prior)(tmp_path, 3)
    assert own[0].read_bytes() == before[0]


def test_batches_do_not_change_the_pictures(tmp_path: Path) -> None:
    one, _ = Counting(prior)(tmp_path / "a", 3, batch_size=1)
    three, _ = Counting(prior)(tmp_path / "b", 3, batch_size=3)
    for first, second in zip(one, three, strict=True):
        a, b = (np.asarray(Image.open(path), dtype=int) for path in (first, second))
        assert np.abs(a - b).max() <= 1


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="--class_prompt"):
        Counting(prior)(tmp_path, 1, "  ")
    with pytest.raises(ConfigError, match="--class_data_dir"):
        Counting(prior)(file, 1)


@pytest.mark.parametrize("prompt", ["a/../b", "x" * 500, "犬の写真", "con", "a:b*c?", "."])
def test_folder_names_are_safe(prompt: str) -> None:
    name = prior.folder_name({"prompt": prompt})
    assert len(name) < 64
    assert all(c.isascii() and (c.isalnum() or c == "-") for c in name)
