"""Interleaved timing: engines take turns in small blocks, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Run = Callable[[], object]

SETTLE_SECONDS = 0.02
"""Idle time before each block. Thread pools of onnxruntime and openvino spin for a while after a run, waiting for more
work (they are faster for it, so it stays on); on shared cores they would slow down whoever comes next. After a few
milliseconds they sleep."""

BLOCK_SECONDS = 0.005
"""A block repeats a short run for about this long, since one run of some microseconds is mostly the clock's noise."""

MAX_REPEATS = 200


@dataclass(frozen=True)
class Timing:
    """Times of one engine: the median of each block, in milliseconds, and the shortest single run."""

    samples_ms: tuple[float, ...]
    min_ms: float

    @property
    def median_ms(self) -> float:
        """Median over the blocks."""
        return statistics.median(self.samples_ms)


def interleave(engines: Mapping[str, Run], rounds: int) -> dict[str, Timing]:
    """Time every engine in `rounds` blocks, in an order that rotates from round to round.

    A block is: idle time, one run that warms the caches (the engine before has filled them with its own weights), then
    as many timed runs as fill BLOCK_SECONDS, at least one.
    """
    if rounds < 1:
        raise ValueError("there must be at least one round")
    repeats = {name: _repeats(run) for name, run in engines.items()}
    samples: dict[str, list[float]] = {name: [] for name in engines}
    shortest = dict.fromkeys(engines, math.inf)
    names = list(engines)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times = _block(engines[name], repeats[name])
            samples[name].append(statistics.median(times))
            shortest[name] = min(shortest[name], *times)
    return {name: Timing(tuple(samples[name]), shortest[name]) for name in names}


def _repeats(run: Run) -> int:
    """How many runs make a block."""
    run()
    start = time.perf_counter()
    run()
    took = time.perf_counter() - start
    return max(1, min(MAX_REPEATS, math.ceil(BLOCK_SECONDS / max(took, 1e-9))))


def _block(run: Run, repeats: int) -> list[float]:
    """Times of one block, in milliseconds."""
    time.sleep(SETTLE_SECONDS)
    run()
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return times
