"""Print the count of mutants at the end of every test run that met one.

`tests/conftest.py` imports `pytest_terminal_summary` from here. The counts travel as user properties of the reports,
so they are also right when tests run in several processes.
"""

from __future__ import annotations

from typing import Any

PROPERTY = "mutant_caught"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Write `mutants: N caught: N survivors: 0`."""
    verdicts: dict[str, bool] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue
            for key, value in getattr(report, "user_properties", ()):
                if key == PROPERTY:
                    name, caught = value
                    verdicts[name] = caught
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
