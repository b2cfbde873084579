"""Products with weights of 8 bits, 4 bits and bfloat16 against numpy in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper

from nestc.graph.region import Region
from nestc.kernels.api import CpuMachine
from nestc.kernels.testing import host_machine, region_of, run_lowered
from nestc.kernels.weight_only import WEIGHT_ONLY

MACHINE = host_machine()
AVX512 = dataclasses.replace(MACHINE, vector_bytes=64, dot_bytes=64, vector_registers=32, bf16=True)
SSE2 = dataclasses.replace(MACHINE, vector_bytes=16, dot_bytes=16, fma=False)

Array = np.ndarray[Any, np.dtype[Any]]
RANGES = {"int8": (-128, 128), "uint8": (0, 256), "int4": (-8, 8), "uint4": (0, 16)}


def codes(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    """Integers of the whole range of a dtype."""
    kind = np.dtype(dtype) if dtype.endswith("8") else np.dtype(getattr(ml_dtypes, dtype))
    return np.random.default_rng([seed, *shape]).integers(*RANGES[dtype], shape).astype(kind)


def sample(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def close(
    region: Region, feeds: dict[str, Array], exact: Array, machine: CpuMachine = MACHINE, jit: bool = True
) -> None:
    """The region's only output by our kernels is `exact` but for float32's rounding."""
    assert WEIGHT_ONLY.refusal(region) is None, WEIGHT_ONLY.refusal(region)
    lowered = WEIGHT_ONLY.lower(region, machine, WEIGHT_ONLY.layouts(region, machine, {}))
    got = run_lowered(region, lowered, feeds, machine, jit=jit)[region.outputs[0]]
    scale = max(1e-3, float(np.abs(exact).max()))
    np.testing.assert_allclose(got.astype(np.float64), exact, rtol=0, atol=2e-5 * scale)


def check(
    m: int,
    k: int,
    n: int,
    dtype: str,
    block: int = 0,
    zero: bool = False,
    columns: bool = True,
    transposed: bool = False,
    tail: bool = False,
    machine: CpuMachine = MACHINE,
    jit: bool = True,
) -> None:
    """MatMul (a Gemm if `transposed`) of float32 and dequantized weights."""
    axis = 1 if not block else 0
    shape = (-(-k // block), n) if block else (n,) if columns else ()
    weights, zeros = codes((k, n), dtype), codes(shape, dtype, 1)
    scale = np.asarray(0.01 * (1 + np.random.default_rng(n).random(shape)), np.float32)

    def spread(x: Array) -> Array:
        x = x.astype(np.float64)
        return np.repeat(x, block, 0)[:k] if block else x

    real = (weights.astype(np.float64) - (spread(zeros) if zero else 0)) * spread(scale)
    a = sample((m, k))
    exact = a.astype(np.float64) @ real
    if transposed:
        weights, axis = np.ascontiguousarray(weights.T), 1 - axis
        scale, zeros = (np.ascontiguousarray(x.T) for x in (scale, zeros))
    feeds: dict[str, Array] = {"a": a, "b": weights, "s": scale, "z": zeros}
    attributes: dict[str, Any] = {"axis": axis} | ({"block_size": block} if block else {})
    inputs = ["b", "s", "z"] if zero else ["b", "s"]
    nodes = [helper.make_node("DequantizeLinear", inputs, ["w"], "d", **attributes)]
    values = {**feeds, "w": weights.astype(np.float32), "y": exact.astype(np.float32)}
    if transposed:
        feeds["c"] = values["c"] = sample((n,))
        exact = 0.5 * exact + 2 * feeds["c"]
        nodes.append(helper.make_node("Gemm", ["a", "w", "c"], ["y"], "product", transB=1, alpha=0.5, beta=2.0))
    else:
        nodes.append(helper.make_node("MatMul", ["a", "w"], ["y"], "product"))
    if tail:
        nodes.append(helper.make_node("Relu", ["y"], ["r"], "relu"))
        exact = np.maximum(exact, 0)
        values["r"] = exact.astype(np.float32)
    fixed = ("b", "s", "z", "c")
    region = region_of(nodes, values, [nodes[-1].output[0]], fixed, "Gemm" if transposed else "MatMul")
    close(region, feeds, exact, machine, jit)


@settings(deadline=None, max_examples=24)
@given(
    m=st.sampled_from([1, 1, 2, 4, 7, 13]),
    k=st.integers(1, 150),
    n=st.integers(1, 90),
    dtype=st.sampled_from(list(RANGES)),
    zero=st.booleans(),
    columns=st.booleans(),
    transposed=st.booleans(),
    tail=st.booleans(),
)
def test_scales_of_tensors_and_columns(
    m: int, k: int, n: int, dtype: str, zero: bool, columns: bool, transposed: bool, tail: bool
) -> None:
    check(m, k, n, dtype, 0, zero, columns, transposed, tail)


@settings(deadline=None, max_examples=16)
@given(
    m=st.sampled_from([1, 1, 3, 9]),
    k=st.integers(1, 150),
    n=st.integers(1, 90),
    dtype=st.sampled_from(list(RANGES)),
    block=st.sampled_from([2, 16, 20, 32, 64]),
    zero=st.booleans(),
    transposed=st.booleans(),
)
def test_scales_of_blocks(m: int, k: int, n: int, dtype: str, block: int, zero: bool, transposed: bool) -> None:
    check(m, k, n, dtype, block, zero, transposed=transposed)


@pytest.mark.parametrize("machine", [AVX512, SSE2])
@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize(("dtype", "block"), [("int8", 0), ("int4", 0), ("uint4", 16)])
def test_other_machines(machine: CpuMachine, m: int, dtype: str, block: int) -> None:
    check(m, 37, 21, dtype, block, True, machine=machine, jit=False)


def test_long_k() -> None:
    for m in (1, 8):
        check(m, 1100, 70, "int4", 32)


@pytest.mark.parametrize("m", [1, 13])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("machine", [MACHINE, AVX512])
def test_bfloat16(m: int, both: bool, machine: CpuMachine) -> None:
    narrow = ml_dtypes.bfloat16
    b = sample((37, 21)).astype(narrow)
    a = sample((m, 37)).astype(narrow if both else np.float32)
    c = sample((21,)).astype(narrow)
    names = ["a", "b", "c"] if both else ["b", "c"]
    nodes: list[NodeProto] = [helper.make_node("Cast", [x], [f"{x}f"], f"cast_{x}", to=1) for x in names]
    nodes.append(helper.make_node("Gemm", ["af" if both else "a", "bf", "cf"], ["y"], "product"))
    exact = a.astype(np.float64) @ b.astype(np.float64) + c.astype(np.float64)
    feeds = {"a": a, "b": b, "c": c}
    wide = {f"{x}f": feeds[x].astype(np.float32) for x in names}
    region = region_of(nodes, {**feeds, **wide, "y": exact.astype(np.float32)}, ["y"], ["b", "c"], "Gemm")
    close(region, feeds, exact, machine, jit=machine is MACHINE)


def test_weights_are_packed_narrowly() -> None:
    for dtype, most in (("int8", 1.1), ("int4", 0.6)):
        values = {"a": sample((1, 256)), "b": codes((256, 512), dtype), "s": sample((512,)) ** 2}
        values.update(w=values["b"].astype(np.float32), y=sample((1, 512)))
        nodes = [
            helper.make_node("DequantizeLinear", ["b", "s"], ["w"], "d", axis=1),
            helper.make_node("MatMul", ["a", "w"], ["y"], "product"),
        ]
        region = region_of(nodes, values, ["y"], ["b", "s"], "MatMul")
        stored = sum(x.nbytes for x in WEIGHT_ONLY.lower(region, MACHINE, {}).constants.values())
        assert stored <= most * 256 * 512


@pytest.mark.parametrize(
    ("attributes", "scale", "reason"),
    [
        ({"axis": 0}, (6,), "neither one a column"),
        ({"axis": 1, "block_size": 2}, (6, 4), "neither one a column"),
        ({"axis": 0, "block_size": 3}, (2, 8), "odd size"),
    ],
)
def test_refusals(attributes: dict[str, Any], scale: tuple[int, ...], reason: str) -> None:
    values = {"a": sample((1, 6)), "b": codes((6, 8), "int8"), "s": sample(scale)}
    values.update(w=values["b"].astype(np.float32), y=sample((1, 8)))
    nodes = [
        helper.make_node("DequantizeLinear", ["b", "s"], ["w"], "d", **attributes),
        helper.make_node("MatMul", ["a", "w"], ["y"], "product"),
    ]
    assert reason in (WEIGHT_ONLY.refusal(region_of(nodes, values, ["y"], ["b", "s"], "MatMul")) or "")
    assert "not narrow constants" in (WEIGHT_ONLY.refusal(region_of(nodes, values, ["y"], ["s"], "MatMul")) or "")
