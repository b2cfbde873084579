"""The pipeline: stages, claims in order of preference, decomposition, the plan, and what nobody takes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import nestc
from nestc.driver import build, compile, explain, with_fallbacks
from nestc.errors import PlanError, ShapeError, UnsupportedOp
from nestc.partition.plan import Plan
from nestc.targets.api import Constraint

from .conftest import Only


def model(nodes, inputs, outputs, weights=()) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def two_matmuls() -> onnx.ModelProto:
    """sum(x @ a, axis=1) @ b, on [2, 4]."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("ReduceSum", ["h", "one"], ["s"], name="sum", keepdims=1),
        helper.make_node("MatMul", ["s", "b"], ["y"], name="second"),
    ]
    generator = np.random.default_rng(0)
    shapes = {"a": (4, 4), "b": (1, 4)}
    weights = [(name, generator.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()]
    weights.append(("one", np.array([1])))
    return model(nodes, [("x", TensorProto.FLOAT, [2, 4])], [("y", TensorProto.FLOAT, [2, 4])], weights)


def expected(proto: onnx.ModelProto, **inputs: np.ndarray) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(proto).run(None, inputs)


X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)


def test_it_stops_after_any_stage(two_matmuls: onnx.ModelProto) -> None:
    targets = with_fallbacks([Only("npu", "MatMul")], None)
    reached = []
    for stage in ("graph", "regions", "plan", "code", "bundle"):
        done = build(nestc.load(two_matmuls), targets, stop_after=stage)
        fields = (done.optimised, done.formed, done.plan, done.artifacts, done.bundle)
        reached.append([bool(part) for part in fields])
    assert reached == [[i <= stage for i in range(5)] for stage in range(5)]


def test_targets_take_regions_in_order_of_preference(two_matmuls: onnx.ModelProto) -> None:
    npu = Only("npu", "MatMul")
    exe = compile(two_matmuls, targets=[npu])
    assert [(p.device, len(p.regions)) for p in exe.plan.partitions] == [("npu", 1), ("cpu", 1), ("npu", 1)]
    assert npu.compiled == ["npu_0", "npu_2"]
    assert [(t.source, t.destination, t.bytes) for t in exe.plan.transfers] == [("npu", "cpu", 32), ("cpu", "npu", 8)]
    middle = next(region for region in exe.plan.regions if "ReduceSum" in region.ops)
    assert middle.refusals["npu"] == "operator ReduceSum (node 'sum') is not offered"
    np.testing.assert_allclose(exe(X), expected(two_matmuls, x=X)[0], rtol=1e-5, atol=1e-6)
    assert [mark["device"] for mark in exe.timeline()] == ["npu", "cpu", "npu"]


def test_a_constraint_that_does_not_hold_is_the_reason(two_matmuls: onnx.ModelProto) -> None:
    rule = Constraint(lambda region: False, "the moon must be full")
    plan, _ = explain(two_matmuls, targets=[Only("npu", "MatMul", where=rule)])
    assert plan.devices == ("npu", "cpu", "host")
    assert "not npu: the moon must be full" in plan.explain()
    assert {region.device for region in plan.regions} == {"cpu"}


def test_what_no_native_target_takes_goes_to_host_and_is_reported() -> None:
    proto = model(
        [helper.make_node("NonZero", ["x"], ["y"])],
        [("x", TensorProto.FLOAT, [2, 4])],
        [("y", TensorProto.INT64, [2, "n"])],
    )
    exe = compile(proto)
    assert exe.fallback_ops == {"NonZero": 1}
    np.testing.assert_array_equal(exe(X), expected(proto, x=X)[0])


def test_what_nobody_takes_is_named_with_each_reason() -> None:
    proto = model(
        [helper.make_node("Multinomial", ["x"], ["y"], name="draw", sample_size=1)],
        [("x", TensorProto.FLOAT, [1, 4])],
        [("y", TensorProto.INT32, [1, 1])],
    )
    with pytest.raises(UnsupportedOp) as caught:
        compile(proto)
    for said in ("Multinomial", "'draw'", "cpu: ", "host: "):
        assert said in str(caught.value)


