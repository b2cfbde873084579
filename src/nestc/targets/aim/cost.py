"""A modelled cost of a region from its shapes alone, before anything is mapped: rows to open, buffers to fill.

Plans are made with it; once a partition is compiled, the timing simulator knows better.
"""

from __future__ import annotations

from math import ceil

from nestc.graph.region import Region
from nestc.runtime.aim.machine import AimMachine
from nestc.targets.aim.recurrent import read_region


def seconds(region: Region, machine: AimMachine, rounded: str | None = None) -> float:
    """Modelled seconds of a region that is taken."""
    products = read_region(region, rounded)
    return machine.seconds(sum(ticks(each.m, each.k, each.rows, machine) for each in products))


def ticks(m: int, k: int, vectors: int, machine: AimMachine) -> int:
    """Ticks of the plain mapping: K in slices of a row, outputs in passes over all banks, sums read after each row.

    The period of a row is nRCDRDMAC + (columns - 1) nCCDS + nRTP + nRP; reading its sums takes two changes of mode
    more (docs/aim.md).
    """
    timing = machine.timing
    slices, passes = ceil(k / machine.row_elements), ceil(m / machine.outputs)
    columns = ceil(k / slices / machine.lanes)
    row = timing["nRCDRDMAC"] + (columns - 1) * timing["nCCDS"] + timing["nRTP"] + timing["nRP"]
    sums = 2 * timing["nMODCH"]
    fill = columns * timing["nCCDS"] + timing["nMODCH"]
    transfers = slices * columns + passes * slices * machine.channels
    return vectors * (slices * (passes * (row + sums) + fill) + transfers)


def rows_needed(m: int, k: int, machine: AimMachine) -> int:
    """Rows of every bank that a matrix takes at least."""
    return ceil(ceil(m / machine.outputs) * ceil(k / machine.lanes) / machine.columns)
