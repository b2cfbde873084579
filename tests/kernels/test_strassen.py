"""Strassen's algorithm: its sums by the tensor of matrix multiplication, its kernels against products in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.codegen.llvm import print_kernel
from nestc.codegen.objects import compile_ir
from nestc.errors import UnsupportedOp
from nestc.graph.region import Region
from nestc.kernels.api import PLAIN, Layout
from nestc.kernels.families import alternatives
from nestc.kernels.position_products import Plan
from nestc.kernels.strassen import STRASSEN, StrassenFamily
from nestc.kernels.strassen_plan import INPUTS, OUTPUTS, POSITIONS, WEIGHTS, Halves, plan
from nestc.kernels.testing import host_machine, region_of, run_lowered
from nestc.targets.cpu.machine import machine
from nestc.tensor import math
from nestc.tensor.verify import verify

MACHINE = host_machine()
BOUND = 1e-5
"""The largest error relative to the largest output. A wrong sign makes errors of 1e-2 and more; a direct sum of some
hundred products 5e-7."""


def finished(nodes, values, last, tail):
    """The nodes and values with elementwise operators behind `last`."""
    for i, kind in enumerate(tail):
        name, y = f"t{i}", values[last]
        if kind == "Add":
            values["residual"] = np.random.default_rng(7).standard_normal(y.shape).astype(np.float32)
            nodes.append(helper.make_node("Add", ["residual", last], [name]))
            values[name] = y + values["residual"]
        elif kind == "Relu":
            nodes.append(helper.make_node("Relu", [last], [name]))
            values[name] = np.maximum(y, 0)
        else:
            nodes.append(helper.make_node("Sigmoid", [last], [name]))
            values[name] = 1 / (1 + np.exp(-y))
        last = name
    stored = {name: np.asarray(value, np.float32) for name, value in values.items()}
    region = region_of(nodes, stored, [last], [name for name in ("w", "b") if name in values])
    return region, {**stored, last: values[last]}


def product_region(rows, k, n, tail=(), **attributes) -> tuple[Region, dict[str, np.ndarray]]:
    """MatMul of `rows` (a shape), or Gemm if there are `attributes`."""
    random = np.random.default_rng(k + n)
    x = random.standard_normal((*rows, k)).astype(np.float32)
    w = (random.standard_normal((k, n)) / np.sqrt(k)).astype(np.float32)
    values = {"x": x, "w": w}
    if not attributes:
        values["y"] = x.astype(np.float64) @ w.astype(np.float64)
        return finished([helper.make_node("MatMul", ["x", "w"], ["y"], "product")], values, "y", tail)
    values["b"] = random.standard_normal(n).astype(np.float32)
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    values["y"] = alpha * (x.astype(np.float64) @ w.astype(np.float64)) + beta * values["b"]
    if attributes.get("transB"):
        values["w"] = np.ascontiguousarray(w.T)
    return finished([helper.make_node("Gemm", ["x", "w", "b"], ["y"], "product", **attributes)], values, "y", tail)


def pointwise_region(
    batch, channels, outputs, size, tail=(), bias=True, stride=1
) -> tuple[Region, dict[str, np.ndarray]]:
    """A convolution of one tap."""
    random = np.random.default_rng(channels + outputs)
    x = random.standard_normal((batch, channels, *size)).astype(np.float32)
    w = (random.standard_normal((outputs, channels)) / np.sqrt(channels)).astype(np.float32)
    ones = (1,) * len(size)
    values = {"x": x, "w": w.reshape(outputs, channels, *ones)}
    read = x[(slice(None), slice(None), *(slice(None, None, stride),) * len(size))]
    y = np.moveaxis(np.tensordot(w.astype(np.float64), read.astype(np.float64), (1, 1)), 0, 1)
    if bias:
        values["b"] = random.standard_normal(outputs).astype(np.float32)
        y = y + values["b"].reshape(-1, *ones)
    values["y"] = y
    names, strides = ["x", "w", "b"] if bias else ["x", "w"], (stride,) * len(size)
    return finished(
        [helper.make_node("Conv", names, ["y"], "conv", kernel_shape=ones, strides=strides)], values, "y", tail
    )


def check(region, values, cut: Plan | None = None, stored=POSITIONS, jit=True, cpu=MACHINE):
    """As good as the product in float64, but for the error that sums of sums may make."""
    assert STRASSEN.refusal(region) is None
    incoming = dict.fromkeys(region.inputs, PLAIN)
    layouts = STRASSEN.layouts(region, cpu, incoming)
    if cut is None:
        lowered = STRASSEN.lower(region, cpu, layouts)
    else:
        lowered = STRASSEN.lower_with(region, cpu, layouts, cut, stored)
    output = region.outputs[0]
    found = run_lowered(region, lowered, {name: values[name] for name in region.inputs}, cpu, layouts, jit)[output]
    expected = values[output]
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND * max(1.0, float(np.abs(expected).max())))


TAILS = [(), ("Relu",), ("Add", "Relu"), ("Sigmoid",)]


def test_the_sums_are_the_tensor_of_matrix_multiplication():
    """Every product of a quarter of the left and one of the right operand comes out where it belongs, once, or not."""
    a, b, c = (np.array(signs) for signs in (INPUTS, WEIGHTS, OUTPUTS))
    assert len(a) == len(b) == c.shape[1] == POSITIONS == 7
    made = np.einsum("ip,pj,pk->ijk", c, a, b)
    expected = np.zeros((4, 4, 4), int)
    for i in (0, 1):
        for j in (0, 1):
            for k in (0, 1):
                expected[2 * i + j, 2 * i + k, 2 * k + j] = 1
    np.testing.assert_array_equal(made, expected)


def test_the_last_sums_of_weights_are_made_of_the_first():
    w = np.array(WEIGHTS)
    np.testing.assert_array_equal(w[4], w[2] - w[3])
    np.testing.assert_array_equal(w[5], w[2] - w[3] - w[0])
    np.testing.assert_array_equal(w[6], w[2] - w[3] - w[1])


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_random_products(data):
    draw = data.draw
    rows = draw(st.sampled_from([(2,), (3,), (13,), (64,), (2, 31), (3, 1, 9)]))
    k, n = (16 * draw(st.integers(1, 6)) for _ in range(2))
    attributes = {}
    if len(rows) == 1 and draw(st.booleans()):
        attributes = {"transB": draw(st.integers(0, 1)), "alpha": draw(st.sampled_from([1.0, 0.5])), "beta": 2.0}
    check(*product_region(rows, k, n, draw(st.sampled_from(TAILS)), **attributes))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_random_convolutions(data):
    draw = data.draw
    size = draw(st.sampled_from([(7,), (1, 8), (5, 5), (14, 14), (3, 4, 3)]))
    channels, outputs = (16 * draw(st.integers(1, 6)) for _ in range(2))
    tail = draw(st.sampled_from(TAILS))
    bias, stride = draw(st.booleans()), draw(st.integers(1, 3))
    check(*pointwise_region(draw(st.integers(1, 2)), channels, outputs, size, tail, bias, stride))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_cut_computes_the_same(data):
    draw = data.draw
    nr = draw(st.integers(1, 3))
    cut = Plan(
        mr=draw(st.integers(1, 6 // nr * 2)),
        nr=nr,
        groups=draw(st.integers(1, 5)),
        columns=draw(st.integers(1, 3)),
        fused=draw(st.booleans()),
    )
    if draw(st.booleans()):
        region, values = product_region((37,), 48, 80, ("Add", "Relu"))
    else:
        region, values = pointwise_region(2, 48, 80, (3, 5), ("Add", "Relu"))
    check(region, values, cut, draw(st.sampled_from([4, POSITIONS])))


@pytest.mark.parametrize("stored", [4, POSITIONS])
@pytest.mark.parametrize("fused", [False, True])
def test_machine_code_does_what_the_interpreter_does(fused, stored):
    region, values = product_region((5,), 32, 32, ("Add", "Relu"))
    check(region, values, Plan(2, 1, 1, 1, fused), stored, jit=False)


def test_large_weights_are_not_stored_more_than_once():
    small, large = Halves(1, 128, 384, 768, MACHINE), Halves(1, 128, 768, 768, MACHINE)
    assert (small.stored, large.stored) == (POSITIONS, 4)
    region, values = product_region((12,), 1024, 1040)
    halves = STRASSEN.source(region, MACHINE).halves
    lowered = STRASSEN.lower(region, MACHINE, STRASSEN.layouts(region, MACHINE, {}))
    packed = lowered.constants["w.strassen"]
    # Columns are padded to whole register columns.
    assert halves.bytes <= packed.nbytes < 1.1 * halves.bytes
    check(region, values)


def test_error_of_a_deep_sum_stays_small():
    """Measured 1e-6 to 3e-6 of the largest output; the bound on a whole network is 2e-4."""
    check(*product_region((33,), 2048, 64))
    check(*pointwise_region(1, 1024, 64, (7, 7)))


def test_rows_of_other_sizes_lend_each_other_only_rounding():
    """A row a thousand times larger than the one it is paired with costs that one three digits, and no more."""
    region, values = product_region((8,), 64, 64)
    x = values["x"].copy()
    x[::2] *= 1000
    lowered = STRASSEN.lower(region, MACHINE, dict.fromkeys((*region.inputs, *region.outputs), PLAIN))
    found = run_lowered(region, lowered, {"x": x}, MACHINE)["y"]
    expected = x.astype(np.float64) @ values["w"].astype(np.float64)
    assert np.abs(found - expected).max() < BOUND * np.abs(expected).max()


@pytest.mark.parametrize("rows", [4, 5])
def test_items_of_a_batch_do_not_meet(rows):
    region, values = product_region((3, rows), 64, 64)
    conv, images = pointwise_region(3, 64, 64, (1, rows))
    for of, name in ((region, "y"), (conv, "y")):
        x = (values if of is region else images)["x"].copy()
        x[1] = np.nan
        layouts = STRASSEN.layouts(of, MACHINE, dict.fromkeys(of.inputs, PLAIN))
        found = run_lowered(of, STRASSEN.lower(of, MACHINE, layouts), {"x": x}, MACHINE, layouts)[name]
        assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()


# -- machines


@pytest.mark.parametrize("arch", ["avx512", "neon", "sse2"])
def test_other_machines_get_kernels(arch):
    cpu = machine(arch)
    for region, _ in (product_region((9,), 64, 96, ("Relu",)), pointwise_region(1, 64, 96, (5, 5))):
        layouts = STRASSEN.layouts(region, cpu, dict.fromkeys(region.inputs, PLAIN))
        for launch in STRASSEN.lower(region, cpu, layouts).launches:
            verify(launch.kernel)
            code = print_kernel(math.expand(launch.kernel, cpu), "kernel", cpu)
            assert compile_ir(code.text, cpu).code


@pytest.mark.parametrize("bytes_", [16, 64])
def test_vectors_of_other_widths(bytes_):
    """The kernels of such machines, with their vectors split or narrow, on this one."""
    cpu = dataclasses.replace(MACHINE, vector_bytes=bytes_, vector_registers=32 if bytes_ == 64 else 16)
    check(*product_region((21,), 64, 96, ("Relu",)), cpu=cpu)
    check(*pointwise_region(1, 64, 96, (5, 5), ("Add", "Relu")), cpu=cpu)


@given(st.integers(2, 4000), st.integers(1, 200), st.integers(1, 200), st.sampled_from([None, False, True]))
@settings(deadline=None, max_examples=100)
def test_cuts_cover_all_pairs_and_columns(rows, blocks, vectors, fused):
    halves = Halves(3, rows, 16 * blocks, 16 * vectors, dataclasses.replace(MACHINE, vector_bytes=32))
    cut = plan(halves, fused)
    assert halves.groups(cut) * cut.mr >= halves.pairs > (halves.groups(cut) - 1) * cut.mr
    assert halves.steps(cut) * cut.columns * cut.nr >= halves.vectors
    assert cut.mr * cut.nr < MACHINE.tile_registers


# -- the family


def test_what_is_refused():
    reason = STRASSEN.refusal
    good, _ = product_region((8,), 32, 32)
    assert reason(good) is None
    assert reason(dataclasses.replace(good, constants={})) == "the right operand is not constant"
    wide = {name: dataclasses.replace(type_, dtype="float64") for name, type_ in good.types.items()}
    assert reason(dataclasses.replace(good, types=wide)) == "only float32 is added up before products"
    turned, _ = product_region((8,), 8, 32, transB=0, transA=1)
    assert reason(turned) == "only a matrix by a matrix is halved"
    conv, _ = pointwise_region(1, 32, 32, (4, 4))
    assert reason(conv) is None
    padded = dataclasses.replace(conv.ops[0], attributes={**conv.ops[0].attributes, "pads": (1, 0, 0, 0)})
    assert (
        reason(dataclasses.replace(conv, ops=(padded,))) == "only convolutions of one tap without padding are products"
    )


def test_halves_of_odd_vectors_are_no_way():
    region, _ = product_region((64,), 24, 512)
    assert STRASSEN.cycles(region, MACHINE)[0] == float("inf")
    assert not any(family.name.startswith("strassen") for family in alternatives(region, MACHINE))
    with pytest.raises(UnsupportedOp, match="no whole vectors"):
        STRASSEN.lower(region, MACHINE, {})


def test_large_products_take_it_first_and_none_if_exact():
    large, _ = product_region((128,), 768, 768)
    small, _ = product_region((128,), 32, 32)
    assert alternatives(large, MACHINE)[0].name == "strassen"
    assert alternatives(small, MACHINE)[0].name == "gemm"
    names = [family.name for family in alternatives(large, MACHINE)]
    assert len(set(names)) == len(names) and {"strassen", "gemm"} < set(names)
    for region in (large, pointwise_region(1, 512, 512, (14, 14))[0]):
        assert not any("strassen" in family.name for family in alternatives(region, MACHINE, exact=True))


def test_the_other_way_is_cut_the_other_way():
    region, _ = product_region((64,), 64, 64)
    halves = STRASSEN.source(region, MACHINE).halves
    other = STRASSEN.other(region, MACHINE)
    assert isinstance(other, StrassenFamily) and other.fused is not plan(halves).fused
    assert plan(halves, other.fused).fused is other.fused
    assert STRASSEN.layouts(pointwise_region(1, 64, 64, (4, 4))[0], MACHINE, {})["x"] == Layout(
        MACHINE.lanes("float32")
    )