def test_sequences_do_not_cross_the_border() -> None:
    graph = helper.make_graph(
        [helper.make_node("SequenceConstruct", ["x", "x"], ["s"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2])],
    )
    with pytest.raises(UnsupportedOp, match="'s' of the model is a sequence"):
        compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_sequences_inside_go_to_host() -> None:
    proto = model(
        [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("SequenceConstruct", ["r", "x"], ["s"]),
            helper.make_node("SequenceAt", ["s", "i"], ["c"]),
            helper.make_node("Identity", ["c"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, [2, 4]), ("i", TensorProto.INT64, [])],
        [("y", TensorProto.FLOAT, [2, 4])],
    )
    exe = compile(proto)
    for index in (np.array(0), np.array(1)):
        np.testing.assert_array_equal(exe(X, index), expected(proto, x=X, i=index)[0])
    assert [partition.device for partition in exe.plan.partitions][:2] == ["cpu", "host"]
    assert exe.fallback_ops["SequenceAt"] == 1


class TestPlan:
    """A plan that is given instead of one that is made."""

    def test_it_is_followed(self, two_matmuls: onnx.ModelProto, tmp_path) -> None:
        plan, _ = explain(two_matmuls, targets=[Only("npu", "MatMul")])
        plan.save(tmp_path / "plan.yaml")
        text = (tmp_path / "plan.yaml").read_text().replace("device: npu\n  ops", "device: cpu\n  ops", 1)
        (tmp_path / "plan.yaml").write_text(text)
        exe = compile(two_matmuls, targets=[Only("npu", "MatMul")], plan=tmp_path / "plan.yaml")
        assert [p.device for p in exe.plan.partitions] == ["cpu", "npu"]
        np.testing.assert_allclose(exe(X), expected(two_matmuls, x=X)[0], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("device: cpu\n  ops", "device: npu\n  ops", "which refuses: operator ReduceSum"),
            ("device: cpu\n  ops", "device: gpu\n  ops", "'gpu', which is not among the targets"),
            ("name: r000_", "name: other_", "says nothing of region r000_"),
        ],
    )
    def test_it_is_refused_where_it_does_not_fit(
        self, two_matmuls: onnx.ModelProto, tmp_path, old: str, new: str, said: str
    ) -> None:
        plan, _ = explain(two_matmuls, targets=[Only("npu", "MatMul")])
        plan.save(tmp_path / "plan.yaml")
        text = (tmp_path / "plan.yaml").read_text()
        assert old in text
        (tmp_path / "plan.yaml").write_text(text.replace(old, new, 1))
        with pytest.raises(PlanError, match=said):
            compile(two_matmuls, targets=[Only("npu", "MatMul")], plan=Plan.load(tmp_path / "plan.yaml"))


def test_an_unknown_objective_is_refused(two_matmuls: onnx.ModelProto) -> None:
    with pytest.raises(PlanError, match="choose latency"):
        compile(two_matmuls, objective="speed")


def test_an_output_may_be_an_input_or_a_constant() -> None:
    proto = model(
        [helper.make_node("Add", ["w", "w"], ["twice"]), helper.make_node("Identity", ["x"], ["same"])],
        [("x", TensorProto.FLOAT, [2])],
        [("twice", TensorProto.FLOAT, [2]), ("same", TensorProto.FLOAT, [2]), ("x", TensorProto.FLOAT, [2])],
        [("w", np.array([1, 2], np.float32))],
    )
    x = np.array([5, 6], np.float32)
    out = compile(proto).run({"x": x})
    np.testing.assert_array_equal(out["twice"], [2, 4])
    np.testing.assert_array_equal(out["same"], x)
    np.testing.assert_array_equal(out["x"], x)
    assert out["x"] is not x


def test_saved_and_opened_it_is_the_same(two_matmuls: onnx.ModelProto, tmp_path) -> None:
    exe = compile(two_matmuls, targets=["cpu"], threads=2)
    exe.save(tmp_path / "m.nest")
    again = nestc.open(tmp_path / "m.nest")
    assert again.plan == exe.plan
    assert again.threads == 2
    np.testing.assert_array_equal(again(X), exe(X))


def test_a_wrong_call_is_refused(two_matmuls: onnx.ModelProto) -> None:
    exe = compile(two_matmuls)
    for wrong in (X.astype(np.float64), X[:1], X[0]):
        with pytest.raises(ShapeError):
            exe(wrong)
    with pytest.raises(ShapeError, match="there is no input 'z'"):
        exe.run({"z": X})
