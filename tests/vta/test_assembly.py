"""VTA assembly: what it looks like, that it gives the same bits back, and what is refused with its line."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.errors import TargetError
from nestc.runtime.vta.assembly import assemble, disassemble, engine
from nestc.runtime.vta.config import preset
from nestc.runtime.vta.encode import decode, decode_uops, encode, encode_uops
from nestc.runtime.vta.isa import Alu, AluOp, Finish, Gemm, Load, MemoryId, Store, Stream, Tokens

STOCK = preset("pynq_1x16x16")

PROGRAM = Stream(
    (
        Load(MemoryId.UOP, 0, 0x400, 1, 2, 2),
        Load(MemoryId.INP, 4, 0x100, 14, 14, 56, tokens=Tokens(push_next=True)),
        Load(MemoryId.WGT, 0, 0x20, 1, 9, 9, 1, 2, 3, 4, Tokens(pop_next=True, push_next=True)),
        Gemm(True, 0, 1, 14, 14, 14, 1),
        Gemm(False, 0, 2, 14, 14, 14, 1, 14, 1, 0, 9, Tokens(pop_prev=True, pop_next=True, push_prev=True)),
        Alu(AluOp.SHR, 0, 1, 14, 14, 14, 1, use_imm=True, imm=-3),
        Alu(AluOp.MAX, 0, 1, 14, 14, 14, 1, 14, 1, tokens=Tokens(push_next=True)),
        Store(0, 0x300, 14, 14, 56, Tokens(pop_prev=True, push_prev=True)),
        Finish(Tokens(pop_next=True)),
    ),
    np.array([[0, 4, 0], [2047, 100, 1023]]),
    0x400,
)

TEXT = """\
; VTA pynq_1x16x16: 9 instructions, 2 micro-ops
.uops 0x400
     0  acc 0 src 4 wgt 0
     1  acc 2047 src 100 wgt 1023
.code
     0 compute  load uop sram 0 dram 0x400 size 1x2 stride 2
     1 load     load inp sram 4 dram 0x100 size 14x14 stride 56   push(compute)
     2 load     load wgt sram 0 dram 0x20 size 1x9 stride 9 pad 1 2 3 4   pop(compute) push(compute)
; conv1: tile 0
     3 compute  reset uop 0:1 loop 14x14 acc +14 +1 inp +0 +0 wgt +0 +0
     4 compute  gemm uop 0:2 loop 14x14 acc +14 +1 inp +14 +1 wgt +0 +9   pop(load,store) push(load)
     5 compute  alu shr imm -3 uop 0:1 loop 14x14 dst +14 +1 src +0 +0
     6 compute  alu max uop 0:1 loop 14x14 dst +14 +1 src +14 +1   push(store)
     7 store    store sram 0 dram 0x300 size 14x14 stride 56   pop(compute) push(compute)
     8 compute  finish   pop(store)
