"""The search among the ways to compute one region: algorithms, then parameters around the best, then confirmation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from math import inf

import numpy as np

from nestc.kernels.api import CpuMachine, Family
from nestc.kernels.families import alternatives
from nestc.kernels.ways import around, named, parametrised
from nestc.targets.cpu.machine import machine as machine_called
from nestc.tune.measure import time_ways
from nestc.tune.store import WORTH, Times
from nestc.tune.task import Task

AT_ONCE = 6
"""Ways that are compiled and measured in turns with the default, so that something is known early."""

NEAR = 1.15
"""Other parameters of a way may pay if it takes at most so many times what the best one takes."""

ROUNDS, CONFIRMING = 11, 21
"""Runs of a way when it is looked at, and when it is to replace the default."""

TimeWays = Callable[[Task, Sequence[str], int], Mapping[str, Sequence[float]]]
"""Seconds of runs of ways, by name, the first one being the default (see `measure.time_ways`)."""


@dataclass(frozen=True)
class Found:
    """What a search has found: seconds of each way that was measured, the default first. Empty: there was no time.

    ``done``: whether everything was looked at that seems worth it; else the time was up.
    """

    key: str
    times: Times
    done: bool


def search(task: Task, left: Callable[[], float], time: TimeWays = time_ways) -> Found:
    """Measure the ways of a region until `left` says that no seconds are left.

    Times are medians of how a way compares with the default in the same round, times the median of the default, so
    that a machine which drifts harms nobody. What is to replace the default is measured again, alone with it.
    """
    machine = machine_called(task.arch)
    default = alternatives(task.region, machine, task.exact)[0].name
    times: dict[str, float] = {}
    tried: set[str] = set()
    while left() > 0:
        batch = unknown(task, machine, times, tried)[:AT_ONCE]
        if not batch:
            return Found(task.key, _confirmed(task, default, times, time), done=True)
        tried |= set(batch)
        _add(times, default, time(task, [default, *(name for name in batch if name != default)], ROUNDS))
    return Found(task.key, _confirmed(task, default, times, time), done=False)


def unknown(task: Task, machine: CpuMachine, times: Times, tried: Set[str] = frozenset()) -> list[str]:
    """The ways that seem worth a measurement after what is known: every algorithm, those that the model expects to be
    fast first; then other parameters around the best way, and around the usual one of each that is near to it.

    Those that were `tried` in vain are left out."""
    ways = {way.name: way for way in alternatives(task.region, machine, task.exact)}
    usual = [name for name, way in ways.items() if not parametrised(way)]
    if missing := [name for name in usual if name not in times and name not in tried]:
        return missing
    best = min(times, key=times.__getitem__)
    centres = [best, *(name for name in usual if name != best and times.get(name, inf) <= NEAR * times[best])]
    families: list[Family | None] = [ways[name] if name in ways else named(name, task.region) for name in centres]
    beside = [each.name for way in families if way is not None for each in around(way, task.region, machine)]
    return [name for name in dict.fromkeys(beside) if name not in times and name not in tried]


def _confirmed(task: Task, default: str, times: dict[str, float], time: TimeWays) -> dict[str, float]:
    """The times, after what would replace the default has been measured once more; the next one if that refutes it.

    A way counts with the worse of both results; and with the default's if it is not faster in three rounds of four.
    """
    for _ in range(2):
        best = min(times, key=times.__getitem__, default=default)
        if best == default or times[best] > WORTH * times[default]:
            break
        again = time(task, [default, best], CONFIRMING)
        ratios = _ratios(again[default], again[best])
        refuted = float(np.percentile(ratios, 75)) >= 1
        ratio = max(float(np.median(ratios)), times[best] / times[default])
        times[best] = times[default] * (max(1.0, ratio) if refuted else ratio)
        if times[best] <= WORTH * times[default]:
            break
    return times


def _add(times: dict[str, float], default: str, measured: Mapping[str, Sequence[float]]) -> None:
    """Put what was measured beside what is known, in terms of the default's time, which is known from the first."""
    seconds = times.setdefault(default, float(np.median(measured[default])))
    for name, runs in measured.items():
        if name != default:
            times[name] = seconds * float(np.median(_ratios(measured[default], runs)))


def _ratios(default: Sequence[float], other: Sequence[float]) -> np.ndarray:
    """How a way compares with the default, round by round."""
    rounds = min(len(default), len(other))
    return np.asarray(other[:rounds]) / np.asarray(default[:rounds])
