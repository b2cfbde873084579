"""Tables of 256 bytes indexed by vectors of bytes, with the byte shuffles of the machine instead of a load an element.

x86 looks up 16 entries at once by the low four bits (pshufb); sixteen such parts of the table are narrowed to one by
the upper four bits, a tree of fifteen blends. NEON looks up 64 entries at once (tbl, tbx).
"""

from __future__ import annotations

from collections.abc import Callable

from nestc.kernels.api import CpuMachine
from nestc.tensor.ir import Cast, Expr, Load

Emit = Callable[[str], str]
"""Takes the right side of an LLVM instruction, gives the name of its result."""
Declare = Callable[[str, str], str]
"""Takes the name and the signature of an external function."""

_PSHUFB = {32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}
_SIZE = 256


def table_index(e: Load, machine: CpuMachine) -> Expr | None:
    """The uint8 vector that indexes a table of 256 bytes, if the machine has shuffles for that many lanes."""
    if e.mask is not None or e.buffer.shape != (_SIZE,) or e.buffer.dtype not in ("int8", "uint8"):
        return None
    index = e.index[0]
    if not isinstance(index, Cast) or index.x.dtype != "uint8" or index.dtype != "int64":
        return None
    step = _step(machine)
    whole = bool(step) and (e.lanes % step == 0 or 8 <= e.lanes < step)
    return index.x if whole else None


def _step(machine: CpuMachine) -> int:
    """Bytes that one instruction looks up; 0 if none does."""
    if machine.triple.startswith("x86_64"):
        return machine.dot_bytes if machine.dot_bytes in _PSHUFB else 0
    return 16 if machine.triple.startswith(("aarch64", "arm64")) else 0


class Lookup:
    """Lookups in one table, to which `table` is a pointer."""

    def __init__(self, emit: Emit, declare: Declare, table: str, machine: CpuMachine) -> None:
        self.emit, self.declare = emit, declare
        self.table, self.lanes = table, _step(machine)
        self.kind = f"<{self.lanes} x i8>"

    def run(self, x: str, lanes: int) -> str:
        """The entries for a vector of `lanes` bytes, as such a vector."""
        one = self.neon if self.lanes == 16 else self.x86
        if lanes == self.lanes:
            return one(x)
        if lanes < self.lanes:
            picks = ", ".join(f"i32 {i if i < lanes else 'poison'}" for i in range(self.lanes))
            kind = f"<{lanes} x i8>"
            padded = self.emit(f"shufflevector {kind} {x}, {kind} poison, <{self.lanes} x i32> <{picks}>")
            return self.shuffled(one(padded), "poison", self.lanes, 0, lanes)
        parts = [one(self.shuffled(x, "poison", lanes, start, self.lanes)) for start in range(0, lanes, self.lanes)]
        width = self.lanes
        while len(parts) > 1:
            if len(parts) % 2:
                parts.append("poison")
            parts = [self.shuffled(a, b, width, 0, 2 * width) for a, b in zip(parts[::2], parts[1::2])]
            width *= 2
        return self.shuffled(parts[0], "poison", width, 0, lanes)

    def shuffled(self, a: str, b: str, width: int, start: int, count: int) -> str:
        """`count` bytes from `start` on of two vectors side by side."""
        picks = ", ".join(f"i32 {start + i}" for i in range(count))
        return self.emit(f"shufflevector <{width} x i8> {a}, <{width} x i8> {b}, <{count} x i32> <{picks}>")

    def part(self, number: int) -> str:
        """Entries 16 * number .. 16 * number + 15."""
        place = self.emit(f"getelementptr i8, ptr {self.table}, i64 {16 * number}")
        return self.emit(f"load <16 x i8>, ptr {place}, align 1")

    def splat(self, value: int) -> str:
        return f"<{', '.join([f'i8 {value}'] * self.lanes)}>"

    def x86(self, x: str) -> str:
        low = self.emit(f"and {self.kind} {x}, {self.splat(15)}")
        # The sign of a byte chooses: bits 4 to 7 in turn are moved there, two bytes at a time.
        pairs = f"<{self.lanes // 2} x i16>"
        words = self.emit(f"bitcast {self.kind} {x} to {pairs}")
        signs: list[str] = []
        for shift in (3, 2, 1, 0):
            amount = f"<{', '.join([f'i16 {shift}'] * (self.lanes // 2))}>"
            moved = self.emit(f"bitcast {pairs} {self.emit(f'shl {pairs} {words}, {amount}')} to {self.kind}")
            signs.append(self.emit(f"icmp slt {self.kind} {moved}, zeroinitializer"))
        return self.chosen(low, signs, 0, 4)

    def chosen(self, low: str, signs: list[str], first: int, level: int) -> str:
        """The entry among ``2 ** level`` parts from `first` on."""
        if level == 0:
            name = _PSHUFB[self.lanes]
            self.declare(name, f"{self.kind} @{name}({self.kind}, {self.kind})")
            picks = ", ".join(f"i32 {i % 16}" for i in range(self.lanes))
            wide = self.emit(
                f"shufflevector <16 x i8> {self.part(first)}, <16 x i8> poison, <{self.lanes} x i32> <{picks}>"
            )
            return self.emit(f"call {self.kind} @{name}({self.kind} {wide}, {self.kind} {low})")
        lower = self.chosen(low, signs, first, level - 1)
        upper = self.chosen(low, signs, first + (1 << (level - 1)), level - 1)
        sign = signs[level - 1]
        return self.emit(f"select <{self.lanes} x i1> {sign}, {self.kind} {upper}, {self.kind} {lower}")

    def neon(self, x: str) -> str:
        """tbl gives 0 for an index beyond its 64 entries, tbx leaves what was there."""
        result = ""
        for quarter in range(4):
            parts = ", ".join(f"{self.kind} {self.part(4 * quarter + i)}" for i in range(4))
            index = x
            if quarter:
                index = self.emit(f"sub {self.kind} {x}, {self.splat(64 * quarter)}")
            operands = f"{parts}, {self.kind} {index}"
            name = "llvm.aarch64.neon.tbl4.v16i8"
            if quarter:
                name, operands = "llvm.aarch64.neon.tbx4.v16i8", f"{self.kind} {result}, {operands}"
            self.declare(name, f"{self.kind} @{name}({', '.join([self.kind] * (5 + (quarter > 0)))})")
            result = self.emit(f"call {self.kind} @{name}({operands})")
        return result
