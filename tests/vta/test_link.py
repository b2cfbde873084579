"""A linked stream keeps the program's meaning however its engines run, with no token too many."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestc.errors import TargetError
from nestc.runtime.vta.assembly import line
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.encode import encode_uops
from nestc.runtime.vta.isa import Alu, AluOp, Finish, Gemm, Instruction, Load, MemoryId, Store, Stream, Tokens
from nestc.runtime.vta.simulate import engine_of, simulate
from nestc.targets.vta import intrinsics as vta
from nestc.targets.vta.emit import Piece, emit
from nestc.targets.vta.link import link
from nestc.targets.vta.verify import verify
from nestc.tensor import index as ix
from nestc.tensor.interp import run
from nestc.tensor.ir import Buffer, Call, Expr, For, Kernel, Stmt, Var, Window

SMALL = VtaConfig(
    "small", log_block=2, log_uop_buff_size=6, log_inp_buff_size=5, log_wgt_buff_size=6, log_acc_buff_size=7
)
UOP_BASE = 0x100
DRAM = {"x": 0x1000, "w": 0x2000, "b": 0x3000, "y": 0x4000}


def at(buffer: Buffer, *terms: Expr | int) -> Window:
    return Window(buffer, (ix.add(*terms), ix.const(0), ix.const(0)))


class Program:
    """Builds kernels of statements on x (inputs), w (weights), b (accumulators) and y (outputs, also read)."""

    def __init__(self, config: VtaConfig = SMALL) -> None:
        self.config = config
        self.inp, self.wgt, self.acc = (vta.sram(memory, config) for memory in (vta.INP, vta.WGT, vta.ACC))
        self.x, self.w, self.b, self.y = (
            vta.dram(name, memory, 32, config)
            for name, memory in (("x", vta.INP), ("w", vta.WGT), ("b", vta.ACC), ("y", vta.INP))
        )
        self.body: list[Stmt] = []
        self.variables = 0

    def load(self, buffer: Buffer, sram: int, source: Buffer, dram: int, y: int, x: int, stride: int) -> None:
        tile = vta.load_tile(buffer.memory, y, x, stride, self.config)
        self.body.append(Call(tile, (at(buffer, sram), at(source, dram))))

    def store(self, sram: int, dram: int, y: int, x: int, stride: int) -> None:
        tile = vta.store_tile(y, x, stride, self.config)
        self.body.append(Call(tile, (at(self.y, dram), at(self.acc, sram))))

    def compute(self, intrinsic, operands, serial=(), unrolled=()) -> None:
        """``operands``: (buffer, base, step for each loop)."""
        loops = [Var(f"i{self.variables + k}", extent) for k, extent in enumerate((*serial, *unrolled))]
        self.variables += len(loops)
        windows = tuple(at(b, base, *(ix.mul(v, s) for v, s in zip(loops, steps))) for b, base, *steps in operands)
        statement: Stmt = Call(intrinsic, windows)
        for depth in reversed(range(len(loops))):
            statement = For(loops[depth], (statement,), "serial" if depth < len(serial) else "unroll")
        self.body.append(statement)

    def reset(self, base: int, count: int = 1) -> None:
        self.compute(vta.reset(self.config), [(self.acc, base, 1)], (count,))

    def gemm(self, acc: int, inp: int, wgt: int, count: int = 1) -> None:
        self.compute(vta.gemm(self.config), [(self.acc, acc, 1), (self.inp, inp, 1), (self.wgt, wgt, 0)], (count,))

    def alu(self, op: AluOp, imm: int, base: int, count: int = 1) -> None:
        self.compute(vta.alu(op, imm, self.config), [(self.acc, base, 1)], (count,))

    def kernel(self) -> Kernel:
        return Kernel("k", (self.x, self.w, self.b, self.y), tuple(self.body), (self.inp, self.wgt, self.acc))

    def pieces(self) -> list[Piece]:
        return emit(self.kernel(), DRAM, self.config)

    def stream(self) -> Stream:
        return link(self.pieces(), self.config, UOP_BASE)

    def text(self) -> str:
        """Engine, operation and tokens of each instruction of the linked stream."""
        lines = []
        for instruction in self.stream().instructions:
            words = line(instruction).split()
            kind = " ".join(words[1:3]) if words[1] in ("load", "alu") else words[1]
            tokens = [word for word in words if word.startswith(("pop", "push"))]
            lines.append(" ".join([words[0] + ":", kind, *tokens]))
        return "\n".join(lines)


# --- what a stream does, worked out from its instructions alone


def accesses(stream: Stream) -> list[tuple[set[tuple[str, int]], set[tuple[str, int]]]]:
    """Elements of SRAM and DRAM that each instruction reads and writes."""
    widths = {MemoryId.INP: 4, MemoryId.WGT: 16, MemoryId.ACC: 16, MemoryId.UOP: 4}
    uops: dict[int, np.ndarray] = {}
    result = []
    for i in stream.instructions:
        reads: set[tuple[str, int]] = set()
        writes: set[tuple[str, int]] = set()
        if isinstance(i, (Load, Store)):
            width = widths[i.memory] if isinstance(i, Load) else 4
            dram = {
                ("DRAM", (i.dram + row * i.x_stride + column) * width + byte)
                for row in range(i.y_size) for column in range(i.x_size) for byte in range(width)
            }  # fmt: skip
            name = i.memory.name if isinstance(i, Load) else "ACC"
            sram = {(name, i.sram + k) for k in range(i.y_size * i.x_size)}
            reads, writes = (dram, sram) if isinstance(i, Load) else (sram, dram)
            if isinstance(i, Load) and i.memory is MemoryId.UOP:
                for k in range(i.x_size):
                    uops[i.sram + k] = stream.uops[i.dram - stream.uop_base + k]
        elif isinstance(i, (Gemm, Alu)):
            for out in range(i.iter_out):
                for inner in range(i.iter_in):
                    for n in range(i.uop_begin, i.uop_end):
                        dst, src, wgt = (int(v) for v in uops[n])
                        reads.add(("UOP", n))
                        acc = ("ACC", dst + out * i.dst_out + inner * i.dst_in)
                        writes.add(acc)
                        source = src + out * i.src_out + inner * i.src_in
                        if isinstance(i, Alu):
                            reads |= {acc, ("ACC", source)}
                        elif not i.reset:
                            reads |= {acc, ("INP", source), ("WGT", wgt + out * i.wgt_out + inner * i.wgt_in)}
        result.append((reads, writes))
    return result


def token_edges(instructions: tuple[Instruction, ...]) -> list[tuple[int, int]]:
    """(instruction that gives, instruction that takes) of every token, in the order of each queue."""
    gives: dict[tuple[int, int], list[int]] = {}
    takes: dict[tuple[int, int], list[int]] = {}
    for n, i in enumerate(instructions):
        e, t = engine_of(i), i.tokens
        for set_, table, queue in (
            (t.pop_prev, takes, (e - 1, e)), (t.pop_next, takes, (e + 1, e)),
            (t.push_prev, gives, (e, e - 1)), (t.push_next, gives, (e, e + 1)),
        ):  # fmt: skip
            if set_:
                assert queue in {(0, 1), (1, 0), (1, 2), (2, 1)}
                table.setdefault(queue, []).append(n)
    assert {q: len(v) for q, v in gives.items()} == {q: len(v) for q, v in takes.items()}
    return [edge for q in gives for edge in zip(gives[q], takes[q])]


def ended_before(instructions: tuple[Instruction, ...], edges: list[tuple[int, int]]) -> list[set[int]]:
    """For each instruction those that must have ended when it starts."""
    before: list[set[int]] = []
    last: dict[int, int] = {}
    into: dict[int, list[int]] = {}
    for a, b in edges:
        assert a < b, "a token goes backwards"
        into.setdefault(b, []).append(a)
    for n, i in enumerate(instructions):
        direct = [*into.get(n, []), *([last[engine_of(i)]] if engine_of(i) in last else [])]
        before.append(set(direct).union(*(before[d] for d in direct)))
        last[engine_of(i)] = n
    return before


def hazards(stream: Stream, edges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    touched, before = accesses(stream), ended_before(stream.instructions, edges)
    for a, b in combinations(range(len(touched)), 2):
        (reads_a, writes_a), (reads_b, writes_b) = touched[a], touched[b]
        if a not in before[b] and (writes_a & reads_b or writes_b & reads_a or writes_a & writes_b):
            yield a, b


def check(program: Program) -> Stream:
    """The verifier agrees, every order gives what the interpreter says, no conflict is unordered, no token useless."""
    config, kernel, stream = program.config, program.kernel(), program.stream()
    memory = np.random.default_rng(3).integers(0, 256, 0x5000, np.uint8)
    memory[DRAM["b"] : DRAM["y"]].view(np.int32)[:] >>= 20
    arrays = {}
    for p in kernel.params:
        size = p.size * np.dtype(p.dtype).itemsize
        arrays[p.name] = memory[DRAM[p.name] :][:size].view(p.dtype).reshape(p.shape).copy()
    verify(stream, config)
    memory[UOP_BASE * 4 :][: 4 * len(stream.uops)] = np.frombuffer(encode_uops(stream.uops, config), np.uint8)
    run(kernel, arrays)
    for order in ("program", "load", "compute", "store", "random"):
        changed = memory.copy()
        simulate(stream.instructions, config, changed, order, seed=5, fill=85)
        assert np.array_equal(changed[DRAM["y"] :][: arrays["y"].size].view(np.int8), arrays["y"].reshape(-1)), order
    edges = token_edges(stream.instructions)
    assert not list(hazards(stream, edges))
    end = len(stream.instructions) - 1
    assert stream.instructions[end].__class__ is Finish
    assert len(ended_before(stream.instructions, edges)[end]) == end, "not all has ended at the end"
    for edge in edges:
        rest = [e for e in edges if e != edge]
        unordered = any(hazards(stream, rest)) or len(ended_before(stream.instructions, rest)[end]) < end
        assert unordered, f"nothing needs the token {edge}"
    return stream


# --- small programs


def copy_tile(p: Program, slot: int, source: Buffer, first: int, target: int) -> None:
    """y[target ..] = source[first ..], 2 elements, in a slot of INP and ACC of 4 elements."""
    p.load(p.inp, slot, source, first, 1, 2, 2)
    p.reset(slot, 2)
    p.gemm(slot, slot, 0, 2)
    p.store(slot, target, 1, 2, 2)


def test_two_slots():
    p = Program()
    p.load(p.wgt, 0, p.w, 0, 1, 1, 1)
    for tile in range(4):
        copy_tile(p, 4 * (tile % 2), p.x, 2 * tile, 2 * tile)
    check(p)
    assert (
        p.text()
        == """\
