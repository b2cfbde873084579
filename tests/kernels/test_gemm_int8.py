"""Integer products against int64 in numpy: exact sums, whatever the sizes, zero points, layouts and machine."""

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
from nestc.kernels import gemm_int8
from nestc.kernels.api import PLAIN, CpuMachine
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


@settings(deadline=None, max_examples=14)
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


@settings(deadline=None, max_examples=10)
@given(
    m=st.integers(1, 7),
    k=st.integers(1, 12),
    n=st.integers(1, 20),
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
    ("a", "b"),
    [((2, 3, 5, 7), (7, 20)), ((2, 3, 5, 7), (3, 7, 20)), ((3, 5, 40), (2, 1, 40, 20)), ((5, 9), (4, 9, 33))],
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


def quantized_region(
    feeds: dict[str, Array],
    shape: tuple[int, ...],
    tail: list[NodeProto],
    made: dict[str, Array],
    constants: tuple[str, ...],
    gemm: dict[str, Any] | None = None,
) -> Region:
    """DequantizeLinear of `a` and `b` (and `c`), their product `y` (a Gemm if it has attributes), and a tail."""
    nodes = [helper.make_node("DequantizeLinear", ["a", "sa", "za"], ["af"], "da")]
    axis = feeds["b"].ndim - (2 if gemm and gemm.get("transB") else 1)
    nodes.append(helper.make_node("DequantizeLinear", ["b", "sb", "zb"], ["bf"], "db", axis=axis))
    inputs = ["af", "bf"]
    if "sc" in feeds:
        nodes.append(helper.make_node("DequantizeLinear", ["c", "sc"], ["cf"], "dc", axis=0))
        inputs.append("cf")
    elif "c" in feeds:
        inputs.append("c")
    nodes.append(helper.make_node("MatMul" if gemm is None else "Gemm", inputs, ["y"], "product", **(gemm or {})))
    wide = {f"{n}f": feeds[n].astype(np.float32) for n in ("a", "b", "c") if n in feeds}
    values = {**feeds, **wide, **made, "y": np.zeros(shape, np.float32)}
    outputs = [(tail or nodes)[-1].output[0]]
    return region_of([*nodes, *tail], values, outputs, constants, "MatMul" if gemm is None else "Gemm")


def real(feeds: dict[str, Array], gemm: dict[str, Any] | None = None) -> Array:
    """The product in float64, from exact integers."""
    along = (-1, 1) if gemm and gemm.get("transB") else (-1,)
    a = (feeds["a"].astype(np.int64) - feeds["za"].astype(np.int64)).astype(np.float64) * np.float64(feeds["sa"])
    zero, scale = (feeds[n].reshape(along) if feeds[n].ndim else feeds[n] for n in ("zb", "sb"))
    b = (feeds["b"].astype(np.int64) - zero.astype(np.int64)).astype(np.float64) * scale.astype(np.float64)
    if gemm is None:
        return a @ b
    a, b = (x.T if gemm.get(name) else x for x, name in ((a, "transA"), (b, "transB")))
    c = feeds.get("c", np.zeros(1)).astype(np.float64) * feeds.get("sc", np.ones(1)).astype(np.float64)
    return gemm.get("alpha", 1.0) * (a @ b) + gemm.get("beta", 1.0) * c


def parameters(n: int, weight: str, columns: bool, seed: int = 0) -> dict[str, Array]:
    """Scales and zero points."""
    generator = np.random.default_rng([seed, n])
    many = (n,) if columns else ()
    zero = integers(many, weight, 3) if weight.startswith("u") else np.zeros(many, weight)
    scale = (0.01 * (0.5 + generator.random(many))).astype(np.float32)
    return {"sa": np.array(0.02, np.float32), "za": np.array(37, np.uint8), "sb": np.asarray(scale), "zb": zero}


NUMBERS = ("sa", "za", "sb", "zb", "sc", "sy", "zy")


def within_one(got: Array, exact: Array, scale: float, zero: int) -> None:
    """Codes are those of the exact values; where these lie next to a tie, one more or less."""
    info = np.iinfo(got.dtype)
    ideal = exact / scale + zero
    wanted = np.clip(np.rint(ideal), info.min, info.max)
    tie = np.abs(ideal - np.floor(ideal) - 0.5) < 1e-3
    difference = np.abs(got.astype(np.int64) - wanted)
    assert np.all(difference <= np.where(tie, 1, 0))


@settings(deadline=None, max_examples=14)
@given(
    m=st.integers(1, 20),
    k=st.integers(1, 100),
    n=st.integers(1, 50),
    weight=st.sampled_from(["int8", "uint8"]),
    constant=st.booleans(),
    columns=st.booleans(),
    out=st.sampled_from(["uint8", "int8"]),
    relu=st.booleans(),
)
def test_matmul_between_quantizers(
    m: int, k: int, n: int, weight: str, constant: bool, columns: bool, out: str, relu: bool
) -> None:
    feeds = {"a": integers((m, k), "uint8"), "b": integers((k, n), weight), **parameters(n, weight, columns)}
    exact = real(feeds)
    feeds["sy"] = np.array(max(1e-3, float(np.abs(exact).max()) / 150), np.float32)
    feeds["zy"] = np.array(20, out)
    tail = [helper.make_node("QuantizeLinear", ["r" if relu else "y", "sy", "zy"], ["q"], "q")]
    made = {"q": np.zeros((m, n), out)}
    if relu:
        tail.insert(0, helper.make_node("Relu", ["y"], ["r"], "relu"))
        made["r"] = np.zeros((m, n), np.float32)
    region = quantized_region(feeds, (m, n), tail, made, (*NUMBERS, *(("b",) if constant else ())))
    got = lowered(region, feeds, MACHINE, True)
    within_one(got, np.maximum(exact, 0) if relu else exact, float(feeds["sy"]), 20)


@pytest.mark.parametrize(("largest", "halves"), [(64, True), (127, False)])
@pytest.mark.parametrize("a", ["uint8", "int8"])
def test_weights_whose_products_are_added_in_16_bits(largest: int, halves: bool, a: str) -> None:
    """Extremes on both sides: nothing saturates, and weights of 8 bits go another way."""
    machine = dataclasses.replace(MACHINE, dot_bytes=32, vnni=False, dotprod=False)
    rng = np.random.default_rng(3)
    limits = np.iinfo(a)
    feeds = {
        "a": rng.choice(np.array([limits.min, limits.max], a), (13, 150)),
        "b": rng.choice(np.array([-largest, largest - 1, largest], np.int8), (150, 40)),
        "za": np.array(3, a),
    }
    check_integer(feeds, ("b", "za"), machine)
    node = helper.make_node("MatMulInteger", ["a", "b", "za"], ["y"], "product")
    values = {**feeds, "y": np.zeros((13, 40), np.int32)}
    region = region_of([node], values, ["y"], ("b", "za"), "MatMulInteger")
    layouts = GEMM_INT8.layouts(region, machine, dict.fromkeys(region.inputs, PLAIN))
    kernel = GEMM_INT8.lower(region, machine, layouts).launches[-1].kernel
    assert ("PairSum" in repr(kernel.body)) == halves


@pytest.mark.parametrize("a", ["uint8", "int8"])
@pytest.mark.parametrize("shape", [(6, 4, 5), (13, 150, 40), (31, 70, 17), (9, 3000, 24), (3, 10, 5, 37, 33)])
@pytest.mark.parametrize("weights", ["normal", "ends"])
def test_weights_of_8_bits_in_pairs(
    a: str, shape: tuple[int, ...], weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the weights, if units that saturate are complemented (`byte_pairs`), also in batches and long sums."""
    machine = dataclasses.replace(MACHINE, dot_bytes=32, vnni=False, dotprod=False)
    monkeypatch.setattr(gemm_int8, "PAIRED", (0.0, 0.0, 0.0))
    monkeypatch.setattr(gemm_int8, "PAIRED_TILE", 0.0)
    *batch, m, k, n = shape
    rng, limits = np.random.default_rng(3), np.iinfo(a)
    b = np.clip(np.round(rng.normal(0, 40, (*batch[:1], k, n))), -128, 127).astype(np.int8)
    if weights == "ends":
        b = rng.choice(np.array([-128, -127, 127], np.int8), b.shape)
    feeds = {"a": rng.choice(np.array([limits.min, limits.max, 5], a), (*batch[:1], m, k)), "b": b}
    feeds["za"] = np.array(3, a)
    check_integer(feeds, ("b", "za"), machine)
    check_integer({key: value[..., :2] if key == "b" else value for key, value in feeds.items()}, ("b",), machine)


@pytest.mark.parametrize("machine", [SSE2, VNNI, NEON, PORTABLE])
@pytest.mark.parametrize("m", [1, 9])
def test_matmul_between_quantizers_on_other_machines(machine: CpuMachine, m: int) -> None:
    feeds = {"a": integers((m, 13), "int8"), "b": integers((13, 21), "int8"), **parameters(21, "int8", True)}
    feeds["za"] = np.array(-5, np.int8)
    exact = real(feeds)
    feeds["sy"], feeds["zy"] = np.array(np.abs(exact).max() / 120, np.float32), np.array(3, np.int8)
    tail = [helper.make_node("QuantizeLinear", ["y", "sy", "zy"], ["q"], "q")]
    region = quantized_region(feeds, (m, 21), tail, {"q": np.zeros((m, 21), np.int8)}, (*NUMBERS, "b"))
    within_one(lowered(region, feeds, machine, False), exact, float(feeds["sy"]), 3)


@pytest.mark.parametrize(
    ("transposed", "addend", "constant"),
    [
        ((0, 0), "float", True),
        ((0, 0), "none", False),
        ((0, 1), "int32", True),
        ((0, 1), "one", False),
        ((1, 0), "one", True),
        ((1, 0), "int32", False),
        ((1, 1), "none", True),
        ((1, 1), "float", False),
    ],
)
def test_gemm_to_float(transposed: tuple[int, int], addend: str, constant: bool) -> None:
    m, k, n = 13, 18, 21
    a, b = ((k, m) if transposed[0] else (m, k)), ((n, k) if transposed[1] else (k, n))
    feeds = {"a": integers(a, "uint8"), "b": integers(b, "int8"), **parameters(n, "int8", constant)}
    attributes: dict[str, Any] = {"transA": transposed[0], "transB": transposed[1], "alpha": 0.5, "beta": 2.0}
    if addend == "int32":
        feeds["c"], feeds["sc"] = integers((n,), "int16").astype(np.int32), 2e-4 * feeds["sb"]
    elif addend != "none":
        feeds["c"] = np.linspace(-1, 1, n if addend == "float" else 1, dtype=np.float32)
    fixed = (*NUMBERS, "c", *(("b",) if constant else ()))
    region = quantized_region(feeds, (m, n), [], {}, fixed, attributes)
    exact = real(feeds, attributes)
    np.testing.assert_allclose(lowered(region, feeds, MACHINE, True), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fixed", [("a",), ("a", "b")])
def test_a_constant_left_operand(fixed: tuple[str, ...]) -> None:
    feeds = {"a": integers((9, 20), "int8"), "b": integers((20, 18), "uint8"), **parameters(18, "uint8", False)}
    feeds["za"] = np.array(0, np.int8)
    region = quantized_region(feeds, (9, 18), [], {}, (*NUMBERS, *fixed))
    np.testing.assert_allclose(lowered(region, feeds, MACHINE, True), real(feeds), rtol=1e-5, atol=1e-4)


def test_weights_of_4_bits() -> None:
    narrow = (integers((20, 18), "int8") >> 4).astype(ml_dtypes.int4)
    feeds = {"a": integers((9, 20), "uint8"), "b": narrow, **parameters(18, "int8", True)}
    feeds["zb"] = np.zeros(18, ml_dtypes.int4)
    region = quantized_region(feeds, (9, 18), [], {}, (*NUMBERS, "b"))
    np.testing.assert_allclose(lowered(region, feeds, MACHINE, True), real(feeds), rtol=1e-5, atol=1e-4)


def test_batched_scores_of_attention() -> None:
    feeds = {
        "a": integers((2, 3, 9, 16), "uint8"),
        "b": integers((2, 3, 16, 9), "int8"),
        **parameters(9, "int8", False),
    }
    region = quantized_region(feeds, (2, 3, 9, 9), [], {}, NUMBERS)
    np.testing.assert_allclose(lowered(region, feeds, MACHINE, True), real(feeds), rtol=1e-5, atol=1e-4)


def test_dynamic_quantization_with_its_scales_and_bias_in_the_tail() -> None:
    m, k, n = 7, 40, 33
    feeds = {"a": integers((m, k), "uint8"), "b": integers((k, n), "int8"), "za": integers((), "uint8")}
    feeds["zb"] = np.array(0, np.int8)
    feeds["scale"] = np.linspace(0.001, 0.002, n, dtype=np.float32)
    feeds["bias"] = np.linspace(-1, 1, n, dtype=np.float32)
    nodes = [
        helper.make_node("MatMulInteger", ["a", "b", "za", "zb"], ["y"], "product"),
        helper.make_node("Cast", ["y"], ["f"], "cast", to=1),
        helper.make_node("Mul", ["f", "scale"], ["s"], "scale"),
        helper.make_node("Add", ["s", "bias"], ["r"], "bias"),
    ]
    exact = (feeds["a"].astype(np.int64) - feeds["za"].astype(np.int64)) @ feeds["b"].astype(np.int64)
    wide = dict.fromkeys(("f", "s", "r"), np.zeros((m, n), np.float32))
    values = {**feeds, **wide, "y": exact.astype(np.int32)}
    region = region_of(nodes, values, ["r"], ["b", "zb", "bias"], "MatMulInteger")
    wanted = exact * feeds["scale"].astype(np.float64) + feeds["bias"]
    np.testing.assert_allclose(lowered(region, feeds, MACHINE, True), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"a": integers((5, 6), "int16")}, "not of 8 bits"),
        ({"sa": np.ones(6, np.float32), "za": np.zeros(6, np.uint8)}, "one scale"),
        ({"a": np.zeros((0, 6), np.uint8)}, "size 0"),
        ({"a": np.zeros((5, 70_000), np.uint8), "b": np.zeros((70_000, 7), np.int8)}, "do not fit in 32 bits"),
    ],
)
def test_refusals(change: dict[str, Array], reason: str) -> None:
    feeds = {"a": integers((5, 6), "uint8"), "b": integers((6, 7), "int8"), **parameters(7, "int8", True)}
    feeds.update(change)
    region = quantized_region(feeds, (feeds["a"].shape[0], 7), [], {}, (*NUMBERS, "b"))
    refusal = GEMM_INT8.refusal(region)
    assert refusal is not None and reason in refusal


def test_what_is_no_integer_product_is_refused() -> None:
    node = helper.make_node("Relu", ["a"], ["y"], "r")
    a = np.zeros((2, 3), np.float32)
    assert "none of MatMul" in (GEMM_INT8.refusal(region_of([node], {"a": a, "y": a}, ["y"])) or "")
