"""Models whose sizes are known only at the call: compiled for each, kept, and dropped when there are too many."""

from __future__ import annotations

import threading

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import nestc
from nestc.driver import compile
from nestc.errors import ShapeError
from nestc.graph.shape_operands import shape_operands
from nestc.specialise import CAPACITY, Specialised

from .test_build import model


@pytest.fixture
def doubled() -> onnx.ModelProto:
    """x + x, for x of shape [batch, 3]."""
    return model(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [("x", TensorProto.FLOAT, ["batch", 3])],
        [("y", TensorProto.FLOAT, ["batch", 3])],
    )


@pytest.fixture
def reshaped() -> onnx.ModelProto:
    """x of 12 elements in the shape that an input gives."""
    return model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [("x", TensorProto.FLOAT, [12]), ("shape", TensorProto.INT64, [2])],
        [("y", TensorProto.FLOAT, ["a", "b"])],
    )


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_each_shape_is_compiled_once(doubled: onnx.ModelProto) -> None:
    exe = compile(doubled)
    assert isinstance(exe, Specialised)
    for batch in (1, 4, 1, 4):
        np.testing.assert_array_equal(exe(ones(batch, 3)), 2 * ones(batch, 3))
    assert exe.specialisations == 2


def test_the_least_used_is_dropped(doubled: onnx.ModelProto) -> None:
    exe = compile(doubled)
    for batch in range(1, CAPACITY + 3):
        assert exe(ones(batch, 3)).shape == (batch, 3)
    assert exe.specialisations == CAPACITY


def test_a_bound_size_may_still_come_otherwise(doubled: onnx.ModelProto) -> None:
    exe = compile(doubled, dims={"batch": 2})
    assert isinstance(exe, nestc.Executable)
    assert exe(ones(2, 3)).shape == (2, 3)
    assert exe(ones(5, 3)).shape == (5, 3)
    with pytest.raises(ShapeError):
        exe(ones(5, 4))


def test_values_that_shapes_depend_on_are_part_of_the_specialisation(reshaped: onnx.ModelProto) -> None:
    exe = compile(reshaped)
    x = np.arange(12, dtype=np.float32)
    for shape in ([3, 4], [2, 6], [-1, 12]):
        np.testing.assert_array_equal(exe(x, np.array(shape)), x.reshape(shape))
    assert exe.run({"x": x, "shape": np.array([4, 3])})["y"].shape == (4, 3)
    assert exe.fallback_ops == {}


def test_only_inputs_that_shapes_depend_on_are_operands() -> None:
    proto = model(
        [
            helper.make_node("Cast", ["n"], ["wide"], to=TensorProto.INT64),
            helper.make_node("Tile", ["x", "wide"], ["t"]),
            helper.make_node("Shape", ["z"], ["zs"]),
            helper.make_node("Reshape", ["t", "zs"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, [3]), ("n", TensorProto.INT32, [1]), ("z", TensorProto.FLOAT, [2, 3])],
        [("y", TensorProto.FLOAT, [2, 3])],
    )
    assert shape_operands(nestc.load(proto)) == ("n",)
    y = compile(proto)(ones(3), np.array([2], np.int32), ones(2, 3))
    assert y.shape == (2, 3)


def test_data_is_never_an_operand() -> None:
    proto = model(
        [
            helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
            helper.make_node("Cast", ["m"], ["k"], to=TensorProto.INT64),
            helper.make_node("Range", ["zero", "k", "one"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, [10, 10])],
        [("y", TensorProto.INT64, ["n"])],
        [("zero", np.array(0)), ("one", np.array(1))],
    )
    exe = compile(proto)
    assert isinstance(exe, nestc.Executable)
    assert exe(3 * ones(10, 10)).tolist() == [0, 1, 2]


def test_what_is_open_cannot_be_saved(doubled: onnx.ModelProto, reshaped: onnx.ModelProto, tmp_path) -> None:
    with pytest.raises(ShapeError, match="--dim batch=SIZE"):
        compile(doubled).save(tmp_path / "m.nest")
    with pytest.raises(ShapeError, match="'shape'"):
        compile(reshaped).save(tmp_path / "m.nest")
    assert list(tmp_path.iterdir()) == []


def test_before_the_first_call_there_is_no_plan(doubled: onnx.ModelProto) -> None:
    exe = compile(doubled)
    with pytest.raises(ShapeError, match="batch"):
        _ = exe.plan
    exe(ones(1, 3))
    assert len(exe.plan.regions) == 1
    assert exe.timeline()


def test_requests_of_several_shapes_are_in_flight(doubled: onnx.ModelProto, tmp_path) -> None:
    exe = compile(doubled)
    items = [ones(1, 3), [ones(1, 3)], ones(2, 3), {"x": ones(2, 3)}, ones(1, 3)]
    first, second, third, fourth, fifth = exe.map(items, in_flight=2)
    np.testing.assert_array_equal(first, exe(ones(1, 3)))
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(third, exe(ones(2, 3)))
    assert list(fourth) == list(exe.outputs)
    np.testing.assert_array_equal(fifth, first)
    assert exe.specialisations == 2
    np.testing.assert_array_equal(exe.submit(ones(2, 3)).result(), third)
    np.testing.assert_array_equal(*exe.submit({"x": ones(2, 3)}).result().values(), third)
    assert exe.throughput()["kind"] == "measured" and len(exe.energy()) == 1
    exe.trace(tmp_path / "t.json")
    results = exe.map([ones(1, 3), ones(1, 4)])
    np.testing.assert_array_equal(next(results), first)
    with pytest.raises(ShapeError, match="batch, 3"):
        next(results)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"z": ones(1, 3)}, "no input 'z'"),
        ({}, "'x' is missing"),
        ({"x": ones(1, 4)}, "(batch, 3)"),
        ({"x": ones(3)}, "(batch, 3)"),
        ({"x": np.ones((1, 3))}, "float64"),
    ],
)
def test_wrong_inputs_are_refused(doubled: onnx.ModelProto, inputs: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(ShapeError) as caught:
        compile(doubled).run(inputs)
    assert said in str(caught.value)


def test_several_threads_share_the_specialisations(doubled: onnx.ModelProto) -> None:
    exe = compile(doubled)
    wrong: list[int] = []

    def work(batch: int) -> None:
        for _ in range(5):
            if not np.array_equal(exe(ones(batch, 3)), 2 * ones(batch, 3)):
                wrong.append(batch)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in (1, 2, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert exe.specialisations == 2


def test_calls_like_the_one_before_take_the_same_way(doubled: onnx.ModelProto, reshaped: onnx.ModelProto) -> None:
    exe = compile(doubled)
    for value in (1, 2, 3):
        np.testing.assert_array_equal(exe(value * ones(2, 3)), 2 * value * ones(2, 3))
    with pytest.raises(ShapeError, match="dtype"):
        exe(np.ones((2, 3)))
    with pytest.raises(ShapeError, match="2 were given"):
        exe(ones(2, 3), ones(2, 3))
    np.testing.assert_array_equal(exe(ones(1, 3)), 2 * ones(1, 3))
    exe.close()
    assert exe.specialisations == 0
    np.testing.assert_array_equal(exe(ones(1, 3)), 2 * ones(1, 3))
    assert exe.specialisations == 1
    by_value = compile(reshaped)  # equal shapes, other values
    x = np.arange(12, dtype=np.float32)
    assert by_value(x, np.array([3, 4])).shape == (3, 4)
    assert by_value(x, np.array([6, 2])).shape == (6, 2)