load: load wgt
load: load inp push(compute)
compute: load uop
compute: reset
compute: gemm pop(load) push(load,store)
store: store pop(compute) push(compute)
load: load inp push(compute)
compute: reset
compute: gemm pop(load) push(load,store)
store: store pop(compute) push(compute)
load: load inp pop(compute) push(compute)
compute: reset pop(store)
compute: gemm pop(load) push(store)
store: store pop(compute)
load: load inp pop(compute) push(compute)
compute: reset pop(store)
compute: gemm pop(load) push(store)
store: store pop(compute) push(compute)
compute: finish pop(store)"""
    )


def test_a_chain_of_alu_operations_needs_no_tokens():
    p = Program()
    p.load(p.acc, 0, p.b, 0, 1, 4, 4)
    p.alu(AluOp.ADD, 8, 0, 4)
    p.alu(AluOp.SHR, 4, 0, 4)
    p.compute(vta.alu(AluOp.MAX, None, SMALL), [(p.acc, 0, 1), (p.acc, 2, 1)], (2,))
    p.alu(AluOp.MIN, 127, 0, 4)
    p.store(0, 3, 2, 2, 5)
    check(p)
    assert (
        p.text()
        == """\
compute: load acc
compute: load uop
compute: alu add
compute: alu shr
compute: alu max
compute: alu min push(store)
store: store pop(compute) push(compute)
compute: finish pop(store)"""
    )


def test_what_is_stored_is_loaded_again_through_a_compute_instruction():
    """The first tile's store is known to the reset of the third: the load waits for that, and for nothing later."""
    p = Program()
    p.load(p.wgt, 0, p.w, 0, 1, 1, 1)
    for tile in range(3):
        copy_tile(p, 4 * (tile % 2), p.x, 2 * tile, 2 * tile)
    p.load(p.inp, 2, p.y, 0, 1, 2, 2)
    p.gemm(0, 2, 0, 2)
    p.store(0, 20, 1, 2, 2)
    check(p)
    assert p.text().splitlines()[-8:] == [
        "load: load inp pop(compute) push(compute)",
        "compute: reset pop(store) push(load)",
        "compute: gemm pop(load) push(store)",
        "store: store pop(compute) push(compute)",
        "load: load inp pop(compute) push(compute)",
        "compute: gemm pop(load,store) push(store)",
        "store: store pop(compute) push(compute)",
        "compute: finish pop(store)",
    ]


