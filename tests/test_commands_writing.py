"""`convert`, `truncate` and `merge`: the file that is written is the change that was asked for, or there is none."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamrie import __main__ as command
from dreamrie.adapter_file import save_diffusers
from dreamrie.adapter_open import open_adapter
from dreamrie.commands import merge
from dreamrie.errors import ConfigError
from dreamrie.lora import LowRank
from tests.small_adapters import save_small
from tests.strategies import noise

FP32 = 1e-6


def matrices(path: Path) -> dict[str, Tensor]:
    """The change of each layer of a file."""
    changes = open_adapter(path).changes
    return {
        layer: c.left.double().flatten(1) @ c.right.double().flatten(1)
        for layer, c in changes.items()
    }


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert list(found) == list(wanted)
    return max(float((found[k] - wanted[k]).norm() / wanted[k].norm()) for k in wanted)


def cut(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def litter(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("to", "output"), [("diffusers", "d"), ("universal", "u.safetensors"), ("peft", "p")]
)
def test_converted_and_back_it_is_the_same(to: str, output: str, tmp_path: Path) -> None:
    """Every format holds the change, the trigger and the base; the way back gives them again."""
    given = save_small(tmp_path / "run")
    words = ["convert", str(given), "--to", to, "--output", str(tmp_path / output)]
    assert command.main(words) == 0
    assert command.main(words) == 2
    assert command.main([*words, "--force"]) == 0
    assert apart(matrices(tmp_path / output), matrices(given)) < FP32
    back = ["convert", str(tmp_path / output), "--to", "diffusers", "--output"]
    assert command.main([*back, str(tmp_path / "back")]) == 0
    assert apart(matrices(tmp_path / "back"), matrices(given)) < FP32
    facts, again = open_adapter(given).facts, open_adapter(tmp_path / "back").facts
    for key in ("base_model", "instance_prompt", "rank_trained", "dreamrie_base_float16"):
        assert again[key] == facts[key]


def test_half_precision_is_what_was_asked_for(tmp_path: Path) -> None:
    given = save_small(tmp_path)
    words = ["convert", str(given), "--to", "diffusers", "--output", str(tmp_path / "h")]
    assert command.main([*words, "--dtype", "fp16"]) == 0
    assert open_adapter(tmp_path / "h").dtypes == ("float16",)
    error = apart(matrices(tmp_path / "h"), matrices(given))
    assert 1e-5 < error < 1e-3


def test_truncated_to_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file holds the dense truncation; what it lost is said for each layer and in total."""
    given = save_small(tmp_path)
    place, target = tmp_path / "t.json", tmp_path / "t.safetensors"
    words = ["truncate", str(given), "--rank", "2", "--output", str(target), "--json", str(place)]
    assert command.main(words) == 0
    before = matrices(given)
    wanted = {layer: cut(matrix, 2) for layer, matrix in before.items()}
    assert apart(wanted, before) > 0.01
    assert apart(matrices(target), wanted) < FP32
    record = json.loads(place.read_text("utf-8"))
    total = sum(float(m.norm() ** 2) for m in before.values())
    lost = {k: float((before[k] - wanted[k]).norm() ** 2) for k in before}
    assert record["energy_discarded"] == pytest.approx(sum(lost.values()) / total, rel=1e-5)
    for row in record["layers"]:
        share = lost[row["layer"]] / float(before[row["layer"]].norm() ** 2)
        assert row["energy_discarded"] == pytest.approx(share, rel=1e-5)
    out = capsys.readouterr().out
    assert "3 layers to rank 2" in out
    assert max(len(line) for line in out.splitlines() if "safetensors" not in line) <= 100
    with safe_open(target, "pt") as file:
        facts = file.metadata()
    assert facts["made_by"] == "truncate to rank 2"
    assert facts["rank_exported"] == "2"
    kept = 1 - sum(lost.values()) / total
    assert float(facts["energy_kept"]) == pytest.approx(kept, rel=1e-5)
    assert facts["instance_prompt"] == "a sks øwl"


