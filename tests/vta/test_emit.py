"""Statements of Tensor IR become exactly the instructions and micro-ops that they say, or are refused in words."""

import numpy as np
import pytest

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import Alu, AluOp, Gemm, Load, MemoryId, Store
from nestc.targets.vta import intrinsics as vta
from nestc.targets.vta.emit import Bytes, emit
from nestc.tensor import index as ix
from nestc.tensor.ir import Buffer, Call, Expr, For, Kernel, Stmt, Var, Window

CONFIG = VtaConfig()
INP, WGT, ACC = (vta.sram(memory, CONFIG) for memory in (vta.INP, vta.WGT, vta.ACC))
X, W, Y = vta.dram("x", vta.INP, 5000, CONFIG), vta.dram("w", vta.WGT, 50, CONFIG), vta.dram("y", vta.INP, 5000, CONFIG)
B = vta.dram("b", vta.ACC, 50, CONFIG)
ADDRESSES = {"x": 0x1000, "w": 0x20000, "y": 0x40000, "b": 0x80000}


def at(buffer: Buffer, *terms: Expr | int) -> Window:
    return Window(buffer, (ix.add(*terms), ix.const(0), ix.const(0)))


def nest(loops: list[Var], kinds: str, call: Call) -> Stmt:
    statement: Stmt = call
    for var, kind in reversed(list(zip(loops, kinds, strict=True))):
        statement = For(var, (statement,), "serial" if kind == "s" else "unroll")
    return statement


def pieces(*body: Stmt):
    return emit(Kernel("k", (X, W, Y, B), body, (INP, WGT, ACC)), ADDRESSES, CONFIG)


def refused(*body: Stmt) -> str:
    with pytest.raises(TargetError) as caught:
        pieces(*body)
    return str(caught.value)


def test_dma():
    load, weights, bias, store = pieces(
        Call(vta.load_tile(vta.INP, 3, 28, 196, CONFIG), (at(INP, 100), at(X, 7))),
        Call(vta.load_tile(vta.WGT, 1, 9, 9, CONFIG), (at(WGT, 5), at(W, 11))),
        Call(vta.load_tile(vta.ACC, 1, 2, 2, CONFIG), (at(ACC, 9), at(B, 3))),
        Call(vta.store_tile(2, 28, 196, CONFIG), (at(Y, 28), at(ACC, 64))),
    )
    assert load.instruction == Load(MemoryId.INP, 100, 0x100 + 7, 3, 28, 196)
    assert load.reads == (Bytes(0x1000 + 7 * 16, 3, 28 * 16, 196 * 16),)
    assert (load.writes[0].memory, load.writes[0].where) == (MemoryId.INP, slice(100, 184))
    assert weights.instruction == Load(MemoryId.WGT, 5, 0x200 + 11, 1, 9, 9)
    assert bias.instruction == Load(MemoryId.ACC, 9, 0x2000 + 3, 1, 2, 2)
    assert bias.reads[0].stop == 0x80000 + 5 * 64
    assert store.instruction == Store(64, 0x4000 + 28, 2, 28, 196)
    assert store.writes == (Bytes(0x40000 + 28 * 16, 2, 28 * 16, 196 * 16),)
    assert (store.reads[0].memory, store.reads[0].where) == (MemoryId.ACC, slice(64, 120))
    assert all(p.uops is None and p.origin == "k" for p in (load, weights, bias, store))


