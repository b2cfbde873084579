"""Winograd convolution: its matrices by fractions, its kernels against direct sums in float64."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.codegen.llvm import print_kernel
from nestc.codegen.objects import compile_ir
from nestc.graph.region import Region
from nestc.kernels.api import Layout
from nestc.kernels.families import alternatives
from nestc.kernels.position_products import Plan
from nestc.kernels.testing import host_machine, region_of, run_lowered
from nestc.kernels.winograd import WINOGRAD, WinogradFamily
from nestc.kernels.winograd_matrices import strided, transform
from nestc.kernels.winograd_plan import Tiling, plan, tile
from nestc.targets.cpu.machine import machine
from nestc.tensor import math
from nestc.tensor.text import kernel_text
from nestc.tensor.verify import verify

MACHINE = host_machine()
TRANSFORMS = [(2, 3), (4, 3), (6, 3), (2, 5), (4, 5), (2, 7)]
# The largest error of the random cases below relative to the largest output; of a direct sum it is some 5e-7. A wrong
# coefficient makes errors of 1e-2 and more.
BOUND = 2e-5


def tensors(seed, x_shape, w_shape):
    """Seeded input, weights scaled to unit variance, and bias."""
    random = np.random.default_rng(seed)
    x, w, b = (random.standard_normal(shape).astype(np.float32) for shape in (x_shape, w_shape, w_shape[0]))
    return x, (w / np.sqrt(np.prod(w_shape[1:]))).astype(np.float32), b


def direct(x, w, b, pads, stride=1):
    """The convolution by its definition in float64, for one or two spatial axes."""
    rank = x.ndim - 2
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:])])
    windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], tuple(range(2, 2 + rank)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, stride),) * rank)]
    axes = tuple(range(windows.ndim - rank, windows.ndim))
    y = np.tensordot(windows, w.astype(np.float64), ((1, *axes), (1, *range(2, 2 + rank))))
    return np.moveaxis(y, -1, 1) + b.reshape(-1, *(1,) * rank)


def region_and_values(x, w, b, pads, tail=(), stride=1) -> tuple[Region, dict[str, np.ndarray]]:
    """A Conv with elementwise operators behind it, and every value in float64 (what is stored is float32)."""
    rank = x.ndim - 2
    zeros = np.zeros(w.shape[0], np.float32)
    values = {"x": x, "w": w, "y": direct(x, w, zeros if b is None else b, pads, stride)}
    names = ["x", "w"] + ([] if b is None else ["b"])
    if b is not None:
        values["b"] = b
    strides = [stride] * rank
    node = helper.make_node("Conv", names, ["y"], "conv", pads=list(pads), kernel_shape=w.shape[2:], strides=strides)
    nodes = [node]
    last = "y"
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
            values |= {"low": np.array(-0.5, np.float32), "high": np.array(1.5, np.float32)}
            nodes.append(helper.make_node("Clip", [last, "low", "high"], [name]))
            values[name] = np.clip(y, -0.5, 1.5)
        last = name
    stored = {name: np.asarray(value, np.float32) for name, value in values.items()}
    region = region_of(nodes, stored, [last], [*names[1:], "low", "high"])
    assert len(region.types["x"].shape) == rank + 2
    return region, {**stored, last: values[last]}


def check(m, x, w, b, pads, tail=(), cut: Plan | None = None, jit=True, cpu=MACHINE):
    """Our kernels are as good as a direct sum in float64, but for the error that the transforms may make."""
    region, values = region_and_values(x, w, b, pads, tail, 1 + m % 2)
    family = WinogradFamily(m)
    assert family.refusal(region) is None
    incoming = dict.fromkeys(region.inputs, Layout(cpu.lanes("float32")))
    layouts = family.layouts(region, cpu, incoming)
    lowered = family.lower(region, cpu, layouts) if cut is None else family.lower_with(region, cpu, layouts, cut)
    output = region.outputs[0]
    feeds = {name: values[name] for name in region.inputs}
    found = run_lowered(region, lowered, feeds, cpu, layouts, jit)[output]
    expected = values[output]
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND * max(1.0, float(np.abs(expected).max())))


# -- matrices


def product(matrix, vector):
    return [sum(a * x for a, x in zip(row, vector, strict=True)) for row in matrix]


@pytest.mark.parametrize(("m", "r"), [*TRANSFORMS, (1, 1), (5, 1)])
@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_the_identity_holds_exactly(m, r, data):
    t = transform(m, r)
    numerators = data.draw(st.lists(st.integers(-99, 99), min_size=t.n + r, max_size=t.n + r))
    d, g = ([Fraction(x, 7) for x in part] for part in (numerators[: t.n], numerators[t.n :]))
    elementwise = [u * v for u, v in zip(product(t.g, g), product(t.bt, d), strict=True)]
    assert product(t.at, elementwise) == [sum(d[i + j] * g[j] for j in range(r)) for i in range(m)]


@pytest.mark.parametrize("m", [1, 3, 5, 7])
@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_the_identity_of_stride_2_holds_exactly(m, data):
    t = strided(m, 3)
    assert t.n == 2 * m + 1 == len(t.bt) == len(t.g) and t.stride == 2
    numerators = data.draw(st.lists(st.integers(-99, 99), min_size=t.n + 3, max_size=t.n + 3))
    d, g = ([Fraction(x, 7) for x in part] for part in (numerators[: t.n], numerators[t.n :]))
    elementwise = [u * v for u, v in zip(product(t.g, g), product(t.bt, d), strict=True)]
    assert product(t.at, elementwise) == [sum(d[2 * i + j] * g[j] for j in range(3)) for i in range(m)]


def test_the_points_of_lavin_and_gray():
    """F(2, 3) as they print it, but for signs that cancel."""
    t = transform(2, 3)
    half = Fraction(1, 2)
    assert t.at == ((1, 1, 1, 0), (0, 1, -1, 1))
    assert t.g == ((-1, 0, 0), (half, half, half), (half, -half, half), (0, 0, 1))
    assert t.bt == ((-1, 0, 1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, -1, 0, 1))


def test_entries_of_the_input_transform_are_exact_in_float32():
    for m, r in TRANSFORMS:
        t = transform(m, r)
        assert all(Fraction(float(np.float32(float(c)))) == c for row in (*t.bt, *t.at) for c in row)


def test_wrong_numbers_of_points_are_refused():
    for m, r in ((3, 3), (8, 3)):
        with pytest.raises(ValueError, match=f"F\\({m}, {r}\\) needs {m + r - 2} points"):
            transform(m, r)
    with pytest.raises(ValueError, match="needs 5 points"):
        transform(4, 3, (Fraction(1),))


# -- kernels


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_random_convolutions(data):
    draw = data.draw
    m, r = draw(st.sampled_from(TRANSFORMS))
    rank = draw(st.sampled_from([1, 2, 2, 2]))
    kernel = [r] * rank if rank == 1 else draw(st.sampled_from([(r, r), (r, r), (r, 1), (1, r)]))
    pads = [draw(st.integers(0, min(2, k - 1))) for k in (*kernel, *kernel)]
    size = [max(1, k - pads[i] - pads[rank + i]) + draw(st.integers(0, 14)) for i, k in enumerate(kernel)]
    channels, outputs = draw(st.integers(16, 37)), draw(st.integers(16, 37))
    shape = (draw(st.integers(1, 2)), channels, *size)
    x, w, b = tensors(draw(st.integers(0, 99)), shape, (outputs, channels, *kernel))
    tail = draw(st.sampled_from([(), ("Relu",), ("Add", "Relu"), ("Clip",), ("Relu", "Add")]))
    check(m, x, w, b if draw(st.booleans()) else None, pads, tail)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_random_convolutions_of_stride_2(data):
    draw = data.draw
    rank = draw(st.sampled_from([1, 2, 2]))
    pads = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    size = [max(1, 3 - pads[i] - pads[rank + i]) + draw(st.integers(0, 20)) for i in range(rank)]
    channels, outputs = draw(st.integers(32, 45)), draw(st.integers(32, 45))
    x, w, b = tensors(
        draw(st.integers(0, 99)), (draw(st.integers(1, 2)), channels, *size), (outputs, channels, 3, 3)[: 2 + rank]
    )
    tail = draw(st.sampled_from([(), ("Relu",), ("Add", "Relu"), ("Clip",)]))
    check(3, x, w, b if draw(st.booleans()) else None, pads, tail)


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_any_cut_computes_the_same(data):
    draw = data.draw
    x, w, b = tensors(3, (2, 33, 13, 11), (40, 33, 3, 3))
    nr = draw(st.integers(1, 3))
    cut = Plan(
        mr=draw(st.integers(1, 6 // nr * 2)),
        nr=nr,
        groups=draw(st.integers(1, 5)),
        columns=draw(st.integers(1, 3)),
        fused=draw(st.booleans()),
        outputs_first=draw(st.booleans()),
    )
    check(draw(st.sampled_from([2, 3, 4, 6])), x, w, b, [1, 0, 1, 1], ("Add", "Relu"), cut)


@pytest.mark.parametrize("m", [2, 3, 4, 6])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 14), (160, 7)])
def test_layers_of_networks(m, channels, size):
    x, w, b = tensors(0, (1, channels, size, size), (channels, channels, 3, 3))
    check(m, x, w, b, [1, 1, 1, 1], ("Add", "Relu"))


@pytest.mark.parametrize("fused", [False, True])
def test_machine_code_does_what_the_interpreter_does(fused):
    x, w, b = tensors(0, (1, 17, 3, 3), (16, 17, 3, 3))
    check(2, x, w, b, [1, 1, 1, 1], ("Add", "Relu"), Plan(2, 2, 1, 1, fused), jit=False)


def test_error_of_a_deep_sum_stays_small():
    """Measured 1e-6 to 8e-6; the bound on a whole network is 2e-4."""
    for m in (2, 3, 4, 6):
        x, w, b = tensors(1, (1, 256, 12, 12), (32, 256, 3, 3))
        check(m, np.maximum(x, 0), w, b, [1, 1, 1, 1])


def test_error_does_not_grow_with_depth():
    """Eight layers with Relu between them, which keep the scale of their input: far below 2e-4 of it."""
    found, exact = None, None
    for layer in range(8):
        x, w, _ = tensors(layer, (1, 32, 14, 14), (32, 32, 3, 3))
        found, exact = (x, x.astype(np.float64)) if found is None else (found, exact)
        w *= np.sqrt(2, dtype=np.float32)
        exact = np.maximum(direct(exact, w, np.zeros(32), [1, 1, 1, 1]), 0)
        region, _ = region_and_values(found, w, None, [1, 1, 1, 1], ("Relu",))
        layouts = WinogradFamily(6).layouts(region, MACHINE, {})
        lowered = WinogradFamily(6).lower(region, MACHINE, layouts)
        found = run_lowered(region, lowered, {"x": found}, MACHINE, layouts)[region.outputs[0]]
    assert np.abs(found - exact).max() < 2e-5 * np.abs(exact).max()


# -- machines


def sized_region(channels, outputs, size, kernel=(3, 3), **attributes) -> Region:
    """A Conv of constant weights."""
    x, w, b = tensors(0, (1, channels, *size), (outputs, channels, *kernel))
    stride = attributes.get("strides", [1])[0]
    y = np.zeros((1, outputs, *((extent - 1) // stride + 1 for extent in size)), np.float32)
    pads = [(k - 1) // 2 for k in kernel] * 2
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", pads=pads, **attributes)
    return region_of([node], {"x": x, "w": w, "b": b, "y": y}, ["y"], ["w", "b"])


@pytest.mark.parametrize("arch", ["avx512", "neon", "sse2"])
def test_other_machines_get_kernels(arch):
    cpu = machine(arch)
    for family in WINOGRAD:
        strides = [1 + family.m % 2] * 2
        region = sized_region(40, 48, (13, 13), strides=strides)
        layouts = family.layouts(region, cpu, {})
        for launch in family.lower(region, cpu, layouts).launches:
            verify(launch.kernel)
            code = print_kernel(math.expand(launch.kernel, cpu), "kernel", cpu)
            assert compile_ir(code.text, cpu).code


@pytest.mark.parametrize("bytes_", [16, 64])
def test_vectors_of_other_widths(bytes_):
    """The kernels of such machines, with their vectors split or narrow, on this one."""
    registers = 32 if bytes_ == 64 else 16
    cpu = dataclasses.replace(MACHINE, vector_bytes=bytes_, vector_registers=registers)
    x, w, b = tensors(0, (1, 40, 13, 12), (48, 40, 3, 3))
    check(4, x, w, b, [1, 1, 1, 1], ("Add", "Relu"), cpu=cpu)


@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from([16, 32]))
def test_register_tiles_fit_the_registers(tiles, vectors, registers):
    mr, nr = tile(tiles, vectors, 64, registers)
    assert 1 <= mr <= tiles and 1 <= nr <= vectors and mr * nr + min(nr, 4) + 1 <= registers


@given(st.integers(16, 600), st.integers(16, 600), st.integers(1, 120), st.sampled_from([2, 4, 6]))
@settings(deadline=None, max_examples=60)
def test_cuts_cover_all_tiles_and_outputs(channels, outputs, size, m):
    region = sized_region(channels, 16, (1, 1))
    shape = dataclasses.replace(
        WinogradFamily(m).tiling(region, MACHINE).shape, out_channels=outputs, size=(size, size), out=(size, size)
    )
    t = Tiling(shape, (transform(m, 3), transform(m, 3)), MACHINE)
    cut = plan(t)
    assert t.groups(cut) * cut.mr >= t.count > (t.groups(cut) - 1) * cut.mr
    assert t.steps(cut) * cut.columns == ceil(t.vectors / cut.nr)


def test_few_tiles_are_transformed_in_the_kernel_only_if_all_items_can_read_the_weights():
    small, large = sized_region(8, 16, (14, 14), (5, 5)), sized_region(64, 64, (14, 14))
    assert plan(WinogradFamily(4).tiling(small, MACHINE)).fused
    assert not plan(WinogradFamily(4).tiling(large, MACHINE)).fused


# -- the family


def test_what_is_refused():
    def reason(region, m=4):
        return WinogradFamily(m).refusal(region)

    good = sized_region(16, 16, (8, 8))
    assert reason(good) is None
    assert reason(sized_region(7, 16, (8, 8))) == "fewer than 8 channels are not worth transforming"
    assert reason(sized_region(16, 16, (8, 8), (1, 1))) == "F(4, r) of kernel (1, 1) is not among the transforms"
    assert reason(sized_region(16, 16, (8, 8), (7, 7))) == "F(4, r) of kernel (7, 7) is not among the transforms"
    assert reason(sized_region(16, 16, (8, 8), (3, 3), dilations=[1, 1]), 2) is None
    halved = sized_region(32, 32, (8, 8), strides=[2, 2])
    assert reason(halved) == "tiles of 4 outputs are of stride 1"
    assert reason(halved, 3) is None
    assert reason(good, 3) == "tiles of 3 outputs are of kernels of 3 with stride 2"
    assert (
        reason(sized_region(31, 32, (8, 8), strides=[2, 2]), 3) == "fewer than 32 channels are not worth transforming"
    )
    dilated = dataclasses.replace(good.ops[0], attributes={**good.ops[0].attributes, "dilations": (2, 2)})
    assert reason(dataclasses.replace(good, ops=(dilated,))) == "groups and dilations are not transformed"
    open_weights = dataclasses.replace(good, constants={"b": good.constants["b"]})
    assert reason(open_weights) == "the weights of 'conv' are not constant"


def test_alternatives_have_names_of_their_own_and_none_if_exact():
    region = sized_region(64, 64, (56, 56))
    names = [family.name for family in alternatives(region, MACHINE)]
    assert len(set(names)) == len(names)
    assert {"winograd2", "winograd4", "winograd6", "conv"} <= set(names)
    assert names[0] in ("winograd4", "winograd6")
    assert names[4:7] == ["winograd2_split", "winograd4_split", "winograd6_split"]
    assert not any("winograd" in family.name for family in alternatives(region, MACHINE, exact=True))


def test_few_channels_stay_direct():
    region = sized_region(3, 64, (56, 56))
    assert all("winograd" not in family.name for family in alternatives(region, MACHINE))


def test_text_of_the_products():
    """Register tiles of 2 tiles and 1 vector: p is the position, q the group of tiles, c the block of inputs."""
    region = sized_region(16, 16, (8, 8))
    cpu = machine("avx2")
    lowered = WinogradFamily(4).lower_with(region, cpu, dict.fromkeys(("x", "y"), Layout(8)), Plan(2, 1, 2, 1, False))
    assert [launch.kernel.name for launch in lowered.launches] == ["winograd_input", "winograd"]
    text = kernel_text(lowered.launches[1].kernel)
    start = text.index("  for item in 2 parallel:")
    assert text[start:].splitlines()[:16] == PRODUCTS.splitlines()


PRODUCTS = """\
  for item in 2 parallel:
    for p in 36:
      for q in 2:
        acc[0, 0, 0:8] = splat(0.0, 8)
        acc[1, 0, 0:8] = splat(0.0, 8)
        for c in 2:
          prefetch(p0[item, p, 1, c, 0, (q * 32)])
          prefetch(p0[item, p, 1, c, 0, ((q * 32) + 16)])
          for l in 8 unroll:
            w[0, 0:8] = p0[item, p, 0, c, l, 0:8]
            x[0:8] = splat(p2[p, (((q * 32) + (c * 16)) + l)], 8)
            acc[0, 0, 0:8] = fma(x[0:8], w[0, 0:8], acc[0, 0, 0:8])
            x[0:8] = splat(p2[p, ((((q * 32) + (c * 16)) + l) + 8)], 8)
            acc[1, 0, 0:8] = fma(x[0:8], w[0, 0:8], acc[1, 0, 0:8])
        m[0, (q * 2), (p * 8):8] = acc[0, 0, 0:8]
        m[0, ((q * 2) + 1), (p * 8):8] = acc[1, 0, 0:8]
"""