def test_an_empty_instruction_stands_between_store_and_load():
    p = Program()
    p.load(p.wgt, 0, p.w, 0, 1, 1, 1)
    copy_tile(p, 0, p.x, 0, 0)
    copy_tile(p, 4, p.y, 0, 4)
    check(p)
    lines = p.text().splitlines()
    at_nop = lines.index("compute: load uop pop(store) push(load)")
    assert lines[at_nop - 1 : at_nop + 2 : 2] == [
        "store: store pop(compute) push(compute)",
        "load: load inp pop(compute) push(compute)",
    ]


def test_a_store_waits_for_loads_of_what_it_overwrites():
    p = Program()
    p.reset(0, 2)
    p.load(p.inp, 0, p.y, 0, 1, 2, 2)
    p.store(0, 1, 1, 2, 2)
    check(p)
    assert (
        p.text()
        == """\
compute: load uop
compute: reset
load: load inp push(compute)
compute: load uop pop(load) push(store)
store: store pop(compute) push(compute)
compute: finish pop(store)"""
    )


def test_rows_between_the_rows_of_a_tile_are_free():
    """Two strided stores interleave in DRAM; a load of one's rows waits for that one only."""
    p = Program()
    p.reset(0, 8)
    p.store(0, 0, 3, 1, 4)
    p.alu(AluOp.ADD, 1, 4, 3)
    p.store(4, 2, 3, 1, 4)
    p.load(p.inp, 0, p.y, 0, 3, 1, 4)
    stream = check(p)
    before = ended_before(stream.instructions, token_edges(stream.instructions))
    stores = [n for n, i in enumerate(stream.instructions) if isinstance(i, Store)]
    (load,) = (n for n, i in enumerate(stream.instructions) if engine_of(i) == 0)
    assert stores[0] in before[load] and stores[1] not in before[load]


