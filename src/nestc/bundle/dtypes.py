"""Names of element types (ONNX's in lower case) as numpy dtypes, and as safetensors writes them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Types that safetensors has; others (4-bit, complex) are stored as their bytes, U8."""

_NUMPY = frozenset(SAFETENSORS) - {"bfloat16", "float8_e4m3fn", "float8_e5m2"} | {"complex64", "complex128"}


_ML_DTYPES = {
    "float4e2m1": "float4_e2m1fn",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
    "float8e8m0": "float8_e8m0fnu",
}


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of an element type; bfloat16, float8 and 4-bit types come from ml_dtypes, strings are objects.

    Raises ValueError if there is none of that name.
    """
    if name in _NUMPY:
        return np.dtype(name)
    if name == "string":
        return np.dtype(object)
    import ml_dtypes  # only where such a type is used

    found = getattr(ml_dtypes, _ML_DTYPES.get(name, name), None)
    if found is None:
        raise ValueError(f"there is no element type {name!r}")
    return np.dtype(found)