def test_a_convolution_tap():
    rows, columns, o, i = Var("rows", 6), Var("columns", 5), Var("o", 2), Var("i", 3)
    call = Call(
        vta.gemm(CONFIG),
        (
            at(ACC, 1, ix.mul(rows, 7), columns, ix.mul(o, 49)),
            at(INP, 2, ix.mul(rows, 18), ix.mul(columns, 2), ix.mul(i, 300)),
            at(WGT, 3, ix.mul(o, 27), ix.mul(i, 9)),
        ),
    )
    (piece,) = pieces(nest([rows, columns, o, i], "ssuu", call))
    assert piece.instruction == Gemm(False, 0, 6, 6, 5, 7, 1, 18, 2, 0, 0)
    expected = [(1 + 49 * a, 2 + 300 * b, 3 + 27 * a + 9 * b) for a in range(2) for b in range(3)]
    assert piece.uops is not None and piece.uops.tolist() == [list(u) for u in expected]
    grid = [(y, x, *u) for y in range(6) for x in range(5) for u in expected]
    reached = [
        sorted({7 * y + x + d for y, x, d, _, _ in grid}),
        sorted({18 * y + 2 * x + s for y, x, _, s, _ in grid}),
        sorted({w for *_, w in grid}),
    ]
    for access, elements in zip(piece.reads, reached, strict=True):
        assert np.arange(2048)[access.where].tolist() == elements
    assert [a.memory for a in piece.reads] == [MemoryId.ACC, MemoryId.INP, MemoryId.WGT]
    assert [a.memory for a in piece.writes] == [MemoryId.ACC]
    assert np.arange(2048)[piece.writes[0].where].tolist() == reached[0]


def test_loops_may_be_left_out():
    i, j = Var("i", 9), Var("j", 4)
    alone, one, unrolled = pieces(
        Call(vta.reset(CONFIG), (at(ACC, 77),)),
        nest([i], "s", Call(vta.reset(CONFIG), (at(ACC, ix.mul(i, 3)),))),
        nest([j], "u", Call(vta.gemm(CONFIG), (at(ACC, 5), at(INP, j), at(WGT, ix.sub(8, ix.mul(j, 2)))))),
    )
    assert alone.instruction == Gemm(True, 0, 1, 1, 1) and alone.reads == ()
    assert one.instruction == Gemm(True, 0, 1, 9, 1, 3)
    assert np.arange(100)[one.writes[0].where].tolist() == list(range(0, 27, 3))
    assert unrolled.instruction == Gemm(False, 0, 4, 1, 1)
    assert unrolled.uops is not None and unrolled.uops.tolist() == [[5, 0, 8], [5, 1, 6], [5, 2, 4], [5, 3, 2]]
    assert np.arange(100)[unrolled.reads[2].where].tolist() == [2, 4, 6, 8]
    assert alone.uops is not None and alone.uops.tolist() == [[77, 0, 0]]


def test_alu():
    i, j = Var("i", 4), Var("j", 3)
    immediate, tensor = pieces(
        nest([i, j], "su", Call(vta.alu(AluOp.SHR, 5, CONFIG), (at(ACC, 10, ix.mul(i, 3), j),))),
        nest([i, j], "ss", Call(vta.alu(AluOp.MAX, None, CONFIG), (at(ACC, ix.mul(i, 3), j), at(ACC, 100, i)))),
    )
    # The RTL reads an immediate's operand at src, the specification at dst: both must be the same.
    assert immediate.instruction == Alu(AluOp.SHR, 0, 3, 4, 1, 3, 0, 3, 0, True, 5)
    assert immediate.uops is not None and immediate.uops.tolist() == [[10, 10, 0], [11, 11, 0], [12, 12, 0]]
    assert tensor.instruction == Alu(AluOp.MAX, 0, 1, 4, 3, 3, 1, 1, 0)
    assert tensor.uops is not None and tensor.uops.tolist() == [[0, 100, 0]]
    assert np.arange(200)[tensor.reads[1].where].tolist() == [100, 101, 102, 103]


def test_a_maximum_over_taps_may_come_back_to_its_accumulator():
    i, j = Var("i", 4), Var("j", 3)
    (piece,) = pieces(nest([i, j], "su", Call(vta.alu(AluOp.MAX, None, CONFIG), (at(ACC, i), at(ACC, 100, j)))))
    assert piece.uops is not None and piece.uops.tolist() == [[0, 100, 0], [0, 101, 0], [0, 102, 0]]


