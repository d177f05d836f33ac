"""Decodes damaged pictures under limits; one line of JSON for each. Run by test_mutated_images.py.

    python -m tests.fuzz.decode_worker FIRST END FOLDER

The kernel ends it when a picture takes more than 2 s, and refuses more than 1 GB beyond what the interpreter holds.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from pathlib import Path

from dreamrie.diffusion.images import load_layers
from dreamrie.errors import ImageError
from tests.fuzz.picture_damage import damaged, sound_pictures

LIMIT_S = 2.0
LIMIT_BYTES = 2**30


def limit_memory() -> None:
    """Of the address space; what is mapped by now is free."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limit = pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def outcome_of(path: Path) -> str:
    """What became of a file, in one or two words."""
    try:
        layers = load_layers(path)
    except ImageError as error:
        if str(path) not in str(error):
            return "crashed without naming the file"
        return f"refused {type(error.__cause__).__name__ if error.__cause__ else 'by a check'}"
    except BaseException as error:  # this is what is looked for
        return f"crashed {type(error).__name__}: {error}"
    if layers.color.mode != "RGB" or min(layers.color.size) < 1:
        return f"crashed into {layers.color}"
    if layers.alpha and (layers.alpha.mode, layers.alpha.size) != ("L", layers.color.size):
        return f"crashed into {layers.alpha}"
    return "decoded"


def main() -> None:
    first, end = int(sys.argv[1]), int(sys.argv[2])
    path, sound = Path(sys.argv[3]) / "damaged picture.png", sound_pictures()
    path.write_bytes(sound["JPEG with facts"])
    load_layers(path)  # whatever is imported late is imported now
    limit_memory()
    for number in range(first, end):
        form, damage, content = damaged(number, sound)
        path.write_bytes(content)
        # Seconds of the processor, so that a busy machine does not count; the default action is to end the process.
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        started = time.process_time()
        outcome = outcome_of(path)
        spent = time.process_time() - started
        signal.setitimer(signal.ITIMER_PROF, 0)
        found = {"number": number, "form": form, "damage": damage, "outcome": outcome, "s": spent}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
