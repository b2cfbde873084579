"""float16 and bfloat16 to and from float32 as LLVM IR, for machines with and without an instruction for it.

A value of either type is its 16 bits (``i16``). Every conversion rounds to nearest even, keeps infinities, signed zeros
and subnormal numbers, and makes NaN quiet with the top of its payload kept, as F16C's instructions do (Intel SDM,
VCVTPH2PS and VCVTPS2PH). The method for float16 is the known one of shifting exponent and fraction as one integer and
letting one float32 addition round (or normalise) what is subnormal in float16.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

Emit = Callable[[str], str]
"""Takes the right side of an LLVM instruction, gives the name of its result."""

_EXPONENT_32 = 0x7F800000
_BIAS = (127 - 15) << 23  # between the exponents of the two formats, in float32's place
_SMALLEST = 113 << 23  # 2**-14, the smallest normal float16, as float32 bits
_OVERFLOW = 143 << 23  # 2**16: from here on everything is infinity or NaN
_ALIGN = 126 << 23  # 0.5: an ulp of it is 2**-24, the smallest float16


def vector(element: str, lanes: int) -> str:
    """LLVM type of a value with `lanes` lanes."""
    return element if lanes == 1 else f"<{lanes} x {element}>"


class Halves:
    """Conversions of values with one number of lanes."""

    def __init__(self, emit: Emit, lanes: int, hardware: bool) -> None:
        self.emit, self.lanes, self.hardware = emit, lanes, hardware
        self.bits, self.single, self.flag = (vector(kind, lanes) for kind in ("i32", "float", "i1"))
        self.short = vector("i16", lanes)

    def from_float16(self, x: str) -> str:
        """float16 bits to float32."""
        if self.hardware:
            half = vector("half", self.lanes)
            return self.emit(f"fpext {half} {self.emit(f'bitcast {self.short} {x} to {half}')} to {self.single}")
        wide = self.emit(f"zext {self.short} {x} to {self.bits}")
        sign = self._int("shl", self._int("and", wide, 0x8000), 16)
        aligned = self._int("shl", self._int("and", wide, 0x7FFF), 13)
        normal = self._int("add", aligned, _BIAS)
        # With the exponent of 2**-14 put in, a subnormal is 2**-14 too large; the difference is exact.
        lifted = self.emit(f"bitcast {self.bits} {self._int('add', normal, 1 << 23)} to {self.single}")
        magic = self._splat(_float_literal(_SMALLEST), "float")
        small = self._as_bits(self.emit(f"fsub {self.single} {lifted}, {magic}"))
        special = self._int("or", aligned, _EXPONENT_32)
        quiet = self._int("or", special, 0x400000)
        infinity = 0x7C00 << 13
        special = self._choose(self._is("sgt", aligned, infinity), quiet, special)
        value = self._choose(self._is("slt", aligned, 0x0400 << 13), small, normal)
        value = self._choose(self._is("sgt", aligned, infinity - 1), special, value)
        value = self.emit(f"or {self.bits} {value}, {sign}")
        return self.emit(f"bitcast {self.bits} {value} to {self.single}")

    def to_float16(self, x: str) -> str:
        """float32 to float16 bits."""
        if self.hardware:
            half = vector("half", self.lanes)
            return self.emit(f"bitcast {half} {self.emit(f'fptrunc {self.single} {x} to {half}')} to {self.short}")
        word = self._as_bits(x)
        sign = self._int("and", self._int("lshr", word, 16), 0x8000)
        size = self._int("and", word, 0x7FFFFFFF)
        shifted = self._int("lshr", size, 13)
        odd = self._int("and", shifted, 1)
        rounded = self.emit(f"add {self.bits} {self._int('add', size, 0xFFF - _BIAS)}, {odd}")
        normal = self._int("lshr", rounded, 13)
        # Adding 0.5 leaves the multiple of 2**-24, rounded to nearest even, in the low bits.
        aligned = self.emit(f"bitcast {self.bits} {size} to {self.single}")
        total = self.emit(f"fadd {self.single} {aligned}, {self._splat(_float_literal(_ALIGN), 'float')}")
        small = self._int("sub", self._as_bits(total), _ALIGN)
        payload = self._int("or", self._int("and", shifted, 0x3FF), 0x7E00)
        infinity = self._splat(str(0x7C00), "i32")
        special = self._choose(self._is("sgt", size, _EXPONENT_32), payload, infinity)
        value = self._choose(self._is("slt", size, _SMALLEST), small, normal)
        value = self._choose(self._is("sgt", size, _OVERFLOW - 1), special, value)
        value = self.emit(f"or {self.bits} {value}, {sign}")
        return self.emit(f"trunc {self.bits} {value} to {self.short}")

    def from_bfloat16(self, x: str) -> str:
        """bfloat16 bits to float32."""
        wide = self.emit(f"zext {self.short} {x} to {self.bits}")
        return self.emit(f"bitcast {self.bits} {self._int('shl', wide, 16)} to {self.single}")

    def to_bfloat16(self, x: str) -> str:
        """float32 to bfloat16 bits."""
        word = self._as_bits(x)
        shifted = self._int("lshr", word, 16)
        bias = self._int("add", self._int("and", shifted, 1), 0x7FFF)
        rounded = self._int("lshr", self.emit(f"add {self.bits} {word}, {bias}"), 16)
        nan = self.emit(f"fcmp uno {self.single} {x}, {x}")
        value = self._choose(nan, self._int("or", shifted, 64), rounded)
        return self.emit(f"trunc {self.bits} {value} to {self.short}")

    def _as_bits(self, x: str) -> str:
        return self.emit(f"bitcast {self.single} {x} to {self.bits}")

    def _int(self, op: str, x: str, value: int) -> str:
        return self.emit(f"{op} {self.bits} {x}, {self._splat(str(value), 'i32')}")

    def _is(self, op: str, x: str, value: int) -> str:
        return self.emit(f"icmp {op} {self.bits} {x}, {self._splat(str(value), 'i32')}")

    def _choose(self, flag: str, a: str, b: str) -> str:
        return self.emit(f"select {self.flag} {flag}, {self.bits} {a}, {self.bits} {b}")

    def _splat(self, literal: str, element: str) -> str:
        return literal if self.lanes == 1 else f"<{', '.join([f'{element} {literal}'] * self.lanes)}>"


def _float_literal(bits: int) -> str:
    """LLVM's literal of a float32 given by its bits: those of the same float64."""
    value = struct.unpack("<f", struct.pack("<I", bits))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
