"""``nestc report`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import nestc as package


@pytest.fixture
def bundle(on_cpu: package.Executable, tmp_path: Path) -> Path:
    on_cpu.save(tmp_path / "small.nest")
    return tmp_path / "small.nest"


def test_a_page_and_a_sentence(nestc, bundle: Path, tmp_path: Path) -> None:
    result = nestc("report", bundle, "-o", tmp_path / "r.html", "--runs", 2)
    assert result.status == 0 and "(measured); regions: cpu 4" in result.out
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_json_is_one_object_and_writes_no_page(nestc, bundle: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = nestc("report", bundle, "--json", "--runs", 1, "--requests", 2)
    assert result.status == 0
    data = json.loads(result.out)
    assert data["model"] == "small" and len(data["timelines"]) == 2 and data["runs"] == 1
    assert not (tmp_path / "report.html").exists()


def test_accuracy_beside_the_float_model(nestc, bundle: Path, network: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(network, tmp_path / "float.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(3).standard_normal((6, 3, 8, 8)).astype(np.float32))
    np.save(tmp_path / "labels.npy", np.arange(6) % 5)
    result = nestc(
        "report", bundle, "--json", "--runs", 1, "--data", tmp_path / "data.npz", "--labels", tmp_path / "labels.npy",
        "--against", tmp_path / "float.onnx", "--limit", 5,
    )  # fmt: skip
    assert result.status == 0
    top1, sqnr = json.loads(result.out)["accuracy"]
    assert (top1["metric"], top1["samples"], top1["against"]) == ("top1", 5, "float.onnx")
    assert top1["value"] == top1["reference"] and top1["disagreements"] == 0
    assert sqnr["metric"] == "sqnr" and (sqnr["value"] is None or sqnr["value"] > 60)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("missing.nest",), "there is no file missing.nest"),
        (("float.onnx",), "is no bundle; compile it first"),
        (("small.nest", "--labels", "labels.npy"), "--labels judges the model on data; give --data DATA"),
        (("small.nest", "--against", "float.onnx"), "--against judges the model on data"),
        (("small.nest", "--data", "data.npz"), "--data needs labels to judge by"),
        (("small.nest", "--input", "z=data.npy"), "there is no input 'z'"),
        (("small.nest", "-o", "no/such/r.html"), "cannot write the report"),
        (("small.nest", "--runs", "0"), "runs"),
        (("broken.nest",), "broken.nest"),
    ],
)
def test_bad_input_is_told_in_a_sentence(
    nestc, bundle: Path, network: onnx.ModelProto, tmp_path: Path, monkeypatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(network, tmp_path / "float.onnx")
    (tmp_path / "broken.nest").write_bytes(b"no archive")
    result = nestc("report", *arguments)
    assert result.status == 2 and said in result.err and not result.out
    assert not (tmp_path / "report.html").exists()
