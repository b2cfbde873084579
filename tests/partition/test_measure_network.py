"""The meter: a network on the CPU, and on the simulators."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest
from partition_fakes import (
    meter,
)

import nestc
from nestc.graph import pipeline
from nestc.graph.regions import form, regions, submodel
from nestc.partition.match import takes
from nestc.partition.repeat import LEAST_SECONDS
from nestc.partition.store import Key
from nestc.targets import make
from nestc.targets.api import Target


def small_net() -> nestc.Model:
    """A convolution with Relu, a mean over places, and a matrix product, in float32."""
    random = np.random.default_rng(0)
    arrays = {
        "w": random.standard_normal((16, 16, 3, 3)) / 12,
        "b": random.standard_normal(16) / 4,
        "m": random.standard_normal((16, 64)) / 4,
    }
    nodes = [
        oh.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1] * 4),
        oh.make_node("Relu", ["c"], ["r"], "relu"),
        oh.make_node("GlobalAveragePool", ["r"], ["g"], "mean"),
        oh.make_node("Flatten", ["g"], ["f"], "flatten"),
        oh.make_node("MatMul", ["f", "m"], ["y"], "product"),
    ]
    weights = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    ends = [oh.make_tensor_value_info("x", 1, (1, 16, 8, 8))], [oh.make_tensor_value_info("y", 1, (1, 64))]
    graph = oh.make_graph(nodes, "net", *ends, weights)
    return nestc.load(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 20)], ir_version=9))


def quantized(scheme: str) -> nestc.Model:
    net = small_net()
    if scheme == "bf16":
        return nestc.quantize(net, None, scheme=scheme)
    images = [{"x": np.random.default_rng(seed).standard_normal((1, 16, 8, 8)).astype(np.float32)} for seed in range(4)]
    return nestc.quantize(net, nestc.calibrate(net, images), scheme=scheme)


@pytest.mark.parametrize(
    ("text", "scheme", "kind"),
    [("cpu:threads=1", "int8-pow2", "measured"), ("vta", "int8-pow2", "modelled"), ("aim", "bf16", "modelled")],
)
def test_a_network_is_measured_where_its_regions_are_taken(tmp_path: Path, text: str, scheme: str, kind: str) -> None:
    target: Target = make(text)
    formed = form(pipeline.optimize(quantized(scheme)))
    taken = [region for region in regions(formed) if takes(target, region)]
    assert taken

    def models(names: Sequence[str]) -> ir.Model:
        return submodel(formed, names)

    measured = meter(tmp_path)
    alone = {region.name: measured.region(target, region, models) for region in taken}
    for region in taken:
        entry = alone[region.name]
        assert entry.refusal is None and entry.kind == kind and entry.seconds > 0
        if kind == "modelled":  # a value that only gets another shape takes none
            assert entry.energy_kind == "modelled" and entry.joules is not None
            assert entry.joules > 0 or entry.seconds == LEAST_SECONDS
        else:
            assert entry.energy_kind == "estimated" and (entry.joules or 0.0) == target.machine.watts * entry.seconds
        assert entry.bytes > 0 or not region.constants
    launch = measured.launch(target)
    assert launch.kind == "measured" if kind == "measured" else launch.kind != "measured"
    if text.startswith("cpu"):
        chain = measured.chain(target, taken, models)
        assert list(chain) == list(alone) and all(entry.seconds > 0 for entry in chain.values())
        assert len(taken) == len(regions(formed))
    again = meter(tmp_path)
    kept = [again.store.get(Key(again._hash(region, models), again._fingerprint(target))) for region in taken]
    assert [entry and entry.seconds for entry in kept] == [alone[region.name].seconds for region in taken]
