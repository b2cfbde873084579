"""What a processor draws while it runs: a figure that is assumed, since most machines do not let a process read it."""

from __future__ import annotations

import math

from nestc.errors import TargetError
from nestc.host import available_cpus

WATTS_PER_THREAD = 10.0
"""Assumed. Server processors state 2 to 8 W a core as thermal design power and reach more with few cores busy; memory
is on top. Energies made of it are *estimated*; give the option ``watts`` for a figure of your own machine."""


def cpu_watts(given: float | None, threads: int | None, target: str) -> float:
    """`given`, or what is assumed for that many threads (default: all this process may use). Raises TargetError."""
    if given is None:
        return WATTS_PER_THREAD * (threads or available_cpus())
    return require_figure(given, "watts", target)


def require_figure(value: float, option: str, target: str, above: bool = False) -> float:
    """`value` if it is a finite number from 0 on (`above`: above 0). Raises TargetError."""
    if not math.isfinite(value) or value < 0 or (above and value == 0):
        least = "above 0" if above else "0 or more"
        raise TargetError(f"option {option!r} of target {target} is {value}; it must be {least}")
    return value