FOUR, THREE, TWO = Var("i", 4), Var("j", 3), Var("k", 2)
MANY, M, N = Var("l", 20000), Var("m", 100), Var("n", 100)
ADD, MAX = vta.alu(AluOp.ADD, 1, CONFIG), vta.alu(AluOp.MAX, None, CONFIG)


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        (nest([FOUR, THREE, TWO], "sss", Call(vta.reset(CONFIG), (at(ACC, FOUR, THREE, TWO),))), "3 serial loops are more than 2"),
        (nest([FOUR, THREE], "us", Call(vta.reset(CONFIG), (at(ACC, FOUR, THREE),))), "loops are not serial ones around unrolled ones"),
        (nest([MANY], "s", Call(vta.reset(CONFIG), (at(ACC, 0),))), "loop l runs 20000 times, which is not in 1 .. 16383"),
        (nest([MANY], "u", Call(vta.reset(CONFIG), (at(ACC, 0),))), "loop l runs 20000 times, which is not in 1 .. 8192"),
        (nest([M, N], "uu", Call(vta.reset(CONFIG), (at(ACC, 0),))), "10000 micro-ops do not fit in their buffer"),
        (nest([FOUR], "s", Call(vta.reset(CONFIG), (at(ACC, 100, ix.mul(FOUR, -1)),))), "a factor of ACC is -1 or 0, not in 0 .. 2047"),
        (nest([FOUR], "s", Call(vta.reset(CONFIG), (at(ACC, ix.mul(FOUR, 700)),))), "elements 0 .. 2100 of ACC are not in 0 .. 2047"),
        (nest([FOUR], "u", Call(vta.reset(CONFIG), (at(ACC, ix.floordiv(FOUR, 2)),))), "the place in acc is not affine in the loops"),
        (Call(vta.reset(CONFIG), (Window(INP, (ix.const(0),) * 3),)), "operands of reset lie in INP"),
        (Call(vta.reset(CONFIG), (Window(ACC, (ix.const(0), ix.const(0), ix.const(1))),)), "is not where an element begins"),
        (Call(vta.gemm(CONFIG), (at(ACC, 0), at(X, 0), at(WGT, 0))), "x is in param, not in an SRAM of VTA"),
        (nest([FOUR], "s", Call(vta.load_tile(vta.INP, 1, 1, 1, CONFIG), (at(INP, FOUR), at(X, FOUR)))), "DMA stands in a loop"),
        (Call(vta.load_tile(vta.WGT, 1, 1, 1, CONFIG), (at(INP, 0), at(W, 0))), "inp is not in its memory"),
        (Call(vta.load_tile(vta.INP, 1, 4, 4, CONFIG), (at(INP, 2046), at(X, 0))), "elements 2046 .. 2049 of INP"),
        (Call(vta.load_tile(vta.INP, 2, 1, 70000, CONFIG), (at(INP, 0), at(X, 0))), "70000 elements between rows are not in 1 .. 65535"),
        (Call(vta.alu(AluOp.ADD, 40000, CONFIG), (at(ACC, 0),)), "the immediate 40000 does not fit in 16 bits"),
        (nest([FOUR], "s", Call(ADD, (at(ACC, 0),))), "an element is written twice in consecutive cycles"),
        (nest([FOUR], "s", Call(MAX, (at(ACC, 1, FOUR), at(ACC, FOUR)))), "an element is read right after it is written"),
        (For(FOUR, ()), "a loop does not hold just one statement"),
    ],
)  # fmt: skip
def test_what_is_no_instruction(statement, problem):
    message = refused(Call(vta.reset(CONFIG), (at(ACC, 0),)), statement)
    assert problem in message and message.startswith("kernel k, statement 1: ")


def test_addresses_must_fit():
    tile = vta.load_tile(vta.WGT, 1, 1, 1, CONFIG)
    k = Kernel("k", (W,), (Call(tile, (at(WGT, 0), at(W, 0))),), (WGT,))
    with pytest.raises(TargetError, match="w has no address"):
        emit(k, {}, CONFIG)
    with pytest.raises(TargetError, match="the address 0x1010 of w is no multiple of 256 bytes"):
        emit(k, {"w": 0x1010}, CONFIG)