def test_truncated_to_an_energy(tmp_path: Path) -> None:
    """The smallest uniform rank for all layers together, and what each would need."""
    given = save_small(tmp_path)
    squares = {k: torch.linalg.svdvals(m) ** 2 for k, m in matrices(given).items()}
    total = sum(float(s.sum()) for s in squares.values())
    ranks = set()
    for energy in (0.5, 0.9, 0.995):
        place, target = tmp_path / "e.json", tmp_path / f"{energy}.safetensors"
        words = ["truncate", str(given), "--energy", str(energy), "--output", str(target)]
        assert command.main([*words, "--json", str(place)]) == 0
        record = json.loads(place.read_text("utf-8"))
        kept = [sum(float(s[:k].sum()) for s in squares.values()) / total for k in range(1, 9)]
        wanted = next(k for k, share in enumerate(kept, 1) if share >= energy)
        assert record["rank"] == wanted
        assert open_adapter(target).rank_stored == wanted
        assert 1 - record["energy_discarded"] >= energy
        for row in record["layers"]:
            s = squares[row["layer"]].cumsum(0) / squares[row["layer"]].sum()
            assert row["rank_for_energy"] == int((s < energy).sum()) + 1
        ranks.add(wanted)
    assert len(ranks) == 3


def test_more_rank_than_there_is_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = save_small(tmp_path)
    target = tmp_path / "t.safetensors"
    with caplog.at_level(logging.WARNING, "dreamrie"):
        assert command.main(["truncate", str(given), "--rank", "40", "--output", str(target)]) == 0
    assert any("nothing is lost" in record.getMessage() for record in caplog.records)
    assert apart(matrices(target), matrices(given)) < FP32


def test_merged_files_are_the_weighted_sum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = save_small(tmp_path / "a"), save_small(tmp_path / "b", seed=2)
    words = ["merge", f"{a}:0.8", f"{b}:-0.6", "--output"]
    assert command.main([*words, str(tmp_path / "exact")]) == 0
    one, other = matrices(a), matrices(b)
    wanted = {layer: 0.8 * one[layer] - 0.6 * other[layer] for layer in one}
    assert apart(matrices(tmp_path / "exact"), wanted) < FP32
    assert command.main([*words, str(tmp_path / "cut"), "--rank", "2"]) == 0
    nearest = {layer: cut(matrix, 2) for layer, matrix in wanted.items()}
    assert apart(nearest, wanted) > 0.01
    assert apart(matrices(tmp_path / "cut"), nearest) < FP32
    out = " ".join(capsys.readouterr().out.split())
    assert "metric projection of the weighted sum" in out
    facts = open_adapter(tmp_path / "cut").facts
    name = "pytorch_lora_weights.safetensors"
    assert facts["made_by"] == f"merge a/{name}:0.8 b/{name}:-0.6 --rank 2"
    assert facts["base_model"] == "small"
    assert "dreamrie_base_float16" in facts


def test_equal_halves_are_the_file(tmp_path: Path) -> None:
    given = save_small(tmp_path)
    half = f"{given}:0.5"
    assert command.main(["merge", half, half, "--output", str(tmp_path / "h")]) == 0
    assert apart(matrices(tmp_path / "h"), matrices(given)) < FP32
    assert open_adapter(tmp_path / "h").facts["instance_prompt"] == "a sks øwl"
    assert command.main(["merge", str(given), "--output", str(tmp_path / "one")]) == 0
    assert apart(matrices(tmp_path / "one"), matrices(given)) < FP32


def test_what_cancels_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = save_small(tmp_path / "run")
    words = ["merge", f"{given}:0.5", f"{given}:-0.5", "--output", str(tmp_path / "zero")]
    with caplog.at_level(logging.ERROR, "dreamrie"):
        assert command.main(words) == 2
    assert any("cancel" in record.getMessage() for record in caplog.records)
    assert litter(tmp_path) == ["run"]


def small(folder: Path, facts: dict[str, str], width: int = 4, prompt: str = "") -> Path:
    change = {"p": LowRank(noise(1, 5, 2), noise(2, 2, width))}
    return save_diffusers(folder, change, {**facts, "instance_prompt": prompt})


