"""Several adapters at once are the sum of their changes, and a picture does not tell what was drawn before."""

from __future__ import annotations

import argparse
import atexit
import copy
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dreamrie.adapter_file import DIFFUSERS_FILE, save_diffusers, save_diffusers_lora
from dreamrie.adapter_open import open_adapter
from dreamrie.adapter_peft import save_peft
from dreamrie.adapter_reading import AdapterContents, read_adapter
from dreamrie.commands import truncate
from dreamrie.diffusion import generating
from dreamrie.diffusion.components import Components
from dreamrie.diffusion.generating import AdapterUse, Drawer, DrawRequest
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.lora import LowRank, attach_lora, base_fingerprint
from tests.small_models import small_components, small_folder
from tests.strategies import noise
from tests.test_adapter_file import train_by_hand, trained

REQUEST = DrawRequest(("a sks dog", "snow", "a cat"), (3, 4, 3), steps=2, guidance_scale=3.0)


def temporary() -> Path:
    """A folder that goes when the tests have ended; laws run without fixtures."""
    folder = Path(tempfile.mkdtemp(prefix="dreamrie-generate-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def adapter(seed: int, rank: int = 2, targets: tuple[str, ...] = tuple(ATTENTION_TARGETS)) -> Path:
    """Folder of an adapter that names its base."""
    parts = small_components("sd2-eps")
    pairs = attach_lora(parts.unet, rank, targets)
    train_by_hand(pairs, size=0.2, seed=seed)
    facts = {"base_model": str(small_folder("sd2-eps").resolve()), "prediction_type": "epsilon"}
    folder = temporary()
    save_diffusers_lora(folder, pairs, facts, base=parts.unet)
    return folder


def changes(folder: Path) -> dict[str, Tensor]:
    """The change of every layer, from the file by hand."""
    tensors = load_file(folder / DIFFUSERS_FILE)
    return {
        name.removeprefix("unet.").removesuffix(".lora_A.weight"): tensors[
            name.replace("lora_A", "lora_B")
        ].double()
        @ tensor.double()
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


def output(unet: Any) -> Tensor:
    """In fp64, on fixed inputs."""
    latents, text = noise(7, 2, unet.config.in_channels, 8, 8), noise(8, 2, 77, 16)
    with torch.no_grad():
        found: Tensor = unet(latents.double(), torch.tensor([10, 700]), text.double()).sample
    return found


def pixels(pictures: Any) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(picture, int) for picture in pictures])


def law_adapters_add_up(impl: Any) -> None:
    """base + a * dA + b * dB on every layer, in fp64, for unequal ranks, layers, scales and signs."""
    folders = (adapter(1), adapter(2, 3), adapter(3, 1, ("to_q", "to_v")))
    parts = small_components("sd2-eps")
    parts.unet.double()
    bare, before = copy.deepcopy(parts.unet), base_fingerprint(parts.unet)
    drawer = impl.Drawer(parts)
    for scales in ((0.7, 0.0, 0.0), (0.7, -1.3, 0.0), (0.4, 1.1, -0.6), (-1.3, 0.7, 2.0)):
        dense = copy.deepcopy(bare)
        for folder, scale in zip(folders, scales, strict=True):
            for layer, change in changes(folder).items():
                dense.get_submodule(layer).weight.data += scale * change
        wanted, base = output(dense), output(bare)
        assert float((wanted - base).abs().max() / wanted.abs().max()) > 1e-2
        uses = [AdapterUse(f, s) for f, s in zip(folders, scales, strict=True)]
        with drawer.using(uses):
            error = float((output(parts.unet) - wanted).abs().max() / wanted.abs().max())
        assert error < 1e-14, (scales, error)  # measured 1.8e-15
        assert torch.equal(output(parts.unet), base)
    assert base_fingerprint(parts.unet) == before


def law_a_picture_does_not_tell_what_came_before(impl: Any) -> None:
    """Byte for byte: after other drawings, evictions and failures, in any order of adapters."""
    a, b, c = (AdapterUse(adapter(1), 0.7), AdapterUse(adapter(2, 3)), AdapterUse(adapter(1), 1, 1))
    fresh = {
        uses: pixels(impl.Drawer(small_components("sd2-eps")).draw(REQUEST, uses))
        for uses in ((), (a,), (a, b), (c,))
    }
    for one, other in (((), (a,)), ((a,), (a, b)), ((a,), (c,))):
        assert np.abs(fresh[one] - fresh[other]).max() > 8
    drawer = impl.Drawer(small_components("sd2-eps"), keep=2)
    for uses in ((a, b), (), (c,), (a,), (b, a), (a, b), (), (c,), (a,)):
        known = fresh[uses if uses in fresh else uses[::-1]]
        assert np.array_equal(pixels(drawer.draw(REQUEST, uses)), known), uses
        with pytest.raises(AdapterError):
            drawer.draw(REQUEST, [*uses, AdapterUse(Path("nowhere"))])


def law_a_file_that_was_written_again_is_read_again(impl: Any) -> None:
    """Contents count, not names: another file under the old name is drawn, a copy is the same adapter."""
    place, drawer = temporary(), impl.Drawer(small_components("sd2-eps"))
    found = []
    for source in (adapter(1), adapter(2, 3)):
        shutil.copy(source / DIFFUSERS_FILE, place / DIFFUSERS_FILE)
        found.append(pixels(drawer.draw(REQUEST, [AdapterUse(place)])))
        assert np.array_equal(found[-1], pixels(drawer.draw(REQUEST, [AdapterUse(source)])))
    assert np.abs(found[0] - found[1]).max() > 8
    assert len(drawer.loaded) == 2


def law_a_file_counts_what_it_says(impl: Any) -> None:
    """Its own scaling, alpha over rank, is part of the change, with and without truncation."""
    change = LowRank(noise(1, 6, 3), noise(2, 3, 7))
    contents = AdapterContents(Path("x"), {}, {"mix": change}, {"mix": 0.5}, ())
    wanted = 0.5 * change.left.double() @ change.right.double()
    u, s, v = torch.linalg.svd(wanted)
    for rank, matrix in ((None, wanted), (3, wanted), (2, u[:, :2] * s[:2] @ v[:2])):
        found = impl.changes_of(contents, rank)["mix"].dense()
        assert float((found - matrix).norm() / matrix.norm()) < 1e-12
    assert float(s[2] / s[0]) > 0.05


LAWS = (
    law_adapters_add_up,
    law_a_picture_does_not_tell_what_came_before,
    law_a_file_that_was_written_again_is_read_again,
    law_a_file_counts_what_it_says,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    law(generating)


@pytest.fixture(scope="module")
def parts() -> Components:
    return small_components("sd2-eps")


def test_neighbours_and_batches_change_no_picture(parts: Components) -> None:
    """At most one grey level, which is how far sums of other sizes round."""
    uses = [AdapterUse(adapter(1), 0.7), AdapterUse(adapter(2, 3))]
    with Drawer(parts) as drawer:
        together = pixels(drawer.draw(REQUEST, uses))
        for number in range(3):
            alone = DrawRequest(
                REQUEST.prompts[number : number + 1],
                REQUEST.seeds[number : number + 1],
                steps=2,
                guidance_scale=3.0,
            )
            assert np.abs(pixels(drawer.draw(alone, uses))[0] - together[number]).max() <= 1
    assert np.abs(together[0] - together[2]).max() > 8


def test_a_rank_is_drawn_as_the_truncated_file(parts: Components, tmp_path: Path) -> None:
    """The numbers are those of `truncate`, and nothing is written."""
    parser = argparse.ArgumentParser()
    truncate.add_arguments(parser)
    words = [str(adapter(2, 3)), "--rank", "2", "--output", str(tmp_path)]
    assert truncate.run(parser.parse_args(words)) == 0
    written = read_adapter(parts.unet, tmp_path).changes
    found = generating.changes_of(read_adapter(parts.unet, adapter(2, 3)), 2)
    assert len(found) > 8
    for layer, change in found.items():
        assert change.right.shape[0] == 2
        assert torch.equal(change.left.float(), written[layer].left)
        assert torch.equal(change.right.float(), written[layer].right)
    with Drawer(parts) as drawer:
        assert np.array_equal(
            pixels(drawer.draw(REQUEST, [AdapterUse(adapter(2, 3), rank=2)])),
            pixels(drawer.draw(REQUEST, [AdapterUse(tmp_path)])),
        )


def test_the_adapter_that_was_not_used_for_longest_goes_first(parts: Components) -> None:
    a, b, c = (AdapterUse(adapter(1), rank=rank) for rank in (1, 2, None))
    with Drawer(parts, keep=2) as drawer:
        names = []
        for use in (a, b):
            drawer.draw(REQUEST, [use])
            names.append(drawer.loaded[-1])
        drawer.draw(REQUEST, [a])
        assert drawer.loaded == (names[1], names[0])
        drawer.draw(REQUEST, [c])
        assert drawer.loaded[0] == names[0]
        assert names[1] not in drawer.loaded
        assert drawer.loaded[1] not in names
        with pytest.raises(ConfigError, match="3 adapters at once are too many; at most 2"):
            drawer.draw(REQUEST, [a, b, c])
    assert drawer.loaded == ()


def test_the_u_net_is_given_back_as_it_was() -> None:
    parts = small_components("sd2-eps")
    before = [(name, id(module)) for name, module in parts.unet.named_modules()]
    state = torch.get_rng_state()
    with Drawer(parts) as drawer:
        drawer.draw(REQUEST, [AdapterUse(adapter(1)), AdapterUse(adapter(2, 3), 0.0)])
        assert len(drawer.loaded) == 1  # a scale of 0 needs no adapter
    assert [(name, id(module)) for name, module in parts.unet.named_modules()] == before
    assert not any(parameter.requires_grad for parameter in parts.unet.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_scales_of_one_adapter_add_up(parts: Components) -> None:
    with Drawer(parts) as drawer:
        twice = drawer.draw(REQUEST, [AdapterUse(adapter(1), 0.25), AdapterUse(adapter(1), 0.5)])
        once = drawer.draw(REQUEST, [AdapterUse(adapter(1), 0.75)])
        none = drawer.draw(REQUEST, [AdapterUse(adapter(1), 0.5), AdapterUse(adapter(1), -0.5)])
        assert np.array_equal(pixels(twice), pixels(once))
        assert np.array_equal(pixels(none), pixels(drawer.draw(REQUEST)))


def test_peft_folders_are_adapters_too(parts: Components, tmp_path: Path) -> None:
    opened = open_adapter(adapter(1))
    save_peft(tmp_path / "peft", opened.changes, opened.facts)
    with Drawer(parts) as drawer:
        found = pixels(drawer.draw(REQUEST, [AdapterUse(tmp_path / "peft")]))
        wanted = pixels(drawer.draw(REQUEST, [AdapterUse(adapter(1))]))
        assert len(drawer.loaded) == 2
    assert np.abs(found - wanted).max() <= 1


def test_steps_are_counted_over_all_batches_and_can_be_stopped(parts: Components) -> None:
    request = DrawRequest(REQUEST.prompts, REQUEST.seeds, steps=2, guidance_scale=3.0, batch_size=2)
    seen: list[tuple[int, int]] = []

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise StopError

    with Drawer(parts) as drawer:
        uses = [AdapterUse(adapter(1))]
        wanted = pixels(drawer.draw(request, uses, on_step=lambda *step: seen.append(step)))
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
        with pytest.raises(StopError):
            drawer.draw(request, uses, on_step=stop)
        assert np.array_equal(pixels(drawer.draw(request, uses)), wanted)


def test_size_and_negative_prompt_reach_the_picture(parts: Components) -> None:
    wide = DrawRequest(("a cat",), (1,), steps=2, guidance_scale=3.0, width=96, height=64)
    with Drawer(parts) as drawer:
        first = drawer.draw(wide)[0]
        assert first.size == (96, 64)
        without = DrawRequest(
            ("a cat",), (1,), "a dog", steps=2, guidance_scale=3.0, width=96, height=64
        )
        assert np.abs(pixels(drawer.draw(without)) - pixels([first])).max() > 4
        (usual,) = drawer.draw(DrawRequest(("a cat",), (1,), steps=1))
        assert usual.size == (64, 64)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompts": ()}, "needs a prompt and a seed"),
        ({"seeds": (1, 2)}, "1 prompts and 2 seeds"),
        ({"prompts": (" ",)}, "prompt is empty"),
        ({"seeds": (-1,)}, "seed must be a whole number from 0"),
        ({"seeds": (True,)}, "seed must be"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000; got 0"),
        ({"steps": 1001}, "steps must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be from 0"),
        ({"guidance_scale": -1.0}, "guidance_scale must be from 0"),
        ({"guidance_scale": 1.0, "negative_prompt": "x"}, "a negative prompt does nothing"),
        ({"negative_prompt": "\ud800"}, "negative prompt: .* not valid"),
        ({"width": 60}, "width must be a multiple of 16 pixels .*trained on 64"),
        ({"height": 0}, "height must be a whole number from 16 to 256"),
        ({"height": 512}, "height must be a whole number from 16 to 256"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    parts: Components, changed: dict[str, Any], said: str
) -> None:
    with Drawer(parts) as drawer, pytest.raises(ConfigError, match=said):
        drawer.draw(DrawRequest(**({"prompts": ("x",), "seeds": (0,)} | changed)))


@pytest.mark.parametrize(
    ("scale", "rank", "said"),
    [
        (float("inf"), None, "must be a number from -4 to 4; got inf"),
        (-4.5, None, "must be a number from -4 to 4; got -4.5"),
        (1.0, 0, "the rank of .* must be a whole number from 1"),
    ],
)
def test_what_no_adapter_can_count_is_said(
    parts: Components, scale: float, rank: int | None, said: str
) -> None:
    with Drawer(parts) as drawer, pytest.raises(ConfigError, match=said):
        drawer.draw(REQUEST, [AdapterUse(adapter(1), scale, rank)])


def test_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """Other weights, another reading of them, a model that carries an adapter already."""
    other = small_components("sd2-v")
    with Drawer(other) as drawer:
        base = pixels(drawer.draw(REQUEST))
        with pytest.raises(AdapterError, match="trained to predict epsilon"):
            opened = open_adapter(adapter(1))
            facts = {k: v for k, v in opened.facts.items() if not k.startswith("dreamrie_base")}
            save_diffusers(tmp_path, opened.changes, facts)
            drawer.draw(REQUEST, [AdapterUse(tmp_path)])
        assert np.array_equal(pixels(drawer.draw(REQUEST)), base)
        assert drawer.loaded == ()
    changed = small_components("sd2-eps")
    changed.unet.conv_in.weight.data += 1e-2
    with Drawer(changed) as drawer, pytest.raises(AdapterError, match="fingerprint differs"):
        drawer.draw(REQUEST, [AdapterUse(adapter(1))])
    with pytest.raises(AdapterError, match="carries an adapter already"):
        Drawer(trained()[0])
    with pytest.raises(ConfigError, match="keep must be at least 1"):
        Drawer(changed, keep=0)
