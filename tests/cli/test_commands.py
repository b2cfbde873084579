"""The commands at work: what they print, what they write, and the fields of their JSON."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import nestc as package
from nestc.runtime.vendors.openvino import core


@pytest.fixture
def bundle(nestc, mlp: Path) -> Path:
    out = mlp.with_suffix(".nest")
    assert nestc("compile", mlp, "-o", out).status == 0
    return out


def test_compile_reports_what_it_made(nestc, mlp: Path) -> None:
    result = nestc("compile", mlp, "-o", mlp.with_suffix(".nest"), "--json")
    report = json.loads(result.out)
    assert result.status == 0
    assert set(report) == {
        "bundle", "seconds", "regions", "partitions", "fallback_ops", "ways", "arena_bytes", "weights_bytes", "predicted_ms",
    }  # fmt: skip
    assert Path(report["bundle"]).is_file()
    assert report["fallback_ops"] == {}
    assert report["regions"] == 1
    (partition,) = report["partitions"]
    assert partition == {"device": "cpu", "regions": 1, "ops": {"Gemm": 1, "Relu": 1}}


def test_the_module_is_the_command() -> None:
    found = subprocess.run([sys.executable, "-m", "nestc", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"nestc {package.__version__}"


def test_a_dimension_is_bound_from_the_command_line(nestc, open_mlp: Path, tmp_path: Path) -> None:
    for option, value in (("--dim", "batch=3"), ("--shape", "x=3,4")):
        assert nestc("compile", open_mlp, "-o", tmp_path / "o.nest", option, value).status == 0
        assert package.open(tmp_path / "o.nest").inputs == {"x": ("float32", (3, 4))}


def test_run_gives_the_outputs(nestc, bundle: Path, tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.save(tmp_path / "x.npy", x)
    result = nestc("run", bundle, "--input", f"x={tmp_path / 'x.npy'}", "-o", tmp_path / "out.npz", "--json")
    report = json.loads(result.out)
    assert set(report) == {"outputs", "latency_ms", "timeline"}
    assert report["outputs"]["y"]["shape"] == [2, 3] and report["outputs"]["y"]["dtype"] == "float32"
    assert set(report["timeline"][0]) == {"device", "region", "start_us", "end_us", "kind", "request"}
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_allclose(out["y"], np.maximum(x @ np.ones((4, 3)) + 1, 0), rtol=1e-6)
    np.savez(tmp_path / "x.npz", x=x)
    for given in (f"x={tmp_path / 'x.npz'}", str(tmp_path / "x.npz"), str(tmp_path / "x.npy")):
        again = json.loads(nestc("run", bundle, "--input", given, "--json").out)
        assert again["outputs"] == report["outputs"]


def test_inputs_say_how_large_open_dimensions_are(nestc, open_mlp: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((5, 4), np.float32))
    result = nestc("run", open_mlp, "--input", f"x={tmp_path / 'x.npy'}", "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["outputs"]["y"]["shape"] == [5, 3]


def test_run_draws_the_same_inputs_again(nestc, bundle: Path, mlp: Path) -> None:
    first = json.loads(nestc("run", bundle, "--json").out)["outputs"]
    assert json.loads(nestc("run", bundle, "--json").out)["outputs"] == first
    assert json.loads(nestc("run", mlp, "--json").out)["outputs"] == first


def test_run_reads_images(nestc, tmp_path: Path) -> None:
    from onnx import TensorProto, helper
    from PIL import Image

    from .conftest import write

    path = write(
        tmp_path / "image.onnx",
        [helper.make_node("GlobalMaxPool", ["x"], ["y"])],
        [("x", TensorProto.FLOAT, [1, 3, 8, 6])],
        [("y", TensorProto.FLOAT, [1, 3, 1, 1])],
    )
    Image.new("RGB", (12, 16), (255, 51, 0)).save(tmp_path / "a.png")
    result = nestc("run", path, "--input", f"x={tmp_path / 'a.png'}", "-o", tmp_path / "o.npz")
    assert result.status == 0, result.err
    with np.load(tmp_path / "o.npz") as out:
        np.testing.assert_allclose(out["y"].ravel(), [1.0, 0.2, 0.0], atol=1e-6)


@pytest.mark.parametrize("level", ["graph", "tensor", "llvm", "asm"])
def test_emit_writes_each_level(nestc, mlp: Path, tmp_path: Path, level: str) -> None:
    forms = tmp_path / "forms"
    result = nestc("compile", mlp, "-o", tmp_path / "m.nest", "--emit", level, "--emit-dir", forms)
    assert result.status == 0, result.err
    suffix = {"graph": ".onnx.txt", "tensor": ".tensor", "llvm": ".ll", "asm": ".s"}[level]
    files = [path for path in forms.iterdir() if path.name != "model.onnx"]
    if level == "graph":
        onnx.checker.check_model(onnx.load(forms / "model.onnx"))
    assert files and all(file.name.endswith(suffix) and file.stat().st_size > 0 for file in files)


def test_explain_says_who_takes_what(nestc, mlp: Path, bundle: Path) -> None:
    for path in (mlp, bundle):
        result = nestc("explain", path)
        assert result.status == 0
        assert "-> cpu: Gemm, Relu" in result.out
    report = json.loads(nestc("explain", mlp, "--json").out)
    assert report["regions"][0]["device"] == "cpu"


def test_bench_measures_and_compares(nestc, mlp: Path, bundle: Path) -> None:
    result = nestc("bench", mlp, "--threads", "1", "--runs", "2", "--vs", "onnxruntime", "--json")
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert set(report) == {
        "model", "threads", "nestc", "vs", "max_abs_diff", "max_rel_diff", "peak_rss_mb", "load_ms",
    }  # fmt: skip
    assert set(report["nestc"]) == {"median_ms", "min_ms", "runs"}
    assert set(report["vs"]["onnxruntime"]) == {"version", "median_ms", "ratio"}
    assert report["max_rel_diff"] < 1e-4
    assert nestc("bench", bundle, "--threads", "1", "--runs", "1", "--vs", "onnxruntime", "--model", mlp).status == 0
    refused = nestc("bench", bundle, "--runs", "1", "--vs", "onnxruntime")
    assert refused.status == 2 and "the ONNX file" in refused.err
    unknown = nestc("bench", mlp, "--runs", "1", "--vs", "onnxrumtime")
    assert unknown.status == 2 and "onnxrumtime" in unknown.err


def test_targets_lists_machines_and_offers(nestc) -> None:
    report = json.loads(nestc("targets", "--json").out)["targets"]
    assert "float32" in report["cpu"]["machine"]["dtypes"]
    assert any("Conv" in offer["ops"] for offer in report["cpu"]["offers"])
    assert report["cpu"]["machine"]["resource"] == "cpu" and report["cpu"]["machine"]["watts"] > 0
    assert report["vta"]["machine"]["link"]["kind"] == "estimated"
    assert report["onnxruntime"]["machine"]["facts"]["provider"] == "CPU"
    shown = nestc("targets")
    assert shown.status == 0 and "cpu:" in shown.out
    assert "border to the host: 50 us a launch, 800 MB/s (estimated)" in shown.out


def test_targets_says_what_is_not_installed(nestc, monkeypatch: pytest.MonkeyPatch) -> None:
    core.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    try:
        shown, report = nestc("targets").out, json.loads(nestc("targets", "--json").out)["targets"]
    finally:
        core.cache_clear()
    assert "openvino: not available here: openvino is not installed: pip install 'nestc[openvino]'" in shown
    assert report["openvino"] == {"unavailable": "openvino is not installed: pip install 'nestc[openvino]'"}


@pytest.mark.parametrize("command", ["compile", "run", "bench", "explain", "targets", "demo"])
def test_each_command_has_help_with_an_example(nestc, command: str) -> None:
    result = nestc(command, "--help")
    assert result.status == 0
    assert f"nestc {command}" in result.out and "Example" in result.out


def test_help_imports_nothing_heavy() -> None:
    heavy = ("numpy", "onnx", "onnx_ir", "llvmlite", "onnxscript")
    script = (
        "import sys; from nestc.cli import status; status(['--help'])\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_a_closed_pipe_is_quiet(mlp: Path) -> None:
    command = f"{sys.executable} -c 'from nestc.cli import main; main()' targets --json | true"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert found.stderr == ""


def test_demo_runs_on_three_devices(nestc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.import_module("nestc.demo.run"), "SIMULATED", 12)
    page = tmp_path / "page.html"
    result = nestc("demo", "--json", "-o", str(page))
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert report["accuracy"] > 0.88 and report["images"] >= 200
    assert report["fallback_ops"] == {}
    small = report["int8"]
    assert small["accuracy"] > 0.88 and small["images"] + small["calibrated_on"] == report["images"]
    assert small["fallback_ops"] == {} and small["disagreements"] <= 8
    rows = report["rows"]
    assert [(row["name"], row["objective"]) for row in rows] == [
        ("cpu", None), ("cpu", None), ("vta + cpu", None), ("aim + cpu", None), ("vta + aim + cpu", "latency"),
        ("vta + aim + cpu", "throughput"), ("vta + aim + cpu", "energy"),
    ]  # fmt: skip
    assert [row["scheme"] for row in rows[:4]] == ["float", "int8", "devices", "devices"]
    assert {row["scheme"] for row in rows[4:]} <= {"auto", "devices"} and rows[6]["regions"]["vta"] > 8
    assert rows[2]["regions"]["vta"] > 8 and rows[2]["latency_kind"] == "modelled" and rows[3]["regions"]["aim"] == 1
    assert all(row["agreement"] >= 11 / 12 and row["images"] == 12 for row in rows[2:])
    assert all(row["latency_ms"] > 0 and row["millijoules"] > 0 for row in rows)
    assert all(row["lower_bound_ms"] <= row["predicted_ms"] * 1.001 for row in rows[4:6])
    assert report["page"] == str(page) and "<html" in page.read_text(encoding="utf-8")[:200]
    assert small["weights_bytes"] < report["weights_bytes"]


def test_demo_tells_where_it_cannot_write(nestc, tmp_path: Path) -> None:
    result = nestc("demo", "-o", str(tmp_path / "none" / "page.html"))
    assert result.status != 0 and "in a folder that does not exist" in result.err