def test_other_bases_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By fingerprint or name; --other-base adds them all the same, and the file names no base then."""
    first = small(tmp_path / "a", {"base_model": "x", "dreamrie_base_float16": "1"}, prompt="a")
    second = small(tmp_path / "b", {"base_model": "x", "dreamrie_base_float16": "2"}, prompt="b")
    words = ["merge", str(first), str(second), "--output", str(tmp_path / "m")]
    with caplog.at_level(logging.WARNING, "dreamrie"):
        assert command.main(words) == 2
        assert litter(tmp_path) == ["a", "b"]
        assert command.main([*words, "--other-base"]) == 0
    said = [record.getMessage() for record in caplog.records]
    assert any("--other-base if it is wanted" in text for text in said)
    assert any("because of --other-base" in text for text in said)
    facts = open_adapter(tmp_path / "m").facts
    assert not [key for key in facts if key.startswith("dreamrie_base_")]
    assert facts["instance_prompt"] == "a; b"


def test_layers_of_other_shapes_are_not_added(tmp_path: Path) -> None:
    paths = [str(small(tmp_path / str(width), {"base_model": "x"}, width)) for width in (4, 6)]
    assert command.main(["merge", *paths, "--output", str(tmp_path / "m")]) == 2
    assert litter(tmp_path) == ["4", "6"]


def test_weights_stand_behind_the_last_colon() -> None:
    assert merge.split_weight("a.safetensors:0.8") == (Path("a.safetensors"), 0.8)
    assert merge.split_weight("a:b:-2e-1") == (Path("a:b"), -0.2)
    assert merge.split_weight("C:/a.safetensors") == (Path("C:/a.safetensors"), 1.0)
    assert merge.split_weight("plain") == (Path("plain"), 1.0)
    assert merge.split_weight("a:0") == (Path("a"), 0.0)
    for text in ("a:nan", "a:inf"):
        with pytest.raises(ConfigError, match="no finite number"):
            merge.split_weight(text)


def test_a_path_that_ends_like_a_weight_is_itself(tmp_path: Path) -> None:
    """Else `dir:0.5` would be read as half of another adapter, `dir`, without a word."""
    (tmp_path / "dir:0.5").mkdir()
    text = str(tmp_path / "dir:0.5")
    assert merge.split_weight(text) == (tmp_path / "dir:0.5", 1.0)
    assert merge.split_weight(f"{text}:2") == (tmp_path / "dir:0.5", 2.0)
    (tmp_path / "dir").mkdir()
    with pytest.raises(ConfigError, match="Say which is meant"):
        merge.split_weight(text)


def test_a_weight_of_zero_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = small(tmp_path / "x", {"base_model": "x"}, 4)
    words = ["merge", f"{path}:0", str(path), "--output", str(tmp_path / "m")]
    assert command.main(words) == 2
    assert "leave it out" in caplog.text


def test_alpha_of_other_programs_counts(tmp_path: Path) -> None:
    """alpha / r = 0.5: a merge with weight 2 gives the bare product."""
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    up, down = noise(1, 5, 4).float(), noise(2, 4, 6).float()
    tensors = {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
    tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "k.safetensors")
    given = f"{tmp_path / 'k.safetensors'}:2"
    assert command.main(["merge", given, "--output", str(tmp_path / "m")]) == 0
    wanted = {"mid_block.attentions.0.proj_in": up.double() @ down.double()}
    assert apart(matrices(tmp_path / "m"), wanted) < FP32


def test_what_cannot_be_done_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    given = save_small(tmp_path)
    before = given.read_bytes()
    path, new = str(given), str(tmp_path / "new")
    for words in (
        ["truncate", path, "--rank", "0", "--output", new],
        ["truncate", path, "--energy", "1.5", "--output", new],
        ["truncate", path, "--energy", "nan", "--output", new],
        ["truncate", path, "--rank", "2", "--output", path],
        ["truncate", path, "--rank", "2", "--output", new, "--json", f"{new}/gone/x.json"],
        ["merge", path, "--rank", "0", "--output", new],
        ["merge", f"{path}:0", "--output", new],
        ["merge", path, "gone", "--output", new],
        ["convert", path, "--to", "universal", "--output", new],
        ["convert", path, "--to", "peft", "--output", f"{new}.safetensors"],
    ):
        assert command.main(words) == 2, words
    assert litter(tmp_path) == [given.name]
    assert given.read_bytes() == before


def test_an_input_is_replaced_on_request_only(tmp_path: Path) -> None:
    given = save_small(tmp_path)
    wanted = {layer: cut(matrix, 1) for layer, matrix in matrices(given).items()}
    words = ["truncate", str(given), "--rank", "1", "--output", str(given), "--force"]
    assert command.main(words) == 0
    assert apart(matrices(given), wanted) < FP32
    assert litter(tmp_path) == [given.name]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = save_small(tmp_path)
    before = given.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dreamrie.files.os.fsync", full)
    words = ["truncate", str(given), "--rank", "1", "--output", str(given), "--force"]
    assert command.main(words) == 2
    assert given.read_bytes() == before
    assert litter(tmp_path) == [given.name]
