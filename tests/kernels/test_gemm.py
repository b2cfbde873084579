"""Products against numpy in float64, as machine code and through the interpreter: ragged edges, broadcasting, tails."""

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
from nestc.kernels.gemm import GEMM
from nestc.kernels.gemm_shape import Tile, choose_blocks, choose_parts, choose_tile, divisors, product_of
from nestc.kernels.testing import evaluate, host_machine, region_of, run_lowered

MACHINE = host_machine()
AVX512 = dataclasses.replace(MACHINE, vector_bytes=64, vector_registers=32)
NEON = dataclasses.replace(MACHINE, vector_bytes=16, vector_registers=32)
SSE2 = dataclasses.replace(MACHINE, vector_bytes=16, fma=False)

Array = np.ndarray[Any, np.dtype[Any]]


def sample(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Array:
    generator = np.random.default_rng([seed, *shape])
    if "float" in dtype:
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(-9 if dtype.startswith("i") else 0, 9, shape).astype(dtype)


def check(
    nodes: list[NodeProto],
    feeds: dict[str, Array],
    constants: tuple[str, ...] = ("b", "c", "bias"),
    *,
    jit: bool = True,
    machine: CpuMachine = MACHINE,
    tolerance: float = 1e-5,
) -> Region:
    """Compare the lowered region with the reference evaluator in float64 (integers as they are)."""
    dtype = feeds["a"].dtype
    wide = {n: x.astype(np.float64 if x.dtype == np.float32 else x.dtype) for n, x in feeds.items()}
    values = {n: x.astype(dtype) for n, x in evaluate(nodes, wide).items()}
    out = nodes[-1].output[0]
    region = region_of(nodes, values, [out], constants)
    assert GEMM.refusal(region) is None
    lowered = GEMM.lower(region, machine, GEMM.layouts(region, machine, {}))
    got = run_lowered(region, lowered, values, machine, jit=jit)[out]
    scale = max(1.0, float(np.abs(values[out].astype(np.float64)).max()))
    np.testing.assert_allclose(got.astype(np.float64), values[out].astype(np.float64), rtol=0, atol=tolerance * scale)
    return region


def matmul(*more: NodeProto) -> list[NodeProto]:
    return [helper.make_node("MatMul", ["a", "b"], ["y"], "product"), *more]


@settings(deadline=None, max_examples=15)
@given(m=st.integers(1, 40), k=st.integers(1, 70), n=st.integers(1, 70), constant=st.booleans())
def test_matmul_of_any_size(m: int, k: int, n: int, constant: bool) -> None:
    check(matmul(), {"a": sample((m, k)), "b": sample((k, n))}, ("b",) if constant else ())


@settings(deadline=None, max_examples=8)
@given(
    m=st.integers(1, 9),
    k=st.integers(1, 9),
    n=st.integers(1, 37),
    constant=st.booleans(),
    machine=st.sampled_from([MACHINE, AVX512, NEON, SSE2]),
)
def test_matmul_in_the_interpreter_for_other_machines(
    m: int, k: int, n: int, constant: bool, machine: CpuMachine
) -> None:
    check(
        matmul(),
        {"a": sample((m, k)), "b": sample((k, n))},
        ("b",) if constant else (),
        jit=False,
        machine=machine,
    )


@pytest.mark.parametrize(
    ("a", "b", "constant"),
    [
        ((70,), (70, 3), True),
        ((9, 70), (70,), False),
        ((70,), (70,), False),
        ((3,), (3, 20), False),
        ((5, 3), (3,), True),
        ((2, 4, 70), (2, 70, 1), True),
        ((2, 3, 5, 7), (3, 7, 20), False),
        ((2, 3, 5, 7), (1, 3, 7, 20), True),
        ((3, 5, 7), (2, 1, 7, 20), False),
        ((2, 3, 5, 7), (7, 20), True),
        ((2, 3, 5, 7), (7, 20), False),
        ((5, 7), (4, 7, 20), False),
        ((1, 1, 5, 7), (4, 2, 7, 33), True),
        ((7,), (4, 7, 20), False),
        ((4, 5, 7), (7,), False),
    ],
)
def test_matmul_broadcasts(a: tuple[int, ...], b: tuple[int, ...], constant: bool) -> None:
    check(matmul(), {"a": sample(a), "b": sample(b)}, ("b",) if constant else ())


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize(
    ("c", "alpha", "beta"),
    [(None, 0.5, 1.0), ((21,), 1.0, 1.0), ((13, 1), 2.0, 0.5), ((), 1.0, 2.0), ((13, 21), 1.0, 0.0)],
)
def test_gemm(
    transposed: tuple[int, int], c: tuple[int, ...] | None, alpha: float, beta: float, constant: bool
) -> None:
    m, k, n = 13, 18, 21
    feeds = {"a": sample((k, m) if transposed[0] else (m, k)), "b": sample((n, k) if transposed[1] else (k, n))}
    if c is not None:
        feeds["c"] = sample(c)
    node = helper.make_node(
        "Gemm", list(feeds), ["y"], "gemm", transA=transposed[0], transB=transposed[1], alpha=alpha, beta=beta
    )
    check([node], feeds, ("b", "c") if constant else ())


def test_gemm_with_few_columns_or_rows_is_a_dot_product() -> None:
    for jit in (True, False):
        feeds = {"a": sample((7, 70)), "b": sample((3, 70)), "c": sample((3,))}
        check([helper.make_node("Gemm", ["a", "b", "c"], ["y"], "g", transB=1)], feeds, ("c",), jit=jit)
        feeds = {"a": sample((2, 70)), "b": sample((19, 70))}
        check([helper.make_node("Gemm", ["a", "b"], ["y"], "g", transB=1)], feeds, (), jit=jit)


@pytest.mark.parametrize("shape", [(7, 9, 20), (1, 9, 40), (5, 40, 3)])
@pytest.mark.parametrize("activation", ["Relu", "Gelu"])
def test_tails(shape: tuple[int, int, int], activation: str) -> None:
    m, k, n = shape
    tail = [
        helper.make_node("Add", ["y", "bias"], ["z"], "bias"),
        helper.make_node(activation, ["z"], ["w"], "activation"),
        helper.make_node("Add", ["w", "residual"], ["v"], "residual"),
    ]
    feeds = {"a": sample((m, k)), "b": sample((k, n)), "bias": sample((n,)), "residual": sample((m, n))}
    for jit in (True, False):
        check(matmul(*tail), feeds, jit=jit)


def test_tail_of_a_batch_whose_axes_are_merged() -> None:
    tail = helper.make_node("Mul", ["y", "bias"], ["z"], "scale")
    check(matmul(tail), {"a": sample((2, 3, 5, 7)), "b": sample((7, 20)), "bias": sample((2, 1, 5, 1))})


@pytest.mark.parametrize("constant", [True, False])
def test_long_k_is_summed_in_parts(constant: bool) -> None:
    assert choose_parts(2048, 4) == 2
    assert choose_parts(1031 * 2, 4) == 1
    tail = helper.make_node("Gelu", ["y"], ["z"], "gelu")
    check(matmul(tail), {"a": sample((29, 2048)), "b": sample((2048, 40))}, ("b",) if constant else ())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float64", 1e-14), ("float16", 2e-3), ("int32", 0.0), ("uint64", 0.0)],
)
@pytest.mark.parametrize("shape", [(9, 40, 20), (30, 70, 3)])
def test_other_dtypes(dtype: str, tolerance: float, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    for constants in (("b",), ()):
        check(matmul(), {"a": sample((m, k), dtype), "b": sample((k, n), dtype)}, constants, tolerance=tolerance)


def test_bfloat16_is_summed_in_float32() -> None:
    import ml_dtypes

    a, b = (sample(s).astype(ml_dtypes.bfloat16) for s in ((9, 40), (40, 20)))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    region = region_of(matmul(), {"a": a, "b": b, "y": exact.astype(ml_dtypes.bfloat16)}, ["y"], ["b"])
    got = run_lowered(region, GEMM.lower(region, MACHINE, {}), {"a": a}, MACHINE)["y"]
    np.testing.assert_allclose(got.astype(np.float64), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    ("node", "feeds", "reason"),
    [
        (helper.make_node("Relu", ["a"], ["y"], "r"), {"a": sample((2, 3))}, "neither MatMul nor Gemm"),
        (helper.make_node("MatMul", ["a", "b"], ["y"], "m"), {"a": sample((2, 0)), "b": sample((0, 3))}, "size 0"),
        (
            helper.make_node("MatMul", ["a", "b"], ["y"], "m"),
            {"a": sample((2, 3), "int8"), "b": sample((3, 3), "int8")},
            "int8",
        ),
    ],
)
def test_refusals(node: NodeProto, feeds: dict[str, Array], reason: str) -> None:
    values = {**feeds, "y": np.zeros((2, 3), feeds["a"].dtype)}
    refusal = GEMM.refusal(region_of([node], values, ["y"]))
    assert refusal is not None and reason in refusal


def test_tiles_fit_the_registers() -> None:
    assert choose_tile(1024, 1024, 8, MACHINE if MACHINE.vector_registers == 16 else SSE2) == Tile(5, 2)
    for machine in (MACHINE, AVX512, NEON, SSE2):
        for m in (1, 2, 3, 5, 8, 100):
            for n in (1, 8, 9, 100):
                t = choose_tile(m, n, machine.lanes("float32"), machine)
                assert t.rows <= m
                assert t.rows * t.vectors * t.split + 2 <= machine.vector_registers


@pytest.mark.parametrize("shape", [(128, 768, 768), (1024, 1024, 1024), (7, 31, 1000)])
def test_items_divide_the_work(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    region = region_of(matmul(), {"a": sample((m, k)), "b": sample((k, n)), "y": sample((m, n))}, ["y"], ["b"])
    product = product_of(region.ops[0], region)
    blocks = choose_blocks(product, Tile(6, 2), 8, 4, MACHINE)
    assert (m // 6) % blocks.tiles == 0
    assert -(-n // 16) % blocks.panels == 0
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
