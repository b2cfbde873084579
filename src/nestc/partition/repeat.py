"""Repeated runs and their median; programs to compare take turns, so that what disturbs one disturbs all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Run = Callable[[], float]
"""Runs a program once and returns the seconds that count."""

UNSTEADY = 0.3
"""A spread above this part of the median is measured again."""

TRIES = 3
"""Measurements of one thing at most; the steadiest is kept."""

BLOCKS = 5
"""Turns that a program has at least, where it takes turns with others."""

SETTLE_SECONDS = 0.01
"""Idle time when the program changes: pools of vendors' runtimes spin for a while after a run, on shared cores."""

REST_SECONDS = 0.1
"""Idle time between rounds, so that they do not all fall into one slow moment."""

SHORT_SECONDS = 0.005
"""A program below that finds its weights in a cache, from which other programs have driven them when its turn comes."""

LEAST_SECONDS = 1e-9
"""A measured time is never zero, though the clock may not see it (a value that only gets another shape)."""


@dataclass(frozen=True)
class Effort:
    """A measurement is of at least ``runs`` runs and ``seconds``, but ends, with three, once it took ``longest``.

    If the first run alone takes that long it is the only one. Of several ``rounds`` the one with the least median
    counts: a processor that others share runs slower by a third for tenths of a second at a time.
    """

    runs: int = 15
    seconds: float = 0.03
    longest: float = 1.0
    rounds: int = 1


@dataclass(frozen=True)
class Timed:
    """The median of ``runs`` runs and the distance of their quartiles, in seconds."""

    seconds: float
    spread: float
    runs: int


def together(programs: Sequence[Run], effort: Effort) -> list[Timed]:
    """Time programs that have run once, in blocks that go round until all of them have had enough runs.

    What varies by more than `UNSTEADY` is measured again, up to `TRIES` times, and the steadiest kept.
    """
    if not programs:
        return []
    best = _round(programs, effort)
    for _ in range(effort.rounds - 1):
        time.sleep(REST_SECONDS)
        best = [min(pair, key=lambda each: each.seconds) for pair in zip(best, _round(programs, effort), strict=True)]
    for _ in range(TRIES - effort.rounds):
        again = [index for index, timed in enumerate(best) if timed.spread > UNSTEADY * timed.seconds]
        if not again:
            break
        for index, timed in zip(again, _round([programs[index] for index in again], effort), strict=True):
            best[index] = min(best[index], timed, key=lambda each: each.spread / each.seconds)
    return best


def _round(programs: Sequence[Run], effort: Effort) -> list[Timed]:
    """One measurement of each, in turns."""
    times: list[list[float]] = [[] for _ in programs]
    spent = [0.0 for _ in programs]
    waiting = list(range(len(programs)))
    alone = len(programs) == 1
    # Each round has turns of its own.
    block = effort.seconds if alone else effort.seconds / max(2, BLOCKS // effort.rounds)
    while waiting:
        for index in list(waiting):
            _block(programs[index], times[index], spent, index, block, alone)
            if _enough(times[index], spent[index], effort):
                waiting.remove(index)
        waiting = waiting[1:] + waiting[:1]  # nobody always follows the same one
    return [_timed(each) for each in times]


def _block(program: Run, times: list[float], spent: list[float], index: int, seconds: float, alone: bool) -> None:
    """Runs of one program for about so long, at least one; what another one before has changed does not count."""
    if not alone:
        time.sleep(SETTLE_SECONDS)
    if (not alone and (not times or times[-1] < SHORT_SECONDS)) or not times:
        program()
    begin = time.perf_counter()
    while True:
        times.append(program())
        took = time.perf_counter() - begin
        if took >= seconds:
            break
    spent[index] += took


def _enough(times: Sequence[float], spent: float, effort: Effort) -> bool:
    return (len(times) >= effort.runs and spent >= effort.seconds) or (len(times) >= 3 and spent >= effort.longest)


def _timed(times: Sequence[float]) -> Timed:
    low, middle, high = (float(value) for value in np.percentile(times, (25, 50, 75)))
    return Timed(max(middle, LEAST_SECONDS), high - low, len(times))
