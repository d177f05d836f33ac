"""Commands around training: `python -m dreamrie doctor|info|convert|truncate|merge|diff|verify ...`."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from dreamrie.errors import DreamrieError
from dreamrie.runlog import exit_code, start_logging

COMMANDS = {
    "doctor": "dreamrie.diffusion.doctor",
    "info": "dreamrie.commands.info",
    "convert": "dreamrie.commands.convert",
    "truncate": "dreamrie.commands.truncate",
    "merge": "dreamrie.commands.merge",
    "diff": "dreamrie.commands.diff",
    "verify": "dreamrie.commands.verify",
    "merge-into-base": "dreamrie.commands.merge_into_base",
    "card": "dreamrie.commands.card",
    "push": "dreamrie.commands.push",
    "generate": "dreamrie.commands.generate",
    "train-llm": "dreamrie.commands.train_llm",
    "evaluate-llm": "dreamrie.commands.evaluate_llm",
    "sweep": "dreamrie.commands.sweep",
}
"""Modules with `HELP`, `add_arguments(parser)` and `run(options)`, which returns the exit code."""


def make_parser(names: Sequence[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The commands and their flags.

    Args:
        names: of the commands to know. Their modules are imported, and that of pictures need not wait for PEFT.

    Returns:
        The parser, which sets `run` to what the command does.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dreamrie",
        description="Tools around training. Training itself is train_dreambooth.py.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in names:
        module = importlib.import_module(COMMANDS[name])
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
        command.add_argument(
            "-v", "--verbose", action="store_true", help="say where an error happened"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: command line, default that of the process.

    Returns:
        0 done, 1 something needs attention, 2 something given cannot work, 130 stopped by Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["train-llm"]:
        # Its flags are settings, as those of train_dreambooth.py; files need no reader of settings.
        from dreamrie.config.reading import normalized

        words = normalized(words)
    parser = make_parser(words[:1] if words and words[0] in COMMANDS else tuple(COMMANDS))
    options = parser.parse_args(words)
    if options.command is None:
        parser.print_help()
        return 2
    start_logging(options.verbose)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name in another script must not end a command whose output goes into an old code page.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: int = options.run(options)
    except (DreamrieError, KeyboardInterrupt) as error:
        return exit_code(error, options.verbose)
    return code


if __name__ == "__main__":
    sys.exit(main())
