"""benchmarks/loading.py on a model of one addition: what a row holds, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import loading
from nestc.errors import Error


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A zoo of one model, ``y = x + x``."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    file = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), file)
    monkeypatch.setattr(loading.zoo, "path", lambda name: file)
    monkeypatch.setattr(loading.zoo, "inputs", lambda name: {"x": np.ones(4, np.float32)})
    return tmp_path


def test_a_row_has_the_medians_of_fresh_processes(tiny, capsys):
    assert loading.main(["--models", "tiny", "--rounds", "1", "--work", str(tiny / "work"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["model"], row["threads"], row["rounds"]) == ("tiny", 1, 1)
    for engine in loading.ENGINES:
        assert row[engine]["answer_ms"] == row[engine]["load_ms"] + row[engine]["first_ms"] > 0
        assert row[engine]["peak_mib"] > 10
    assert row["memory_ratio"] == row["onnxruntime"]["peak_mib"] / row["nestc"]["peak_mib"]
    loading.print_row(row)
    assert capsys.readouterr().out.startswith("tiny ")


def test_what_fails_is_told_in_a_line(tiny, capsys):
    with pytest.raises(Error, match=r"nestc fails on broken\.nest: .*cannot read the bundle"):
        loading._run("nestc", tiny / "broken.nest", tiny / "no.npz", 1, tiny / "bytecode")
    assert loading.main(["--threads", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --rounds is at least 1")
