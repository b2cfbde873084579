"""The timing model against the state machines of the RTL, stepped cycle by cycle (facts of apache/tvm-vta, slow)."""

from collections import deque
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import Alu, AluOp, Finish, Gemm, Instruction, Load, MemoryId, Store, Tokens
from nestc.runtime.vta.timing import RTL, Timing, simulate_timing

FETCH, UOP, INP, WGT, ACC, OUT = range(6)  # ports of VME
PORT = {MemoryId.UOP: UOP, MemoryId.INP: INP, MemoryId.WGT: WGT, MemoryId.ACC: ACC}
BYTES = {UOP: 4, INP: 16, WGT: 256, ACC: 64, OUT: 16}
BURST, DELAY, TAGS = 256, 16, 16


def requests(address: int, rows: int, size: int, stride: int, beat: int) -> list[int]:
    """Beats of each request: those that a row touches, a new request at each multiple of 256 beats."""
    out: list[int] = []
    for row in range(rows):
        start = address + row * stride
        fresh = True
        for index in range(start // beat, (start + size - 1) // beat + 1):
            if fresh or index % BURST == 0:
                out.append(0)
            out[-1] += 1
            fresh = False
    return out


class Loader:
    """GenVMECmd and the counter of beats in flight, of TensorLoad or FetchWideVME."""

    def __init__(self, register: bool) -> None:
        self.register = register  # data passes a register before it is counted
        self.commands: deque[int] = deque()
        self.busy = self.pipe = False
        self.flight = 0

    @property
    def done(self) -> bool:
        return self.busy and not self.commands and self.flight == 0

    def step(self, begin: list[int] | None, fire: bool, data: bool) -> None:
        counted = self.pipe if self.register else data
        done = self.done
        if fire:
            self.flight += self.commands.popleft()
        self.flight -= counted
        self.pipe = data
        if done:
            self.busy = False
        if begin is not None:
            self.busy, self.commands, self.flight = True, deque(begin), 0


class Memory:
    """VME's read side (queues of one request, 16 tags) and VTAMemDPIToAXI's."""

    def __init__(self) -> None:
        self.slots: list[int | None] = [None] * 5
        self.tags, self.counter, self.left, self.length, self.port = TAGS, 0, 0, 0, 0
        self.queue: deque[tuple[int, int]] = deque()
        self.reading = False
        self.beat: int | None = None  # port of the beat at the memory
        self.data: int | None = None  # port of the beat at the client

    def step(self, fired: dict[int, int]) -> None:
        last = self.beat is not None and self.left == 0
        chosen = next((p for p in range(5) if self.slots[p] is not None), None)
        taken = chosen is not None and self.tags > 0 and not last
        waiting = bool(self.queue)
        served = waiting and not self.reading and self.counter == DELAY
        self.data = self.beat
        if not self.reading:
            if served and self.queue[0][1] > 1:
                self.reading = True
        elif self.beat is not None and self.left == 1:
            self.reading = False
        if served:
            self.port, self.length = self.queue.popleft()
            self.left = self.length - 1
        elif self.beat is not None and self.left:
            self.left -= 1
        self.beat = self.port if self.length else None
        self.length -= self.length > 0
        self.counter = min(self.counter + 1, DELAY) if waiting else 0
        self.tags += last
        if taken:
            self.queue.append((chosen, self.slots[chosen]))  # type: ignore[arg-type]
            self.slots[chosen] = None  # type: ignore[index]
            self.tags -= 1
        for port, beats in fired.items():
            self.slots[port] = beats


class Unit:
    """TensorGemm or TensorAlu: index generator, four stages, a counter of micro-ops in flight."""

    def __init__(self) -> None:
        self.start = self.running = self.stutter = self.pair = False
        self.state, self.left, self.flight = "idle", 0, 0
        self.stages = [False] * 4

    @property
    def done(self) -> bool:
        return self.state == "wait" and self.flight == 0

    def step(self, begin: tuple[int, bool] | None) -> None:
        done = self.done
        advance = self.running and (not self.pair or self.stutter)
        last = advance and self.left == 1
        self.stutter = self.running and not advance
        self.flight += advance - self.stages[3]
        self.stages = [advance, *self.stages[:3]]
        self.left -= advance
        state = self.state
        if state == "idle" and self.start:
            self.state, self.running = "run", True
        elif state == "run" and last:
            self.state, self.running = "wait", False
        elif done:
            self.state = "idle"
        self.start = begin is not None
        if begin is not None:
            self.left, self.pair = begin


class Writer:
    """TensorStore, VME's write side and VTAMemDPIToAXI's."""

    def __init__(self, pause: int) -> None:
        self.pause = pause  # beats between two reads of the SRAM, 0: none
        self.state, self.vme, self.dpi = "idle", "idle", "idle"
        self.bursts: deque[int] = deque()
        self.sent = 0

    @property
    def acknowledged(self) -> bool:
        return self.vme == "response" and self.dpi == "response"

    @property
    def done(self) -> bool:
        return self.state == "ack" and self.acknowledged and len(self.bursts) == 1

    def step(self, begin: list[int] | None) -> None:
        state, vme, dpi, acknowledged, done = self.state, self.vme, self.dpi, self.acknowledged, self.done
        beat = state == "data" and vme == "data" and dpi == "data"
        final = beat and self.sent == self.bursts[0] - 1
        if vme == "idle":
            self.vme = "address" if state == "command" else "idle"
        elif vme == "address":
            self.vme = "data" if dpi == "address" else "address"
        elif vme == "data":
            self.vme = "response" if final else "data"
        elif acknowledged:
            self.vme = "idle"
        if dpi == "idle":
            self.dpi = "address" if vme == "address" else "idle"
        elif dpi == "address":
            self.dpi = "data"
        elif dpi == "data":
            self.dpi = "response" if final else "data"
        elif acknowledged:
            self.dpi = "idle"
        if begin is not None:
            self.state, self.bursts, self.sent = "command", deque(begin), 0
        elif state == "command" and vme == "idle":
            self.state, self.sent = "data", 0
        elif beat:
            self.sent += 1
            if final:
                self.state = "ack"
            elif self.pause and self.sent % self.pause == 0:
                self.state = "read"
        elif state == "read":
            self.state = "data"
        elif state == "ack" and acknowledged:
            self.bursts.popleft()
            self.state = "idle" if done else "command"


class Fetch:
    """Fetch64Bit or FetchWideVME."""

    def __init__(self, count: int, bits: int) -> None:
        self.wide, self.beat = bits >= 128, bits // 8
        self.state = "start" if count else "idle"
        self.rest, self.next, self.batch, self.got = count, 0, 0, 0
        self.loader = Loader(register=True)
        self.pulse = False
        self.pipe: deque[int] = deque()

    def command(self, memory: Memory) -> int | None:
        """Beats of the request that leaves in this cycle."""
        if self.wide:
            ready = self.loader.busy and self.loader.commands and not self.pulse
            return self.loader.commands[0] if ready and memory.slots[FETCH] is None else None
        if self.state == "command" and memory.slots[FETCH] is None:
            return 2 * self.batch
        return None

    def given(self, room: list[bool], engines: list[int]) -> int | None:
        """The instruction that goes to its queue in this cycle."""
        if self.wide:
            return self.pipe[0] if self.pipe and room[engines[self.pipe[0]]] else None
        return self.next if self.state == "drain" and self.got and room[engines[self.next]] else None

    def _load(self) -> list[int]:
        self.batch = min(self.rest, 256 if self.wide else 128)
        self.rest -= self.batch
        self.got = 0
        return [-(-self.batch * 16 // self.beat)]

    def step(self, fired: bool, data: bool, given: int | None) -> None:
        if self.wide:
            self._step_wide(fired, data, given)
            return
        state = self.state
        if state == "start":
            self._load()
            self.state = "command"
        elif state == "command" and fired:
            self.state, self.beats = "read", 0
        elif state == "read" and data:
            self.beats += 1
            if self.beats == 2 * self.batch:
                self.state, self.got = "drain", self.batch
        elif state == "drain":
            if self.got == 0:
                self.state = "command" if self.rest else "idle"
                if self.rest:
                    self._load()
            elif given is not None:
                self.got -= 1
                self.next += 1

    beats = 0

    def _step_wide(self, fired: bool, data: bool, given: int | None) -> None:
        state, begin, pulse, done = self.state, None, self.pulse, self.loader.done and not self.pulse
        self.pulse = False
        full = len(self.pipe) == 2
        if given is not None:
            self.pipe.popleft()
        if state == "start":
            begin, self.state = self._load(), "read"
        elif state == "read" and pulse:
            begin = self._load()
        elif state == "read" and done:
            self.state, self.got = "drain", self.batch
        elif state == "drain" and self.got == 0:
            self.state = "read" if self.rest else "idle"
            self.pulse = bool(self.rest)
        elif state == "drain" and not full:
            self.pipe.append(self.next)
            self.next += 1
            self.got -= 1
        self.loader.step(begin, fired, data)


def engine(instruction: Instruction) -> int:
    if isinstance(instruction, Store):
        return 2
    return 0 if isinstance(instruction, Load) and instruction.memory in (MemoryId.INP, MemoryId.WGT) else 1


def execute(stream: list[Instruction], bits: int, timing: Timing) -> tuple[list[int], list[int]]:
    """First cycle and cycle after the last of each instruction."""
    beat = bits // 8
    memory, unit, writer = Memory(), Unit(), Writer(16 // beat if bits < 128 else 0)
    loaders = {p: Loader(register=8 * BYTES[p] > bits) for p in (UOP, INP, WGT, ACC)}
    fetch = Fetch(len(stream) if timing.fetch else 0, bits)
    engines = [engine(i) for i in stream]
    queues: list[deque[int]] = [deque(), deque(), deque()]
    if not timing.fetch:
        for i, e in enumerate(engines):
            queues[e].append(i)
    state = ["idle"] * 3
    tokens = [0] * 4
    takes = ((None, 1), (0, 3), (2, None))
    gives = ((None, 0), (1, 2), (3, None))
    start, end = [-1] * len(stream), [-1] * len(stream)
    for cycle in range(1_000_000):
        if min(end, default=0) >= 0:
            return start, end
        room = [len(q) < timing.command_queue for q in queues]
        given = fetch.given(room, engines)
        fired: dict[int, int] = {}
        for p, loader in loaders.items():
            if loader.busy and loader.commands and memory.slots[p] is None:
                fired[p] = loader.commands[0]
        command = fetch.command(memory)
        if command is not None:
            fired[FETCH] = command
        begin: dict[int, list[int]] = {}
        compute: tuple[int, bool] | None = None
        posts: list[int] = []
        for e in range(3):
            if not queues[e]:
                continue
            i = queues[e][0]
            x = stream[i]
            needs = [q for q, flag in zip(takes[e], (x.tokens.pop_prev, x.tokens.pop_next)) if flag and q is not None]
            if state[e] == "idle":
                if any(tokens[q] == 0 for q in needs):
                    continue
                start[i] = cycle
                posts += [~q for q in needs]
                state[e] = "execute"
                if isinstance(x, (Gemm, Alu)):
                    count = (x.uop_end - x.uop_begin) * x.iter_out * x.iter_in
                    compute = (count, isinstance(x, Alu) and not x.use_imm)
                elif isinstance(x, Finish) or not x.x_size:
                    state[e] = "sync"
                else:
                    p = OUT if isinstance(x, Store) else PORT[x.memory]
                    size = BYTES[p]
                    begin[p] = requests(x.dram * size, x.y_size, x.x_size * size, x.x_stride * size, beat)
                continue
            done = state[e] == "sync"
            if not done:
                if isinstance(x, Load):
                    done = loaders[PORT[x.memory]].done
                else:
                    done = writer.done if isinstance(x, Store) else unit.done
            if done:
                end[i] = cycle + 1
                queues[e].popleft()
                state[e] = "idle"
                flags = (x.tokens.push_prev, x.tokens.push_next)
                posts += [q for q, flag in zip(gives[e], flags) if flag and q is not None]
        for q in posts:
            tokens[q if q >= 0 else ~q] += 1 if q >= 0 else -1
        if given is not None:
            queues[engines[given]].append(given)
        arrived = memory.data
        for p, loader in loaders.items():
            loader.step(begin.get(p), p in fired, arrived == p)
        fetch.step(FETCH in fired, arrived == FETCH, given)
        unit.step(compute)
        writer.step(begin.get(OUT))
        memory.step(fired)
    raise AssertionError("no end")


NOW = replace(RTL, fetch=False)

loads = st.builds(
    Load,
    st.sampled_from([MemoryId.UOP, MemoryId.INP, MemoryId.WGT, MemoryId.ACC]),
    st.just(0),
    st.integers(0, 300),
    st.integers(1, 6),
    st.integers(0, 20),
    st.integers(20, 40),
)
stores = st.builds(Store, st.just(0), st.integers(0, 300), st.integers(1, 3), st.integers(0, 40), st.integers(40, 60))
gemms = st.builds(Gemm, st.booleans(), st.just(0), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
alus = st.builds(
    Alu, st.just(AluOp.MAX), st.just(0), st.integers(1, 5), st.integers(1, 6), st.just(1), use_imm=st.booleans()
)


@settings(deadline=None, max_examples=120)
@given(st.one_of(loads, stores, gemms, alus), st.sampled_from([64, 128, 256, 512]))
def test_one_instruction_takes_what_the_state_machines_take(instruction: Instruction, bits: int) -> None:
    report = simulate_timing([instruction], VtaConfig(bus_bits=bits), NOW)
    assert (report.start.tolist(), report.end.tolist()) == execute([instruction], bits, NOW)


def chain(parts: tuple[Load, Gemm, Store]) -> list[Instruction]:
    """A load, a product that waits for it, a store that waits for the product."""
    load, gemm, store = parts
    return [
        replace(load, memory=MemoryId.INP, tokens=Tokens(push_next=True)),
        replace(gemm, tokens=Tokens(pop_prev=True, push_next=True)),
        replace(store, tokens=Tokens(pop_prev=True)),
    ]


pieces = st.one_of(st.one_of(loads, stores, gemms, alus).map(lambda x: [x]), st.tuples(loads, gemms, stores).map(chain))


@settings(deadline=None, max_examples=60)
@given(st.lists(pieces, min_size=1, max_size=12), st.sampled_from([64, 128, 512]), st.booleans())
def test_streams_take_what_the_state_machines_take(pieces: list[list[Instruction]], bits: int, fetch: bool) -> None:
    stream = [x for piece in pieces for x in piece]
    timing = RTL if fetch else NOW
    report = simulate_timing(stream, VtaConfig(bus_bits=bits), timing)
    start, end = execute(stream, bits, timing)
    # Equal but where two clients wait for one of the 16 tags, which the model gives to whoever asked first.
    assert report.cycles == pytest.approx(max(end), rel=0.01, abs=10)
    if not any(isinstance(x, Load) and x.memory in (MemoryId.UOP, MemoryId.ACC) for x in stream):
        assert (report.start.tolist(), report.end.tolist()) == (start, end)


@pytest.mark.parametrize("bits", [64, 128, 256])
def test_hundreds_of_instructions_in_several_batches_are_exact(bits: int) -> None:
    random = Random(bits)
    stream: list[Instruction] = []
    while len(stream) < 300:
        memory = random.choice([MemoryId.UOP, MemoryId.INP, MemoryId.WGT, MemoryId.ACC])
        load = Load(memory, 0, random.randrange(300), random.randint(1, 4), random.randint(1, 20), 40)
        gemm = Gemm(False, 0, random.randint(1, 9), random.randint(1, 14), random.randint(1, 4))
        store = Store(0, random.randrange(300), random.randint(1, 3), random.randint(1, 20), 50)
        stream += [load, Alu(AluOp.ADD, 0, 1, random.randint(1, 30), 1), *chain((load, gemm, store)), Finish()]
    report = simulate_timing(stream, VtaConfig(bus_bits=bits))
    assert (report.start.tolist(), report.end.tolist()) == execute(stream, bits, RTL)
