"""`Dot` as LLVM IR: the one instruction for it where the machine has that, else widen, multiply and add.

Vectors wider than the instruction are cut into parts and put together again, which the code generator does without
instructions of its own once registers are assigned.
"""

from __future__ import annotations

from collections.abc import Callable

from nestc.codegen.llvm_types import suffix, unsigned, vector_type
from nestc.kernels.api import CpuMachine
from nestc.tensor.ir import DOT_GROUPS

Emit = Callable[[str], str]
"""Takes the right side of an LLVM instruction, gives the name of its result."""
Declare = Callable[[str, str], str]
"""Takes the name and the signature of an external function."""

_PMADDUBSW = {32: "llvm.x86.avx2.pmadd.ub.sw", 64: "llvm.x86.avx512.pmaddubs.w.512"}
_PMADDWD = {16: "llvm.x86.sse2.pmadd.wd", 32: "llvm.x86.avx2.pmadd.wd", 64: "llvm.x86.avx512.pmaddw.d.512"}


class Dots:
    """Sums of neighbouring products on one machine."""

    def __init__(self, emit: Emit, declare: Declare, machine: CpuMachine) -> None:
        self.emit, self.declare, self.machine = emit, declare, machine

    def dot(self, acc: str, a: str, b: str, a_dtype: str, b_dtype: str, lanes: int) -> str:
        """`acc` with `lanes` sums of products added, see `tensor.ir.Dot`."""
        group = DOT_GROUPS[a_dtype, b_dtype]
        if a_dtype == "int8" and b_dtype == "uint8":
            a, b, a_dtype, b_dtype = b, a, b_dtype, a_dtype
        name = self.instruction(a_dtype, b_dtype)
        element = "float" if a_dtype == "bfloat16" else "i32"
        if name:

            def whole(acc: str, a: str, b: str, lanes: int) -> str:
                return self.call(name, acc, a, b, lanes, a_dtype)

            return self.pieces(acc, a, b, lanes, group, element, self.vector_lanes, whole)
        if a_dtype == "bfloat16":
            return self.wide_floats(acc, a, b, lanes)
        if self.machine.dot_bytes and not self.arm:
            if group == 4:
                a, b = (self.widened(x, dtype, 4 * lanes, 16) for x, dtype in ((a, a_dtype), (b, b_dtype)))
                zero = "zeroinitializer"
                pairs = self.pieces(zero, a, b, 2 * lanes, 2, "i32", self.vector_lanes, self.multiply_pairs)
                return self.emit(
                    f"add {vector_type('i32', lanes)} {acc}, {self.folded('add', pairs, 'i32', 2 * lanes)}"
                )
            return self.pieces(acc, a, b, lanes, 2, "i32", self.vector_lanes, self.multiply_pairs)
        a, b = (self.widened(x, dtype, group * lanes, 32) for x, dtype in ((a, a_dtype), (b, b_dtype)))
        products = self.emit(f"mul <{group * lanes} x i32> {a}, {b}")
        while group > 1:
            products = self.folded("add", products, "i32", group * lanes)
            group //= 2
        return self.emit(f"add {vector_type('i32', lanes)} {acc}, {products}")

    def pair_sum(self, a: str, b: str, lanes: int) -> str:
        """`lanes` saturated sums of two products, see `tensor.ir.PairSum`."""
        bits = 16 * lanes
        name = _PMADDUBSW.get(bits // 8, "")
        if name and not self.arm and bits // 8 <= self.machine.dot_bytes:
            factor, kind = f"<{2 * lanes} x i8>", f"<{lanes} x i16>"
            self.declare(name, f"{kind} @{name}({factor}, {factor})")
            return self.emit(f"call {kind} @{name}({factor} {a}, {factor} {b})")
        a, b = self.widened(a, "uint8", 2 * lanes, 32), self.widened(b, "int8", 2 * lanes, 32)
        total = self.folded("add", self.emit(f"mul <{2 * lanes} x i32> {a}, {b}"), "i32", 2 * lanes)
        kind = vector_type("i32", lanes)
        for op, bound in (("smin", 32767), ("smax", -32768)):
            limit = str(bound) if lanes == 1 else f"<{', '.join([f'i32 {bound}'] * lanes)}>"
            name = f"llvm.{op}.{suffix('i32', lanes)}"
            self.declare(name, f"{kind} @{name}({kind}, {kind})")
            total = self.emit(f"call {kind} @{name}({kind} {total}, {kind} {limit})")
        return self.emit(f"trunc {kind} {total} to {vector_type('i16', lanes)}")

    @property
    def vector_lanes(self) -> int:
        """32-bit lanes of the widest instruction."""
        return self.machine.dot_bytes // 4

    def instruction(self, a_dtype: str, b_dtype: str) -> str:
        """Name of the intrinsic for whole vectors, less the part that tells the number of lanes; empty if none."""
        if self.machine.vnni and (a_dtype, b_dtype) == ("uint8", "int8"):
            return "llvm.x86.avx512.vpdpbusd"
        if self.machine.vnni and a_dtype == "int16":
            return "llvm.x86.avx512.vpdpwssd"
        if self.machine.bf16 and a_dtype == "bfloat16":
            return "llvm.aarch64.neon.bfdot" if self.arm else "llvm.x86.avx512bf16.dpbf16ps"
        if self.machine.dotprod and a_dtype == b_dtype and a_dtype in ("int8", "uint8"):
            return "llvm.aarch64.neon." + ("udot" if unsigned(a_dtype) else "sdot")
        return ""

    @property
    def arm(self) -> bool:
        """Whether the machine is an Arm one, else an x86 one."""
        return self.machine.triple.startswith(("aarch64", "arm64"))

    def pieces(
        self,
        acc: str,
        a: str,
        b: str,
        lanes: int,
        group: int,
        element: str,
        widest: int,
        one: Callable[[str, str, str, int], str],
    ) -> str:
        """`one` on parts of 4, 8 or 16 lanes that an instruction takes; what fills no part is padded."""
        size = min(widest, max(4, 1 << (lanes - 1).bit_length()))
        factor = "i8" if group == 4 else "i16"
        if lanes == size:
            return one(acc, a, b, lanes)
        results: list[str] = []
        for start in range(0, lanes, size):
            part = self.cut(acc, element, lanes, start, size)
            x, y = (self.cut(v, factor, group * lanes, group * start, group * size) for v in (a, b))
            results.append(one(part, x, y, size))
        width = size
        while len(results) > 1:
            if len(results) % 2:
                results.append("poison")
            picks = ", ".join(f"i32 {i}" for i in range(2 * width))
            kind = f"<{width} x {element}>"
            results = [
                self.emit(f"shufflevector {kind} {low}, {kind} {high}, <{2 * width} x i32> <{picks}>")
                for low, high in zip(results[::2], results[1::2])
            ]
            width *= 2
        return self.cut(results[0], element, width, 0, lanes)

    def cut(self, value: str, element: str, lanes: int, start: int, size: int) -> str:
        """`size` lanes from `start` on; those past the end are anything."""
        if value == "zeroinitializer" or (start == 0 and size == lanes):
            return value
        if lanes == 1:
            return self.emit(f"insertelement <{size} x {element}> poison, {element} {value}, i64 0")
        if size == 1:
            return self.emit(f"extractelement <{lanes} x {element}> {value}, i64 {start}")
        picks = ", ".join(f"i32 {start + i if start + i < lanes else 'poison'}" for i in range(size))
        return self.emit(
            f"shufflevector <{lanes} x {element}> {value}, <{lanes} x {element}> poison, <{size} x i32> <{picks}>"
        )

    def call(self, name: str, acc: str, a: str, b: str, lanes: int, dtype: str) -> str:
        """The intrinsic on one vector."""
        element = "float" if dtype == "bfloat16" else "i32"
        kind = f"<{lanes} x {element}>"
        bits = 32 * lanes
        if dtype == "bfloat16":
            factor = f"<{2 * lanes} x bfloat>"
            a, b = (self.emit(f"bitcast <{2 * lanes} x i16> {x} to {factor}") for x in (a, b))
            name += f".{suffix('float', lanes)}.v{2 * lanes}bf16" if self.arm else f".{bits}"
        elif self.arm:
            factor = f"<{4 * lanes} x i8>"
            name += f".v{lanes}i32.v{4 * lanes}i8"
        else:
            # LLVM before 22 knows these with 32-bit lanes only, and takes them so since.
            factor = kind
            source = f"<{2 * lanes} x i16>" if dtype == "int16" else f"<{4 * lanes} x i8>"
            a, b = (self.emit(f"bitcast {source} {x} to {kind}") for x in (a, b))
            name += f".{bits}"
        self.declare(name, f"{kind} @{name}({kind}, {factor}, {factor})")
        return self.emit(f"call {kind} @{name}({kind} {acc}, {factor} {a}, {factor} {b})")

    def multiply_pairs(self, acc: str, a: str, b: str, lanes: int) -> str:
        """pmaddwd and an addition on one vector."""
        kind, factor = f"<{lanes} x i32>", f"<{2 * lanes} x i16>"
        name = _PMADDWD[4 * lanes]
        self.declare(name, f"{kind} @{name}({factor}, {factor})")
        product = self.emit(f"call {kind} @{name}({factor} {a}, {factor} {b})")
        return product if acc == "zeroinitializer" else self.emit(f"add {kind} {acc}, {product}")

    def widened(self, value: str, dtype: str, lanes: int, bits: int) -> str:
        """Integers of `lanes` lanes as wider ones."""
        element = "i16" if dtype == "int16" else "i8"
        if element == f"i{bits}":
            return value
        extend = "zext" if unsigned(dtype) else "sext"
        return self.emit(f"{extend} <{lanes} x {element}> {value} to <{lanes} x i{bits}>")

    def folded(self, op: str, value: str, element: str, lanes: int) -> str:
        """Each lane and its neighbour combined: half as many lanes."""
        half = lanes // 2
        even, odd = (self.stepped(value, element, lanes, start) for start in (0, 1))
        return self.emit(f"{op} {vector_type(element, half)} {even}, {odd}")

    def stepped(self, value: str, element: str, lanes: int, start: int) -> str:
        """Every second lane from `start` on."""
        kind = f"<{lanes} x {element}>"
        if lanes == 2:
            return self.emit(f"extractelement {kind} {value}, i64 {start}")
        picks = ", ".join(f"i32 {i}" for i in range(start, lanes, 2))
        return self.emit(f"shufflevector {kind} {value}, {kind} poison, <{lanes // 2} x i32> <{picks}>")

    def wide_floats(self, acc: str, a: str, b: str, lanes: int) -> str:
        """bfloat16 pairs as float32: the odd ones are the upper halves of 32-bit words, the even ones the lower."""
        words, kind = vector_type("i32", lanes), vector_type("float", lanes)
        a, b = (self.emit(f"bitcast <{2 * lanes} x i16> {x} to {words}") for x in (a, b))
        for shift in (True, False):
            x, y = (self.single(word, lanes, shift) for word in (a, b))
            if self.machine.fma:
                name = f"llvm.fma.{suffix('float', lanes)}"
                self.declare(name, f"{kind} @{name}({kind}, {kind}, {kind})")
                acc = self.emit(f"call {kind} @{name}({kind} {x}, {kind} {y}, {kind} {acc})")
            else:
                acc = self.emit(f"fadd {kind} {acc}, {self.emit(f'fmul {kind} {x}, {y}')}")
        return acc

    def single(self, word: str, lanes: int, even: bool) -> str:
        """The even or odd bfloat16 of each 32-bit word as float32."""
        words = vector_type("i32", lanes)
        number = str(16 if even else -65536)
        operand = number if lanes == 1 else f"<{', '.join([f'i32 {number}'] * lanes)}>"
        bits = self.emit(f"{'shl' if even else 'and'} {words} {word}, {operand}")
        return self.emit(f"bitcast {words} {bits} to {vector_type('float', lanes)}")
