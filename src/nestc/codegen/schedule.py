"""Turn kernel steps into a static SPMD schedule: places in memory, serial lanes, chunk sizes and the fewest barriers.

Nothing here is machine code; `codegen.main` prints a Schedule as LLVM IR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nestc.codegen.arena import ArenaPlan, Buffer, plan_arena

PARALLEL = -1
"""Lane of a step that all workers share; a serial step has the lane of the one worker that runs it (modulo workers)."""

SMALL_SECONDS = 2e-6
"""A step below this cost stays on one worker: halving it would save less than the barriers around it can cost."""

CHUNK_SECONDS = 5e-6
"""Cost of a chunk where the grain is chosen here: long beside an atomic (20 ns), short beside a typical step."""

CHUNKS_PER_WORKER = 16
"""At most so many chunks a worker where the grain is chosen here; more would not balance better."""

SPREAD_SECONDS = 20e-6
"""A serial step above this cost may get a lane of its own, beside independent serial steps."""

BARRIER_SECONDS = 2e-6
WAKE_SECONDS = 30e-6
"""What a meeting and the start of sleeping workers cost on a virtual machine; below that a model is left to one."""
MAX_LANES = 8

LOOSE_GROWTH, LOOSE_BYTES = 1.25, 1 << 18
"""An arena may grow by so much, or up to so many bytes (half of a common L2), to spare barriers."""

SCRATCH_ALIGNMENT = 64


@dataclass(frozen=True)
class Step:
    """One call of the kernel `symbol`, whose parallel loop runs over [0, extent).

    ``args`` are value names and ``writes`` says of each whether the kernel writes it. ``grain`` is the number of
    iterations in a chunk (0: chosen from the cost); ``cost`` is the estimated time on one thread in seconds
    (0: unknown). ``origin`` names the ONNX nodes it computes.
    """

    symbol: str
    args: tuple[str, ...]
    writes: tuple[bool, ...]
    extent: int = 1
    grain: int = 0
    cost: float = 0.0
    origin: tuple[str, ...] = ()


@dataclass(frozen=True)
class Alias:
    """A value without storage of its own: `value` from byte `offset` on (a view, or a part of a concatenation).

    In a `Loop` it lies `stride` bytes further at each turn.
    """

    value: str
    offset: int = 0
    stride: int = 0


@dataclass(frozen=True)
class Loop:
    """The steps [first, end) are issued `turns` times in a row, each time on the next slice of what has a stride.

    What no step outside uses, and has no stride, holds its contents for one turn only.
    """

    first: int
    end: int
    turns: int


@dataclass(frozen=True)
class Place:
    """Where an argument lies: pointer number `slot` of the table, plus `offset` bytes; ``end`` is exclusive."""

    slot: int
    offset: int
    end: int


@dataclass(frozen=True)
class ScheduledStep:
    """A step with the places of its arguments, its lane and grain; ``barrier``: all workers meet before it."""

    step: Step
    places: tuple[Place, ...]
    lane: int
    grain: int
    barrier: bool

    @property
    def chunks(self) -> int:
        """Number of chunks that workers claim."""
        return 1 if self.lane != PARALLEL else -(-self.step.extent // self.grain)


@dataclass(frozen=True)
class Schedule:
    """The whole program. The pointer table holds inputs, outputs, constants, arena and scratch, in this order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[str, ...]
    steps: tuple[ScheduledStep, ...]
    arena_bytes: int
    scratch_bytes: int
    worth_threads: bool

    @property
    def arena_slot(self) -> int:
        """Number of the arena's base in the pointer table."""
        return len(self.inputs) + len(self.outputs) + len(self.constants)

    @property
    def scratch_slot(self) -> int:
        """Number of the scratch memory's base in the pointer table; a worker's own is ``scratch_bytes`` apart."""
        return self.arena_slot + 1

    @property
    def slots(self) -> int:
        """Number of pointers in the table."""
        return self.arena_slot + 2

    @property
    def thread_bytes(self) -> int:
        """Bytes of the shared context that each worker owns: a 64-bit word a step, with which its part is claimed."""
        return -(-8 * len(self.steps) // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT


_Access: TypeAlias = tuple[int, int, int, bool]
"""What a step touches: slot, first byte, end, whether it writes."""

_Call: TypeAlias = tuple[Step, tuple[Place, ...]]
"""One call of a step, with the places of its arguments."""

_Root: TypeAlias = tuple[str, int, int]
"""The value that owns the storage of another one, the byte offset in it, and by how much that moves each turn."""


def schedule(
    steps: Sequence[Step],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    constants: Sequence[str],
    sizes: Mapping[str, int],
    aliases: Mapping[str, Alias] | None = None,
    loops: Sequence[Loop] = (),
    scratch_bytes: int = 0,
    threads: int = 1,
) -> Schedule:
    """Plan memory, lanes and barriers for `steps`, which run in the given order wherever they depend on each other.

    `sizes` gives the bytes of every value that is not an input, output or constant, aliases included. `threads` is
    only a hint (chunk sizes, and whether arena memory may be reused among steps that can overlap): the schedule is
    right for any number of workers. `loops` are unrolled: in order and apart from each other. Raises ValueError if a
    value is unknown or read before it is written.
    """
    aliases = aliases or {}
    slots = {name: slot for slot, name in enumerate((*inputs, *outputs, *constants))}
    if len(slots) != len(inputs) + len(outputs) + len(constants):
        raise ValueError("a value is listed twice among inputs, outputs and constants")
    roots = {name: _root(name, aliases) for step in steps for name in step.args}
    _check(steps, roots, slots, sizes, frozenset(inputs) | frozenset(constants), loops)
    arena_slot = len(slots)

    # Before the arena is planned each value has a slot of its own, so that only true dependences count.
    temporaries = sorted({root for root, *_ in roots.values()} - set(slots))
    own = {name: arena_slot + 2 + number for number, name in enumerate(temporaries)}
    apart = _calls(steps, roots, {**own, **slots}, {}, sizes)
    lanes = _lanes(apart, threads)
    epochs = _epochs(_phases(apart, lanes), lanes) if threads > 1 else None
    arena = _plan(steps, roots, own, sizes, epochs, loops)

    calls = _calls(steps, roots, {**dict.fromkeys(own, arena_slot), **slots}, arena.offsets, sizes, loops)
    if loops:
        lanes = _lanes(_calls(steps, roots, {**own, **slots}, {}, sizes, loops), threads)
    phases = _phases(calls, lanes)
    scheduled = tuple(
        ScheduledStep(
            step,
            places,
            lanes[number],
            _grain(step, threads),
            barrier=number > 0 and phases[number] != phases[number - 1],
        )
        for number, (step, places) in enumerate(calls)
    )
    return Schedule(
        tuple(inputs),
        tuple(outputs),
        tuple(constants),
        scheduled,
        arena.nbytes,
        -(-scratch_bytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT,
        _worth_threads(scheduled),
    )


def _root(name: str, aliases: Mapping[str, Alias]) -> _Root:
    """The value that owns the storage of `name`, and where in it that is."""
    offset = stride = 0
    seen: set[str] = set()
    while name in aliases:
        if name in seen:
            raise ValueError(f"value {name!r} is an alias of itself")
        seen.add(name)
        offset += aliases[name].offset
        stride += aliases[name].stride
        name = aliases[name].value
    return name, offset, stride


def _check(
    steps: Sequence[Step],
    roots: Mapping[str, _Root],
    slots: Mapping[str, int],
    sizes: Mapping[str, int],
    given: frozenset[str],
    loops: Sequence[Loop],
) -> None:
    last = 0
    for loop in loops:
        if not last <= loop.first < loop.end <= len(steps) or loop.turns < 1:
            raise ValueError(f"a loop of {loop.turns} turns over the steps [{loop.first}, {loop.end})")
        last = loop.end
    turns = {number: loop.turns for loop in loops for number in range(loop.first, loop.end)}
    written = set(given)
    for number, step in enumerate(steps):
        where = f"step {number} ({step.symbol})"
        if len(step.args) != len(step.writes):
            raise ValueError(f"{where} has {len(step.args)} arguments and {len(step.writes)} write flags")
        if step.extent < 1 or step.grain < 0:
            raise ValueError(f"{where} has extent {step.extent} and grain {step.grain}")
        for name, write in zip(step.args, step.writes, strict=True):
            root, offset, stride = roots[name]
            offset += stride * (turns.get(number, 1) - 1)
            if name not in slots and name not in sizes:
                raise ValueError(f"{where} uses {name!r}, which has no size")
            if root not in slots and offset + sizes[name] > sizes[root]:
                raise ValueError(f"{where} uses {name!r}, which reaches beyond {root!r}")
            if write and root in given:
                raise ValueError(f"{where} writes {name!r}, which is an input or a constant")
            # Nothing writes a value without elements, and nothing is read of it.
            if not write and root not in written and sizes.get(root, 1) > 0:
                raise ValueError(f"{where} reads {name!r} before any step has written it")
        written.update(roots[name][0] for name, write in zip(step.args, step.writes, strict=True) if write)


def _calls(
    steps: Sequence[Step],
    roots: Mapping[str, _Root],
    slots: Mapping[str, int],
    offsets: Mapping[str, int],
    sizes: Mapping[str, int],
    loops: Sequence[Loop] = (),
) -> list[_Call]:
    """The steps in the order in which they are called, with the places of their arguments; `loops` unrolled."""

    def called(step: Step, turn: int) -> _Call:
        return step, tuple(_place(name, roots[name], slots, offsets, sizes, turn) for name in step.args)

    found: list[_Call] = []
    number = 0
    for loop in loops:
        found += [called(step, 0) for step in steps[number : loop.first]]
        for turn in range(loop.turns):
            found += [called(step, turn) for step in steps[loop.first : loop.end]]
        number = loop.end
    return found + [called(step, 0) for step in steps[number:]]


def _place(
    name: str, place: _Root, slots: Mapping[str, int], offsets: Mapping[str, int], sizes: Mapping[str, int], turn: int
) -> Place:
    root, offset, stride = place
    begin = offsets.get(root, 0) + offset + turn * stride
    # Inputs, outputs and constants have no size here: a use of the whole is a use of everything in the slot.
    end = begin + sizes[name] if name in sizes else 1 << 62
    return Place(slots[root], begin, end)


def _lanes(calls: Sequence[_Call], threads: int) -> list[int]:
    """Lane of each call: PARALLEL, or the worker of a serial one. Costly independent serial ones get their own lanes.

    A serial call follows the serial call that it depends on, so that chains need no barrier.
    """
    lanes: list[int] = []
    recent: dict[int, list[_Access]] = {}  # what serial calls touched since the last parallel one, by lane
    busy = [0.0] * (MAX_LANES if threads > 1 else 1)
    for call in calls:
        step = call[0]
        if step.extent > 1 and not 0 < step.cost < SMALL_SECONDS:
            lanes.append(PARALLEL)
            recent.clear()
            busy = [0.0] * len(busy)
            continue
        mine = _accesses(call)
        spread = step.cost >= SPREAD_SECONDS
        lane = 0
        if spread or recent.keys() - {0}:
            needs = [number for number, theirs in recent.items() if _conflict(mine, theirs)]
            if needs:
                lane = min(needs)
            elif spread:
                lane = min(range(len(busy)), key=lambda number: busy[number])
        busy[lane] += step.cost
        recent.setdefault(lane, []).extend(mine)
        lanes.append(lane)
    return lanes


def _phases(calls: Sequence[_Call], lanes: Sequence[int]) -> list[int]:
    """Number of barriers before each call; calls of equal number may run at the same time unless they share a lane."""
    phases: list[int] = []
    since: dict[int, list[_Access]] = {}
    phase = 0
    for call, lane in zip(calls, lanes, strict=True):
        mine = _accesses(call)
        # Calls on one serial lane are run by one worker in order, so they never need to meet.
        if any(_conflict(mine, theirs) for other, theirs in since.items() if other != lane or lane == PARALLEL):
            phase += 1
            since.clear()
        since.setdefault(lane, []).extend(mine)
        phases.append(phase)
    return phases


def _epochs(phases: Sequence[int], lanes: Sequence[int]) -> list[int]:
    """Steps of equal number may overlap in time: those of a phase, unless one worker runs the whole phase in order."""
    used: dict[int, set[int]] = {}
    for phase, lane in zip(phases, lanes, strict=True):
        used.setdefault(phase, set()).add(lane)
    epochs: list[int] = []
    for number, phase in enumerate(phases):
        alone = len(used[phase]) == 1 and lanes[number] != PARALLEL
        new = number > 0 and (alone or phase != phases[number - 1])
        epochs.append(epochs[-1] + new if epochs else 0)
    return epochs


def _accesses(call: _Call) -> list[_Access]:
    step, places = call
    return [(place.slot, place.offset, place.end, write) for place, write in zip(places, step.writes, strict=True)]


def _conflict(mine: Sequence[_Access], others: Sequence[_Access]) -> bool:
    """Whether two sets of accesses overlap with a write among them."""
    return any(
        slot == other_slot and (write or other_write) and lo < other_end and other_lo < end
        for slot, lo, end, write in mine
        for other_slot, other_lo, other_end, other_write in others
    )


def _plan(
    steps: Sequence[Step],
    roots: Mapping[str, _Root],
    own: Mapping[str, int],
    sizes: Mapping[str, int],
    epochs: Sequence[int] | None,
    loops: Sequence[Loop],
) -> ArenaPlan:
    """Arena offsets. With `epochs`, memory is not reused within one, unless that makes the arena much larger."""
    lives: dict[str, tuple[int, int]] = {}
    for number, step in enumerate(steps):
        for name in step.args:
            root = roots[name][0]
            if root in own:
                lives[root] = (lives.get(root, (number, 0))[0], number)
    sliced = {root for root, _, stride in roots.values() if stride}
    for loop in loops:
        # What comes into a loop, goes out of it, or is made slice by slice, has to last from its begin to its end.
        for root, (lo, hi) in lives.items():
            inside = loop.first <= lo and hi < loop.end and root not in sliced
            if not inside and lo < loop.end and hi >= loop.first:
                lives[root] = (min(lo, loop.first), max(hi, loop.end - 1))
    tight = plan_arena([Buffer(name, sizes[name], *life) for name, life in lives.items()])
    if epochs is None:
        return tight
    loose = plan_arena([Buffer(name, sizes[name], epochs[lo], epochs[hi]) for name, (lo, hi) in lives.items()])
    return loose if loose.nbytes <= max(tight.nbytes * LOOSE_GROWTH, LOOSE_BYTES) else tight


def _grain(step: Step, threads: int) -> int:
    if step.grain:
        return min(step.grain, step.extent)
    most = -(-step.extent // (max(threads, 2) * CHUNKS_PER_WORKER))
    if step.cost <= 0:
        return most
    by_cost = int(step.extent * CHUNK_SECONDS / step.cost)
    return max(1, min(max(most, by_cost), -(-step.extent // max(threads, 2))))


def _worth_threads(steps: Sequence[ScheduledStep]) -> bool:
    """Whether a second worker can save more than waking it and meeting it costs (yes where costs are unknown)."""
    shared = [item for item in steps if item.lane == PARALLEL or item.lane > 0]
    if any(item.step.cost <= 0 for item in shared):
        return True
    barriers = sum(item.barrier for item in steps)
    return sum(item.step.cost for item in shared) / 2 > WAKE_SECONDS + barriers * BARRIER_SECONDS
