"""Fused kernels against ONNX Runtime, and to the bit against the two kernels that they stand for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper

from nestc.kernels.api import PLAIN, CpuMachine, Family, Layout
from nestc.kernels.checking import by_onnxruntime
from nestc.kernels.choices import ConvChoice
from nestc.kernels.conv import CONV, ConvFamily
from nestc.kernels.fused import FusedFamily, join, parts
from nestc.kernels.fused_bands import DEPTHWISE_POINTWISE, ELEMENTWISE_POINTWISE
from nestc.kernels.fused_pool import CONV_POOL
from nestc.kernels.fused_scale import SCALED_WEIGHTS, ScaledWeights
from nestc.kernels.fused_winograd import WINOGRAD_POOL
from nestc.kernels.generic import Generic
from nestc.kernels.pool import POOL
from nestc.kernels.testing import evaluate, host_machine, region_of, run_lowered
from nestc.kernels.winograd import WINOGRAD, WinogradFamily

HOST = host_machine()
MACHINES = {
    4: dataclasses.replace(HOST, vector_bytes=16, vector_registers=32),
    8: dataclasses.replace(HOST, vector_bytes=32, vector_registers=16),
    16: dataclasses.replace(HOST, vector_bytes=64, vector_registers=32),
}
"""By the lanes of their vectors; LLVM splits those that the host does not have."""

ACTIVATIONS = {
    "none": [],
    "relu": [helper.make_node("Relu", ["d"], ["e"])],
    "clip": [helper.make_node("Clip", ["d", "low", "high"], ["e"])],
    "hardswish": [helper.make_node("HardSwish", ["d"], ["e"])],
    "swish": [helper.make_node("Sigmoid", ["d"], ["gate"]), helper.make_node("Mul", ["d", "gate"], ["e"])],
}

Feeds = dict[str, np.ndarray]


class Case:
    """Two chains of nodes, the second on the last output of the first; `feeds` whose names begin with a capital are
    what the network reads, the rest are constants."""

    def __init__(self, first: list[NodeProto], second: list[NodeProto], feeds: Feeds) -> None:
        self.first, self.second, self.feeds = first, second, feeds
        nodes = [*first, *second]
        double = any(array.dtype == np.float64 for array in feeds.values())
        # ONNX Runtime has no convolution of doubles; the reference evaluator is slow but has.
        self.values = {**feeds, **(evaluate(nodes, feeds) if double else by_onnxruntime(nodes, feeds))}
        self.constants = [name for name in feeds if name[0].islower()]
        self.between, self.output = first[-1].output[0], second[-1].output[0]
        self.halves = [
            region_of(chain, self.values, [chain[-1].output[0]], self.constants) for chain in (first, second)
        ]
        joined = join(*self.halves)
        assert joined is not None
        self.region = joined

    def fused(self, family: FusedFamily, machine: CpuMachine = HOST, jit: bool = True) -> np.ndarray:
        """What the fused kernel gives."""
        assert family.refusal(self.region) is None
        return self.run(self.region, family, machine, self.feeds, jit)

    def apart(self, first: Family, second: Family, machine: CpuMachine = HOST) -> np.ndarray:
        """What two kernels give."""
        before = self.run(self.halves[0], first, machine, self.feeds)
        return self.run(self.halves[1], second, machine, {**self.feeds, self.between: before})

    def run(self, region: Any, family: Family, machine: CpuMachine, feeds: Feeds, jit: bool = True) -> np.ndarray:
        block = Layout(machine.lanes("float32"))
        incoming = {name: block if name == self.between else PLAIN for name in region.inputs}
        layouts = {**incoming, **family.layouts(region, machine, incoming)}
        lowered = family.lower(region, machine, layouts)
        return run_lowered(region, lowered, feeds, machine, layouts, jit)[region.outputs[0]]

    def close(self, found: np.ndarray) -> None:
        """What was found is what ONNX Runtime gives."""
        expected = self.values[self.output]
        assert found.shape == expected.shape and found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * max(1.0, float(np.abs(expected).max())))


def numbers(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def pointwise(
    value: str, channels: int, outputs: int, out: tuple[int, ...], residual: bool, bias: bool, dtype: str = "float32"
) -> tuple[list[NodeProto], Feeds]:
    """A 1x1 convolution of `value` and its operands, perhaps with another map added to it."""
    feeds = {"w2": numbers(3, outputs, channels, *(1 for _ in out[1:]), dtype=dtype) / np.sqrt(channels).astype(dtype)}
    if bias:
        feeds["b2"] = numbers(4, outputs, dtype=dtype)
    nodes = [helper.make_node("Conv", [value, *feeds], ["f"], name="pointwise")]
    if residual:
        feeds["R"] = numbers(5, out[0], outputs, *out[1:], dtype=dtype)
        nodes += [helper.make_node("Add", ["f", "R"], ["g"]), helper.make_node("Relu", ["g"], ["y"])]
    return nodes, feeds


def depthwise_case(
    channels: int,
    outputs: int,
    size: tuple[int, int],
    kernel: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (1, 1, 1, 1),
    batch: int = 1,
    act: str = "relu",
    residual: bool = False,
    bias: bool = True,
    dtype: str = "float32",
) -> Case:
    feeds = {"X": numbers(0, batch, channels, *size, dtype=dtype), "w1": numbers(1, channels, 1, *kernel, dtype=dtype)}
    names = list(feeds)
    if bias:
        feeds["b1"] = numbers(2, channels, dtype=dtype)
        names.append("b1")
    if act == "clip":
        feeds |= {"low": np.array(0, dtype), "high": np.array(6, dtype)}
    conv = helper.make_node("Conv", names, ["d"], name="depthwise", group=channels, strides=strides, pads=pads)
    out = tuple(
        (n + a + b - k) // s + 1 for n, a, b, k, s in zip(size, pads[:2], pads[2:], kernel, strides, strict=True)
    )
    value = "d" if act == "none" else "e"
    second, more = pointwise(value, channels, outputs, (batch, *out), residual, bias, dtype)
    return Case([conv, *ACTIVATIONS[act]], second, {**feeds, **more})


DEPTHWISE: dict[str, dict[str, Any]] = {
    "plain": {"channels": 32, "outputs": 16, "size": (28, 28)},
    "stride 2, residual, clip": {
        "channels": 48,
        "outputs": 24,
        "size": (31, 29),
        "strides": (2, 2),
        "residual": True,
        "act": "clip",
    },
    "ragged channels, batch, no tail": {
        "channels": 20,
        "outputs": 30,
        "size": (15, 9),
        "kernel": (5, 5),
        "pads": (2, 2, 2, 2),
        "batch": 2,
        "act": "none",
        "bias": False,
    },
    "swish, many outputs": {"channels": 16, "outputs": 104, "size": (14, 14), "act": "swish"},
    "hard swish, uneven pads": {
        "channels": 24,
        "outputs": 40,
        "size": (13, 17),
        "kernel": (3, 5),
        "strides": (1, 2),
        "pads": (0, 1, 2, 3),
        "act": "hardswish",
    },
}


@pytest.mark.parametrize("lanes", MACHINES)
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_and_pointwise(name: str, lanes: int) -> None:
    case = depthwise_case(**DEPTHWISE[name])
    found = case.fused(DEPTHWISE_POINTWISE, MACHINES[lanes])
    case.close(found)
    np.testing.assert_array_equal(found, case.apart(CONV, CONV, MACHINES[lanes]))


@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.data())
def test_random_depthwise_and_pointwise(data: st.DataObject) -> None:
    draw = data.draw
    kernel = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    case = depthwise_case(
        draw(st.integers(2, 40)),
        draw(st.integers(1, 50)),
        (draw(st.integers(kernel[0], 30)), draw(st.integers(kernel[1] + 1, 30))),
        kernel,
        (draw(st.integers(1, 3)), draw(st.integers(1, 2))),
        (draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2)), 1, draw(st.integers(1, 2))),
        draw(st.integers(1, 2)),
        draw(st.sampled_from(sorted(ACTIVATIONS))),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    if DEPTHWISE_POINTWISE.refusal(case.region) is not None:
        return  # a row of one pixel
    found = case.fused(DEPTHWISE_POINTWISE)
    case.close(found)
    np.testing.assert_array_equal(found, case.apart(CONV, CONV))


def test_many_bands_of_a_small_cache() -> None:
    machine = dataclasses.replace(HOST, l2_bytes=16 << 10)
    case = depthwise_case(32, 24, (36, 30))
    lowered = DEPTHWISE_POINTWISE.lower(case.region, machine, dict.fromkeys((*case.region.inputs, "f"), Layout(8)))
    parallel = lowered.launches[0].kernel.parallel
    assert parallel is not None and parallel.extent == 18  # two rows of 3840 bytes in half of the cache
    np.testing.assert_array_equal(case.fused(DEPTHWISE_POINTWISE, machine), case.apart(CONV, CONV))


def test_depthwise_in_double() -> None:
    case = depthwise_case(10, 12, (9, 8), dtype="float64", residual=True)
    found = case.fused(DEPTHWISE_POINTWISE)
    np.testing.assert_allclose(found, case.values[case.output], rtol=0, atol=1e-12)


@pytest.mark.parametrize("lanes", MACHINES)
def test_interpreted(lanes: int) -> None:
    case = depthwise_case(6, 5, (6, 5), residual=True)
    case.close(case.fused(DEPTHWISE_POINTWISE, MACHINES[lanes], jit=False))
    pool = pool_case(3, 10, (9, 8), (3, 3), 2, 1)
    pool.close(pool.fused(CONV_POOL, MACHINES[lanes], jit=False))


# -- a convolution and a pool


def pool_case(
    channels: int,
    outputs: int,
    size: tuple[int, int],
    window: tuple[int, int] = (3, 3),
    step: int = 2,
    border: int = 0,
    kernel: int = 3,
    stride: int = 1,
    pad: int = 1,
    batch: int = 1,
    kind: str = "MaxPool",
    **attributes: Any,
) -> Case:
    feeds = {
        "X": numbers(0, batch, channels, *size),
        "w1": numbers(1, outputs, channels, kernel, kernel) / np.float32(kernel * np.sqrt(channels)),
        "b1": numbers(2, outputs),
    }
    conv = helper.make_node("Conv", list(feeds), ["d"], name="conv", strides=[stride] * 2, pads=[pad] * 4)
    pool = helper.make_node(
        kind, ["e"], ["y"], name="pool", kernel_shape=window, strides=[step] * 2, pads=[border] * 4, **attributes
    )
    return Case([conv, *ACTIVATIONS["relu"]], [pool], feeds)


POOLS: dict[str, dict[str, Any]] = {
    "stem of ResNet": {"channels": 3, "outputs": 24, "size": (56, 56), "border": 1, "kernel": 7, "stride": 2, "pad": 3},
    "stem of SqueezeNet": {"channels": 3, "outputs": 16, "size": (57, 43), "kernel": 3, "stride": 2, "pad": 0},
    "ceiling, ragged, batch": {"channels": 5, "outputs": 44, "size": (29, 31), "border": 1, "batch": 2, "ceil_mode": 1},
    "2x2": {"channels": 3, "outputs": 40, "size": (30, 33), "window": (2, 2)},
    "average": {"channels": 5, "outputs": 20, "size": (21, 13), "border": 1, "kind": "AveragePool"},
    "average of padding too": {
        "channels": 4,
        "outputs": 8,
        "size": (12, 13),
        "border": 1,
        "step": 1,
        "kind": "AveragePool",
        "count_include_pad": 1,
    },
    "gaps, dilation, one tap": {
        "channels": 4,
        "outputs": 9,
        "size": (17, 16),
        "window": (2, 3),
        "step": 3,
        "kernel": 1,
        "pad": 0,
        "dilations": [1, 2],
    },
}


@pytest.mark.parametrize("lanes", MACHINES)
@pytest.mark.parametrize("name", POOLS)
def test_convolution_and_pool(name: str, lanes: int) -> None:
    case = pool_case(**POOLS[name])
    # Bands of a few rows, so that rows move from one to the next.
    machine = dataclasses.replace(MACHINES[lanes], l2_bytes=32 << 10)
    found = case.fused(CONV_POOL, machine)
    case.close(found)
    np.testing.assert_array_equal(found, case.fused(CONV_POOL, MACHINES[lanes]))
    np.testing.assert_array_equal(found, case.apart(CONV, POOL, MACHINES[lanes]))


@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.data())
def test_random_convolution_and_pool(data: st.DataObject) -> None:
    draw = data.draw
    window = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    case = pool_case(
        draw(st.integers(1, 6)),
        draw(st.integers(1, 40)),
        (draw(st.integers(8, 30)), draw(st.integers(8, 30))),
        window,
        draw(st.integers(1, 3)),
        draw(st.integers(0, min(window) // 2)),
        draw(st.sampled_from([1, 3])),
        draw(st.integers(1, 2)) if window[0] > 1 else 1,
        1,
        draw(st.integers(1, 2)),
        draw(st.sampled_from(["MaxPool", "AveragePool"])),
        ceil_mode=draw(st.integers(0, 1)),
    )
    if CONV_POOL.refusal(case.region) is not None:
        return  # a convolution of one tap that leaves pixels out
    machine = dataclasses.replace(HOST, l2_bytes=draw(st.sampled_from([4, 64, 512])) << 10)
    found = case.fused(CONV_POOL, machine)
    case.close(found)
    np.testing.assert_array_equal(found, case.apart(CONV, POOL))


# -- a product with scales and a convolution


def scaled_case(
    channels: int, outputs: int, size: tuple[int, ...], residual: bool = False, batch: int = 1, swapped: bool = False
) -> Case:
    feeds = {"X": numbers(0, batch, channels, *size), "S": numbers(1, batch, channels, *(1 for _ in size))}
    names = ["S", "X"] if swapped else ["X", "S"]
    second, more = pointwise("d", channels, outputs, (batch, *size), residual, True)
    return Case([helper.make_node("Mul", names, ["d"], name="mul")], second, {**feeds, **more})


SCALED: dict[str, dict[str, Any]] = {
    "plain": {"channels": 32, "outputs": 16, "size": (14, 14)},
    "residual, swapped": {"channels": 24, "outputs": 24, "size": (9, 11), "residual": True, "swapped": True},
    "ragged": {"channels": 19, "outputs": 37, "size": (7, 9)},
    "few channels": {"channels": 5, "outputs": 6, "size": (6, 6)},
}


@pytest.mark.parametrize("lanes", MACHINES)
@pytest.mark.parametrize("name", SCALED)
def test_scaled_weights(name: str, lanes: int) -> None:
    case = scaled_case(**SCALED[name])
    case.close(case.fused(SCALED_WEIGHTS, MACHINES[lanes]))
    found = case.fused(ELEMENTWISE_POINTWISE, MACHINES[lanes])
    case.close(found)
    np.testing.assert_array_equal(found, case.apart(Generic(), CONV, MACHINES[lanes]))


def test_scaled_weights_of_rows_and_with_a_chosen_tile() -> None:
    case = scaled_case(16, 24, (40,))
    case.close(case.fused(SCALED_WEIGHTS))
    case = scaled_case(16, 24, (8, 8))
    family = SCALED_WEIGHTS.replacing(Generic(), ConvFamily(ConvChoice(tile=(2, 3))))
    assert isinstance(family, ScaledWeights) and family.name == "scaled_weights_2x3"
    case.close(case.fused(family))


def test_chosen_tiles() -> None:
    tiled = ConvFamily(ConvChoice(tile=(3, 2)))
    deep = depthwise_case(24, 40, (12, 12))
    family = DEPTHWISE_POINTWISE.replacing(CONV, tiled)
    assert family is not None and family.name == "depthwise_pointwise_3x2"
    np.testing.assert_array_equal(deep.fused(family), deep.apart(CONV, CONV))
    stem = pool_case(3, 40, (21, 20))
    family = CONV_POOL.replacing(tiled, POOL)
    assert family is not None and family.name == "conv_pool_3x2"
    np.testing.assert_array_equal(stem.fused(family), stem.apart(CONV, POOL))


def test_normalisation_and_activation_before_a_convolution() -> None:
    feeds = {"X": numbers(0, 2, 20, 12, 10), "scale": numbers(1, 1, 20, 1, 1), "shift": numbers(2, 1, 20, 1, 1)}
    first = [
        helper.make_node("Mul", ["X", "scale"], ["m"]),
        helper.make_node("Add", ["m", "shift"], ["a"]),
        helper.make_node("Relu", ["a"], ["d"]),
    ]
    second, more = pointwise("d", 20, 12, (2, 12, 10), True, True)
    case = Case(first, second, {**feeds, **more})
    found = case.fused(ELEMENTWISE_POINTWISE)
    case.close(found)
    np.testing.assert_array_equal(found, case.apart(Generic(), CONV))


# -- what is refused


def test_refusals() -> None:
    deep = depthwise_case(32, 16, (12, 12))
    pool = pool_case(3, 16, (12, 12))
    scaled = scaled_case(8, 8, (6, 6), batch=2)
    alone = deep.halves[0]
    for family in (DEPTHWISE_POINTWISE, ELEMENTWISE_POINTWISE, CONV_POOL, SCALED_WEIGHTS):
        assert parts(alone) is None and family.refusal(alone) is not None
    assert DEPTHWISE_POINTWISE.refusal(pool.region) == "no convolution follows"
    assert ELEMENTWISE_POINTWISE.refusal(pool.region) == "no convolution follows"
    assert SCALED_WEIGHTS.refusal(pool.region) == "no convolution follows"
    assert "Conv" in (ELEMENTWISE_POINTWISE.refusal(deep.region) or "")
    assert CONV_POOL.refusal(deep.region) == "they are not a convolution and a pool"
    assert (
        SCALED_WEIGHTS.refusal(scaled.region) == "only the weights of a pointwise convolution of one image are scaled"
    )
    assert SCALED_WEIGHTS.refusal(deep.region) == "the first is not one product"
    assert DEPTHWISE_POINTWISE.refusal(scaled.region) == "it is not a convolution and something after it"


def test_other_algorithms_are_not_replaced() -> None:
    winograd = WINOGRAD[0]
    assert CONV_POOL.replacing(winograd, POOL) is None and CONV_POOL.replacing(CONV, POOL) is not None
    assert DEPTHWISE_POINTWISE.replacing(CONV, winograd) is None
    assert SCALED_WEIGHTS.replacing(Generic(), winograd) is None
    assert ELEMENTWISE_POINTWISE.replacing(Generic(), winograd) is None


def test_only_the_first_operand_is_joined() -> None:
    feeds = {"X": numbers(0, 1, 8, 6, 6), "w1": numbers(1, 8, 8, 1, 1)}
    relu = helper.make_node("Relu", ["X"], ["d"])
    conv = helper.make_node("Conv", ["d", "w1"], ["f"])
    add = helper.make_node("Add", ["f", "d"], ["y"])
    values = {**feeds, **by_onnxruntime([relu, conv, add], feeds)}
    first, second = (region_of(nodes, values, [nodes[-1].output[0]], ["w1"]) for nodes in ([relu], [conv, add]))
    assert join(first, second) is None  # what lies between them is added once more
    assert join(second, first) is None
    both = join(first, region_of([conv], values, ["f"], ["w1"]))
    assert both is not None and both.inputs == ("X",) and both.outputs == ("f",)
    found = parts(both)
    assert found is not None and found.between == "d" and found.first.ops[0].op_type == "Relu"


# -- Winograd's tiles and a pool


@pytest.mark.parametrize("lanes", MACHINES)
@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("m", [2, 4, 6])
def test_winograd_and_pool(m: int, kind: str, lanes: int) -> None:
    winograd = WinogradFamily(m)
    family = WINOGRAD_POOL.replacing(winograd, POOL)
    assert family is not None and family.name == f"winograd{m}_pool"
    # Sizes that tiles do not divide; an odd one, whose last row no window takes; ragged channels.
    for channels, outputs, size, batch in ((8, 20, (13, 22), 2), (16, 8, (24, 24), 1)):
        case = pool_case(channels, outputs, size, (2, 2), batch=batch, kind=kind)
        found = case.fused(family, MACHINES[lanes])
        expected = case.values[case.output]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))
        np.testing.assert_array_equal(found, case.apart(winograd, POOL, MACHINES[lanes]))


def test_windows_that_tiles_do_not_cover_are_refused() -> None:
    def refusal(**attributes: Any) -> str | None:
        return WINOGRAD_POOL.refusal(pool_case(8, 8, (13, 12), **attributes).region)

    assert refusal(window=(2, 2)) is None
    several = "windows other than 2x2 side by side lie in several tiles"
    assert refusal(window=(3, 3)) == several
    assert refusal(window=(2, 2), border=1) == several
    assert refusal(window=(2, 2), step=1) == several
    assert refusal(window=(2, 2), ceil_mode=1) == several
    assert refusal(window=(2, 2), stride=2) is not None
    assert WINOGRAD_POOL.replacing(WinogradFamily(3), POOL) is None
    assert WINOGRAD_POOL.replacing(CONV, POOL) is None
