"""Plain sizes of tensors in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import ml_dtypes
import numpy as np

from nestc.graph.region import Region, TensorType


def nbytes(type_: TensorType | None) -> int:
    """Plain size of a tensor; 0 where it is known only at run time."""
    if type_ is None or any(size < 0 for size in type_.shape):
        return 0
    if type_.dtype == "string":
        return 8 * prod(type_.shape)
    kind = getattr(np, type_.dtype, None) or getattr(ml_dtypes, type_.dtype, None)
    return 0 if kind is None else np.dtype(kind).itemsize * prod(type_.shape)


def constant_bytes(regions: Sequence[Region]) -> int:
    """Plain bytes of the constants of some regions."""
    return sum(nbytes(region.types[name]) for region in regions for name in region.constants)
