"""Print the count of mutants, and the figures that tests report, at the end of every test run that met one.

`tests/conftest.py` imports `pytest_terminal_summary` from here. The counts travel as user properties of the reports,
so they are also right when tests run in several processes.
"""

from __future__ import annotations

import os
from typing import Any

from tests.margins import WORST

PROPERTY = "mutant_caught"
# `record_property(FIGURE, "10 kills: 0 failures")` in a test prints the line at the end of the run.
FIGURE = "figure"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Write `mutants: N caught: N survivors: 0`, and on request how close the laws came to their bars."""
    if os.environ.get("DREAMRIE_MARGINS") and WORST:
        terminalreporter.section("margins: worst value that passed, bar")
        for law, (value, bar) in sorted(WORST.items()):
            terminalreporter.write_line(f"{law:<60} {value:9.2e} {bar:9.1e}")
    verdicts: dict[str, bool] = {}
    figures: list[str] = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue
            for key, value in getattr(report, "user_properties", ()):
                if key == PROPERTY:
                    name, caught = value
                    verdicts[name] = caught
                elif key == FIGURE:
                    figures.append(value)
    if figures:
        terminalreporter.section("figures")
        for line in figures:
            terminalreporter.write_line(line)
    if not verdicts:
        return
    survivors = sorted(name for name, caught in verdicts.items() if not caught)
    terminalreporter.section("mutants")
    count = len(verdicts)
    terminalreporter.write_line(
        f"mutants: {count} caught: {count - len(survivors)} survivors: {len(survivors)}"
    )
    for name in survivors:
        terminalreporter.write_line(f"  survivor: {name}")