def test_loads_around_what_is_stored():
    """One reaches into what is stored, one ends where the first begins, one lies before both."""
    p = Program()
    p.reset(0, 2)
    p.store(0, 10, 1, 2, 2)
    p.load(p.inp, 0, p.y, 8, 1, 4, 4)
    p.load(p.inp, 4, p.y, 6, 1, 3, 3)
    p.load(p.inp, 7, p.y, 0, 1, 1, 1)
    stream = check(p)
    before = ended_before(stream.instructions, token_edges(stream.instructions))
    loads = [n for n, i in enumerate(stream.instructions) if engine_of(i) == 0]
    (store,) = (n for n, i in enumerate(stream.instructions) if isinstance(i, Store))
    assert all(store in before[load] for load in loads)
    assert [i.tokens.pop_next for i in stream.instructions if engine_of(i) == 0] == [True, False, False]


def test_micro_ops_are_shared_and_come_in_windows():
    p = Program()
    for turn in range(2):
        for base in range(6):
            p.compute(vta.reset(SMALL), [(p.acc, base, 1)], (), (3,))
        if not turn:
            p.store(0, 0, 1, 8, 8)
    stream = check(p)
    loads = [i for i in stream.instructions if isinstance(i, Load)]
    # 16 micro-ops fit: five lists of three, then the sixth and, in the same window, four of those again.
    assert [(i.sram, i.dram - UOP_BASE, i.x_size) for i in loads] == [(0, 0, 15), (0, 16, 15), (0, 32, 6)]
    assert len(stream.uops) == 38
    begins = [i.uop_begin for i in stream.instructions if isinstance(i, Gemm)]
    assert begins == [0, 3, 6, 9, 12, 0, 3, 6, 9, 12, 0, 3]


def test_micro_ops_of_one_instruction_must_fit():
    p = Program()
    p.compute(vta.reset(SMALL), [(p.acc, 0, 1)], (), (8,))
    (piece,) = p.pieces()
    too_many = replace(piece, uops=np.zeros((17, 3), np.int64))
    with pytest.raises(TargetError, match="17 micro-ops of one instruction do not fit in 16"):
        link([too_many], SMALL, UOP_BASE)


def outstanding(stream: Stream) -> int:
    """The most tokens that may wait in a queue, whatever the engines do: those given, less those surely taken."""
    edges = token_edges(stream.instructions)
    before = ended_before(stream.instructions, edges)
    queues: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for a, b in edges:
        queues.setdefault((engine_of(stream.instructions[a]), engine_of(stream.instructions[b])), []).append((a, b))
    return max(k + 1 - sum(b in before[a] for _, b in q[:k]) for q in queues.values() for k, (a, _) in enumerate(q))


