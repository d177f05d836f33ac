"""The model card of a language model's adapter, and publishing: what is said, what goes, and what never does."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from dreamrie.__main__ import main
from dreamrie.config import LlmConfig, config_of, parse_yaml
from dreamrie.errors import ConfigError
from dreamrie.llm import card as real
from dreamrie.llm import task
from dreamrie.publishing import hub as shared
from tests.diffusion import test_hub as hubs
from tests.llm.small import ROWS, write_rows
from tests.llm.test_train_llm import SHORT, leg, world

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token, and no word about being offline."""
    monkeypatch.setattr(shared, "get_token", lambda: hubs.SECRET)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@cache
def _trained() -> tuple[tuple[str, bytes], ...]:
    """Files of a scored run, made once."""
    with world() as values:
        folder = Path(values["output_dir"])
        mixed = write_rows(folder.parent / "private-notes.jsonl", [*SHORT[:2], *ROWS[:2]])
        values |= {"data": [str(mixed)], "max_train_steps": 2, "score_steps": 1}
        leg(task, values)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return tuple((str(path.relative_to(folder)), path.read_bytes()) for path in files)


def finished(folder: Path) -> Path:
    """A scored run, with things in its folder that must not leave it."""
    for name, content in _trained():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "rows.jsonl").write_text("private", "utf-8")
    (folder / "best" / "notes.txt").write_text("private", "utf-8")
    return folder


def of_hub(run: Path) -> Path:
    """The same run of a model of the Hub."""
    record = json.loads((run / "run.json").read_text("utf-8"))
    record["base_model"] = {"base_model": "me/model", "base_model_commit": "0a1b"}
    (run / "run.json").write_text(json.dumps(record), "utf-8")
    return run


def law_ll19_card_and_adapters_go(impl: Any, folder: Path) -> None:
    """Card and both adapters, each of two files, in one commit; rows, settings, records and checkpoints stay."""
    run, fake = finished(folder / "run"), hubs.FakeHub()
    impl.push(run, hubs.NAME, api=fake)
    _, files = dict(fake.calls)["create_commit"]
    assert set(files) == {"README.md", *ADAPTER, *(f"best/{name}" for name in ADAPTER)}
    assert all(files[name] == (run / name).read_bytes() for name in files)


def law_ll20_a_card_names_what_others_can_have(impl: Any, folder: Path) -> None:
    """The base by its Hub id and commit; no folder, no file, and tasks by name only where all know them."""
    run = finished(folder / "run")
    text = impl.card_text(impl.read_run(run))
    settings = parse_yaml((run / "config.yaml").read_text("utf-8"))
    for private in (settings["model"], settings["output_dir"], "private-notes", "rows", "/tmp"):
        assert private not in text
    assert "base_model" not in text.split("---")[1]
    assert "4 examples (2 of boolq, 2 others)" in text
    text = impl.card_text(impl.read_run(of_hub(run)))
    assert 'base_model: "me/model"' in text.split("---")[1]
    assert 'from_pretrained("me/model", revision="0a1b")' in text
    assert text == impl.card_text(impl.read_run(run))


LAWS = (
    law_ll19_card_and_adapters_go,
    law_ll20_a_card_names_what_others_can_have,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any, tmp_path: Path) -> None:
    law(real, tmp_path)


def test_the_laws_of_publishing_hold_for_this_task(tmp_path: Path) -> None:
    hubs.law_a_new_repository_is_private(real, tmp_path / "a", finished)
    hubs.law_a_failed_push_loses_nothing_and_tells_no_token(real, tmp_path / "b", finished)


def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    """Accuracy before training and of the best step are those of the records; the facts are those of the file."""
    run = finished(tmp_path / "run")
    text = real.card_text(real.read_run(run))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    scores = {row["step"]: row["scores"]["accuracy"] for row in rows if "scores" in row}
    best = json.loads((run / "best" / "best.json").read_text("utf-8"))["step"]
    assert f"| before training | {scores[0]:.1%} |" in text
    assert f"| step {best}, in `best/` | {scores[best]:.1%} |" in text
    for row in ("| steps | 2 |", "| rank | 3 trained; the file has rank 6 |", "| start | loi |"):
        assert row in text
    assert "| optimizer | riemannion ([arXiv 2507.12142]" in text
    shutil.rmtree(run / "best")
    assert "best/" not in real.card_text(real.read_run(run))


def test_a_training_ends_with_its_card_and_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked without --push_to_hub; with it the token is tried before the model is loaded."""
    fake = hubs.FakeHub()
    monkeypatch.setattr(shared, "HfApi", lambda: fake)
    plan = {"max_train_steps": 1, "validation_data": [], "target_modules": ["q_proj"]}
    with world() as values:
        leg(task, {**values, **plan})
        assert (Path(values["output_dir"]) / "README.md").is_file()
        assert not fake.calls
        leg(task, {**values, **plan, "push_to_hub": True, "hub_model_id": hubs.NAME})
        asked = [name for name, _ in fake.calls]
        assert asked == ["whoami", "whoami", "create_repo", "create_commit"]
        fake.fails = "whoami"
        config = config_of(LlmConfig, {**values, "model": "none", "push_to_hub": True})
        with pytest.raises(ConfigError, match="did not accept the token"):
            real_request(config)


def real_request(config: Any) -> Any:
    """As the command begins."""
    from dreamrie.llm.prepare import read_request

    return read_request(config, "cpu")  # type: ignore[arg-type]


def test_the_commands_find_out_what_a_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = hubs.FakeHub()
    monkeypatch.setattr(shared, "HfApi", lambda: fake)
    run = finished(tmp_path / "run")
    assert main(["card", str(run)]) == 0
    assert "wrote" in capsys.readouterr().out
    assert "library_name: peft" in (run / "README.md").read_text("utf-8")
    assert main(["push", str(run), "--hub_model_id", hubs.NAME]) == 0
    assert [name for name, _ in fake.calls] == ["whoami", "create_repo", "create_commit"]
    (run / "run.json").unlink()
    assert main(["card", str(run)]) == 2
