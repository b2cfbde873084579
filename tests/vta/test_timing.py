from dataclasses import replace

import numpy as np
import pytest

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.energy import Energy, joules
from nestc.runtime.vta.isa import Alu, AluOp, Finish, Gemm, Instruction, Load, MemoryId, Store, Tokens
from nestc.runtime.vta.timing import RTL, Timing, simulate_timing, simulate_timing_many
from nestc.runtime.vta.trace import trace

NOW = replace(RTL, fetch=False)  # all instructions are in the queues at cycle 0
PUSH_NEXT, POP_PREV = Tokens(push_next=True), Tokens(pop_prev=True)


def bus(bits: int) -> VtaConfig:
    return VtaConfig(bus_bits=bits)


def alone(instruction: Instruction, bits: int = 64, timing: Timing = NOW) -> int:
    return simulate_timing([instruction], bus(bits), timing).cycles


def test_compute_instructions_take_their_micro_ops_and_seven_cycles() -> None:
    assert alone(Gemm(False, 3, 12, 14, 2)) == 9 * 14 * 2 + 7
    assert alone(Gemm(True, 0, 1, 1, 1)) == 1 + 7
    assert alone(Alu(AluOp.MAX, 0, 2, 7, 5, use_imm=True)) == 70 + 7
    assert alone(Alu(AluOp.ADD, 0, 2, 7, 5)) == 140 + 7
    assert alone(Finish()) == 2
    assert alone(Load(MemoryId.UOP, 0, 0, 0, 0, 0)) == alone(Load(MemoryId.INP, 0, 0, 1, 0, 0)) == 2


@pytest.mark.parametrize(
    ("memory", "dram", "rows", "size", "bits", "beats", "wide"),
    [
        (MemoryId.INP, 0, 1, 4, 64, 8, False),
        (MemoryId.INP, 0, 3, 1, 64, 6, False),
        (MemoryId.WGT, 1, 1, 9, 64, 288, False),  # two requests, cut at 2048 bytes; the second streams behind the first
        (MemoryId.ACC, 0, 1, 4, 64, 32, False),
        (MemoryId.UOP, 1, 1, 5, 64, 3, True),  # bytes 4 to 23 lie in three beats
        (MemoryId.INP, 5, 1, 4, 128, 4, True),
        (MemoryId.INP, 3, 1, 4, 512, 2, True),  # bytes 48 to 111 lie in two beats of 64
        (MemoryId.WGT, 0, 1, 9, 512, 36, False),
    ],
)
def test_a_load_takes_its_beats_and_a_constant(
    memory: MemoryId, dram: int, rows: int, size: int, bits: int, beats: int, wide: bool
) -> None:
    load = Load(memory, 0, dram, rows, size, size + 1)
    assert alone(load, bits) == beats + (22 if wide else 23)
    assert simulate_timing([load], bus(bits), NOW).work.bus_read == beats * bits // 8


def test_rows_of_one_beat_hold_up_their_own_requests() -> None:
    # Requests leave their client at cycles 2, 4 .. 18; the memory takes the first at 19 and then one a cycle. While
    # their last (and only) beats come, 20 to 28, no request may leave: the tenth does at 29, arrives at 30, finds
    # the queue of the memory empty and waits 16 cycles; its beat reaches the client at 48.
    load = Load(MemoryId.INP, 0, 0, 10, 1, 2)
    assert alone(replace(load, y_size=9), 128) == 9 + 22
    assert alone(load, 128) == 48 + 2


def test_zeros_are_written_one_a_cycle_beside_the_data() -> None:
    few = Load(MemoryId.INP, 0, 0, 2, 4, 4, x_pad_1=1)
    assert alone(few) == alone(replace(few, x_pad_1=0))
    many = Load(MemoryId.INP, 0, 0, 1, 14, 14, y_pad_1=3)
    assert alone(many) == 3 + 3 * 14 + 28  # more than fits before the first beat, so the 28 beats hold it up


@pytest.mark.parametrize(
    ("rows", "size", "bits", "cycles"),
    [
        (1, 1, 64, 1 + 2 + 4),
        (1, 4, 64, 1 + 8 + 3 + 4),  # the SRAM is read between elements
        (2, 4, 64, 1 + 2 * (8 + 3 + 4)),
        (1, 200, 64, 1 + (256 + 127 + 4) + (144 + 71 + 4)),  # 2048 bytes at most in a request
        (1, 4, 128, 1 + 4 + 4),
        (2, 5, 512, 1 + (2 + 4) + (2 + 4)),  # bytes 0 to 79 and 112 to 191 lie in two beats each
    ],
)
def test_a_store_waits_for_each_of_its_requests(rows: int, size: int, bits: int, cycles: int) -> None:
    assert alone(Store(0, 0, rows, size, 7), bits) == cycles


