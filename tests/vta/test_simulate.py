"""The functional machine against a sequential one: each step of each loop by itself, in the order of the program."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import Alu, AluOp, Finish, Gemm, Instruction, Load, MemoryId, Store, Tokens
from nestc.runtime.vta.simulate import Order, legal_order, simulate

# 64 micro-ops, 64 inputs, 16 weights, 64 accumulators.
SMALL = VtaConfig("small", log_uop_buff_size=8, log_inp_buff_size=10, log_wgt_buff_size=12, log_acc_buff_size=12)
BATCHED = replace(SMALL, log_batch=1, log_inp_buff_size=11, log_acc_buff_size=13)
WIDE = replace(SMALL, log_block=5, log_inp_buff_size=11, log_wgt_buff_size=14, log_acc_buff_size=13)
CONFIGS = (SMALL, BATCHED, WIDE)
ORDERS: tuple[Order, ...] = ("program", "load", "compute", "store", "random")
UOPS, INPUTS, WEIGHTS, SUMS, OUT = 0x1000, 0x2000, 0x8000, 0x10000, 0x18000
DRAM_BYTES = 0x20000


class Sequential:
    """The pseudo-code of ``hw_spec.h``, word for word, with Python's own integers for the indices."""

    def __init__(self, config: VtaConfig, dram: np.ndarray) -> None:
        self.config, self.dram = config, dram
        self.inp = np.zeros((config.inp_depth, config.batch, config.block), np.int64)
        self.wgt = np.zeros((config.wgt_depth, config.block, config.block), np.int64)
        self.acc = np.zeros((config.acc_depth, config.batch, config.block), np.int64)
        self.uop = np.zeros(config.uop_depth, np.int64)

    def run(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Load():
                    self.load(instruction)
                case Store():
                    self.store(instruction)
                case Gemm():
                    self.gemm(instruction)
                case Alu():
                    self.alu(instruction)
                case Finish():
                    pass

    def element(self, memory: MemoryId, address: int) -> np.ndarray | int:
        width = self.config.batch * self.config.block
        size, kind, shape = {
            MemoryId.UOP: (4, "<u4", ()),
            MemoryId.INP: (width, "i1", self.inp.shape[1:]),
            MemoryId.WGT: (self.config.block**2, "i1", self.wgt.shape[1:]),
            MemoryId.ACC: (4 * width, "<i4", self.acc.shape[1:]),
            MemoryId.ACC_8BIT: (width, "i1", self.acc.shape[1:]),
        }[memory]
        return self.dram[address * size : (address + 1) * size].view(kind).reshape(shape)

    def load(self, load: Load) -> None:
        if load.x_size == 0:
            return
        sram = {MemoryId.UOP: self.uop, MemoryId.INP: self.inp, MemoryId.WGT: self.wgt}.get(load.memory, self.acc)
        place = load.sram
        for y in range(-load.y_pad_0, load.y_size + load.y_pad_1):
            for x in range(-load.x_pad_0, load.x_size + load.x_pad_1):
                inside = 0 <= y < load.y_size and 0 <= x < load.x_size
                sram[place] = self.element(load.memory, load.dram + y * load.x_stride + x) if inside else 0
                place += 1

    def store(self, store: Store) -> None:
        width = self.config.batch * self.config.block
        for y in range(store.y_size):
            for x in range(store.x_size):
                start = (store.dram + y * store.x_stride + x) * width
                low = self.acc[store.sram + y * store.x_size + x] & 0xFF
                self.dram[start : start + width] = low.ravel()

    def fields(self, index: int) -> tuple[int, int, int]:
        word, acc = int(self.uop[index]), self.config.log_acc_depth
        return word % (1 << acc), (word >> acc) % (1 << acc), (word >> 2 * acc) % (1 << self.config.log_wgt_depth)

    def gemm(self, gemm: Gemm) -> None:
        for i in range(gemm.iter_out):
            for j in range(gemm.iter_in):
                for index in range(gemm.uop_begin, gemm.uop_end):
                    dst, src, wgt = self.fields(index)
                    dst += i * gemm.dst_out + j * gemm.dst_in
                    src += i * gemm.src_out + j * gemm.src_in
                    wgt += i * gemm.wgt_out + j * gemm.wgt_in
                    total = 0 if gemm.reset else wrap(self.acc[dst] + self.inp[src] @ self.wgt[wgt].T)
                    self.acc[dst] = total

    def alu(self, alu: Alu) -> None:
        for i in range(alu.iter_out):
            for j in range(alu.iter_in):
                for index in range(alu.uop_begin, alu.uop_end):
                    dst, src, _ = self.fields(index)
                    dst += i * alu.dst_out + j * alu.dst_in
                    src += i * alu.src_out + j * alu.src_in
                    left = self.acc[dst]
                    right = np.full_like(left, alu.imm) if alu.use_imm else self.acc[src]
                    self.acc[dst] = wrap(OPERATIONS[alu.op](left, right))


def wrap(values: np.ndarray) -> np.ndarray:
    return (values + (1 << 31)) % (1 << 32) - (1 << 31)


OPERATIONS = {
    AluOp.MIN: np.minimum,
    AluOp.MAX: np.maximum,
    AluOp.ADD: np.add,
    AluOp.MUL: lambda a, b: (a & 0xFFFF) * b + (((a >> 16) * b & 0xFFFF) << 16),
    AluOp.SHR: lambda a, b: np.where(b >= 0, a >> (b % 32), a << (-b % 32)),
}


def memory(seed: int) -> np.ndarray:
    """A DRAM of random bytes."""
    return np.random.default_rng(seed).integers(0, 256, DRAM_BYTES, np.uint8)


def put_uops(dram: np.ndarray, config: VtaConfig, uops: Sequence[tuple[int, int, int]]) -> None:
    acc = config.log_acc_depth
    words = np.array([dst | src << acc | wgt << 2 * acc for dst, src, wgt in uops], "<u4")
    dram[UOPS : UOPS + words.nbytes] = words.view(np.uint8)


def load_all(config: VtaConfig, uops: int) -> list[Instruction]:
    """Micro-ops and every element of the other memories."""
    wgt, inp, acc = config.wgt_depth, config.inp_depth, config.acc_depth
    return [
        Load(MemoryId.UOP, 0, UOPS // 4, 1, uops, uops),
        Load(MemoryId.INP, 0, INPUTS // config.inp_bytes, 1, inp, inp),
        Load(MemoryId.WGT, 0, WEIGHTS // config.wgt_bytes, 1, wgt, wgt),
        Load(MemoryId.ACC, 0, SUMS // config.acc_bytes, 1, acc, acc),
    ]


def store_all(config: VtaConfig) -> list[Instruction]:
    """Store every byte of every accumulator: the low ones, then the next, shifted down, and so on."""
    depth, found = config.acc_depth, []
    found.append(Load(MemoryId.UOP, 0, 0, 0, 1, 1, y_pad_0=1))
    for number in range(4):
        found.append(Store(0, OUT // config.inp_bytes + number * depth, 1, depth, depth))
        found.append(Alu(AluOp.SHR, 0, 1, depth, 1, dst_out=1, use_imm=True, imm=8))
    return found


def compare(instructions: Sequence[Instruction], config: VtaConfig, dram: np.ndarray) -> None:
    expected, found = dram.copy(), dram.copy()
    Sequential(config, expected).run(instructions)
    statistics = simulate(instructions, config, found)
    np.testing.assert_array_equal(found, expected)
    assert statistics.instructions == len(instructions)


@st.composite
def walks(draw: st.DrawFn, depths: tuple[int, ...]) -> tuple[int, int, list[tuple[int, int]], list[tuple[int, ...]]]:
    """Trips of two loops, factors (outer, inner) of each memory, and micro-ops that stay within its depth."""
    out, inner = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    moves = [st.integers(0, min(3, depth // 8)) for depth in depths]
    factors = [(draw(move), draw(move)) for move in moves]
    room = [d - (out - 1) * f[0] - (inner - 1) * f[1] for d, f in zip(depths, factors, strict=True)]
    spread = draw(st.sampled_from((2, 4, 64)))
    fields = st.tuples(*(st.integers(0, min(r, spread) - 1) for r in room))
    return out, inner, factors, draw(st.lists(fields, min_size=1, max_size=8))


@settings(deadline=None, max_examples=80)
@given(walks((64, 64, 16)), st.sampled_from(CONFIGS), st.booleans(), st.integers(0, 99))
def test_gemm(walk, config, reset, seed):
    out, inner, factors, uops = walk
    dram = memory(seed)
    put_uops(dram, config, uops)
    (dst_out, dst_in), (src_out, src_in), (wgt_out, wgt_in) = factors
    gemm = Gemm(reset, 0, len(uops), out, inner, dst_out, dst_in, src_out, src_in, wgt_out, wgt_in)
    compare([*load_all(config, len(uops)), gemm, *store_all(config)], config, dram)


@settings(deadline=None, max_examples=120)
@given(
    walks((64, 64)),
    st.sampled_from(CONFIGS),
    st.sampled_from(AluOp),
    st.booleans(),
    st.integers(-40, 40),
    st.integers(0, 9),
)
def test_alu(walk, config, op, use_imm, imm, seed):
    out, inner, factors, uops = walk
    dram = memory(seed)
    put_uops(dram, config, [(*uop, 0) for uop in uops])
    (dst_out, dst_in), (src_out, src_in) = factors
    alu = Alu(op, 0, len(uops), out, inner, dst_out, dst_in, src_out, src_in, use_imm, imm)
    compare([*load_all(config, len(uops)), alu, *store_all(config)], config, dram)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_immediates_and_chains(config):
    """A running sum over accumulators (each step reads the last one's result), and immediates at their ends."""
    dram = memory(1)
    put_uops(dram, config, [(1, 0, 0), (0, 0, 0)])
    alus = [Alu(AluOp.ADD, 0, 1, 7, 9, 9, 1, 9, 1)]
    alus += [Alu(op, 1, 2, 64, 1, 1, use_imm=True, imm=imm) for op in AluOp for imm in (-32768, 32767, 0, -1, -9, 31)]
    for alu in alus:
        compare([*load_all(config, 2), alu, *store_all(config)], config, dram)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_loads(data):
    config = data.draw(st.sampled_from(CONFIGS))
    kind = data.draw(st.sampled_from((MemoryId.UOP, MemoryId.INP, MemoryId.WGT, MemoryId.ACC, MemoryId.ACC_8BIT)))
    y, x = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))
    pads = [data.draw(st.integers(0, 1)) for _ in range(4)]
    sram, stride = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 5))
    dram = memory(data.draw(st.integers(0, 9)))
    load = Load(kind, sram, data.draw(st.integers(0, 3)), y, x, stride, *pads)
    if kind is MemoryId.UOP:  # whatever they are, all micro-ops fit in depths that are powers of two
        use = [Gemm(False, 0, 16, 1, 1)]
    else:
        put_uops(dram, config, [(0, 0, 0)])
        use = [Load(MemoryId.UOP, 0, UOPS // 4, 1, 1, 1), Gemm(False, 0, 1, 16, 1, 1, 0, 1, 0, 1, 0)]
    compare([*load_all(config, 16), load, *use, *store_all(config)], config, dram)


@pytest.mark.parametrize("stride", [0, 1, 3, 4])
def test_rows_of_a_store_may_overlap(stride):
    dram = memory(2)
    compare([*load_all(SMALL, 1), Store(3, OUT // 16, 4, 3, stride)], SMALL, dram)


def test_sums_longer_than_a_float_holds():
    """200 blocks of the largest products into one accumulator, which float32 would round."""
    config = VtaConfig()
    dram = np.full(DRAM_BYTES, 0x80, np.uint8)
    dram[INPUTS] = dram[INPUTS + 16 * 150] = 0x81
    put_uops(dram, config, [(0, i, i) for i in range(200)])
    instructions = [
        Load(MemoryId.UOP, 0, UOPS // 4, 1, 200, 200),
        Load(MemoryId.INP, 0, INPUTS // 16, 1, 200, 200),
        Load(MemoryId.WGT, 0, WEIGHTS // 256, 1, 200, 200),
        Gemm(False, 0, 200, 60, 1),  # past 2^31
        *store_all(config)[:3],
    ]
    compare(instructions, config, dram)


def test_statistics():
    dram = memory(3)
    put_uops(dram, SMALL, [(0, 0, 0), (1, 0, 0)])
    instructions = [
        *load_all(SMALL, 2),
        Gemm(True, 0, 2, 3, 1, 2),
        Gemm(False, 0, 2, 3, 4),
        Alu(AluOp.ADD, 0, 2, 5, 1, 2),
        Store(0, OUT // 16, 2, 3, 3),
        Finish(),
    ]
    found = simulate(instructions, SMALL, dram)
    assert (found.inp_bytes, found.wgt_bytes, found.acc_bytes, found.uop_bytes) == (1024, 4096, 4096, 8)
    assert (found.out_bytes, found.gemm_steps, found.reset_steps, found.alu_steps) == (96, 24, 6, 10)


def pipeline(rounds: int, cut: int | None = None) -> list[Instruction]:
    """Load, multiply and store `rounds` times through two halves of the memories; `cut` leaves out one token's wait."""
    found: list[Instruction] = [
        Load(MemoryId.WGT, 0, WEIGHTS // 256, 1, 1, 1),
        Load(MemoryId.UOP, 0, UOPS // 4, 1, 2, 2),
    ]
    for number in range(rounds):
        half, again = number % 2, number >= 2
        source, result = INPUTS // 16 + 8 * number, OUT // 16 + 8 * number
        compute = {"dst_out": 1, "src_out": 1}
        waits = again and cut != number
        found += [
            Load(MemoryId.INP, 8 * half, source, 1, 8, 8, tokens=Tokens(pop_next=waits, push_next=True)),
            Gemm(True, half, half + 1, 8, 1, **compute, tokens=Tokens(pop_prev=True, pop_next=again)),
            Gemm(False, half, half + 1, 8, 1, **compute, tokens=Tokens(push_prev=True, push_next=True)),
            Store(8 * half, result, 1, 8, 8, tokens=Tokens(pop_prev=True, push_prev=True)),
        ]
    return [*found, Finish()]


def results(instructions: Sequence[Instruction]) -> set[bytes]:
    start = memory(4)
    put_uops(start, SMALL, [(0, 0, 0), (8, 8, 0)])
    found = set()
    for order in ORDERS:
        for seed in range(8 if order == "random" else 1):
            dram = start.copy()
            simulate(instructions, SMALL, dram, order, seed, fill=seed - 4)
            found.add(dram.tobytes())
    return found


def test_a_stream_without_hazards_is_the_same_in_every_order():
    assert len(results(pipeline(6))) == 1


def test_a_missing_wait_shows_in_some_order():
    assert len(results(pipeline(6, cut=3))) > 1


def test_orders_differ_and_keep_each_engine_in_order():
    stream = pipeline(5)
    orders = [legal_order(stream, order) for order in ORDERS]
    assert orders[0] == list(range(len(stream)))
    assert len({tuple(order) for order in orders}) > 2
    kinds = [[type(stream[n]).__name__ for n in order if isinstance(stream[n], Gemm)] for order in orders]
    assert kinds[1:] == kinds[:-1]
    # The load engine runs two rounds ahead: as far as its tokens go.
    assert orders[1][:4] == [0, 2, 6, 1]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_random_orders_are_legal(seed):
    stream = pipeline(4)
    order = legal_order(stream, "random", random.Random(seed).randrange(1000))
    assert sorted(order) == list(range(len(stream)))


def test_a_deadlock_is_told_before_anything_runs():
    stream = [
        Load(MemoryId.INP, 0, 0, 1, 4, 4),
        Gemm(True, 0, 1, 4, 1, 1, tokens=Tokens(pop_prev=True)),
        Store(0, 0, 1, 4, 4, tokens=Tokens(pop_prev=True)),
    ]
    dram = memory(5)
    before = dram.copy()
    with pytest.raises(TargetError, match=r"deadlock: 1 of 3 .*instruction 1 \(GEMM\) .*load to compute.*2 \(STORE\)"):
        simulate(stream, SMALL, dram)
    assert np.array_equal(dram, before)


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        (Load(MemoryId.INP, 62, 0, 1, 3, 3), r"instruction 1 \(LOAD INP\) fills elements 62 to 65 of a memory of 64"),
        (Load(MemoryId.INP, 0, DRAM_BYTES // 16 - 1, 1, 2, 2), r"moves the DRAM bytes 0x1fff0 to 0x20010"),
        (Load(MemoryId.OUT, 0, 0, 1, 2, 2), "only stored"),
        (Store(60, 0, 1, 5, 5), "accumulators 60 to 65 of 64"),
        (Store(0, DRAM_BYTES // 16, 1, 1, 1), "moves the DRAM bytes"),
        (Gemm(False, 0, 1, 65, 1, 1), "accumulator 64 of 64"),
        (Gemm(False, 0, 1, 2, 33, 0, 0, 1, 2), "input 65 of 64"),
        (Gemm(False, 0, 1, 17, 1, 0, 0, 0, 0, 1), "weight 16 of 16"),
        (Gemm(False, 0, 65, 1, 1), "micro-op 64 of 64"),
        (Alu(AluOp.ADD, 0, 1, 65, 1, 0, 0, 1), "accumulator 64 of 64"),
        (Load(MemoryId.INP, 0, 0, 1, 1, 1, tokens=Tokens(push_prev=True)), "push_prev, but the load engine"),
        (Store(0, 0, 1, 1, 1, tokens=Tokens(pop_next=True)), "pop_next, but the store engine"),
    ],
)
def test_faults_name_the_instruction(instruction, words):
    with pytest.raises(TargetError, match=words):
        simulate([Load(MemoryId.UOP, 0, 0, 0, 1, 1, y_pad_0=1), instruction], SMALL, memory(6))


def test_a_memory_that_is_not_flat_is_refused():
    with pytest.raises(TargetError, match="flat, contiguous array of uint8"):
        simulate([], SMALL, memory(7)[::2])
