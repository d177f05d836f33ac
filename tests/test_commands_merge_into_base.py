"""`merge-into-base`: a whole pipeline whose weights hold the adapter's change, or nothing at all."""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dreamrie import __main__ as command
from dreamrie.adapter_file import DIFFUSERS_FILE, save_diffusers_lora
from dreamrie.adapter_reading import AdapterContents
from dreamrie.diffusion import merging
from dreamrie.diffusion.adapters import load_saved_adapter
from dreamrie.diffusion.components import load_components
from dreamrie.diffusion.pipeline import sample
from dreamrie.diffusion.source import quiet_libraries
from dreamrie.errors import AdapterError
from dreamrie.lora import LowRank
from tests.small_adapters import Small
from tests.small_models import make_small_pipeline, small_folder
from tests.strategies import noise
from tests.test_adapter_file import trained

pytestmark = pytest.mark.end_to_end

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FP32 = 1e-6


def temporary() -> Path:
    """A folder that goes when the tests have ended; laws run without fixtures."""
    folder = Path(tempfile.mkdtemp(prefix="dreamrie-merge-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def saved(kind: str = "sd2-eps") -> Path:
    """Folder of an adapter that names its base."""
    folder = temporary()
    parts, pairs = trained(kind)
    facts = {"base_model": str(small_folder(kind).resolve()), "instance_prompt": "a sks dog"}
    save_diffusers_lora(folder, pairs, facts, base=parts.unet)
    return folder


def changes(folder: Path) -> dict[str, Tensor]:
    """The change of every weight, from the file by hand."""
    tensors = load_file(folder / DIFFUSERS_FILE)
    return {
        name.replace("unet.", "").replace(".lora_A", ""): tensors[
            name.replace("lora_A", "lora_B")
        ].double()
        @ tensor.double()
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def merged(impl: Any, base: Path, adapter: Path, scale: float = 1.0, **options: Any) -> Path:
    """A folder of its own that holds the merge."""
    output = temporary() / "out"
    impl.merge_into_base(load_components(base), adapter, output, scale=scale, **options)
    return output


def law_m1_merged_minus_base_is_the_change(impl: Any) -> None:
    """W' - W = scale * change on every adapted layer, to 1e-6 of the change; every other weight keeps its bytes."""
    for kind, scale in (("sd2-eps", 1.0), ("sd15", -0.6)):
        before, wanted = load_file(small_folder(kind) / WEIGHTS), changes(saved(kind))
        output = merged(impl, small_folder(kind), saved(kind), scale)
        after = load_file(output / WEIGHTS)
        shutil.rmtree(output.parent)
        assert list(after) == list(before)
        assert 8 < len(wanted) < len(before)
        for name, weight in after.items():
            assert weight.dtype == torch.float32
            if name not in wanted:
                assert torch.equal(weight, before[name]), name
                continue
            change = scale * wanted[name]
            error = (weight.double() - before[name].double() - change).norm() / change.norm()
            assert error < FP32, (name, float(error))


def law_m2_the_folder_draws_what_base_and_adapter_draw(impl: Any) -> None:
    """Within a grey level, and not what the base draws."""
    base, adapter = small_folder("sd2-eps"), saved()
    output = merged(impl, base, adapter)
    parts = load_components(base)
    bare = draw(parts)
    load_saved_adapter(parts, adapter)
    wanted, found = draw(parts), draw(load_components(output))
    shutil.rmtree(output.parent)
    assert np.abs(wanted - bare).max() > 8
    assert np.abs(found - wanted).max() <= 1


def law_m3_strength_and_kernels_count(impl: Any) -> None:
    """A file's own scaling, and the order of a kernel's numbers: (out, in * kh * kw)."""
    model: Any = Small().requires_grad_(False)
    names, kernel = ("mix", "deep.cut"), model.deep["cut"].weight
    contents = AdapterContents(
        Path("x"),
        {},
        {
            "mix": LowRank(noise(1, 6, 2), noise(2, 2, 7)),
            "deep.cut": LowRank(noise(3, 5, 2, 1, 1), noise(4, 2, *kernel.shape[1:])),
        },
        {"mix": 0.5, "deep.cut": 3.0},
        (),
    )
    before = {name: model.get_submodule(name).weight.double().clone() for name in names}
    impl.add_to_weights_(model, contents, 2.0, torch.float32)
    for name, formula in (("mix", "ok,ki->oi"), ("deep.cut", "okab,kihw->oihw")):
        change = torch.einsum(formula, *(factor.double() for factor in contents.changes[name]))
        found = model.get_submodule(name).weight.double() - before[name]
        wanted = 2.0 * contents.scalings[name] * change
        assert (found - wanted).norm() / wanted.norm() < FP32, name


def law_m4_half_precision_is_rounded_once(impl: Any) -> None:
    """A base in fp16 stays in fp16, each merged weight the nearest to the exact sum."""
    base = in_half(temporary() / "base")
    before, wanted = load_file(base / WEIGHTS), changes(saved())
    output = merged(impl, base, saved(), 0.7, other_base=True)
    after = load_file(output / WEIGHTS)
    shutil.rmtree(output.parent)
    shutil.rmtree(base.parent)
    for name, weight in after.items():
        exact = before[name].double() + 0.7 * wanted.get(name, torch.zeros(()))
        assert torch.equal(weight, exact.half()), name


def draw(parts: Any) -> Any:
    pictures = sample(parts, ["a sks dog", "a cat"], [3, 4], steps=2, guidance_scale=3.0)
    return np.stack([np.asarray(picture, int) for picture in pictures])


def in_half(folder: Path) -> Path:
    """The small base with a U-Net in fp16."""
    make_small_pipeline("sd2-eps", folder)
    with quiet_libraries():
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float16)
        unet.save_pretrained(folder / "unet")
    return folder


LAWS = [
    law_m1_merged_minus_base_is_the_change,
    law_m2_the_folder_draws_what_base_and_adapter_draw,
    law_m3_strength_and_kernels_count,
    law_m4_half_precision_is_rounded_once,
]


@pytest.mark.parametrize("law", LAWS)
def test_law(law: Any) -> None:
    law(merging)


def test_the_command_writes_a_whole_pipeline_and_leaves_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain diffusers loads it; the parts beside the U-Net are the base's, byte for byte."""
    base, before = small_folder("sd2-eps"), hashes(small_folder("sd2-eps"))
    output = tmp_path / "merged"
    words = ["merge-into-base", str(saved()), "--base", str(base), "--output", str(output)]
    assert command.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "layers changed, U-Net in fp32, everything else as in the base" in said
    assert hashes(base) == before
    after = hashes(output)
    assert set(after) == {*before, "dreamrie_merged.json"}
    changed = {name for name in before if after[name] != before[name]}
    assert changed - {"model_index.json"} == {WEIGHTS}
    mask = os.umask(0o022)
    os.umask(mask)
    assert {stat.S_IMODE(p.stat().st_mode) for p in output.rglob("*.*")} == {0o666 & ~mask}
    with quiet_libraries():
        pipe = StableDiffusionPipeline.from_pretrained(output)
    weight = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    found = pipe.unet.get_submodule(weight).weight
    assert torch.equal(found, load_file(output / WEIGHTS)[f"{weight}.weight"])
    origin = (output / "dreamrie_merged.json").read_text("utf-8")
    assert str(base) not in origin
    assert '"a local folder"' in origin
    assert '"scale": 1.0' in origin
    # What is there is not replaced.
    assert command.main(words) == 2
    assert hashes(output) == after


def test_another_precision_on_request(tmp_path: Path) -> None:
    words = ["merge-into-base", str(saved()), "--base", str(small_folder("sd2-eps"))]
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        output = tmp_path / name
        assert command.main([*words, "--output", str(output), "--dtype", name]) == 0
        assert {t.dtype for t in load_file(output / WEIGHTS).values()} == {dtype}
        vae = "vae/diffusion_pytorch_model.safetensors"
        assert (output / vae).read_bytes() == (small_folder("sd2-eps") / vae).read_bytes()


def test_variants_pickles_and_filters_are_not_carried_on(tmp_path: Path) -> None:
    base = make_small_pipeline("sd2-eps", tmp_path / "base")
    for name in ("vae/model.fp16.safetensors", "vae/x.bin", "text_encoder/a.ckpt", "vae/.cache"):
        (base / name).write_bytes(b"x")
    (base / "tokenizer" / "merges.txt").write_text("a b")
    (base / "safety_checker").mkdir()
    (base / "model_index.json").unlink()
    output = tmp_path / "merged"
    words = ["merge-into-base", str(saved()), "--base", str(base), "--output", str(output)]
    assert command.main(words) == 0
    found = hashes(output)
    assert "tokenizer/merges.txt" in found
    assert not [name for name in found if name.endswith((".bin", ".ckpt", ".cache"))]
    assert "vae/model.fp16.safetensors" not in found
    assert (output / "model_index.json").is_file()
    with quiet_libraries():
        assert StableDiffusionPipeline.from_pretrained(output).safety_checker is None


def fail_to_sync(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def fail_to_save(*_: Any, **__: Any) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def fail_by_ctrl_c(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fault", [fail_to_sync, fail_to_save, fail_by_ctrl_c])
def test_what_fails_leaves_nothing(
    fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, before = small_folder("sd2-eps"), hashes(small_folder("sd2-eps"))
    if fault is fail_to_sync:
        monkeypatch.setattr("dreamrie.files.os.fsync", fault)
    else:
        monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", fault)
    words = ["merge-into-base", str(saved()), "--base", str(base)]
    code = command.main([*words, "--output", str(tmp_path / "merged")])
    assert code == (130 if fault is fail_by_ctrl_c else 2)
    assert list(tmp_path.iterdir()) == []
    assert hashes(base) == before


def test_a_disk_without_room_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(AdapterError, match="1,000 are free"):
        merging.merge_into_base(
            load_components(small_folder("sd2-eps")), saved(), tmp_path / "merged"
        )
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_merged_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = str(small_folder("sd2-eps"))
    other = str(make_small_pipeline("sd2-eps", tmp_path / "other", seed=1))
    out = str(tmp_path / "merged")
    for words, said in (
        ([str(saved()), "--base", base, "--output", out, "--scale", "0"], "--scale"),
        ([str(saved()), "--base", base, "--output", out, "--scale", "nan"], "--scale"),
        ([str(saved()), "--base", base, "--output", f"{out}/deep/er"], "does not exist"),
        ([str(saved()), "--base", base, "--output", base], "is there already"),
        (
            [str(saved()), "--base", base, "--output", f"{base}/new"],
            "lies in the folder of the base",
        ),
        ([str(saved()), "--base", other, "--output", out], "fingerprint differs"),
        ([str(saved()), "--base", f"{out}-gone", "--output", out], "--base"),
        ([f"{out}-gone", "--base", base, "--output", out], "there is no adapter"),
        (
            [str(saved()), "--base", base, "--output", out, "--scale", "1e6", "--dtype", "fp16"],
            "overflows float16",
        ),
    ):
        caplog.clear()
        with caplog.at_level(logging.ERROR, "dreamrie"):
            assert command.main(["merge-into-base", *words]) == 2, words
        assert said in caplog.text, words
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
