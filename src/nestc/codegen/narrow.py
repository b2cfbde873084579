"""int32 to bytes with saturation as x86 instructions: packing works in halves of 16 bytes, so one permutation follows.

LLVM's own lowering puts a permutation after every pack, three for four vectors, and each is two operations on Zen.
"""

from __future__ import annotations

from collections.abc import Callable

from nestc.codegen.llvm_types import unsigned
from nestc.kernels.api import CpuMachine
from nestc.kernels.elementwise import integer_range
from nestc.tensor.ir import Binary, Broadcast, Cast, Const, Expr

Emit = Callable[[str], str]
"""Takes the right side of an LLVM instruction, gives the name of its result."""
Declare = Callable[[str, str], str]
"""Takes the name and the signature of an external function."""


def saturated(e: Cast, machine: CpuMachine) -> Expr | None:
    """x of ``Cast(min(max(x, lowest), highest), dtype)``, if x is four 32-byte vectors of int32 and dtype has bytes."""
    if e.dtype not in ("int8", "uint8") or e.lanes != 32 or machine.vector_bytes != 32:
        return None
    if not machine.triple.startswith("x86_64"):
        return None
    low, high = integer_range(e.dtype)
    outer = e.x
    if not isinstance(outer, Binary) or outer.op != "min" or not _is(outer.b, high):
        return None
    inner = outer.a
    if not isinstance(inner, Binary) or inner.op != "max" or not _is(inner.b, low):
        return None
    return inner.a


def _is(e: Expr, value: int) -> bool:
    return isinstance(e, Broadcast) and e.x == Const(value, "int32")


def packed(emit: Emit, declare: Declare, value: str, dtype: str) -> str:
    """<32 x i32> `value` as <32 x i8>, saturated."""
    quarters = [_cut(emit, value, 8 * i) for i in range(4)]
    halves = [
        _call(emit, declare, "packssdw", "<16 x i16>", "<8 x i32>", a, b) for a, b in zip(quarters[::2], quarters[1::2])
    ]
    name = "packuswb" if unsigned(dtype) else "packsswb"
    mixed = _call(emit, declare, name, "<32 x i8>", "<16 x i16>", *halves)
    words = emit(f"bitcast <32 x i8> {mixed} to <8 x i32>")
    order = ", ".join(f"i32 {i}" for i in (0, 4, 1, 5, 2, 6, 3, 7))
    words = emit(f"shufflevector <8 x i32> {words}, <8 x i32> poison, <8 x i32> <{order}>")
    return emit(f"bitcast <8 x i32> {words} to <32 x i8>")


def _cut(emit: Emit, value: str, start: int) -> str:
    picks = ", ".join(f"i32 {start + i}" for i in range(8))
    return emit(f"shufflevector <32 x i32> {value}, <32 x i32> poison, <8 x i32> <{picks}>")


def _call(emit: Emit, declare: Declare, op: str, result: str, operand: str, a: str, b: str) -> str:
    name = f"llvm.x86.avx2.{op}"
    declare(name, f"{result} @{name}({operand}, {operand})")
    return emit(f"call {result} @{name}({operand} {a}, {operand} {b})")