"""


def same(a: Stream, b: Stream) -> None:
    assert a.instructions == b.instructions
    assert a.uop_base == b.uop_base
    np.testing.assert_array_equal(a.uops, b.uops)


def test_text_of_a_program():
    assert disassemble(PROGRAM, STOCK, {3: "conv1: tile 0"}) == TEXT
    same(assemble(TEXT, STOCK), PROGRAM)


def test_what_may_be_left_out():
    text = """
    .code
    load inp sram 0x10 dram 16 size 1x1 stride 1 push(compute)   # a comment
    load load wgt sram 0 dram 0 size 1x1 stride 1                ; and another
    3 store sram 1 dram 0 size 1x1 stride 1
    """
    stream = assemble(text, STOCK)
    assert stream.instructions == (
        Load(MemoryId.INP, 16, 16, 1, 1, 1, tokens=Tokens(push_next=True)),
        Load(MemoryId.WGT, 0, 0, 1, 1, 1),
        Store(1, 0, 1, 1, 1),
    )
    assert stream.uops.shape == (0, 3) and stream.uop_base == 0
    same(assemble("", STOCK), Stream((), np.zeros((0, 3), np.int64), 0))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_bits_come_back(data: st.DataObject):
    # From bits, so that tokens without a neighbour, unused immediates and odd memories are tried too.
    masks = [
        (0, (1 << 58) - 8 | ((1 << 64) - 1) << 64),
        (2, (1 << 63) - 8 | ((1 << 64) - 1) << 64),
        (4, (1 << 63) - 8 & ~(1 << 7) | ((1 << 64) - 1) << 64),
        (3, 0x78),
    ]
    words = b""
    for _ in range(data.draw(st.integers(1, 6))):
        opcode, mask = data.draw(st.sampled_from(masks))
        word = data.draw(st.integers(0, (1 << 128) - 1)) & mask | opcode
        if opcode == 0:
            word &= ~(1 << 8 if word >> 9 & 1 else 0)  # memories 6 and 7 do not exist
        if opcode == 4:
            word &= ~(3 << 108 if word >> 110 & 1 else 0)  # nor do operations 5 to 7
        words += word.to_bytes(16, "little")
    uops = data.draw(st.binary(min_size=0, max_size=40).map(lambda b: b[: len(b) // 4 * 4]))
    base = data.draw(st.integers(0, (1 << 32) - 1))
    stream = assemble(disassemble(Stream(tuple(decode(words, STOCK)), decode_uops(uops, STOCK), base), STOCK), STOCK)
    assert encode(stream.instructions, STOCK) == words
    assert encode_uops(stream.uops, STOCK) == uops
    assert stream.uop_base == base


GEMM = "gemm uop 0:1 loop 1x1 acc +0 +0 inp +0 +0 wgt +0 +0"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("jump 3", "'jump' is not an instruction; there are load, store, gemm, reset, alu, finish"),
        ("load lds sram 0", "'lds' is not a memory; there are uop, wgt, inp, acc, out, acc_8bit"),
        ("alu xor uop 0:1", "'xor' is not an ALU operation"),
        ("gemm uop 0:1 loop 1", "'1' is not two numbers with 'x' between"),
        ("gemm uop 0:1 loop 1xtwo", "'two' is not a number"),
        ("gemm uop 0:1 turns 1x1", "'loop' is expected, not 'turns'"),
        ("gemm uop 0:1", "the line ends where 'loop' is expected"),
        (f"load {GEMM}", "runs on the compute engine, not on 'load'"),
        (f"{GEMM} pull(load)", "'pull(load)' is not pop(ENGINE) or push(ENGINE)"),
        (f"{GEMM} pop(compute)", "the compute engine has no tokens of 'compute', only of load and store"),
        (f"{GEMM} pop(load) pop(load)", "pop(load) is said twice"),
        ("finish now", "'now' is not pop(ENGINE)"),
        ("gemm uop 0:1 loop 1x1 acc +0 +2048 inp +0 +0 wgt +0 +0", "instruction 1 (gemm): dst_in is 2048"),
        ("alu add imm 40000 uop 0:1 loop 1x1 dst +0 +0 src +0 +0", "imm is 40000"),
        (".data", "'.data' is not a section"),
        (".uops 0x100000000", "the address 0x100000000 is not one of 32 bits"),
        (".uops 0x10 7", "'7' is one word too many"),
    ],
)
def test_refused_with_its_line(line: str, words: str):
    with pytest.raises(TargetError) as error:
        assemble(f".code\n\nfinish ; first\n{line}\n{GEMM}\n", STOCK)
    assert str(error.value).startswith("line 4 of VTA assembly: ")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("acc 1 src 2", "the line ends where 'wgt' is expected"),
        ("acc 1 src 2 wgt 1024", "micro-op 1: wgt is 1024"),
        ("acc -1 src 2 wgt 0", "is not one of 32 bits"),
        ("7 acc 99999999999999999999 src 2 wgt 0", "is not one of 32 bits"),
    ],
)
def test_uop_refused_with_its_line(line: str, words: str):
    with pytest.raises(TargetError, match="line 3 of VTA assembly: ") as error:
        assemble(f".uops\n0 acc 1 src 1 wgt 1\n{line}\n", STOCK)
    assert words in str(error.value)


def test_a_line_before_the_sections():
    with pytest.raises(TargetError, match=r"line 1 of VTA assembly: stands before .uops or .code"):
        assemble("finish", STOCK)


def test_engines():
    load = Load(MemoryId.INP, 0, 0, 1, 1, 1)
    engines = [engine(replace(load, memory=memory)) for memory in MemoryId]
    assert engines == ["compute", "load", "load", "compute", "compute", "compute"]


def test_the_example_in_the_manual_is_assembled():
    import nestc.runtime.vta.assembly as module

    assert module.__doc__ is not None
    example = [line for line in module.__doc__.splitlines() if line.startswith("    ")]
    text = "\n".join(line.split("  address of")[0].split("  a micro-op a line")[0] for line in example)
    stream = assemble(text, STOCK)
    assert [engine(item) for item in stream.instructions] == ["compute", "load", "compute", "store", "compute"]
    assert stream.uop_base == 0x400
