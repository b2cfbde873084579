"""Arrays as native code wants them: aligned, C-contiguous, and their addresses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

ALIGNMENT = 64


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """A new array whose data begins at a multiple of 64 bytes; its contents are not set."""
    if dtype.hasobject:
        return np.empty(shape, dtype)
    block = np.empty(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)
    return np.ndarray(shape, dtype, block, -address(block) % ALIGNMENT)


def address(array: np.ndarray) -> int:
    """Address of the first byte; faster than ``array.ctypes.data``."""
    return array.__array_interface__["data"][0]


def ready(array: np.ndarray) -> np.ndarray:
    """`array` itself if native code can read it as it is, else a contiguous, aligned copy."""
    flags = array.flags
    if flags.c_contiguous and flags.aligned:
        return array
    return np.array(array, order="C", copy=True)


def aligned(array: np.ndarray) -> np.ndarray:
    """`array` itself if it is contiguous and begins at a multiple of 64 bytes, else such a copy."""
    if array.flags.c_contiguous and address(array) % ALIGNMENT == 0:
        return array
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy
