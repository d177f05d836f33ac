"""The settings that must be given, files of settings, and the list of all of them."""

from __future__ import annotations

from pathlib import Path

from dreamrie.config import GROUPS

NEEDED = ["--instance_data_dir", "pictures", "--instance_prompt", "a photo of a sks dog"]
NEEDED_VALUES = {"instance_data_dir": "pictures", "instance_prompt": "a photo of a sks dog"}
SETTINGS = [(name, f) for model in GROUPS.values() for name, f in model.model_fields.items()]


def settings_file(folder: Path, text: str) -> list[str]:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]
