"""Whole networks, from float ONNX to what simulated devices compute, bit for bit beside the independent reference."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from float_nets import NETS, SIZE
from reference import regions_of, run_qdq

import nestc
from nestc.quant.observe import with_outputs


def images(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"x": random.standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)} for _ in range(count)]


@cache
def quantized(name: str, granularity: str) -> nestc.Model:
    """The network in int8-pow2, with every rounded value as an output."""
    model, data = NETS[name](), images(4, seed=0)
    scheme = f"int8-pow2:granularity={granularity}"
    made = nestc.quantize(model, nestc.calibrate(model, data, threads=1), scheme, data=data, threads=1)
    rounded = [node.outputs[0].name or "" for node in made.ir.graph if node.op_type == "QuantizeLinear"]
    return with_outputs(made, rounded)


def check(name: str, granularity: str, target: str) -> None:
    model = quantized(name, granularity)
    executable = nestc.compile(model, targets=[target], threads=1)
    assert isinstance(executable, nestc.Executable)
    device = {region.name: region.device for region in executable.plan.regions}
    elsewhere = {op for region in executable.plan.regions if region.device != "vta" for op in region.ops}
    # The image becomes integers and the answer becomes real on the CPU, and bounds a channel (of `equalize`) stay there.
    assert elsewhere <= {"DequantizeLinear", "Gemm", "Min", "QuantizeLinear"}
    (image,) = images(1, seed=9)
    found = executable.run(image)
    expected = run_qdq(regions_of(model), image, lambda region: device[region.name] == "vta")
    compared = [key for key, array in found.items() if array.dtype == np.int8]
    assert len(compared) > 5
    for key in compared:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
        assert len(np.unique(found[key])) > 5, key


@pytest.mark.parametrize("name", NETS)
def test_scales_a_channel(name: str) -> None:
    check(name, "channel", "vta")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("residual", "vta"),
        ("inverted_residual", "vta"),
        ("bottleneck", "vta:count=2"),
        ("concatenations", "vta:config=zcu102_1x16"),
        ("preactivation", "vta:config=1x32x32"),
        ("efficient_lite", "vta:config=1x32x32,count=2"),
    ],
)
def test_scales_a_tensor(name: str, target: str) -> None:
    check(name, "tensor", target)
