"""LLVM's names for our types, and literals of them."""

from __future__ import annotations

import struct
from math import isinf, isnan

from nestc.tensor.ir import Const

FLOAT = {"float32": "float", "float64": "double"}
_BITS = {"bool": 8, "bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}


def width(dtype: str) -> int:
    """Bits of one element in memory."""
    return _BITS.get(dtype) or int(dtype.lstrip("uint"))


def unsigned(dtype: str) -> bool:
    """Whether integers of this dtype are unsigned."""
    return dtype.startswith("uint") or dtype == "bool"


def scalar_type(dtype: str) -> str:
    """LLVM type of a value; bool is i1, float16 and bfloat16 are their 16 bits."""
    if dtype == "bool":
        return "i1"
    return FLOAT.get(dtype) or f"i{width(dtype)}"


def memory_type(dtype: str) -> str:
    """LLVM type of an element in memory; bool takes a byte."""
    return "i8" if dtype == "bool" else scalar_type(dtype)


def vector_type(element: str, lanes: int) -> str:
    """LLVM type of a value with `lanes` lanes."""
    return element if lanes == 1 else f"<{lanes} x {element}>"


def suffix(element: str, lanes: int) -> str:
    """How an intrinsic's name tells its type."""
    short = {"float": "f32", "double": "f64"}.get(element, element)
    return short if lanes == 1 else f"v{lanes}{short}"


def _float16_bits(value: float) -> int:
    """The bits of the nearest float16; infinity beyond the largest."""
    try:
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    except OverflowError:
        return 0x7C00 if value > 0 else 0xFC00


def literal(e: Const) -> str:
    """An LLVM literal; floats in hexadecimal so that every bit is kept."""
    if e.dtype == "bool":
        return "true" if e.value else "false"
    if e.dtype in ("float32", "float64"):
        value = float(e.value)
        if e.dtype == "float32" and not (isnan(value) or isinf(value)):
            try:
                value = struct.unpack("f", struct.pack("f", value))[0]
            except OverflowError:
                value = float("inf") if value > 0 else float("-inf")
        return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
    if e.dtype == "float16":
        return str(_float16_bits(float(e.value)))
    if e.dtype == "bfloat16":
        bits = struct.unpack("<I", struct.pack("<f", float(e.value)))[0]
        return str((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return str(int(e.value))
