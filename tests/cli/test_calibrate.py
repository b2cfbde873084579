"""``nestc calibrate``, and what it and ``nestc quantize --scheme auto`` say of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from .conftest import write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six samples for the small models."""
    generator = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    np.savez(path, x=generator.standard_normal((6, 4)).astype(np.float32))
    return path


def expect(result, *said: str) -> None:
    assert result.status == 2, result
    assert result.err.startswith("nestc: ") and result.err.count("\n") == 1, result.err
    assert result.out == ""
    for words in said:
        assert words in result.err, result.err


def test_calibrate_writes_a_profile(nestc, mlp: Path, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "p.json"
    result = nestc("calibrate", mlp, "--data", data, "--method", "entropy", "-o", target, "--json")
    assert result.status == 0 and result.err == "", result
    report = json.loads(result.out)
    assert report["profile"] == str(target) and report["method"] == "entropy" and report["nonfinite"] == []
    assert report["samples"] == 6 and report["samples_per_second"] > 0
    content = json.loads(target.read_text())
    assert content["samples"] == 6 and set(content["tensors"]) == {"x", "y"} and report["tensors"] == 2
    values = np.load(data)["x"]
    assert content["tensors"]["x"]["min"] == values.min() and content["tensors"]["x"]["count"] == 24
    assert content["tensors"]["y"]["max"] == pytest.approx(max(values.sum(1).max() + 1, 0), rel=1e-5)


def test_some_samples_and_a_sentence(nestc, mlp: Path, data: Path, tmp_path: Path) -> None:
    result = nestc("calibrate", mlp, "--data", data, "--samples", "2", "-o", tmp_path / "p.json")
    assert result.status == 0 and result.err == ""
    assert f"{tmp_path / 'p.json'}: 2 tensors over 2 samples" in result.out


def test_nodes_that_make_no_numbers_are_reported(nestc, tmp_path: Path, data: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Log", ["h"], ["l"], name="logarithm"),
        helper.make_node("MatMul", ["l", "w"], ["y"], name="last"),
    ]
    values = [("x", TensorProto.FLOAT, [1, 4])], [("y", TensorProto.FLOAT, [1, 4])]
    model = write(tmp_path / "log.onnx", nodes, *values, [("w", np.eye(4, dtype=np.float32))])
    result = nestc("calibrate", model, "--data", data, "-o", tmp_path / "p.json")
    negative = int((np.load(data)["x"] < 0).sum())
    assert result.status == 0
    assert result.err == f"  warning: node 'logarithm' makes {negative} NaN in 'l'\n"


def test_bad_input(nestc, mlp: Path, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "p.json"
    expect(nestc("calibrate", tmp_path / "none.onnx", "--data", data), "there is no file")
    expect(nestc("calibrate", mlp, "--data", tmp_path / "none"), "none")
    expect(nestc("calibrate", mlp, "--data", data, "--method", "entrpy", "-o", target), "did you mean 'entropy'")
    expect(nestc("calibrate", mlp, "--data", data, "--samples", "3", "-o", target), "3 samples", "batches of 2")
    expect(nestc("calibrate", mlp, "--data", data, "-o", tmp_path / "no" / "p.json"), "does not exist")
    expect(nestc("calibrate", mlp, "--data", data, "-o", tmp_path), "is a folder")
    expect(nestc("calibrate", mlp, "--data", data, "--dim", "batch=2"), "no symbolic dimension 'batch'")
    for name, arrays in {
        "name": {"image": np.zeros((2, 4), np.float32)},
        "shape": {"x": np.zeros((2, 5), np.float32)},
        "dtype": {"x": np.zeros((2, 4), complex)},
        "empty": {"x": np.zeros((0, 4), np.float32)},
        "nan": {"x": np.full((2, 4), np.nan, np.float32)},
    }.items():
        path = tmp_path / f"{name}.npz"
        np.savez(path, **arrays)
        expect(nestc("calibrate", mlp, "--data", path, "-o", target))
    assert not target.exists()


def test_a_profile_of_another_model(nestc, mlp: Path, open_mlp: Path, data: Path, tmp_path: Path) -> None:
    profile = tmp_path / "p.json"
    assert nestc("calibrate", mlp, "--data", data, "-o", profile).status == 0
    expect(nestc("quantize", open_mlp, "--profile", profile), "was made of another model", "calibrate this model")


def test_scheme_auto(nestc, mlp: Path, data: Path, tmp_path: Path) -> None:
    profile, target = tmp_path / "p.json", tmp_path / "auto.onnx"
    assert nestc("calibrate", mlp, "--data", data, "-o", profile).status == 0
    given = ("quantize", mlp, "--profile", profile, "--scheme", "auto", "-o", target)
    expect(nestc(*given), "checked on data")
    result = nestc(*given, "--data", data, "--accuracy-budget", "1", "--json")
    assert result.status == 0, result
    report = json.loads(result.out)
    assert report["quantized_ops"]["Gemm"] == 1 and any(note.startswith("auto: int8") for note in report["notes"])
    assert target.exists()
