"""Offline memory planner: buffers with a size and a lifetime become offsets in one arena.

Greedy by size with best fit, as in Y. Pisarchyk and J. Lee, "Efficient Memory Management for Deep Neural Net Inference"
(2020), which TFLite's ArenaPlanner and Arm Vela's greedy allocation also use; here three orders are tried and the
smallest arena is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Bytes; a cache line on every CPU we know, and the widest vector register (AVX-512)."""


@dataclass(frozen=True)
class Buffer:
    """A buffer of `nbytes` that must keep its contents from step `first` through step `last` (both included)."""

    name: str
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class ArenaPlan:
    """Byte offset of every buffer, and the size of the arena in bytes."""

    offsets: Mapping[str, int]
    nbytes: int


def lower_bound(buffers: Sequence[Buffer], alignment: int = ALIGNMENT) -> int:
    """The most bytes that are live at once: no arena can be smaller."""
    changes: dict[int, int] = {}
    for buffer in buffers:
        size = _aligned(buffer.nbytes, alignment)
        changes[buffer.first] = changes.get(buffer.first, 0) + size
        changes[buffer.last + 1] = changes.get(buffer.last + 1, 0) - size
    live = peak = 0
    for step in sorted(changes):
        live += changes[step]
        peak = max(peak, live)
    return peak


def plan_arena(buffers: Sequence[Buffer], alignment: int = ALIGNMENT) -> ArenaPlan:
    """Place the buffers so that no two that live at the same step overlap; offsets are multiples of `alignment`.

    Raises ValueError for a negative size, an empty lifetime, or a name given twice.
    """
    _check(buffers)
    bound = lower_bound(buffers, alignment)
    best: ArenaPlan | None = None
    for order in _ORDERS:
        plan = _place(sorted(buffers, key=order), alignment)
        if best is None or plan.nbytes < best.nbytes:
            best = plan
        if best.nbytes == bound:
            break
    assert best is not None
    return best


# Size first is the published heuristic; the other two win on long chains, where equal sizes alternate.
_ORDERS: tuple[Callable[[Buffer], tuple[int, ...]], ...] = (
    lambda buffer: (-buffer.nbytes, buffer.first, buffer.last),
    lambda buffer: (-buffer.nbytes * (buffer.last - buffer.first + 1), buffer.first),
    lambda buffer: (buffer.first, -buffer.nbytes),
)


def _place(order: Sequence[Buffer], alignment: int) -> ArenaPlan:
    placed: list[tuple[int, int, Buffer]] = []  # (offset, end, buffer), sorted by offset
    offsets: dict[str, int] = {}
    arena = 0
    for buffer in order:
        size = _aligned(buffer.nbytes, alignment)
        if size == 0:
            offsets[buffer.name] = 0
            continue
        offset = _best_gap(size, [(lo, hi) for lo, hi, other in placed if _overlap(buffer, other)])
        offsets[buffer.name] = offset
        arena = max(arena, offset + size)
        placed.append((offset, offset + size, buffer))
        placed.sort(key=lambda item: item[0])
    return ArenaPlan(offsets, arena)


def _best_gap(size: int, taken: Sequence[tuple[int, int]]) -> int:
    """Offset of the smallest gap of at least `size` between the `taken` ranges (sorted), or of the end of them all."""
    best: tuple[int, int] | None = None
    end = 0
    for lo, hi in taken:
        gap = lo - end
        if gap >= size and (best is None or gap < best[0]):
            best = (gap, end)
        end = max(end, hi)
    return end if best is None else best[1]


def _overlap(a: Buffer, b: Buffer) -> bool:
    return a.first <= b.last and b.first <= a.last


def _aligned(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment


def _check(buffers: Sequence[Buffer]) -> None:
    names: set[str] = set()
    for buffer in buffers:
        if buffer.nbytes < 0 or buffer.last < buffer.first:
            raise ValueError(f"buffer {buffer.name!r}: {buffer.nbytes} bytes, live in [{buffer.first}, {buffer.last}]")
        if buffer.name in names:
            raise ValueError(f"buffer {buffer.name!r} is given twice")
        names.add(buffer.name)
