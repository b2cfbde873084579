"""VTA's instructions as Tensor IR intrinsics: what each does to its operands, and what an encoder needs to know.

Memories of a kernel: ``vta.inp``, ``vta.wgt`` and ``vta.acc`` are the SRAMs, each one local buffer (depth, ...) of
elements; DRAM values and constants are parameters, (elements, ...) of the same elements. Operands are windows whose
first index is an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import AluOp, MemoryId
from nestc.tensor import index as ix
from nestc.tensor.build import constant
from nestc.tensor.ir import Binary, Block, Buffer, Cast, Expr, For, Intrinsic, Load, Reduce, Store, Var

INP, WGT, ACC = "vta.inp", "vta.wgt", "vta.acc"
_IDS = {INP: MemoryId.INP, WGT: MemoryId.WGT, ACC: MemoryId.ACC}


@dataclass(frozen=True, eq=False)
class LoadTile(Intrinsic):
    """A LOAD without padding: operands (SRAM, DRAM); `y` rows of `x` elements, `stride` apart in DRAM."""

    memory: MemoryId = MemoryId.INP
    y: int = 1
    x: int = 1
    stride: int = 1


@dataclass(frozen=True, eq=False)
class StoreTile(Intrinsic):
    """A STORE: operands (DRAM, accumulators); `y` rows of `x` elements, `stride` apart in DRAM."""

    y: int = 1
    x: int = 1
    stride: int = 1


@dataclass(frozen=True, eq=False)
class GemmStep(Intrinsic):
    """One micro-op of a GEMM: operands (acc, inp, wgt), or (acc,) with ``reset``."""

    reset: bool = False


@dataclass(frozen=True, eq=False)
class AluStep(Intrinsic):
    """One micro-op of an ALU instruction: operands (dst, src), or (dst,) where ``imm`` is a number."""

    op: AluOp = AluOp.ADD
    imm: int | None = None


def element(memory: str, config: VtaConfig) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of an element of a memory."""
    if memory == INP:
        return "int8", (config.batch, config.block)
    if memory == WGT:
        return "int8", (config.block, config.block)
    return "int32", (config.batch, config.block)


def sram(memory: str, config: VtaConfig) -> Buffer:
    """The local buffer that is one of the machine's SRAMs."""
    depth = {INP: config.inp_depth, WGT: config.wgt_depth, ACC: config.acc_depth}[memory]
    dtype, shape = element(memory, config)
    return Buffer(memory.removeprefix("vta."), dtype, (depth, *shape), memory)  # type: ignore[arg-type]


def dram(name: str, memory: str, elements: int, config: VtaConfig) -> Buffer:
    """A DRAM parameter that holds elements of a memory (an output holds those of ``vta.inp``)."""
    dtype, shape = element(memory, config)
    return Buffer(name, dtype, (elements, *shape))


def _copy(dst: Buffer, src: Buffer, y: int, x: int, stride: int) -> Block:
    rows, columns, inner = Var("row", y), Var("column", x), Var("part", dst.shape[1])
    lanes = dst.shape[2]
    read: Expr = Load(src, (ix.add(ix.mul(rows, stride), columns), inner, ix.const(0)), lanes)
    if dst.dtype != src.dtype:
        read = Cast(read, dst.dtype)
    to_sram = dst.shape[0] == y * x
    place = ix.add(ix.mul(rows, x if to_sram else stride), columns)
    return (For(rows, (For(columns, (For(inner, (Store(dst, (place, inner, ix.const(0)), read),)),)),)),)


@cache
def load_tile(memory: str, y: int, x: int, stride: int, config: VtaConfig) -> LoadTile:
    """LOAD of `y` rows of `x` elements that lie `stride` elements apart in DRAM."""
    dtype, shape = element(memory, config)
    dst = Buffer("sram", dtype, (y * x, *shape))
    src = Buffer("dram", dtype, ((y - 1) * stride + x, *shape))
    name = f"load.{memory.removeprefix('vta.')}[{y}x{x}, {stride}]"
    return LoadTile(name, (dst, src), _copy(dst, src, y, x, stride), _IDS[memory], y, x, stride)


@cache
def store_tile(y: int, x: int, stride: int, config: VtaConfig) -> StoreTile:
    """STORE of `y` rows of `x` accumulators, to places `stride` elements apart in DRAM; keeps the low 8 bits."""
    shape = (config.batch, config.block)
    dst = Buffer("dram", "int8", ((y - 1) * stride + x, *shape))
    src = Buffer("sram", "int32", (y * x, *shape))
    rows, columns, inner = Var("row", y), Var("column", x), Var("part", config.batch)
    read = Cast(Load(src, (ix.add(ix.mul(rows, x), columns), inner, ix.const(0)), config.block), "int8")
    write = Store(dst, (ix.add(ix.mul(rows, stride), columns), inner, ix.const(0)), read)
    body = (For(rows, (For(columns, (For(inner, (write,)),)),)),)
    return StoreTile(f"store[{y}x{x}, {stride}]", (dst, src), body, y, x, stride)


@cache
def gemm(config: VtaConfig) -> GemmStep:
    """acc[b, o] += sum over i of inp[b, i] * wgt[o, i], wrapping in 32 bits."""
    acc, inp, wgt = (Buffer(n, t, (1, *s)) for n, (t, s) in zip(("acc", "inp", "wgt"), _elements(config), strict=True))
    b, o = Var("b", config.batch), Var("o", config.block)
    zero = ix.const(0)
    a, w = Load(inp, (zero, b, zero), config.block), Load(wgt, (zero, o, zero), config.block)
    dot = Reduce("add", Binary("mul", Cast(a, "int32"), Cast(w, "int32")))
    total = Store(acc, (zero, b, o), Binary("add", Load(acc, (zero, b, o)), dot))
    return GemmStep("gemm", (acc, inp, wgt), (For(b, (For(o, (total,)),)),))


@cache
def reset(config: VtaConfig) -> GemmStep:
    """acc = 0."""
    acc = Buffer("acc", "int32", (1, config.batch, config.block))
    b = Var("b", config.batch)
    clear = Store(acc, (ix.const(0), b, ix.const(0)), constant(0, "int32", config.block))
    return GemmStep("reset", (acc,), (For(b, (clear,)),), True)


@cache
def alu(op: AluOp, imm: int | None, config: VtaConfig) -> AluStep:
    """dst = op(dst, src), or op(dst, imm) for an `imm` of 16 bits; see `AluOp`."""
    shape = (1, config.batch, config.block)
    dst, src = Buffer("dst", "int32", shape), Buffer("src", "int32", shape)
    b = Var("b", config.batch)
    place = (ix.const(0), b, ix.const(0))
    left = Load(dst, place, config.block)
    right: Expr = Load(src, place, config.block) if imm is None else constant(imm, "int32", config.block)
    write = Store(dst, place, _apply(op, left, right, imm, config.block))
    name = op.name.lower() if imm is None else f"{op.name.lower()}[{imm}]"
    return AluStep(name, (dst, src) if imm is None else (dst,), (For(b, (write,)),), op, imm)


def _apply(op: AluOp, a: Expr, b: Expr, imm: int | None, lanes: int) -> Expr:
    if op is not AluOp.SHR:
        return Binary(op.name.lower(), a, b)
    if imm is not None:
        return Binary("shr", a, b) if imm >= 0 else Binary("shl", a, constant(-imm, "int32", lanes))
    return Binary("shr", a, b)


def _elements(config: VtaConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return element(ACC, config), element(INP, config), element(WGT, config)
