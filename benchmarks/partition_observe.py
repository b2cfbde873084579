"""Running the plans that benchmarks/partition.py compares: in turns, by the runtime's clock or by the wall clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import nestc
from nestc.measure import interleave

IN_FLIGHT = 4
"""Requests under way at a time where throughput is seen."""

REQUESTS = 10
"""Requests of a run that shows throughput, the filling and the emptying of the pipeline included."""

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Seen:
    """Milliseconds (of energy: millijoules) of each run, and how much of the median was modelled by a simulator."""

    samples_ms: tuple[float, ...]
    modelled_ms: float = 0.0

    @property
    def median_ms(self) -> float:
        """Median of the runs."""
        return statistics.median(self.samples_ms)

    @property
    def spread_percent(self) -> float:
        """Half of what lies between the quartiles (of few runs: between all), over the median."""
        low, high = min(self.samples_ms), max(self.samples_ms)
        if len(self.samples_ms) > 3:
            low, _, high = statistics.quantiles(self.samples_ms, n=4)
        return 50 * (high - low) / self.median_ms

    def to_json(self) -> dict[str, Any]:
        """As the benchmark prints it."""
        return {
            "median": self.median_ms,
            "spread_percent": self.spread_percent,
            "modelled": self.modelled_ms,
            "runs": len(self.samples_ms),
        }


def by_runtime_clock(
    executables: Mapping[str, nestc.Executable], inputs: Inputs, rounds: int, energy: bool = False
) -> dict[str, Seen]:
    """Run each executable `rounds` times in turns; the latency by the clock of its own timeline, or the `energy`.

    For those with simulated devices: what their simulators take is not in it, what the CPU takes is measured.
    """
    for executable in executables.values():
        executable.run(inputs)
    samples: dict[str, list[float]] = {name: [] for name in executables}
    modelled: dict[str, list[float]] = {name: [] for name in executables}
    for name in _turns(list(executables), rounds):
        executable = executables[name]
        # Beside simulators the runtime calls what it measures several times; without any it is done here.
        calls = 1 if any(map(_computes, executable.timeline())) else 4
        found = [_run(executable, inputs, energy) for _ in range(calls)][-3:]
        samples[name].append(statistics.median(value for value, _ in found))
        modelled[name].append(found[-1][1])
    return {name: Seen(tuple(samples[name]), statistics.median(modelled[name])) for name in executables}


def _run(executable: nestc.Executable, inputs: Inputs, energy: bool) -> tuple[float, float]:
    """Milliseconds, or millijoules, of a run, and how many of them partitions on simulated devices took."""
    executable.run(inputs)
    if energy:
        rows = [(row["kind"], 1e3 * (row["joules"] or 0.0)) for row in executable.energy()]
        return sum(joules for _, joules in rows), sum(joules for kind, joules in rows if kind == "modelled")
    marks = executable.timeline()
    spent = sum(mark["end_us"] - mark["start_us"] for mark in marks if _computes(mark))
    return max(mark["end_us"] for mark in marks) / 1e3, spent / 1e3


def _computes(mark: Mapping[str, Any]) -> bool:
    """Whether a row of a timeline is a partition on a simulated device, and no transfer."""
    return mark["kind"] == "modelled" and "bytes" not in mark


def periods(executables: Mapping[str, nestc.Executable], inputs: Inputs, rounds: int) -> dict[str, Seen]:
    """Milliseconds a request with `IN_FLIGHT` of them under way: the end of the timeline over `REQUESTS`."""
    samples: dict[str, list[float]] = {name: [] for name in executables}
    for name in _turns(list(executables), rounds):
        for _ in executables[name].map([inputs] * REQUESTS, in_flight=IN_FLIGHT):
            pass
        samples[name].append(max(mark["end_us"] for mark in executables[name].timeline()) / 1e3 / REQUESTS)
    return {name: Seen(tuple(samples[name])) for name in executables}


def by_wall_clock(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Seen]:
    """Time calls from outside, in turns; for what is all measured."""
    return {name: Seen(timing.samples_ms) for name, timing in interleave(runs, rounds).items()}


def _turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """All names in each round, in an order that rotates."""
    for turn in range(rounds):
        shift = turn % len(names)
        yield from names[shift:]
        yield from names[:shift]


def ratios(ours: Seen, other: Seen) -> tuple[float, float, float]:
    """Quartiles of the other's time over ours, round by round: above 1 ours is faster. The middle is the median."""
    pairs = [b / a for a, b in zip(ours.samples_ms, other.samples_ms, strict=True)]
    if len(pairs) < 2:
        return pairs[0], pairs[0], pairs[0]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return low, middle, high