BIG = VtaConfig()


@pytest.mark.parametrize("turns", [300, 600])
def test_no_more_tokens_than_a_counter_holds(turns):
    """Loads of an element each, all before the compute instructions that use them, or right before each."""
    ahead, mixed = Program(BIG), Program(BIG)
    for p in (ahead, mixed):
        for n in range(turns):
            p.load(p.inp, n, p.x, n % 32, 1, 1, 1)
            if p is mixed:
                p.gemm(n, n, 0)
        if p is ahead:
            for n in range(turns):
                p.gemm(n, n, 0)
        stream = p.stream()
        assert 100 < outstanding(stream) <= 255
        edges = token_edges(stream.instructions)
        before = ended_before(stream.instructions, edges)
        loads = [n for n, i in enumerate(stream.instructions) if engine_of(i) == 0]
        gemms = [n for n, i in enumerate(stream.instructions) if isinstance(i, Gemm)]
        assert all(load in before[gemm] for load, gemm in zip(loads, gemms, strict=True))


def test_nothing_to_do():
    stream = link([], SMALL, UOP_BASE)
    assert stream.instructions == (Finish(Tokens()),) and stream.uops.shape == (0, 3)


# --- random programs


@st.composite
def programs(draw: st.DrawFn) -> Program:
    p = Program()
    small = st.integers(1, 3)
    for buffer, source in ((p.wgt, p.w), (p.inp, p.x), (p.acc, p.b)):
        p.load(buffer, 0, source, 0, 1, buffer.shape[0], buffer.shape[0])
    p.alu(AluOp.SHR, 2, 0, 8)  # the hardware stores only what was computed
    for _ in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(["inp", "wgt", "acc", "reset", "gemm", "imm", "alu", "store"]))
        if kind in ("inp", "wgt", "acc", "store"):
            y, x = draw(small), draw(st.integers(1, 2))
            stride = x if y == 1 else x + draw(st.integers(0, 2))
            depth = 4 if kind == "wgt" else 8
            y = min(y, depth // x)
            sram, dram = draw(st.integers(0, depth - y * x)), draw(st.integers(0, 12))
            if kind == "store":
                p.store(sram, dram, y, x, stride)
            else:
                buffer = {"inp": p.inp, "wgt": p.wgt, "acc": p.acc}[kind]
                source = draw(st.sampled_from([p.x, p.y])) if kind == "inp" else {"wgt": p.w, "acc": p.b}[kind]
                p.load(buffer, sram, source, dram, y, x, stride)
                if kind == "acc":
                    p.alu(AluOp.ADD, 3, sram, y * x)
            continue
        serial = draw(st.lists(st.integers(1, 2), max_size=2))
        unrolled = draw(st.lists(st.integers(1, 2), max_size=2))
        loops = (*serial, *unrolled)

        def operand(buffer: Buffer, depth: int, loops: tuple[int, ...] = loops):
            steps = [draw(st.integers(0, 2)) for _ in loops]
            reach = sum((extent - 1) * step for extent, step in zip(loops, steps))
            if reach >= depth:
                steps, reach = [0] * len(loops), 0
            return buffer, draw(st.integers(0, depth - 1 - reach)), *steps

        if kind == "reset":
            intrinsic, operands = vta.reset(SMALL), [operand(p.acc, 8)]
        elif kind == "gemm":
            intrinsic, operands = vta.gemm(SMALL), [operand(p.acc, 8), operand(p.inp, 8), operand(p.wgt, 4)]
        elif kind == "imm":
            op, imm = draw(st.sampled_from([(AluOp.ADD, 9), (AluOp.SHR, 3), (AluOp.MAX, -7), (AluOp.MIN, 100)]))
            intrinsic, operands = vta.alu(op, imm, SMALL), [operand(p.acc, 8)]
        else:
            op = draw(st.sampled_from([AluOp.ADD, AluOp.MAX, AluOp.MIN]))
            intrinsic, operands = vta.alu(op, None, SMALL), [operand(p.acc, 8), operand(p.acc, 8)]
        p.compute(intrinsic, operands, serial, unrolled)
        try:
            emit(replace(p.kernel(), body=(p.body[-1],)), DRAM, SMALL)
        except TargetError:  # what the pipeline of the ALU cannot take
            p.body.pop()
    return p


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs())
def test_random_programs(program):
    check(program)
