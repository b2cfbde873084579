import time

import numpy as np
import onnx
import pytest

from nestc.errors import Error
from nestc.measure import bench, difference, interleave, pinned, usable_cores

INPUTS = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


class Doubler:
    """An executable as `bench` needs it."""

    def run(self, inputs):
        return {"y": inputs["x"] * np.float32(2)}

    def timeline(self):
        return [{"device": "cpu", "region": "cpu_0", "start_us": 0.0, "end_us": 1.0, "kind": "measured"}]


class Simulated(Doubler):
    """Says that one second of each run is modelled, and half a second before it measured."""

    def timeline(self):
        return [
            {"device": "cpu", "region": "cpu_0", "start_us": 0.0, "end_us": 5e5, "kind": "measured"},
            {"device": "npu", "region": "npu_1", "start_us": 5e5, "end_us": 1.5e6, "kind": "modelled"},
        ]


@pytest.fixture
def model(tmp_path):
    from netbuilder import NetBuilder, save

    net = NetBuilder("double")
    x = net.input("x", (2, 3), dims=("N", 3))
    net.output(net.add(x, x), "y", dims=("N", 3))
    path = tmp_path / "double.onnx"
    save(net.model(), path)
    return path


def test_bench_alone_has_the_fields_of_the_contract() -> None:
    result = bench(Doubler(), INPUTS, runs=3, load_ms=1.5, name="double")
    assert set(result) == {
        "model", "threads", "nestc", "vs", "max_abs_diff", "max_rel_diff", "peak_rss_mb", "load_ms",
    }  # fmt: skip
    assert set(result["nestc"]) == {"median_ms", "min_ms", "runs"}
    assert result["vs"] == {} and result["max_rel_diff"] is None and result["load_ms"] == 1.5
    assert 0 < result["nestc"]["min_ms"] <= result["nestc"]["median_ms"]


def test_bench_against_onnxruntime(model) -> None:
    result = bench(Doubler(), INPUTS, model, vs=["onnxruntime"], runs=3)
    peer = result["vs"]["onnxruntime"]
    assert peer["ratio"] == pytest.approx(peer["median_ms"] / result["nestc"]["median_ms"])
    assert result["max_abs_diff"] == 0 and result["max_rel_diff"] == 0
    assert result["model"] == "double.onnx"


def test_modelled_time_is_named_and_not_compared(model) -> None:
    result = bench(Simulated(), INPUTS, model, vs=["onnxruntime"], runs=3)
    assert result["nestc"] == {"median_ms": 1500.0, "min_ms": 1500.0, "runs": 3, "modelled_ms": {"npu": 1000.0}}
    peer = result["vs"]["onnxruntime"]
    assert peer["ratio"] is None and peer["median_ms"] > 0 and result["max_abs_diff"] == 0
    assert bench(Simulated(), INPUTS, runs=2)["nestc"]["runs"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vs": ["fastest"]}, "nothing called 'fastest'"),
        ({"threads": 4096}, "may use only"),
        ({"runs": 0}, "at least 1"),
    ],
)
def test_bench_refuses(model, arguments, message) -> None:
    with pytest.raises(Error, match=message):
        bench(Doubler(), INPUTS, model, **arguments)


def test_bench_of_a_bundle_needs_the_model_to_compare() -> None:
    with pytest.raises(Error, match="needs the ONNX file"):
        bench(Doubler(), INPUTS, None, vs=["onnxruntime"])


def test_a_missing_peer_names_the_extra(model, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Error, match=r"onnxruntime is not installed; pip install 'nestc\[bench\]'"):
        bench(Doubler(), INPUTS, model, vs=["onnxruntime"])


def test_a_peer_that_refuses_the_model_is_named(tmp_path) -> None:
    broken = tmp_path / "broken.onnx"
    node = onnx.helper.make_node("NoSuchOp", ["x"], ["y"])
    info = [onnx.helper.make_tensor_value_info(name, 1, [2, 3]) for name in "xy"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", info[:1], info[1:])), str(broken))
    with pytest.raises(Error, match=r"onnxruntime cannot run broken\.onnx"):
        bench(Doubler(), INPUTS, broken, vs=["onnxruntime"])


def test_engines_take_turns() -> None:
    calls: list[str] = []

    def engine(name: str):
        def run() -> None:
            calls.append(name)
            time.sleep(0.006)

        return run

    timings = interleave({"a": engine("a"), "b": engine("b")}, rounds=2)
    # Two runs each to find the block's length, then blocks of a warm-up and one timed run, the order rotating.
    assert "".join(calls) == "aabb" + "aabb" + "bbaa"
    assert all(len(timing.samples_ms) == 2 and timing.min_ms >= 6 for timing in timings.values())


def test_pinned_restores_the_cores() -> None:
    before = usable_cores()
    with pinned(1) as cores:
        assert usable_cores() == list(cores) == before[-1:]
    assert usable_cores() == before


def test_difference_is_relative_to_the_output_scale() -> None:
    found = difference([np.array([0.0, 100.0])], [np.array([1.0, 100.0])])
    assert (found.max_abs, found.max_rel) == (1.0, 0.01)
    assert difference([np.array([np.inf, 1.0])], [np.array([np.inf, 1.0])]).max_rel == 0
    assert difference([np.array([np.inf, 1.0])], [np.array([1.0, 1.0])]).max_rel == float("inf")
    assert difference([np.array([1.0])], [np.array([np.nan])]).max_rel == float("inf")
    assert difference([np.zeros(2)], [np.zeros(3)]).max_abs == float("inf")
