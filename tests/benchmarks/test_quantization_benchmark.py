"""The benchmark of quantizers: which rows it has, what a row says, and the peers' quantizers on a small network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest


def test_rows_are_chosen_by_scheme_and_tool(capsys: pytest.CaptureFixture[str]) -> None:
    import quantization

    every = quantization.select(None, None)
    assert {way.family for way in every} == {"nestc", "onnxruntime", "nncf"}
    assert len({(way.scheme, way.tool) for way in every}) == len(every)
    chosen = quantization.select("int8,int8-symmetric", "onnxruntime *,nncf mixed")
    assert [way.tool for way in chosen].count("onnxruntime MinMax") == 2 and chosen[-1].tool == "nncf mixed"
    assert quantization.main(["--list", "--tools", "nncf*"]) == 0
    assert capsys.readouterr().out.split("\n")[0].split() == ["int8", "nncf", "mixed"]
    assert quantization.main(["--tools", "nestc,ncf"]) == 2
    assert "nothing is called 'ncf'; there are nestc, " in capsys.readouterr().err


def test_a_row_counts_what_differs() -> None:
    import quantization

    reference = np.array([[2, 1, 0], [0, 2, 1], [0, 1, 2], [3, 0, 1]], np.float32)
    scores = reference.copy()
    scores[3] = [0, 0, 1]
    answer = {"seconds": 1.5, "scores": {"onnxruntime": scores, "saturating": reference, "nestc": scores}}
    row = quantization.judge(answer, reference, np.array([0, 1, 2, 0]))
    assert (row["top1"], row["top1_float"], row["agreement"], row["disagreements"]) == (0.75, 1.0, 0.75, 1)
    assert row["sqnr_db"] == pytest.approx(10 * np.log10(25 / 9))
    assert row["top1_saturating"] == 1.0 and row["nestc_decides_as_onnxruntime"] == 1.0
    shown = quantization.line({"model": "m", "scheme": "int8", "tool": "t", **row})
    assert "75.00" in shown and "100.00" in shown and json.dumps(row)
    assert "broken" in quantization.line({"model": "m", "scheme": "int8", "tool": "t", "error": "broken"})


def test_data_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    import quantization

    assert quantization.main(["--models", "efficientnet_lite0"]) == 2
    assert "needs --data" in capsys.readouterr().err


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two convolutions with ReLU, global average, fully connected, [1, 3, 12, 12] to [1, 5]."""
    from netbuilder import NetBuilder, save

    net = NetBuilder("small")
    x = net.input("x", (1, 3, 12, 12))
    x = net.activate(net.conv(x, 8, 3, pads=(1, 1, 1, 1)), "relu")
    x = net.activate(net.conv(x, 8, 3, 2), "relu")
    net.output(net.gemm(net.flatten(net.global_pool(x)), 5), "y")
    save(net.model(), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


def test_batch_norms_as_convolutions_compute_the_same(small: Path, tmp_path: Path) -> None:
    import peers
    import quantization
    from nestc.errors import Error
    from netbuilder import NetBuilder, save

    random = np.random.default_rng(0)
    net = NetBuilder("normed")
    x = net.conv(net.input("x", (1, 3, 6, 6)), 4, 3)
    parts = [random.uniform(0.5, 2, 4).astype(np.float32) for _ in range(4)]
    net.output(net.batch_norm(x, *parts, epsilon=1e-3), "y")
    save(net.model(), tmp_path / "normed.onnx")
    quantization.unfold(tmp_path / "normed.onnx", tmp_path / "unfolded.onnx")
    assert [node.op_type for node in onnx.load(str(tmp_path / "unfolded.onnx")).graph.node][:2] == ["Conv", "Conv"]
    inputs = {"x": random.standard_normal((1, 3, 6, 6), dtype=np.float32)}
    expected, found = (peers.exact_outputs(tmp_path / name, inputs)[0] for name in ("normed.onnx", "unfolded.onnx"))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(Error, match="no batch normalizations"):
        quantization.unfold(small, tmp_path / "other.onnx")


@pytest.mark.parametrize("symmetric", [False, True])
def test_onnxruntime_quantizes_as_it_is_called(small: Path, tmp_path: Path, symmetric: bool) -> None:
    import peers
    import quantizers

    random = np.random.default_rng(0)
    batches = [{"x": random.standard_normal((1, 3, 12, 12), dtype=np.float32)} for _ in range(4)]
    quantizers.onnxruntime_prepare(small, batches[0], tmp_path / "prepared.onnx")
    quantizers.onnxruntime_static(tmp_path / "prepared.onnx", batches, tmp_path / "int8.onnx", symmetric=symmetric)
    graph = onnx.load(str(tmp_path / "int8.onnx")).graph
    kinds = {onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer if t.name.endswith("_zero_point")}
    assert kinds == ({"INT8", "INT32"} if symmetric else {"INT8", "UINT8", "INT32"})
    scales = {t.name: list(t.dims) for t in graph.initializer if t.name.endswith("_scale")}
    assert [8] in scales.values()  # a scale for each channel of the weights
    float_y, int_y = (peers.exact_outputs(tmp_path / name, batches[0])[0] for name in ("small.onnx", "int8.onnx"))
    assert np.abs(float_y - int_y).max() < 0.1 * np.abs(float_y).max()


def test_peers_rows_and_their_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import peers
    import quantized_zoo
    from nestc.errors import Error

    assert peers.plan("magika", ["fp32"]) == [("magika", "fp32")]
    assert peers.plan(None, ["int8"]) == [(name, "int8") for name in quantized_zoo.MODELS]
    with pytest.raises(Error, match="no precision 'int4'"):
        peers.plan(None, ["int4"])

    def path(name: str, engine: str) -> Path:
        if engine == "openvino":
            raise Error("nncf is not installed")
        return tmp_path / engine

    monkeypatch.setattr(quantized_zoo, "path", path)
    monkeypatch.setattr(peers.zoo, "path", lambda name: tmp_path / "float")
    files, errors = peers.files_of("magika", "int8", ["onnxruntime", "openvino"], True)
    assert list(files) == ["nestc", "onnxruntime", peers.NARROW, peers.EXACT, peers.FLOAT]
    assert files[peers.FLOAT].name == "float" and files[peers.EXACT] == files["onnxruntime"]
    assert errors == {"openvino": "nncf is not installed"}
    files, errors = peers.files_of("magika", "fp32", ["onnxruntime"], True)
    assert set(files.values()) == {tmp_path / "float"} and not errors


def test_peers_means_are_by_precision() -> None:
    import peers

    rows = [
        {"model": "a", "precision": "int8", "threads": 1, "ratio_to_best": 2.0, "gflop": 1.0, "nestc_ms": 10.0},
        {"model": "a", "precision": "fp32", "threads": 1, "ratio_to_best": 0.5, "gflop": 1.0, "nestc_ms": 20.0},
    ]
    result = peers.finish(rows, {1: {"fp32": 100.0, "bf16": None, "int8": None}})
    assert result["geomean"] == {"fp32": 0.5, "bf16": None, "int8": 2.0}
    assert [row["percent_of_peak"] for row in result["rows"]] == [None, 50.0]
