"""The generic lowering against numpy and ONNX Runtime, as machine code and in the interpreter, over random shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.kernels.api import PLAIN, Layout
from nestc.kernels.generic import Generic, convert
from nestc.kernels.testing import Array, evaluate, host_machine, region_of, run_lowered, type_of

MACHINE = host_machine()
GENERIC = Generic()
QUICK = settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))


def check(
    nodes: Sequence[onnx.NodeProto],
    feeds: dict[str, Array],
    outputs: Sequence[str],
    layouts: dict[str, Layout] | None = None,
    constants: Sequence[str] = (),
    rtol: float = 2e-5,
    interpret: bool = True,
    atol: float = 0.0,
) -> None:
    """Lower and run `nodes`, and compare every output with the reference evaluator."""
    values = evaluate(nodes, feeds)
    region = region_of(nodes, values, outputs, constants)
    assert GENERIC.refusal(region) is None
    lowered = GENERIC.lower(region, MACHINE, layouts or {})
    small = interpret and sum(values[n].size for n in outputs) <= 400
    for jit in (True, False) if small else (True,):
        results = run_lowered(region, lowered, values, MACHINE, layouts, jit=jit)
        for name in outputs:
            want = values[name]
            if want.dtype.kind == "f":
                scale = max(1e-6, float(np.abs(want[np.isfinite(want)]).max(initial=0)))
                np.testing.assert_allclose(results[name], want, rtol=rtol, atol=max(atol, rtol * scale))
            else:
                np.testing.assert_array_equal(results[name], want)


def normal(shape: Sequence[int], seed: int = 0) -> Array:
    """Repeatable float32 data."""
    return np.random.default_rng(seed).normal(size=tuple(shape)).astype(np.float32)


shapes = st.lists(st.integers(1, 21), min_size=1, max_size=4)
node = helper.make_node


@QUICK
@given(shapes, st.data())
def test_elementwise_broadcast(shape: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(shape)))
    other = [1 if data.draw(st.booleans()) else n for n in shape[cut:]]
    nodes = [node("Add", ["x", "y"], ["s"]), node("Sigmoid", ["s"], ["g"]), node("Mul", ["x", "g"], ["o"])]
    check(nodes, {"x": normal(shape), "y": normal(other, 1)}, ["o", "s"])


@pytest.mark.parametrize("shape", [(70_001,), (3, 50_003), (40, 1000), (2, 3, 9000), (5, 4, 3, 1001)])
def test_large_elementwise_is_split_without_gaps(shape: tuple[int, ...]) -> None:
    x, y = normal(shape), normal((shape[0], *(1,) * (len(shape) - 1)), 1)
    check([node("Mul", ["x", "y"], ["m"]), node("Relu", ["m"], ["o"])], {"x": x, "y": y}, ["o"], interpret=False)


@QUICK
@given(shapes, st.randoms(use_true_random=False))
def test_transpose(shape: list[int], random: object) -> None:
    perm = list(range(len(shape)))
    random.shuffle(perm)  # type: ignore[attr-defined]
    check([node("Transpose", ["x"], ["o"], perm=perm)], {"x": normal(shape)}, ["o"])


@pytest.mark.parametrize(
    "shape", [(257, 130), (16, 16), (33, 47), (8, 1000), (64, 128, 3), (2, 100, 99), (2, 3, 70, 90)]
)
def test_large_transpose(shape: tuple[int, ...]) -> None:
    rank = len(shape)
    perm = [0, 2, 1] if rank == 3 else [0, 3, 1, 2] if rank == 4 else [1, 0]
    for dtype in (np.float32, np.uint8, np.int64):
        x = (normal(shape) * 50).astype(dtype)
        check([node("Transpose", ["x"], ["o"], perm=perm)], {"x": x}, ["o"], interpret=False)


@QUICK
@given(
    shapes,
    st.sampled_from(["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceLogSumExp", "ReduceProd"]),
    st.booleans(),
    st.data(),
)
def test_reduce(shape: list[int], kind: str, keep: bool, data: st.DataObject) -> None:
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    feeds = {"x": normal(shape), "axes": np.array(axes, np.int64)}
    nodes = [node(kind, ["x", "axes"], ["o"], keepdims=int(keep))]
    # A sum near zero has the rounding of its terms, in ours and in the reference.
    atol = 0.0
    if kind in ("ReduceSum", "ReduceMean"):
        atol = 1e-6 * float(evaluate(nodes, {**feeds, "x": np.abs(feeds["x"])})["o"].max())
    check(nodes, feeds, ["o"], rtol=1e-4, atol=atol)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 1000), [1]),
        ((1000, 3), [0]),
        ((100_003,), [0]),
        ((64, 65, 66), [1]),
        ((64, 65, 66), [0, 2]),
        ((500, 700), [1]),
        ((7, 5000, 9), [1]),
        ((2, 3, 40, 50), [2, 3]),
    ],
)
@pytest.mark.parametrize("kind", ["ReduceSum", "ReduceMax", "ReduceMean"])
def test_large_reduce(shape: tuple[int, ...], axes: list[int], kind: str) -> None:
    feeds = {"x": normal(shape), "axes": np.array(axes, np.int64)}
    nodes = [node(kind, ["x", "axes"], ["r"], keepdims=1), node("Tanh", ["r"], ["o"])]
    check(nodes, feeds, ["o"], rtol=1e-4, interpret=False)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "float64", "float16"])
def test_reduce_dtypes(dtype: str) -> None:
    for axes in ([0], [1], [0, 1]):
        x = (np.arange(37 * 45).reshape(37, 45) % 7).astype(dtype)
        feeds = {"x": x, "axes": np.array(axes, np.int64)}
        check([node("ReduceMax", ["x", "axes"], ["o"])], feeds, ["o"])
        if dtype not in ("uint8", "float16"):
            check([node("ReduceSum", ["x", "axes"], ["o"])], feeds, ["o"])


def test_nan_passes_through_extremes() -> None:
    x = normal((6, 40))
    x[1, 7] = x[3, 39] = x[4, 0] = np.nan
    for kind in ("ReduceMax", "ReduceMin"):
        for axis in (0, 1):
            feeds = {"x": x, "axes": np.array([axis], np.int64)}
            check([node(kind, ["x", "axes"], ["o"])], feeds, ["o"])
    check([node("Relu", ["x"], ["r"]), node("Max", ["r", "x"], ["o"])], {"x": x}, ["r", "o"])


@QUICK
@given(shapes, st.data())
def test_slice_pad_concat(shape: list[int], data: st.DataObject) -> None:
    rank = len(shape)
    starts = [data.draw(st.integers(-n, n - 1)) for n in shape]
    steps = [data.draw(st.sampled_from([1, 2, -1, -3])) for _ in shape]
    ends = [2**60 if s > 0 else -(2**60) for s in steps]
    pads = [data.draw(st.integers(0, 3)) for _ in range(2 * rank)]
    axis = data.draw(st.integers(0, rank - 1))
    nodes = [
        node("Slice", ["x", "starts", "ends", "axes", "steps"], ["s"]),
        node("Pad", ["s", "pads", "value"], ["p"]),
        node("Concat", ["p", "p", "s2"], ["c"], axis=axis),
        node("Abs", ["c"], ["o"]),
    ]
    x = normal(shape)
    feeds = {
        "x": x,
        "starts": np.array(starts, np.int64),
        "ends": np.array(ends, np.int64),
        "axes": np.arange(rank),
        "steps": np.array(steps, np.int64),
        "pads": np.array(pads, np.int64),
        "value": np.array(1.5, np.float32),
    }
    padded = evaluate(nodes[:2], feeds)["p"]
    feeds["s2"] = np.ones([5 if d == axis else n for d, n in enumerate(padded.shape)], np.float32)
    check(nodes, feeds, ["o"])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_concat_split_large(axis: int) -> None:
    x, y = normal((12, 40, 70)), normal((12, 40, 70), 1)
    nodes = [
        node("Concat", ["x", "y"], ["c"], axis=axis),
        node("Relu", ["c"], ["r"]),
        node("Split", ["r"], ["a", "b"], axis=axis, num_outputs=2),
    ]
    check(nodes, {"x": x, "y": y}, ["r", "a", "b"], interpret=False)
    check(nodes, {"x": x, "y": y}, ["a", "b"], interpret=False)


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_pad_modes(mode: str) -> None:
    feeds = {"x": normal((3, 9, 20)), "pads": np.array([0, 4, 9, 0, 5, 17], np.int64)}
    check([node("Pad", ["x", "pads"], ["o"], mode=mode)], feeds, ["o"])


@QUICK
@given(st.lists(st.integers(1, 12), min_size=2, max_size=3), st.data())
def test_gather(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    count = data.draw(st.lists(st.integers(1, 9), max_size=2))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    indices = rng.integers(-shape[axis], shape[axis], count)
    check([node("Gather", ["x", "i"], ["o"], axis=axis)], {"x": normal(shape), "i": np.array(indices)}, ["o"])
    many = rng.integers(-shape[axis], shape[axis], [7 if d == axis else n for d, n in enumerate(shape)])
    check([node("GatherElements", ["x", "i"], ["o"], axis=axis)], {"x": normal(shape), "i": many}, ["o"])


def test_gather_never_reads_outside() -> None:
    x, i = normal((4, 8)), np.array([0, 3, 99, -77], np.int64)
    region = region_of([node("Gather", ["x", "i"], ["o"])], {"x": x, "i": i, "o": normal((4, 8))}, ["o"])
    got = run_lowered(region, GENERIC.lower(region, MACHINE, {}), {"x": x, "i": i}, MACHINE)["o"]
    np.testing.assert_array_equal(got[:2], x[[0, 3]])
    assert np.isfinite(got).all()


@QUICK
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9))
def test_channel_shuffle_and_blocks(n: int, c: int, h: int, w: int) -> None:
    nodes = [
        node("Reshape", ["x", "s1"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["b", "s2"], ["o"]),
    ]
    x = normal((n, 2 * c, h, w))
    feeds = {"x": x, "s1": np.array([n, 2, c, h, w]), "s2": np.array(x.shape)}
    check(nodes, feeds, ["o"])
    y = normal((n, 4 * c, h, w))
    for mode in ("DCR", "CRD"):
        check([node("DepthToSpace", ["x"], ["o"], blocksize=2, mode=mode)], {"x": y}, ["o"])
    z = normal((n, c, 2 * h, 2 * w))
    check([node("SpaceToDepth", ["x"], ["o"], blocksize=2)], {"x": z}, ["o"])


@QUICK
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.sampled_from([8, 16]))
def test_convert_layouts(n: int, c: int, h: int, w: int, block: int) -> None:
    x = normal((n, c, h, w))
    region = region_of([node("Identity", ["source"], ["target"])], {"source": x, "target": x}, ["target"])
    for source, target in ((PLAIN, Layout(block)), (Layout(block), PLAIN), (Layout(8), Layout(16))):
        layouts = {"source": source, "target": target}
        lowered = convert(type_of(x), source, target, MACHINE)
        for jit in (True, False):
            got = run_lowered(region, lowered, {"source": x}, MACHINE, layouts, jit=jit)
            np.testing.assert_array_equal(got["target"], x)


@pytest.mark.parametrize("channels", [8, 20, 24])
def test_blocked_elementwise(channels: int) -> None:
    x, y, b = normal((2, channels, 7, 9)), normal((2, channels, 7, 9), 1), normal((channels, 1, 1), 2)
    nodes = [node("Add", ["x", "y"], ["s"]), node("Mul", ["s", "b"], ["m"]), node("Exp", ["m"], ["o"])]
    values = evaluate(nodes, {"x": x, "y": y, "b": b})
    region = region_of(nodes, values, ["o"], ["b"])
    layouts = dict(GENERIC.layouts(region, MACHINE, {"x": Layout(8), "y": PLAIN}))
    assert layouts == {"x": Layout(8), "y": Layout(8), "o": Layout(8)}
    check(nodes, {"x": x, "y": y, "b": b}, ["o"], layouts, ["b"])


@pytest.mark.parametrize("channels", [16, 19])
def test_blocked_inputs_of_other_operators(channels: int) -> None:
    x = normal((2, channels, 6, 7))
    spatial = np.array([2, 3], np.int64)
    cases = [
        ([node("ReduceMean", ["x", "a"], ["o"], keepdims=0)], {"a": spatial}),
        ([node("ReduceMax", ["x", "a"], ["o"], keepdims=1)], {"a": spatial}),
        ([node("Transpose", ["x"], ["o"], perm=[0, 2, 3, 1])], {}),
        ([node("Slice", ["x", "s", "e", "b"], ["o"])], {"s": spatial, "e": spatial + 3, "b": spatial}),
        ([node("Reshape", ["x", "r"], ["t"]), node("Neg", ["t"], ["o"])], {"r": np.array([2, -1, 7])}),
    ]
    for nodes, operands in cases:
        feeds = {"x": x, **operands}
        region = region_of(nodes, evaluate(nodes, feeds), ["o"])
        layouts = dict(GENERIC.layouts(region, MACHINE, {"x": Layout(8)}))
        check(nodes, feeds, ["o"], layouts)
        check(nodes, feeds, ["o"], {**layouts, "x": Layout(8)})


def test_blocked_concat() -> None:
    feeds = {"x": normal((1, 8, 5, 5)), "y": normal((1, 16, 5, 5), 1)}
    nodes = [node("Concat", ["x", "y"], ["c"], axis=1), node("Relu", ["c"], ["o"])]
    region = region_of(nodes, evaluate(nodes, feeds), ["o"])
    layouts = dict(GENERIC.layouts(region, MACHINE, {"x": Layout(8), "y": Layout(8)}))
    assert set(layouts.values()) == {Layout(8)}
    check(nodes, feeds, ["o"], layouts)


@QUICK
@given(st.lists(st.integers(1, 13), min_size=1, max_size=3), st.data())
def test_top_k_and_arg(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    k = data.draw(st.integers(1, min(5, shape[axis])))
    x = np.random.default_rng(k).permutation(int(np.prod(shape))).reshape(shape).astype(np.float32)
    largest = data.draw(st.integers(0, 1))
    nodes = [node("TopK", ["x", "k"], ["v", "i"], axis=axis, largest=largest)]
    check(nodes, {"x": x, "k": np.array([k], np.int64)}, ["v", "i"])
    ties = (x % 3).astype(np.float32)
    for kind in ("ArgMax", "ArgMin"):
        check([node(kind, ["x"], ["o"], axis=axis, select_last_index=largest)], {"x": ties}, ["o"])


def test_empty_tensors() -> None:
    x = np.zeros((3, 0, 4), np.float32)
    check([node("Relu", ["x"], ["o"])], {"x": x}, ["o"])
    check([node("Concat", ["x", "y"], ["o"], axis=1)], {"x": x, "y": normal((3, 5, 4))}, ["o"])
    check([node("ReduceSum", ["x", "a"], ["o"])], {"x": x, "a": np.array([1], np.int64)}, ["o"])


def test_refusal_says_why() -> None:
    values = {"x": normal((3,)), "s": np.array([3], np.int64), "o": normal((3,))}
    region = region_of([node("NonZero", ["x"], ["o"])], values, ["o"])
    assert GENERIC.refusal(region) == "NonZero (node 'NonZero') has no generated code"