def test_fetch_brings_batches_and_gives_out_one_instruction_a_cycle() -> None:
    # Request at 1, first beat 20 cycles later, 2 beats an instruction; then state drain, then the queue.
    assert simulate_timing([Finish()], bus(64)).cycles == 1 + 19 + 2 + 1 + 1 + 2
    assert simulate_timing([Finish()], bus(128)).cycles == 1 + 19 + 1 + 4 + 1 + 2
    report = simulate_timing([Finish()] * 130, bus(64))
    first = 1 + 19 + 256 + 2
    assert report.queued[:128].tolist() == list(range(first, first + 128))
    again = report.queued[127] - 1 + 2
    assert report.queued[128] == again + 19 + 4 + 2


def test_a_full_queue_stops_all_dispatch() -> None:
    stream = [Gemm(True, 0, 1, 100, 1)] * 3 + [Load(MemoryId.INP, 0, 0, 0, 0, 0)]
    report = simulate_timing(stream, bus(64), replace(RTL, command_queue=2))
    assert report.queued[2] == report.end[0] + 1
    assert report.queued[3] == report.queued[2] + 1
    deep = simulate_timing(stream, bus(64))
    assert deep.queued.tolist() == list(range(deep.queued[0], deep.queued[0] + 4))


def test_tokens_chain_the_engines() -> None:
    stream = [
        Load(MemoryId.INP, 0, 0, 1, 4, 4, tokens=PUSH_NEXT),
        Gemm(False, 0, 1, 10, 1, tokens=Tokens(pop_prev=True, push_next=True)),
        Store(0, 0, 1, 4, 4, tokens=Tokens(pop_prev=True, push_prev=True)),
        Finish(Tokens(pop_next=True)),
    ]
    report = simulate_timing(stream, bus(64), NOW)
    assert report.start.tolist() == [0, 31, 48, 64]
    assert report.end.tolist() == [31, 48, 64, 66]
    load, compute, store = report.engines
    assert (load.busy, load.idle) == (31, 35)
    assert (compute.busy, compute.tokens, compute.instructions, compute.idle) == (19, 47, 0, 0)
    assert (store.count, store.busy, store.tokens, store.idle) == (1, 16, 48, 2)
    assert store.utilization == 16 / 66


def test_loads_overlap_with_compute() -> None:
    load = Load(MemoryId.WGT, 0, 0, 1, 2, 2, tokens=PUSH_NEXT)
    gemm = Gemm(False, 0, 1, 80, 1, tokens=POP_PREV)
    report = simulate_timing([load, gemm] * 3, bus(64), NOW)
    assert report.end[::2].tolist() == [87, 174, 261]
    assert report.end[1::2].tolist() == [174, 261, 348]


def test_two_clients_share_the_read_channel() -> None:
    loads = [Load(MemoryId.WGT, 0, 0, 1, 2, 2), Load(MemoryId.ACC, 0, 0, 1, 1, 1)]
    report = simulate_timing(loads, bus(64), NOW)
    assert report.end[0] == 64 + 23
    assert report.end[1] == 64 + 8 + 23  # its request stands behind the other's


def test_shares_of_ranges_add_up() -> None:
    load = Load(MemoryId.INP, 0, 0, 1, 4, 4, tokens=PUSH_NEXT)
    report = simulate_timing([load, Gemm(False, 0, 1, 9, 1, tokens=POP_PREV)] * 5, bus(64))
    assert sum(report.between(i, i + 2) for i in range(0, 10, 2)) == report.between(0, 10) == report.cycles
    assert report.between(4, 4) == 0
    assert report.seconds == report.cycles / 100e6


def test_devices_share_the_memory() -> None:
    stream = [Load(MemoryId.WGT, 0, 0, 1, 8, 8), Store(0, 0, 1, 16, 16)]
    one = simulate_timing(stream, bus(64), NOW)
    four = simulate_timing_many([stream] * 4, bus(64), NOW)
    assert one.end.tolist() == [256 + 23, 1 + 32 + 15 + 4]
    assert sorted(int(r.end[0]) for r in four) == [256 * n + 23 for n in (1, 2, 3, 4)]
    # A write channel is held from the address to the response, the 3 cycles of `store_burst` and 47 of data.
    assert sorted(int(r.end[1]) for r in four) == [2 + 50 * n for n in (1, 2, 3, 4)]
    apart = simulate_timing_many([stream, [Gemm(False, 0, 1, 500, 1)]], bus(64), NOW)
    assert [r.cycles for r in apart] == [one.cycles, 507]
    assert simulate_timing_many([], bus(64)) == []


