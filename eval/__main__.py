"""Command line of the scores.

python -m eval run --adapter DIR --reference DIR --subject-class dog --token sks
python -m eval compare RUN RUN
python -m eval score --generated DIR --reference DIR [--prompts FILE]
python -m eval paper --data DIR --adapters DIR --output DIR

`python -m eval COMMAND --help` lists the flags.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from dreamrie.errors import DreamrieError
from dreamrie.trainer import sigterm_as_ctrl_c

try:
    from eval import compare, paper, run, score_command
except ModuleNotFoundError as error:
    raise SystemExit(
        f'python -m eval needs the package {error.name}: pip install -e ".[eval]" in the checkout.'
    ) from error

COMMANDS = {"run": run, "compare": compare, "score": score_command, "paper": paper}


def make_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.HELP))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a wrong input is one message and exit code 2, Ctrl-C is 130.

    Args:
        argv: command line, default that of the process.

    Returns:
        Exit code.
    """
    options = make_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("eval").setLevel(logging.INFO)
    try:
        with sigterm_as_ctrl_c():
            text = COMMANDS[options.command].run(options)
    except DreamrieError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = options.command in {"run", "paper"}
        rest = "; the same command goes on where this one ended" if goes_on else ""
        print(f"stopped{rest}", file=sys.stderr)
        return 130
    if text:  # of several processes one alone has something to say
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
