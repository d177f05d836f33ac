"""The whole recipe, from package download to the saved pipeline.

    python -m tools.pretrain_tiny all

Every stage keeps its state in the work folder and goes on where it was after an interruption.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from tools.pretrain_tiny import assemble, clip, concepts, download, evaluate, unet

_ROOT = Path(__file__).resolve().parents[2]
STAGES = ("download", "clip", "unet", "assemble", "evaluate", "concepts")


def main() -> None:
    """Run the stages that are named, or all of them in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument(
        "--work", type=Path, default=Path("build/pretrain_tiny"), help="state of the stages"
    )
    parser.add_argument("--raw", type=Path, default=Path("build/raw"), help="unpacked art")
    parser.add_argument("--assets", type=Path, default=_ROOT / "dreamrie" / "assets")
    parser.add_argument("--examples", type=Path, default=_ROOT / "examples" / "concepts")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    chosen = STAGES if "all" in options.stages else tuple(options.stages)
    work, raw = options.work, options.raw
    work.mkdir(parents=True, exist_ok=True)
    actions = {
        "download": lambda: download.download(raw),
        "clip": lambda: clip.train(work, raw),
        "unet": lambda: unet.train(work, raw),
        "assemble": lambda: assemble.assemble(work, raw, options.assets),
        "evaluate": lambda: evaluate.evaluate(
            options.assets / "tiny-sd", raw, _ROOT / "docs" / "embedded_model"
        ),
        "concepts": lambda: concepts.write_examples(raw, options.examples),
    }
    for stage in STAGES:
        if stage in chosen:
            actions[stage]()


if __name__ == "__main__":
    main()
