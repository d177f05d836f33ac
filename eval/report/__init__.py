"""Pages and plots about scores: the only home of matplotlib within eval/, which is imported when it is needed."""

from __future__ import annotations

from pathlib import Path

from eval.results import Result


def write_report(result: Result) -> Path:
    """Write `report.html` into the folder of a result; see `eval.report.html`.

    Args:
        result: scored run, whose pictures lie in its folder.

    Returns:
        Path of the page.
    """
    from eval.report import html

    return html.write_report(result)
