"""One layer on several devices: ways to share its output, and which of them takes the least modelled time."""

from __future__ import annotations

from itertools import pairwise

from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.timing import RTL, Timing
from nestc.targets.vta.layer import Layer
from nestc.targets.vta.model import Estimate, whole
from nestc.targets.vta.schedule import estimated
from nestc.targets.vta.tiling import Share


def shares(layer: Layer, count: int, config: VtaConfig) -> list[list[Share]]:
    """Ways to give every device a part of the output: by output blocks, and by rows.

    Parts are as equal as whole blocks and rows allow. Devices that would get nothing are left out, so a list may be
    shorter than `count`.
    """
    every = whole(layer, config)
    by_blocks = [Share(cut, every.rows) for cut in _parts(every.blocks[1], count)]
    by_rows = [Share(every.blocks, cut) for cut in _parts(every.rows[1], count)]
    found = [by_blocks]
    if by_rows[0] != by_blocks[0]:
        found.append(by_rows)
    return found


def choose_split(layer: Layer, count: int, config: VtaConfig, timing: Timing = RTL) -> list[Share]:
    """The way to share a layer among up to `count` devices that takes the least modelled time.

    The devices run at once and share one DRAM channel, so a way takes as long as its slowest device, or as all their
    transfers together. A layer that gains nothing stays on one device.
    """
    ways = [[whole(layer, config)], *(shares(layer, count, config) if count > 1 else [])]
    return min(ways, key=lambda way: (split_cycles(layer, way, config, timing), len(way)))


def split_cycles(layer: Layer, way: list[Share], config: VtaConfig, timing: Timing = RTL) -> int:
    """Modelled cycles of a layer whose shares run on a device each, with one DRAM channel for all."""
    every, known = whole(layer, config), dict[tuple[int, int, bool, bool], Estimate]()
    estimates: list[Estimate] = []
    for share in way:
        (first, last), (top, bottom) = share.blocks, share.rows
        # Shares of one size take the same time but for padding above and below, which costs nothing.
        alike = last - first, bottom - top, top == every.rows[0], bottom == every.rows[1]
        if alike not in known:
            known[alike] = estimated(layer, share, config, timing)
        estimates.append(known[alike])
    channel = sum(each.load + each.store for each in estimates)
    return max(channel if len(way) > 1 else 0, *(each.cycles for each in estimates))


def seconds(layer: Layer, config: VtaConfig, timing: Timing = RTL) -> float:
    """Modelled time of a whole layer on one device, for the comparison with other targets before anything is tiled."""
    return estimated(layer, whole(layer, config), config, timing).cycles / config.clock_hz


def _parts(size: int, count: int) -> list[tuple[int, int]]:
    """`size` cut into `count` ranges that differ by one at most, without empty ones."""
    edges = [size * at // count for at in range(count + 1)]
    return [(low, high) for low, high in pairwise(edges) if low < high]
