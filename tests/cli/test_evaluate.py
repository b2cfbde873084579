"""`nestc evaluate`: the JSON it prints, the table for people, and one sentence for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


@pytest.fixture
def nets(tmp_path: Path) -> tuple[Path, Path]:
    """y = x @ w for x [1, 4], with w the identity, and with w whose first two columns are exchanged."""
    weights = np.eye(4, dtype=np.float32)
    paths: list[Path] = []
    for name, w in (("float", weights), ("other", weights[:, [1, 0, 2, 3]])):
        x, y = (helper.make_tensor_value_info(border, TensorProto.FLOAT, ["n", 4]) for border in "xy")
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        graph = helper.make_graph(nodes, name, [x], [y], [numpy_helper.from_array(w, "w")])
        paths.append(tmp_path / f"{name}.onnx")
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), paths[-1])
    return paths[0], paths[1]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """x = twice the unit vector of the class, 6 samples."""
    classes = np.array([0, 1, 2, 3, 2, 1])
    np.savez(tmp_path / "x.npz", x=2 * np.eye(4, dtype=np.float32)[classes])
    np.save(tmp_path / "labels.npy", classes)
    rows = [f"{index},{label},{'late' if index > 3 else 'early'}" for index, label in enumerate(classes)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,split", *rows]))
    return tmp_path / "x.npz"


def test_top1_as_json(nestc, nets, data: Path) -> None:
    given = ("evaluate", nets[1], "--against", nets[0], "--data", data, "--labels", data.with_name("labels.npy"))
    result = nestc(*given, "--threads", 1, "--batch", 4, "--json")
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert report["model"] == "other.onnx" and report["against"] == "float.onnx" and report["metric"] == "top1"
    assert (report["correct"], report["samples"], report["disagreements"]) == (3, 6, 3)
    assert report["reference"]["value"] == 1.0 and report["loss"] == 0.5
    assert 0.1 < report["interval"][0] < 0.5 < report["interval"][1] < 0.9


def test_a_bundle_and_a_split(nestc, nets, data: Path, tmp_path: Path) -> None:
    compiled = nestc("compile", nets[0], "--dim", "n=1", "-o", tmp_path / "a.nest", "--threads", 1)
    assert compiled.status == 0, compiled.err
    given = ("evaluate", tmp_path / "a.nest", "--data", data, "--labels", data.with_name("labels.csv"))
    result = nestc(*given, "--split", "late", "--json")
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert (report["correct"], report["samples"]) == (2, 2) and report["against"] is None
    shown = nestc(*given, "--split", "early", "--limit", 3, "--against", tmp_path / "a.nest")
    assert "100.00 %" in shown.out and "3 of 3" in shown.out and "0 samples are decided otherwise" in shown.out


def test_sqnr(nestc, nets, data: Path) -> None:
    given = ("evaluate", nets[1], "--against", nets[0], "--data", data, "--metric", "sqnr", "--threads", 1)
    report = json.loads(nestc(*given, "--json").out)
    assert report["value"] == pytest.approx(10 * np.log10(6 / 6)) and report["outputs"] == {"y": report["value"]}
    assert "0.00 dB" in nestc(*given).out
    equal = json.loads(nestc("evaluate", nets[0], *given[2:], "--json").out)
    assert equal["value"] is None and equal["disagreements"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metric", "top1"], "needs labels"),
        (["--metric", "cosine"], "--against"),
        (["--metric", "top7"], "top7"),
        (["--labels", "none.csv"], "none.csv"),
        (["--labels", "{labels}", "--split", "neither"], "the splits are early, late"),
        (["--labels", "{labels}", "--preprocess", "imagenet"], "preprocessing is for images"),
        (["--labels", "{labels}", "--against", "none.onnx"], "no file none.onnx"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_bad_input(nestc, nets, data: Path, options: list[str], said: str) -> None:
    filled = [option.format(labels=data.with_name("labels.csv")) for option in options]
    result = nestc("evaluate", nets[0], "--data", data, *filled)
    assert result.status == 2 and said in result.err and result.err.count("\n") == 1, result
    assert result.out == ""
