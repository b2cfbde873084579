"""The benchmark of VTA on a network small enough for a test."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import nestc
from nestc.graph.region import Op, Region, TensorType


def small() -> tuple[nestc.Model, dict[str, np.ndarray]]:
    """A quantized network: two convolutions, a pool in front and behind, a classifier; and an input."""
    from netbuilder import NetBuilder

    net = NetBuilder("small", seed=1)
    x = net.pool(net.conv(net.input("input", (1, 3, 20, 20)), 8, 3, 2, activation="relu"), "max", 2, 2)
    x = net.add(net.conv(net.conv(x, 24, 3, activation="relu"), 8, 1), x)
    net.output(net.gemm(net.flatten(net.global_pool(net.activate(x, "relu"))), 5), "output")
    random = np.random.default_rng(2)
    data = [{"input": random.standard_normal((1, 3, 20, 20)).astype(np.float32)} for _ in range(3)]
    model = nestc.load(net.model())
    return nestc.quantize(model, nestc.calibrate(model, data, threads=1), "int8-pow2", threads=1), data[0]


def test_a_network_layer_by_layer() -> None:
    from vta_network import run_network

    model, inputs = small()
    result = run_network(model, inputs, "vta", 1, True)
    assert [row.exact for row in result.layers] == [True] * len(result.layers)
    assert [row.what for row in result.layers] == [
        "MaxPool 8 5x5",
        "Conv 3x3 8>24 5x5",
        "Conv 1x1 24>8 5x5",
        "GlobalAveragePool 8 1x1",
    ]
    assert [row.ideal for row in result.layers] == [0, 2 * 9 * 25, 2 * 25, 0] and result.ideal == 20 * 25
    assert result.cycles == sum(row.cycles for row in result.layers)
    assert result.comparable == result.cycles - result.layers[0].cycles - result.layers[-1].cycles
    assert len(result.on_cpu) == 3 and all(": " in each for each in result.on_cpu)
    assert set(result.facts["utilization"]) == {"load", "compute", "store"}


def test_a_wrong_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import vta_network

    class Wrong(vta_network.ExactGraph):
        def run(self, wanted, given):
            found = super().run(wanted, given)
            name = list(found)[-1]
            return {**found, name: found[name] ^ 1}

    monkeypatch.setattr(vta_network, "ExactGraph", Wrong)
    model, inputs = small()
    assert [row.exact for row in vta_network.run_network(model, inputs, "vta", 1, True).layers].count(False) == 1


@pytest.mark.parametrize(
    ("weight", "out", "group", "cycles"),
    [
        ((64, 64, 3, 3), (1, 64, 56, 56), 1, 451_584),
        ((20, 17, 1, 1), (1, 20, 5, 5), 1, 4 * 25),
        ((40, 1, 5, 5), (1, 40, 7, 7), 40, 3 * 25 * 49),
        ((32, 8, 1, 1), (1, 32, 2, 2), 4, 2 * 4),  # two groups a block
        ((40, 1, 1, 1), (1, 40, 7, 7), 40, 0),  # a batch normalization
    ],
)
def test_ideal_cycles(weight: tuple[int, ...], out: tuple[int, ...], group: int, cycles: int) -> None:
    from vta_network import ideal_cycles

    op = Op("Conv", ("x", "w"), ("y",), {"group": group})
    types = {"w": TensorType("int8", weight), "y": TensorType("float32", out)}
    region = Region("r", "Conv", (op,), ("x",), ("y",), types, {})
    assert ideal_cycles(op, region, 1, 16) == cycles


def test_the_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import vta
    from vta_network import LayerRow, NetworkResult

    layers = [LayerRow("conv", "Conv 3x3 16>16 4x4", 200, 144, True), LayerRow("pool", "MaxPool", 50, 0, None, True)]
    facts = {
        "seconds": 2.5e-6, "energy_joules": 1e-6, "dram_bytes_read": 10, "dram_bytes_written": 5,
        "utilization": {"compute": 0.5}, "gemm_utilization": 0.4, "compile_seconds": 1.0, "simulation_seconds": 0.1,
    }  # fmt: skip
    result = NetworkResult(layers, 250, 200, 144, facts, ("r0: reason",))
    monkeypatch.setattr(vta, "run_network", lambda *_: result)
    monkeypatch.setattr(vta.quantized_zoo, "path", lambda *_: "m.onnx")
    monkeypatch.setattr(vta.zoo, "path", lambda *_: "m.onnx")
    monkeypatch.setattr(vta.nestc, "load", lambda *_: None)
    assert vta.main(["--models", "resnet18", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in answer["rows"]] == ["conv", "pool"]
    assert set(answer["rows"][0]) >= {"model", "layer", "cycles", "ideal_cycles", "published_cycles", "bit_exact"}
    totals = answer["totals"]["resnet18"]
    assert (totals["cycles"], totals["ideal_cycles"], totals["published_cycles"]) == (250, 144, 7_729_601)
    assert totals["comparable_cycles"] == 200 and totals["bit_exact"] is True
    assert answer["context"]["kind"] == "simulated"
    assert vta.main(["--models", "resnet18", "--layers", "c*", "--config", "1x32x32"]) == 0
    printed = capsys.readouterr().out
    assert "conv " in printed and "MaxPool" not in printed and "r0: reason" in printed and "7,729,601" not in printed
    monkeypatch.setattr(vta, "run_network", lambda *_: dataclasses.replace(result, layers=()))
    assert vta.main(["--models", "resnet18"]) == 0


def test_bad_input_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    import vta

    assert vta.main(["--models", "nope"]) == 2
    assert "no model 'nope'" in capsys.readouterr().err
    assert vta.main(["--models", "resnet18", "--config", "nope"]) == 2
    assert "nope" in capsys.readouterr().err
