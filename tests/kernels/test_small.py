"""Element types of 8 bits and fewer against ml_dtypes: every code decoded, and rounding when encoded."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from nestc.kernels.generic import Generic
from nestc.kernels.testing import Array, host_machine, region_of, run_lowered

FLOATS = {
    "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn,
    "FLOAT8E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "FLOAT8E5M2": ml_dtypes.float8_e5m2,
    "FLOAT8E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "FLOAT4E2M1": ml_dtypes.float4_e2m1fn,
}
NARROW = {"INT4": ml_dtypes.int4, "UINT4": ml_dtypes.uint4, "INT2": ml_dtypes.int2, "UINT2": ml_dtypes.uint2}


def cast(x: Array, wanted: np.dtype, name: str, **attributes: int) -> Array:
    """Cast through the generic lowering."""
    node = helper.make_node("Cast", ["x"], ["y"], to=getattr(TensorProto, name), **attributes)
    region = region_of([node], {"x": x, "y": np.zeros(x.shape, wanted)}, ["y"])
    lowered = Generic().lower(region, host_machine(), {})
    return run_lowered(region, lowered, {"x": x}, host_machine())["y"]


@pytest.mark.parametrize("name", [*FLOATS, "FLOAT8E8M0"])
def test_every_code_is_decoded(name: str) -> None:
    kind = {**FLOATS, "FLOAT8E8M0": ml_dtypes.float8_e8m0fnu}[name]
    codes = np.arange(16 if name == "FLOAT4E2M1" else 256, dtype=np.uint8).view(kind)
    np.testing.assert_array_equal(cast(codes, np.dtype(np.float32), "FLOAT"), codes.astype(np.float32))


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_is_to_nearest_even(name: str) -> None:
    kind = FLOATS[name]
    finite = np.unique(np.arange(256, dtype=np.uint8).view(kind).astype(np.float32)) if "8" in name else None
    if finite is None:
        finite = np.unique(np.arange(16, dtype=np.uint8).view(kind).astype(np.float32))
    finite = finite[np.isfinite(finite)]
    halves = (finite[1:] + finite[:-1]) / 2
    noise = np.random.default_rng(0).uniform(finite[0], finite[-1], 300).astype(np.float32)
    x = np.concatenate(
        [finite, halves, np.nextafter(halves, np.inf), np.nextafter(halves, -np.inf), noise, noise / 999]
    )
    x = x.astype(np.float32)
    got = cast(x, np.dtype(kind), name).view(np.uint8)
    np.testing.assert_array_equal(got, x.astype(kind).view(np.uint8))


@pytest.mark.parametrize("name", NARROW)
def test_narrow_integers(name: str) -> None:
    kind = NARROW[name]
    x = np.arange(-40, 40).astype(np.int32)
    packed = cast(x, np.dtype(kind), name).view(kind)
    np.testing.assert_array_equal(packed.astype(np.int32), x.astype(kind).astype(np.int32))
    np.testing.assert_array_equal(cast(packed, np.dtype(np.float32), "FLOAT"), x.astype(kind).astype(np.float32))
