"""A cache folder of its own for every test, small networks, and regions of the CPU target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nestc.driver import build, with_fallbacks
from nestc.importers.onnx import load
from nestc.targets.api import Partition
from nestc.targets.cpu.target import CpuTarget


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nestc"


def convolutions(path: Path, count: int = 2, channels: int = 16, size: int = 20) -> Path:
    """`count` equal 3x3 convolutions with a Relu each, then a product."""
    random = np.random.default_rng(3)
    nodes, weights, value = [], [], "x"
    for index in range(count):
        w = random.standard_normal((channels, channels, 3, 3)) / (3 * np.sqrt(channels))
        weights.append(numpy_helper.from_array(w.astype(np.float32), f"w{index}"))
        nodes.append(helper.make_node("Conv", [value, f"w{index}"], [f"c{index}"], pads=[1] * 4, name=f"conv{index}"))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], name=f"relu{index}"))
        value = f"r{index}"
    weights.append(numpy_helper.from_array(random.standard_normal((size, 24)).astype(np.float32), "m"))
    nodes.append(helper.make_node("MatMul", [value, "m"], ["y"], name="product"))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, size, size])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, channels, size, 24])]
    graph = helper.make_graph(nodes, "convolutions", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """Two convolutions of one geometry and a product."""
    return convolutions(tmp_path / "net.onnx")


@pytest.fixture
def partitions() -> Callable[[Path, CpuTarget], Sequence[Partition]]:
    """The CPU's partitions of a model."""

    def of(path: Path, target: CpuTarget) -> Sequence[Partition]:
        done = build(load(path), with_fallbacks([target], 1), threads=1, stop_after="plan")
        return [each for each in done.partitions if each.device == "cpu"]

    return of
