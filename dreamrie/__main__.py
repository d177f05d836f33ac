"""Commands that need no model: `python -m dreamrie doctor|info|convert|truncate|merge|diff`."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from types import ModuleType

from dreamrie.commands import convert, diff, info, merge, truncate
from dreamrie.diffusion import doctor
from dreamrie.errors import DreamrieError
from dreamrie.runlog import exit_code, start_logging

COMMANDS: dict[str, ModuleType] = {
    "doctor": doctor,
    "info": info,
    "convert": convert,
    "truncate": truncate,
    "merge": merge,
    "diff": diff,
}
"""Each has `HELP`, `add_arguments(parser)` and `run(options)`, which returns the exit code."""


def make_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = argparse.ArgumentParser(
        prog="python -m dreamrie",
        description="Tools around training. Training itself is train_dreambooth.py.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
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
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 2
    start_logging(options.verbose)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name in another script must not end a command whose output goes into an old code page.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: int = COMMANDS[options.command].run(options)
    except (DreamrieError, KeyboardInterrupt) as error:
        return exit_code(error, options.verbose)
    return code


if __name__ == "__main__":
    sys.exit(main())