def test_work_counts_micro_ops_and_bytes() -> None:
    stream = [
        Load(MemoryId.UOP, 0, 1, 1, 5, 5),
        Load(MemoryId.INP, 0, 0, 3, 4, 9),
        Load(MemoryId.WGT, 0, 0, 1, 2, 2),
        Load(MemoryId.ACC, 0, 0, 1, 6, 6),
        Gemm(True, 0, 1, 6, 1),
        Gemm(False, 0, 2, 3, 4),
        Alu(AluOp.SHR, 0, 1, 6, 1, use_imm=True),
        Alu(AluOp.ADD, 0, 1, 3, 1),
        Store(0, 0, 1, 6, 6),
    ]
    work = simulate_timing(stream, bus(64)).work
    assert (work.gemm, work.reset, work.alu_immediate, work.alu_tensor) == (24, 6, 6, 3)
    assert work.read == {"insn": 9 * 16, "uop": 20, "inp": 12 * 16, "wgt": 512, "acc": 6 * 64}
    assert (work.written, work.bus_written) == (96, 96)
    assert work.bus_read == sum(work.read.values()) + 4


def test_energy_is_counts_times_constants() -> None:
    free = Energy(multiply=0, add=0, sram_word=0, dram_word=0)
    report = simulate_timing(
        [Load(MemoryId.WGT, 0, 0, 1, 1, 1), Gemm(False, 0, 1, 10, 1), Alu(AluOp.ADD, 0, 1, 4, 1)], bus(64), NOW
    )
    assert joules(report, free)["total"] == 0
    assert joules(report, replace(free, multiply=2.0, add=1.0)) == pytest.approx(
        {"mac": 2560 * 3.0, "alu": 4 * 16, "sram": 0, "dram": 0, "total": 2560 * 3.0 + 64}
    )
    assert joules(report, replace(free, dram_word=1.0))["dram"] == 256 / 8
    # Banks of 64 bits: uop 32 KB, inp and acc 16 KB, wgt 8 KB, out 16 KB.
    deep, root = 2.0, 2**0.5
    words = 14 * 0.5 * deep + 10 * 2 * root + (10 + 1) * 32 + (2 * 14 + 4) * 8 * root + 14 * 2 * root
    assert joules(report, replace(free, sram_word=1.0))["sram"] == pytest.approx(words)
    assert joules(report)["total"] > 0


def test_a_trace_has_a_bar_an_instruction() -> None:
    stream = [Load(MemoryId.INP, 0, 7, 1, 4, 4, tokens=PUSH_NEXT), Gemm(True, 0, 1, 9, 1, tokens=POP_PREV), Finish()]
    report = simulate_timing(stream, bus(64), NOW)
    events = trace(report, stream, device=2)
    bars = [e for e in events if e["ph"] == "X"]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in bars] == [
        ("load inp", 0, 0.0, 0.31),
        ("reset", 1, 0.31, 0.16),
        ("finish", 1, 0.47, 0.02),
    ]
    assert {e["pid"] for e in events} == {2}
    assert [e["args"] for e in events if e["name"] == "thread_name"] == [
        {"name": n} for n in ("load", "compute", "store")
    ]


def test_a_stream_that_waits_forever_is_refused() -> None:
    with pytest.raises(TargetError, match=r"deadlock: number 1 \(gemm\) waits for a token that never comes"):
        simulate_timing([Finish(), Gemm(True, 0, 1, 1, 1, tokens=POP_PREV)], bus(64))
    blocked: list[Instruction] = [Gemm(True, 0, 1, 1, 1, tokens=POP_PREV)] * 3 + [Load(MemoryId.INP, 0, 0, 0, 0, 0)]
    with pytest.raises(TargetError, match="deadlock"):
        simulate_timing(blocked, bus(64), replace(RTL, command_queue=2))


def test_more_tokens_than_the_hardware_counts_are_refused() -> None:
    push = Load(MemoryId.INP, 0, 0, 0, 0, 0, tokens=PUSH_NEXT)
    pop = Gemm(True, 0, 1, 1, 1, tokens=POP_PREV)
    start: list[Instruction] = [Gemm(True, 0, 1, 4000, 1)]
    assert simulate_timing([*start, *[push] * 255, *[pop] * 255], bus(64), NOW).cycles > 0
    with pytest.raises(TargetError, match="256 tokens from load to compute"):
        simulate_timing([*start, *[push] * 256, *[pop] * 256], bus(64), NOW)


def test_an_empty_stream_takes_no_time() -> None:
    report = simulate_timing([], bus(64))
    assert report.cycles == 0 and np.array_equal(report.end, np.empty(0))
    assert report.gemm_utilization == 0 and report.engines[0].utilization == 0
