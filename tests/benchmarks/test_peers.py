"""ncnn and MNN as peers: what they compute, how they are converted and fail, and what a row says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from nestc.errors import Error
from nestc.measure import PEERS, convert, difference, open_peer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nestc" / "peers"


def need(peer: str) -> None:
    for package in {"ncnn": ("ncnn", "pnnx"), "mnn": ("MNN",)}[peer]:
        if convert.importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """x [1, 3, 20, 20] -> 3x3 convolutions (which both peers compute by Winograd) -> pooling -> 5 numbers."""
    from netbuilder import NetBuilder, save

    net = NetBuilder("small")
    x = net.conv(net.input("x", (1, 3, 20, 20)), 32, 3, activation="relu")
    x = net.conv(x, 32, 3, activation="relu")
    net.output(net.gemm(net.flatten(net.pool(x, "max", 2, 2)), 5), "y")
    save(net.model(), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("peer", ["ncnn", "mnn"])
def test_outputs_are_those_of_onnxruntime(peer: str, threads: int, network: Path, cache: Path) -> None:
    need(peer)
    inputs = {"x": np.random.default_rng(0).standard_normal((1, 3, 20, 20), dtype=np.float32)}
    expected = open_peer("onnxruntime", network, inputs, 1).outputs()
    engine = open_peer(peer, network, inputs, threads)
    engine.run()
    found = engine.outputs()
    assert found[0].shape == (1, 5) and difference(expected, found).max_rel < 1e-4
    # The converted model is kept, whole, under a name of its own.
    (kept,) = cache.iterdir()
    assert kept.name.startswith("small-") and not list(kept.glob("*.onnx"))
    before = [file.stat().st_mtime_ns for file in sorted(kept.iterdir())]
    assert difference(expected, open_peer(peer, network, inputs, threads).outputs()).max_rel < 1e-4
    assert [file.stat().st_mtime_ns for file in sorted(kept.iterdir())] == before


def test_kinds_of_tokens_become_constants_where_pnnx_needs_it(tmp_path: Path) -> None:
    """pnnx runs a model on random integers below 10, of which a table with two rows takes few."""
    need("ncnn")
    from netbuilder import NetBuilder, save

    net = NetBuilder("tokens")
    ids = net.input("ids", (1, 24), TensorProto.INT64)
    kinds = net.input("kinds", (1, 24), TensorProto.INT64)
    words = net.op("Gather", [net.normal((50, 8), 1.0), ids], (1, 24, 8))
    net.output(net.add(words, net.op("Gather", [net.normal((2, 8), 1.0), kinds], (1, 24, 8))), "y")
    save(net.model(), tmp_path / "tokens.onnx")
    random = np.random.default_rng(0)
    inputs = {"ids": random.integers(0, 50, (1, 24)), "kinds": random.integers(0, 2, (1, 24))}
    files = convert.ncnn_files(tmp_path / "tokens.onnx", inputs)
    assert list(files.inputs) == ["ids"] and files.frozen == ("kinds",)
    expected = open_peer("onnxruntime", tmp_path / "tokens.onnx", inputs, 1).outputs()
    found = open_peer("ncnn", tmp_path / "tokens.onnx", inputs, 1).outputs()
    assert difference(expected, found).max_rel < 1e-6


@pytest.mark.parametrize("peer", ["ncnn", "mnn"])
def test_a_converter_that_fails_is_told_in_its_words(peer: str, tmp_path: Path, cache: Path) -> None:
    need(peer)
    node = onnx.helper.make_node("NoSuchOp", ["x"], ["y"])
    info = [onnx.helper.make_tensor_value_info(name, 1, [2, 3]) for name in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", info[:1], info[1:]))
    onnx.save(model, str(tmp_path / "broken.onnx"))
    with pytest.raises(Error, match=r"pnnx|mnnconvert does not convert it|NoSuchOp"):
        open_peer(peer, tmp_path / "broken.onnx", {"x": np.zeros((2, 3), np.float32)}, 1)
    assert [entry for entry in cache.iterdir() if entry.name.startswith("tmp")] == []


def test_a_missing_converter_is_named(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise convert.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(convert.importlib.metadata, "version", version)
    with pytest.raises(Error, match="pnnx is not installed; pip install --no-deps pnnx"):
        convert.ncnn_files(network, {"x": np.zeros((1, 3, 20, 20), np.float32)})


class Fake:
    """An engine that gives what it is told to."""

    version = "1"

    def __init__(self, name: str, value: float) -> None:
        self.name = name
        self._outputs = [np.array([[1.0, value]], np.float32)]

    def run(self) -> object:
        return None

    def outputs(self) -> list[np.ndarray]:
        return self._outputs


def test_a_peer_that_computes_something_else_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    import peers

    values = {"nestc": 0.5, "onnxruntime": 0.5, "openvino": 0.501, "ncnn": float("nan"), "mnn": 0.9}

    def opened(engine: str, *_: Any) -> Fake:
        if engine == "openvino":
            raise Error("openvino cannot run it")
        return Fake(engine, values[engine])

    monkeypatch.setattr(peers, "_open", opened)
    monkeypatch.setattr(peers.zoo, "gflops", lambda name: 1.0)
    row = peers.measure(peers.Task("ds_cnn", "fp32", 1, 1, dict.fromkeys(values, Path("m.onnx"))))
    assert set(row["peers"]) == {"onnxruntime"} and row["errors"]["openvino"] == "fails: openvino cannot run it"
    assert row["errors"]["mnn"].startswith("fails: its outputs differ from onnxruntime's by 0.4 of their scale")
    assert row["errors"]["ncnn"].startswith("fails: its outputs differ from onnxruntime's by inf")
    assert row["max_rel_diff"] == 0 and row["same_decision"]
    assert row["ratio_to_best"] == row["peers"]["onnxruntime"] / row["nestc_ms"]


def test_peers_that_die_are_found_before(monkeypatch: pytest.MonkeyPatch) -> None:
    import peers
    from isolated import Lost

    tried: list[str] = []

    def run_isolated(function: Any, tasks: Any, jobs: int, timeout: float) -> Any:
        tried.append(tasks[0][0])
        yield tasks[0], Lost("the process died with status -11") if tasks[0][0] == "mnn" else ""

    monkeypatch.setattr(peers, "run_isolated", run_isolated)
    kept, errors = peers.usable_peers("magika", list(PEERS), 1, 1.0)
    assert kept == ["onnxruntime", "openvino", "ncnn"] and tried == ["ncnn", "mnn"]
    assert errors == {"mnn": "fails: the process died with status -11"}


def test_small_networks_have_a_mean_of_their_own() -> None:
    import peers

    def row(model: str, own: float, best: float, other: float) -> dict[str, Any]:
        known = {"nestc_ms": own, "peers": {"onnxruntime": other, "mnn": best}, "ratio_to_best": best / own}
        return {"model": model, "precision": "fp32", "threads": 1, "gflop": 1.0, **known}

    rows = [row("resnet18", 1.0, 2.0, 4.0), row("magika", 1.0, 3.0, 5.0), row("silero_vad_16k", 1.0, 8.0, 20.0)]
    result = peers.finish(rows, {1: {"fp32": 100.0}})
    assert result["geomean"]["fp32"] == pytest.approx(4.0)  # of 2 and 8
    assert result["geomean_small_to_onnxruntime"] == pytest.approx(10.0)  # of 5 and 20


def test_rows_where_no_models_are_named() -> None:
    import peers

    assert len(peers.plan(None, ["fp32"])) == 20
    assert {"resnet18", "ppocr_det", "vit_s16", "ds_cnn"} <= {name for name, _ in peers.plan(None, ["bf16"])}


def test_keyword_spotting_has_the_size_of_its_paper() -> None:
    import nets_vision
    import zoo

    model = nets_vision.ds_cnn()
    weights = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    # 22,604 with four numbers for each batch norm's channel, which are folded into a bias here.
    assert weights == 64 * 40 + 64 + 4 * (64 * 9 + 64 + 64 * 64 + 64) + 64 * 12 + 12
    assert zoo.inputs("ds_cnn")["input"].shape == (1, 1, 49, 10)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 9
