"""Calibration: statistics equal those of numpy on what ONNX Runtime computes, in one pass over the data."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_nets import batches, chain, parsed

import nestc
from nestc.graph.bind import bind
from nestc.quant.observe import BINS, _State, observed, with_outputs
from nestc.quant.prepare import prepare


def counted(arrays: list[np.ndarray]) -> _State:
    state = _State(None)
    for array in arrays:
        state.add(array)
    return state


def ordered(arrays: list[np.ndarray], width: float, first: int, bins: int) -> np.ndarray:
    """The counts that bins of this place and width must have."""
    index = np.floor(np.concatenate(arrays).astype(np.float64) / width).astype(np.int64) - first
    assert index.min() >= 0 and index.max() < bins
    return np.bincount(index, minlength=bins)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.floats(-3, 3), st.integers(1, 3000)),
        min_size=1,
        max_size=6,
    )
)
def test_a_growing_histogram_counts_as_if_its_last_bins_had_been_known(parts) -> None:
    arrays = [
        (2.0**spread * (np.random.default_rng(seed).standard_normal(size) + shift)).astype(np.float32)
        for seed, spread, shift, size in parts
    ]
    stats = counted(arrays).stats()
    histogram = stats.histogram
    everything = np.concatenate(arrays)
    assert histogram.total == everything.size == stats.count
    assert (stats.min, stats.max) == (everything.min(), everything.max())
    assert np.log2(histogram.width) == int(np.log2(histogram.width)) and len(histogram.counts) <= BINS
    np.testing.assert_array_equal(
        histogram.counts, ordered(arrays, histogram.width, histogram.first, len(histogram.counts))
    )


def test_a_histogram_spans_at_least_half_of_its_bins() -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal(5000).astype(np.float32) * 3.0**i for i in range(8)]
    assert len(counted(arrays).stats().histogram.counts) >= BINS // 2 - 2


@pytest.mark.parametrize("value", [0.0, 3.25, -1e-20, 1e30, -7e-38])
def test_a_constant_tensor(value: float) -> None:
    stats = counted([np.full(10, value, np.float32)] * 2).stats()
    assert stats.constant and stats.min == np.float32(value)
    assert stats.histogram.total == 20 and np.count_nonzero(stats.histogram.counts) == 1


def test_percentiles_are_those_of_the_values_to_a_bin() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    stats = counted([values]).stats()
    for percent in (0.1, 5, 50, 99, 99.9):
        assert stats.percentile(percent) == pytest.approx(np.percentile(values, percent), abs=2 * stats.histogram.width)
    assert stats.percentile(0) == stats.min and stats.percentile(100) == stats.max


@pytest.mark.parametrize("fixed", [False, True])
def test_statistics_are_those_of_what_onnxruntime_computes(fixed: bool) -> None:
    model = bind(chain(), {"x": [1, 3, 8, 8]}) if fixed else chain()
    data = batches(5)
    profile = nestc.calibrate(model, data, "mse")
    prepared = prepare(model)
    assert profile.model_hash == prepared.hash and profile.samples == 20 and profile.method == "mse"
    assert profile.nonfinite == ()
    names = [value.name for value in observed(prepared)]
    assert list(profile.tensors) == names
    proto = ir.to_proto(with_outputs(chain_prepared(), [name for name in names if name != "x"]).ir)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    wanted = [name for name in names if name != "x"]
    seen = [dict(zip(wanted, session.run(wanted, batch), strict=True), **batch) for batch in data]
    for name, stats in profile.tensors.items():
        values = np.concatenate([each[name] for each in seen])
        axis = stats.channel_axis
        assert axis is not None and stats.count == values.size == stats.histogram.total
        others = tuple(i for i in range(values.ndim) if i != axis)
        tolerance = {"rtol": 1e-4, "atol": 1e-4}
        np.testing.assert_allclose(stats.channel_min, values.min(others), **tolerance)
        np.testing.assert_allclose(stats.channel_max, values.max(others), **tolerance)
        assert (stats.min, stats.max) == (stats.channel_min.min(), stats.channel_max.max())


def chain_prepared() -> nestc.Model:
    return prepare(chain())


def test_what_is_computed_inside_a_product_is_not_observed() -> None:
    prepared = chain_prepared()
    ops = [node.op_type for node in prepared.ir.graph]
    assert ops[:2] == ["Conv", "Relu"] and "BatchNormalization" not in ops
    conv, relu = list(prepared.ir.graph)[:2]
    names = [value.name for value in observed(prepared)]
    assert conv.outputs[0].name not in names and relu.outputs[0].name in names and names[0] == "x"


def test_preparing_is_deterministic_and_names_every_node() -> None:
    one, other = chain_prepared(), chain_prepared()
    assert one.hash == other.hash
    names = [node.name for node in one.ir.graph]
    assert all(names) and len(set(names)) == len(names)


LOGS = """
<ir_version: 8, opset_import: ["": 17]>
logs (float[N, 4] x) => (float[N, 4] y)
<float[4, 4] w>
{
  a = MatMul (x, w)
  l = Log (a)
  y = MatMul (l, w)
}
"""


def test_values_that_are_not_numbers_are_counted_and_their_node_is_named() -> None:
    model = parsed(LOGS, w=np.eye(4, dtype=np.float32))
    data = [
        {"x": np.array([[1, 2, 3, 4]], np.float32)},
        {"x": np.array([[-1, 2, 0, 4]], np.float32)},
        {"x": np.array([[1, -2, 3, -4]], np.float32)},
    ]
    profile = nestc.calibrate(model, data)
    [found] = profile.nonfinite
    log = next(node for node in prepare(model).ir.graph if node.op_type == "Log")
    assert (found.node, found.tensor, found.nan, found.inf) == (log.name, log.outputs[0].name, 3, 1)
    assert str(found) == f"node {log.name!r} makes 3 NaN and 1 infinite values in {log.outputs[0].name!r}"
    stats = profile.tensors[log.outputs[0].name or ""]
    assert (stats.count, stats.nan, stats.inf, stats.histogram.total) == (12, 3, 1, 8)
    assert (stats.min, stats.max) == (0.0, pytest.approx(np.log(4), rel=1e-6))
    assert np.isfinite(stats.channel_min).all() and np.isfinite(stats.channel_max).all()


def test_batches_are_read_once_and_one_at_a_time() -> None:
    alive: list[int] = []

    def stream():
        for index, batch in enumerate(batches(6, size=1)):
            alive.append(index)
            yield batch

    told: list[str] = []
    profile = nestc.calibrate(chain(), stream(), "minmax", progress=lambda what, fraction: told.append(what))
    assert profile.samples == 6 and alive == list(range(6))
    assert len(told) == 6 and all("samples/s" in what for what in told)


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ([], nestc.DataError, "no calibration data"),
        (iter(()), nestc.DataError, "no calibration data"),
        ({"x": np.zeros((1, 3, 8, 8), np.float32)}, nestc.DataError, "put a single batch into a list"),
        ([np.zeros((1, 3, 8, 8), np.float32)], nestc.DataError, "is no {input: array}"),
        ([{"image": np.zeros((1, 3, 8, 8), np.float32)}], nestc.ShapeError, "'image', which is no input"),
        ([{}], nestc.ShapeError, "lacks input 'x'"),
        ([{"x": np.zeros((1, 3, 8, 8))}], nestc.ShapeError, "takes float32, not float64"),
        ([{"x": np.zeros((1, 8, 8), np.float32)}], nestc.ShapeError, r"takes shape \(N, 3, 8, 8\), not \(1, 8, 8\)"),
        ([{"x": np.zeros((1, 4, 8, 8), np.float32)}], nestc.ShapeError, r"not \(1, 4, 8, 8\)"),
        ([{"x": np.zeros((0, 3, 8, 8), np.float32)}], nestc.DataError, "is empty"),
        ([{"x": np.full((1, 3, 8, 8), np.nan, np.float32)}], nestc.DataError, "192 NaN and 0 infinite"),
        ([{"x": np.full((1, 3, 8, 8), np.inf, np.float32)}], nestc.DataError, "0 NaN and 192 infinite"),
    ],
)
def test_data_that_do_not_fit(data, error: type[nestc.Error], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        nestc.calibrate(chain(), data)
    assert "\n" not in str(caught.value)


def test_a_later_batch_that_does_not_fit_is_named() -> None:
    bad = {"x": np.zeros((1, 3, 9, 8), np.float32)}
    with pytest.raises(nestc.ShapeError, match="batch 2 of the calibration data: input 'x'"):
        nestc.calibrate(chain(), [*batches(2), bad])


def test_a_batch_that_a_fixed_batch_does_not_divide() -> None:
    fixed = bind(chain(), {"x": [2, 3, 8, 8]})
    with pytest.raises(nestc.ShapeError, match=r"takes shape \(2, 3, 8, 8\), not \(3, 3, 8, 8\)"):
        nestc.calibrate(fixed, batches(1, size=3))
    assert nestc.calibrate(fixed, batches(2, size=4)).samples == 8


@pytest.mark.parametrize("method", ["entrpy", "percentile:", "percentile:12", "percentile:high", "mse:3", ""])
def test_unknown_methods(method: str) -> None:
    with pytest.raises(nestc.Error, match="method") as caught:
        nestc.calibrate(chain(), batches(1), method)
    assert "\n" not in str(caught.value)
