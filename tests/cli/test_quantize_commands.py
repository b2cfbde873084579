"""Quantizing from the command line: what is printed and written, and the sentences for what cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from .conftest import write
from .test_bad_input import expect


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six samples for `mlp`, float32 [12, 4] in batches of 2."""
    path = tmp_path / "data.npz"
    np.savez(path, x=np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32))
    return path


@pytest.fixture
def profile(nestc, mlp: Path, data: Path) -> Path:
    path = mlp.with_name("profile.json")
    assert nestc("calibrate", mlp, "--data", data, "-o", path).status == 0
    return path


def test_quantize_writes_a_model_and_reports(nestc, mlp: Path, profile: Path, data: Path) -> None:
    out = mlp.with_name("q.onnx")
    result = nestc("quantize", mlp, "--profile", profile, "--scheme", "int8", "-o", out, "--json")
    report = json.loads(result.out)
    assert result.status == 0
    assert {"scheme", "quantized_ops", "kept_float", "sqnr_db"} <= set(report)
    assert (report["scheme"], report["quantized_ops"], report["kept_float"]) == ("int8", {"Gemm": 1}, [])
    assert report["sqnr_db"]["y"] > 25 and report["sqnr_data"] == "a random input, seed 0"
    x = np.ones((2, 4), np.float32)
    options = onnxruntime.SessionOptions()
    # Its products of 8-bit integers saturate on x86 without VNNI unless told not to.
    options.add_session_config_entry("session.x64quantprecision", "1")
    found = onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_allclose(np.asarray(found), 5.0, atol=0.2)
    again = json.loads(nestc("quantize", mlp, "--profile", profile, "-o", out, "--data", data, "--json").out)
    assert again["sqnr_data"] == f"12 samples of {data}"


def test_quantize_names_the_output_after_the_scheme(nestc, mlp: Path) -> None:
    result = nestc("quantize", mlp, "--scheme", "weight-int8")
    assert result.status == 0 and mlp.with_name("mlp.weight-int8.onnx").is_file()
    assert "weight-int8" in result.out and "Gemm 1" in result.out


def test_explain_tells_the_reason_of_each_node(nestc, mlp: Path, profile: Path, data: Path) -> None:
    out = mlp.with_name("q.onnx")
    assert nestc("quantize", mlp, "--profile", profile, "-o", out).status == 0
    for arguments in ([out], [mlp, "--quantize", "int8", "--calibrate", data]):
        result = nestc("explain", *arguments)
        assert result.status == 0
        assert "activations uint8, weights int8 with a scale a channel" in result.out
        report = json.loads(nestc("explain", *arguments, "--json").out)
        (reason,) = (each for each in report["quantized"].values() if each["op"] == "Relu")
        assert reason["reason"].startswith("computed on the result of")


def test_compile_quantizes_first(nestc, mlp: Path, data: Path) -> None:
    out = mlp.with_name("m.nest")
    result = nestc("compile", mlp, "-o", out, "--calibrate", data, "--quantize", "int8", "--json")
    report = json.loads(result.out)
    assert result.status == 0 and report["quantized"]["quantized_ops"] == {"Gemm": 1}
    assert nestc("run", out, "--json").status == 0


def test_overrides_and_tools(nestc, mlp: Path, profile: Path) -> None:
    path = mlp.with_name("overrides.yaml")
    path.write_text('"*": float\n', encoding="utf-8")
    result = nestc("quantize", mlp, "--profile", profile, "--overrides", path, "--tools", "none", "--json")
    report = json.loads(result.out)
    assert report["quantized_ops"] == {} and len(report["kept_float"]) == 2 and report["sqnr_db"] == {"y": None}


def test_a_budget_is_checked_on_data(nestc, mlp: Path, profile: Path, data: Path) -> None:
    out = mlp.with_name("q.onnx")
    common = ["quantize", mlp, "--profile", profile, "-o", out]
    met = nestc(*common, "--data", data, "--accuracy-budget", "1.0", "--json")
    assert met.status == 0 and 0 <= json.loads(met.out)["loss"] <= 1
    expect(nestc(*common, "--accuracy-budget", "0.1"), "--accuracy-budget is checked on data; give --data")


def test_a_budget_that_cannot_be_met(nestc, tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    # Two classes that differ by less than a step of the weights' scale: only float can tell them apart.
    weight = np.array([[1.0, 1.001, 0.0]] * 4, np.float32)
    kind = onnx.TensorProto.FLOAT
    model = write(tmp_path / "near.onnx", nodes, [("x", kind, [1, 4])], [("y", kind, [1, 3])], [("w", weight)])
    data = tmp_path / "data.npz"
    np.savez(data, x=np.abs(np.random.default_rng(0).standard_normal((8, 4))).astype(np.float32))
    result = nestc(
        "compile", model, "-o", tmp_path / "m.nest", "--quantize", "int8:granularity=tensor", "--tools", "none",
        "--calibrate", data, "--accuracy-budget", "0.1",
    )  # fmt: skip
    expect(result, "loses 1.0000 of the float model's decisions on 8 samples, more than the budget of 0.1")
    assert not (tmp_path / "m.nest").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheme", "int9"], "there is no scheme 'int9', did you mean 'int8'?"),
        (["--scheme", "int8"], "scheme int8 needs a profile of the model; make one with nestc calibrate"),
        (["--scheme", "bf16", "--tools", "squnt"], "did you mean 'squant'?"),
        (["--scheme", "bf16", "--overrides", "none.yaml"], "cannot read the overrides none.yaml"),
        (["--scheme", "bf16", "-o", "none/q.onnx"], "in a folder that does not exist"),
        (["--profile", "none.json"], "none.json"),
    ],
)
def test_what_quantize_refuses(nestc, mlp: Path, arguments: list[str], said: str) -> None:
    expect(nestc("quantize", mlp, *arguments), said)


