"""Start the app: python -m app, then open http://127.0.0.1:7860.

`--help` lists the flags. Exit code: 0 stopped, 2 something given cannot work.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from dreamrie.errors import ConfigError, DreamrieError
from dreamrie.runlog import exit_code, start_logging

_MIN_PASSWORD = 8
_LOCAL = ("127.0.0.1", "localhost", "::1")


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m app",
        description="Train, watch, generate and compare concepts in a browser.",
    )
    parser.add_argument(
        "--pretrained_model_name_or_path",
        metavar="MODEL",
        help="hub id, alias (sd2-base, ...) or folder; default: the small model that comes with dreamrie, a toy",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub repository")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("runs/app"),
        metavar="FOLDER",
        help="everything that is uploaded, trained and drawn (runs/app)",
    )
    parser.add_argument("--port", type=int, default=7860, help="to listen on (7860)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1, this computer only)"
    )
    parser.add_argument(
        "--auth",
        action="append",
        default=[],
        metavar="NAME:PASSWORD",
        help=f"who may come in, passwords of {_MIN_PASSWORD} characters or more; several times for several people",
    )
    parser.add_argument(
        "--share", action="store_true", help="also through gradio's relay; needs --auth"
    )
    parser.add_argument("--browser", action="store_true", help="open the page in a browser")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more, show tracebacks")
    return parser


def read_auth(words: Sequence[str], share: bool, host: str) -> list[tuple[str, str]]:
    """Names and passwords.

    Args:
        words: NAME:PASSWORD each.
        share: whether the page can be reached from elsewhere.
        host: address to listen on.

    Returns:
        Pairs.

    Raises:
        ConfigError: one is no pair, a password is short, or none is there where one is needed.
    """
    pairs = []
    for word in words:
        name, colon, password = word.partition(":")
        if not (name and colon) or len(password) < _MIN_PASSWORD:
            raise ConfigError(
                f"--auth is NAME:PASSWORD with a password of at least {_MIN_PASSWORD} characters; that of "
                f"{name or 'nobody'} is not."
            )
        pairs.append((name, password))
    open_to = "--share" if share else f"--host {host}" if host not in _LOCAL else ""
    if open_to and not pairs:
        raise ConfigError(
            f"{open_to} lets others reach this page, so it needs --auth NAME:PASSWORD. Without it the page is for "
            "this computer only."
        )
    return pairs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the app until it is stopped.

    Args:
        argv: command line, default that of the process.

    Returns:
        The exit code.
    """
    options = make_parser().parse_args(argv)
    start_logging(options.verbose)
    try:
        auth = read_auth(options.auth, options.share, options.host)
        serve(options, auth)
    except (DreamrieError, KeyboardInterrupt) as error:
        return exit_code(error, options.verbose)
    return 0


def serve(options: argparse.Namespace, auth: Sequence[tuple[str, str]]) -> None:
    """Open the studio, serve the page, close both at Ctrl-C or SIGTERM.

    Args:
        options: of the command line.
        auth: who may come in.

    Raises:
        ConfigError: the port is taken.
    """
    from app.studio import AppSettings, Studio

    settings = AppSettings(options.data, options.pretrained_model_name_or_path, options.revision)
    # Gradio reads these when it is imported: uploads go into the data folder, nothing is sent anywhere.
    os.environ["GRADIO_TEMP_DIR"] = str(settings.data.absolute() / "incoming")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if settings.model is None:
        # The toy model is too small to share: beside a browser its threads wait for each other most of the time.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    print("Loading the model ...", flush=True)
    # The page takes as long to import as the model to load, which happens in another process.
    threading.Thread(target=importlib.import_module, args=("app.main",), daemon=True).start()
    studio = Studio(settings)
    try:
        from app.main import launch

        try:
            page, url = launch(
                studio,
                port=options.port,
                host=options.host,
                share=options.share,
                auth=auth,
                browser=options.browser,
            )
        except OSError as error:
            raise ConfigError(
                f"the page cannot be served on port {options.port}: {error}. Choose another --port."
            ) from error
        print(f"dreamrie is at {url}   (data: {options.data}; Ctrl-C stops)", flush=True)
        stopped.wait()
        print("Stopping; a training saves what it has learned ...", flush=True)
        page.close()
    finally:
        studio.close()


if __name__ == "__main__":
    sys.exit(main())
