"""Times of several actions side by side: A B C A B C ..., so that a busy machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Action = Callable[[], object]

KERNELS = 15
"""Rows of a table of kernels."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one action, one number a round.

    Attributes:
        name: of the action.
        samples: wall time from call to finished work.
        events: time on the device between the events around the same calls; empty on the CPU.
    """

    name: str
    samples: tuple[float, ...]
    events: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Of the wall times."""
        return statistics.median(self.samples)

    @property
    def fastest(self) -> float:
        """Smallest wall time."""
        return min(self.samples)

    def facts(self) -> dict[str, float | int | str]:
        """What goes into a file."""
        found: dict[str, float | int | str] = {
            "name": self.name,
            "median_ms": round(self.median, 4),
            "fastest_ms": round(self.fastest, 4),
            "rounds": len(self.samples),
        }
        if self.events:
            found["device_median_ms"] = round(statistics.median(self.events), 4)
        return found


def wait_for(device: torch.device) -> None:
    """Return when everything given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _once(action: Action, device: torch.device) -> tuple[float, float | None]:
    """Wall time and, on a GPU, time between events, both in milliseconds."""
    wait_for(device)
    started = time.perf_counter()
    if device.type != "cuda":
        action()
        return 1e3 * (time.perf_counter() - started), None
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    action()
    after.record()
    torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started), before.elapsed_time(after)


def interleaved(
    actions: Mapping[str, Action],
    seconds: float,
    device: torch.device,
    least: int = 3,
    warmups: int = 2,
) -> list[Timing]:
    """Time actions in turns.

    Args:
        actions: by name; each is called again and again and may change its own state.
        seconds: share of each action, without its warm-up; a slow one gets fewer rounds.
        device: where they work.
        least: rounds that each action gets in any case.
        warmups: calls before the clock runs.

    Returns:
        One timing for each action, in the order given.
    """
    walls: dict[str, list[float]] = {name: [] for name in actions}
    events: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        for _ in range(warmups):
            action()
    open_ = list(actions)
    while open_:
        for name in open_:
            wall, event = _once(actions[name], device)
            walls[name].append(wall)
            if event is not None:
                events[name].append(event)
        open_ = [
            name for name in open_ if len(walls[name]) < least or sum(walls[name]) < 1e3 * seconds
        ]
    return [Timing(name, tuple(walls[name]), tuple(events[name])) for name in actions]


def table(timings: Sequence[Timing], unit: str) -> str:
    """The timings as text; the last column counts in times of one of them.

    Args:
        timings: of one round of measurements.
        unit: name of the timing that counts as 1.

    Returns:
        A line for each, after a heading.
    """
    one = next(timing for timing in timings if timing.name == unit).median
    on_device = any(timing.events for timing in timings)
    heading = f"{'':<34} {'median ms':>10} {'fastest':>9} {'rounds':>6}"
    lines = [heading + (f" {'device ms':>10}" if on_device else "") + f"   times {unit}"]
    for timing in timings:
        line = f"{timing.name:<34} {timing.median:10.2f} {timing.fastest:9.2f} {len(timing.samples):6d}"
        if on_device:
            line += f" {statistics.median(timing.events):10.2f}"
        lines.append(f"{line}   {timing.median / one:8.3f}")
    return "\n".join(lines)


def machine(device: torch.device) -> dict[str, str | int]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": str(torch.__version__), "threads": torch.get_num_threads()}


def kernels(step: Callable[[], object], device: torch.device) -> tuple[int, str]:
    """Count what one call runs on the device (on the CPU: operators), and list the dearest.

    Args:
        step: what to look at; it has run before.
        device: where it works.

    Returns:
        How many, and a table by name.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    wait_for(device)
    with profile(activities=activities, acc_events=True) as record:
        step()
        wait_for(device)
    found: dict[str, tuple[int, float]] = {}
    for event in record.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if device.type == "cuda":
            spent = event.self_device_time_total if on_device else 0.0
            if not on_device:
                continue
        else:
            spent = event.self_cpu_time_total
        if event.key.startswith("Optimizer."):
            continue
        found[event.key] = (event.count, spent)
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    total = sum(count for count, _ in found.values())
    lines = [f"{'count':>7} {'ms':>9}  {'kernel' if device.type == 'cuda' else 'operator'}"]
    lines += [
        f"{count:7d} {spent / 1e3:9.3f}  {name[:90]}" for name, (count, spent) in ordered[:KERNELS]
    ]
    lines.append(f"{total:7d} {sum(spent for _, spent in found.values()) / 1e3:9.3f}  all")
    return total, "\n".join(lines)
