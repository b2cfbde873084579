import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper


def write_case(folder, name, model, tensors):
    from onnx import numpy_helper

    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    blobs = [numpy_helper.from_array(array, "").SerializeToString() for array in tensors]
    (folder / f"{name}.data").write_bytes(b"".join(len(blob).to_bytes(8, "little") + blob for blob in blobs))


@pytest.fixture
def relu(tmp_path, monkeypatch):
    """A cache with one case of our own, in place of the package's."""
    import conformance
    import node_cases

    node = helper.make_node("Relu", ["x"], ["y"])
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy"]
    graph = helper.make_graph([node], "g", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    x = np.array([-1, 0, 2], np.float32)
    write_case(tmp_path, "test_relu", model, [x, np.maximum(x, 0)])
    case = node_cases.NodeCase("test_relu", "Relu", "", 1e-3, 1e-7, False)
    monkeypatch.setattr(node_cases, "CACHE", tmp_path)
    monkeypatch.setattr(conformance, "_CASES", {"test_relu": case})
    return case


def test_a_case_passes_in_onnxruntime(relu) -> None:
    import conformance

    result = conformance.run_case("test_relu", engine="onnxruntime")
    assert (result.status, result.op, result.detail) == ("native", "Relu", "")


def test_differences_are_named(relu) -> None:
    from conformance import compare

    want = [np.array([1.0, 2.0], np.float32)]
    assert compare(relu, want, want) == ""
    assert compare(relu, want, []) == "0 outputs where 1 are expected"
    assert "has shape (1, 2)" in compare(relu, want, [want[0][None]])
    assert "has type float64" in compare(relu, want, [want[0].astype(np.float64)])
    assert "differs in 1 of 2 elements, first 3.0 where 2.0" in compare(relu, want, [np.array([1, 3], np.float32)])
    texts = np.array(["a", "bc"], object)
    assert compare(relu, [texts], [texts.astype(str)]) == ""
    assert compare(relu, [texts], [np.array(["a", "b"])]) == "output 0 has other strings"
    nan = [np.array([np.nan], np.float32)]
    assert compare(relu, nan, nan) == ""


def test_bfloat16_may_be_two_units_off(relu) -> None:
    import ml_dtypes

    from conformance import compare

    want = np.array([1.0], ml_dtypes.bfloat16)
    assert compare(relu, [want], [(want.astype(np.float32) * 1.0078125).astype(ml_dtypes.bfloat16)]) == ""
    assert "differs" in compare(relu, [want], [np.array([1.0625], ml_dtypes.bfloat16)])


def test_dropout_in_training_is_judged_by_shape() -> None:
    from node_cases import _is_random

    def model(op, names):
        node = helper.make_node(op, names, ["y"])
        info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        return helper.make_model(helper.make_graph([node], "g", info, []))

    names = ["x", "r", "t"]
    assert _is_random(model("Dropout", names), [np.ones(2), np.array(0.5), np.array(True)])
    assert not _is_random(model("Dropout", names), [np.ones(2), np.array(0.0), np.array(True)])
    assert not _is_random(model("Dropout", names), [np.ones(2), np.array(0.5), np.array(False)])
    assert _is_random(model("Bernoulli", ["x"]), [np.ones(2)])
    assert not _is_random(model("Relu", ["x"]), [np.ones(2)])


def test_summary_counts(relu) -> None:
    from conformance import Result, summarize

    results = [
        Result("test_relu", "Relu", "nestc", "fallback"),
        Result("test_relu", "Relu", "onnxruntime", "native"),
    ]
    summary = summarize(results, [relu])
    assert summary["fallback"] == 1 and summary["total"] == 1 and summary["onnxruntime"] == {"pass": 1}
    assert summary["by_op"]["Relu"] == {
        "native": 0, "fallback": 1, "unsupported": 0, "wrong": 0, "crash": 0, "total": 1, "onnxruntime": 1,
    }  # fmt: skip
    assert summary["context"]["versions"]["onnx"] == onnx.__version__


def test_dead_and_hanging_workers_cost_one_task_each() -> None:
    from worker_tasks import misbehave

    from isolated import Lost, run_isolated

    answers = dict(run_isolated(misbehave, ["fine", "die", "also fine", "hang", "last"], jobs=1, timeout=1.0))
    assert {task for task, answer in answers.items() if isinstance(answer, Lost)} == {"die", "hang"}
    assert "status -6" in answers["die"].reason and "no answer" in answers["hang"].reason
    assert answers["last"] == "LAST"


def test_noise_of_four_units_of_the_largest_element_is_none(relu) -> None:
    from conformance import compare

    want = [np.array([54.0, 0.0], np.float32)]
    assert compare(relu, want, [np.array([54.0, 1.5e-5], np.float32)]) == ""
    assert "differs in 1 of 2" in compare(relu, want, [np.array([54.0, 1.6e-5], np.float32)])
