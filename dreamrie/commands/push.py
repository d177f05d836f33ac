"""Publish the folder of a finished run on the Hugging Face Hub.

python -m dreamrie push RUN --hub_model_id OWNER/NAME
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dreamrie.run_folder import is_of_texts

HELP = "push the adapter, the model card and its pictures to the Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="output folder of a training")
    parser.add_argument(
        "--hub_model_id",
        required=True,
        metavar="ID",
        help="OWNER/NAME, or NAME for your own; a repository that does not exist yet becomes a private one",
    )


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Args:
        options: parsed.

    Returns:
        0. What cannot be pushed is an error.
    """
    folder: Path = options.run_folder
    # Either kind of run needs libraries that the other does without.
    if is_of_texts(folder):
        from dreamrie.llm.card import push
    else:
        from dreamrie.diffusion.hub import push
    sys.stdout.write(f"pushed to {push(folder, options.hub_model_id)}\n")
    return 0
