"""Integer products against int64 in numpy: exact sums, whatever the sizes, zero points, layouts and machine."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper

from nestc.graph.region import Region
from nestc.kernels.api import CpuMachine
from nestc.kernels.gemm_int8 import GEMM_INT8
from nestc.kernels.testing import host_machine, region_of, run_lowered

MACHINE = host_machine()
SSE2 = dataclasses.replace(MACHINE, vector_bytes=16, dot_bytes=16, fma=False)
VNNI = dataclasses.replace(MACHINE, vector_bytes=64, dot_bytes=64, vector_registers=32, vnni=True)
NEON = dataclasses.replace(MACHINE, vector_bytes=16, dot_bytes=16, vector_registers=32, dotprod=True)
PORTABLE = dataclasses.replace(MACHINE, vector_bytes=16, dot_bytes=0, vnni=False)

Array = np.ndarray[Any, np.dtype[Any]]


def integers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    """Integers of the whole range of a dtype."""
    info = np.iinfo(dtype)
    return np.random.default_rng([seed, *shape]).integers(info.min, info.max + 1, shape).astype(dtype)


def lowered(region: Region, feeds: dict[str, Array], machine: CpuMachine, jit: bool) -> Array:
    """The only output of a region by our kernels."""
    assert GEMM_INT8.refusal(region) is None, GEMM_INT8.refusal(region)
    built = GEMM_INT8.lower(region, machine, GEMM_INT8.layouts(region, machine, {}))
    return run_lowered(region, built, feeds, machine, jit=jit)[region.outputs[0]]


def check_integer(
    feeds: dict[str, Array], constants: tuple[str, ...], machine: CpuMachine = MACHINE, jit: bool = True
) -> None:
    """MatMulInteger of `a`, `b` and zero points `za`, `zb` equals the product in int64."""
    zero_a, zero_b = (feeds.get(n, np.zeros((), np.int64)).astype(np.int64) for n in ("za", "zb"))
    exact = (feeds["a"].astype(np.int64) - zero_a) @ (feeds["b"].astype(np.int64) - zero_b)
    names = ["a", "b", "za" if "za" in feeds else "", "zb" if "zb" in feeds else ""]
    while not names[-1]:
        names.pop()
    node = helper.make_node("MatMulInteger", names, ["y"], "product")
    region = region_of([node], {**feeds, "y": exact.astype(np.int32)}, ["y"], constants, "MatMulInteger")
    np.testing.assert_array_equal(lowered(region, feeds, machine, jit), exact)


@settings(deadline=None, max_examples=20)
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 150),
    n=st.integers(1, 70),
    constants=st.sampled_from([("b", "za", "zb"), ("b", "zb"), ("b",), ()]),
    a=st.sampled_from(["uint8", "int8"]),
    b=st.sampled_from(["uint8", "int8"]),
)
def test_matmul_integer_of_any_size(m: int, k: int, n: int, constants: tuple[str, ...], a: str, b: str) -> None:
    feeds = {"a": integers((m, k), a), "b": integers((k, n), b), "za": integers((), a, 1), "zb": integers((), b, 2)}
    check_integer(feeds, constants)


@settings(deadline=None, max_examples=16)
@given(
    m=st.integers(1, 8),
    k=st.integers(1, 20),
    n=st.integers(1, 37),
    constants=st.sampled_from([("b", "za", "zb"), ("b", "zb"), ("b",), ()]),
    a=st.sampled_from(["uint8", "int8"]),
    machine=st.sampled_from([MACHINE, SSE2, VNNI, NEON, PORTABLE]),
)
def test_matmul_integer_for_other_machines(
    m: int, k: int, n: int, constants: tuple[str, ...], a: str, machine: CpuMachine
) -> None:
    feeds = {"a": integers((m, k), a), "b": integers((k, n), "int8"), "za": integers((1,), a, 1)}
    check_integer({**feeds, "zb": integers((1,), "int8", 2) // 64}, constants, machine, jit=False)
    check_integer(feeds, constants, machine, jit=False)


@pytest.mark.parametrize("constants", [("b", "zb"), ("zb",), ()])
@pytest.mark.parametrize(
    ("a", "b"), [((2, 3, 5, 7), (7, 20)), ((2, 3, 5, 7), (3, 7, 20)), ((3, 5, 40), (2, 1, 40, 20)), ((5, 9), (4, 9, 33))]
)
def test_broadcasting_with_a_zero_point_a_column(
    a: tuple[int, ...], b: tuple[int, ...], constants: tuple[str, ...]
) -> None:
    zeros = {"za": integers((), "uint8"), "zb": integers((b[-1],), "uint8")}
    check_integer({"a": integers(a, "uint8"), "b": integers(b, "uint8"), **zeros}, constants)


def test_long_k_is_summed_in_parts() -> None:
    for m, k in ((1, 5000), (13, 1500)):
        feeds = {"a": integers((m, k), "uint8"), "b": integers((k, 40), "int8")}
        check_integer(feeds, ("b",))
        check_integer(feeds, ())
