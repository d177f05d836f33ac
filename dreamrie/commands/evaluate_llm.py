"""Ask a language model, alone or with adapters, questions with choices; print one table of accuracies.

python -m dreamrie evaluate-llm --model MODEL --data FILES [--adapter DIR ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dreamrie.commands.files import FILE_HELP
from dreamrie.errors import ConfigError
from dreamrie.llm.evaluating import Base, Questions, evaluate, table
from dreamrie.llm.models import QUANTIZERS
from dreamrie.trainer import make_accelerator

HELP = "accuracy of a language model and its adapters on questions with choices"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    add = parser.add_argument
    add("--model", required=True, help="Hub id, local folder, GGUF file, or smollm2-135m")
    add("--revision", help="branch, tag or commit of the Hub repository")
    add("--base_precision", choices=("fp32", "bf16"), default="fp32", help="of the model (fp32)")
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="PLACE",
        help="files, or folders that hold TASK.test.jsonl",
    )
    add("--quantization", choices=tuple(QUANTIZERS), help="as in training (none)")
    add("--adapter", nargs="+", default=[], metavar="DIR", help=FILE_HELP + "; several: seeds")
    add("--base", action="store_true", help="beside adapters, also the model without one")
    add("--tasks", nargs="+", default=[], metavar="TASK", help="only these (all)")
    add("--rows_per_task", type=int, metavar="N", help="only the first N rows of each task (all)")
    add(
        "--by",
        choices=("likelihood", "generation"),
        default="likelihood",
        help="the likeliest choice, or the first one named in a greedy answer (likelihood)",
    )
    add("--answers", choices=("name", "text"), default="name", help="as in training (name)")
    add("--template", choices=("chat", "plain"), help="as in training (the model's own)")
    add("--max_length", type=int, metavar="N", help="as in training (1024, or the context)")
    add("--batch_size", type=int, default=8, metavar="N", help="questions at a time (8)")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON that grows by a task at a time; what stands there is not measured again",
    )


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Args:
        options: parsed.

    Returns:
        0. What cannot be used is an error.

    Raises:
        ConfigError: a number is too small, or an adapter is named twice.
    """
    for name in ("rows_per_task", "max_length", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}.")
    twice = sorted({name for name in options.adapter if options.adapter.count(name) > 1})
    if twice:
        raise ConfigError(f"--adapter names {twice[0]} more than once; name each once.")
    alone = [None] if options.base or not options.adapter else []
    questions = Questions(
        data=options.data,
        tasks=options.tasks,
        rows_per_task=options.rows_per_task,
        answers=options.answers,
        template=options.template,
        max_length=options.max_length,
        by=options.by,
        batch_size=options.batch_size,
    )
    found = evaluate(
        Base(options.model, options.revision, options.base_precision, options.quantization),
        [*alone, *options.adapter],
        questions,
        device=make_accelerator().device,
        record=options.output,
    )
    sys.stdout.write(table(found) + "\n")
    return 0