def test_models_that_quantize_refuses(nestc, mlp: Path, open_mlp: Path, profile: Path) -> None:
    out = mlp.with_name("q.onnx")
    assert nestc("quantize", mlp, "--profile", profile, "-o", out).status == 0
    expect(nestc("quantize", out, "--profile", profile), "the model is quantized already")
    expect(nestc("quantize", open_mlp, "--profile", profile), "another model")
    expect(nestc("compile", mlp, "--calibrate", profile), "--calibrate and --accuracy-budget are for --quantize")


def test_a_batch_left_open_is_one_in_reports(nestc, open_mlp: Path) -> None:
    out = open_mlp.with_name("q.onnx")
    report = json.loads(nestc("quantize", open_mlp, "--scheme", "weight-int8", "-o", out, "--json").out)
    assert report["sqnr_data"] == "a random input, seed 0 (batch = 1)" and len(report["sqnr_db"]) == 1
    result = nestc("explain", out)
    assert result.status == 0 and "for one sample a call: batch = 1" in result.out


def test_what_compile_needs_is_said_before_calibrating(nestc, mlp: Path, open_mlp: Path, data: Path) -> None:
    expect(nestc("compile", mlp, "--quantize", "int8"), "needs data to calibrate on; give --calibrate DATA")
    # A file that is not there would be missed first if it were opened before the rest is looked at.
    missing = ("--calibrate", data.with_name("none.npz"), "--quantize")
    expect(nestc("compile", open_mlp, *missing, "int8"), "--dim batch=SIZE")
    expect(nestc("compile", mlp, *missing, "int9"), "there is no scheme 'int9'")
    expect(nestc("compile", mlp, *missing, "auto:auto"), "a search for a whole model")


def test_data_that_are_no_archive_or_too_large(nestc, mlp: Path, data: Path) -> None:
    data.write_text("hello", encoding="utf-8")
    expect(nestc("calibrate", mlp, "--data", data), "not an .npz file that can be read: it is cut, or of another kind")
    data.write_bytes(b"")
    expect(nestc("calibrate", mlp, "--data", data), "it is empty")
    np.savez(data, x=np.full((2, 4), 1e300))
    expect(nestc("calibrate", mlp, "--data", data), "holds 1e+300, which is infinite in float32")


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_channels_that_a_convolution_has_no_weights_for(nestc, tmp_path: Path, op: str) -> None:
    node = helper.make_node(op, ["x", "w"], ["y"], name="stem")
    x, y = (("x", TensorProto.FLOAT, ["N", "C", 5, 5]), ("y", TensorProto.FLOAT, ["N", 2, "H", "W"]))
    model = write(tmp_path / "c.onnx", [node], [x], [y], [("w", np.ones((2, 2, 3, 3), np.float32))])
    result = nestc("compile", model, "--shape", "x=1,3,5,5")
    expect(result, f"{op} 'stem': its weights are for 2 channels, but its input 'x' has 3")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_left_is_no_error(unbuffered: str) -> None:
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from nestc.cli import main; main(['--help'])"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with os.fdopen(written, "wb") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_formats_that_targets_ask_for(nestc, mlp: Path, tmp_path: Path) -> None:
    result = nestc(
        "quantize", str(mlp), "--scheme", "devices", "--target", "aim", "--json", "-o", str(tmp_path / "q.onnx")
    )
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert report["scheme"] == "devices" and report["quantized_ops"] == {"Gemm": 1}
    (gemm,) = (each for each in report["reasons"].values() if each["op"] == "Gemm")
    assert gemm["scheme"] == "bf16" and "; for aim, " in gemm["reason"] and gemm["reason"].endswith(" us modelled")
    shown = nestc("explain", str(mlp), "--quantize", "devices", "--target", "aim")
    assert shown.status == 0 and "; for aim, " in shown.out and "aim takes 1 regions" in shown.out
    bundle = tmp_path / "m.nest"
    made = nestc("compile", str(mlp), "--quantize", "devices", "--target", "aim", "-o", str(bundle), "--json")
    assert made.status == 0 and "aim" in {part["device"] for part in json.loads(made.out)["partitions"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "devices"], "name them (--target vta)"),
        (["--scheme", "device"], "did you mean 'devices'?"),
        (["--scheme", "bf16", "--target", "aim"], "targets are for the schemes devices and auto"),
        (["--scheme", "devices:float", "--target", "cpu"], "nothing to change"),
    ],
)
def test_targets_and_schemes_that_do_not_fit(nestc, mlp: Path, arguments: list[str], message: str) -> None:
    result = nestc("quantize", str(mlp), *arguments)
    assert result.status != 0 and message in " ".join(result.err.split())
