"""A small network on the CPU, and the same on a made-up pair of devices of which one is modelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import nestc
from nestc.bundle.artifact import Artifact
from nestc.bundle.bundle import Bundle, BundlePartition
from nestc.bundle.schema import DeviceSpec, TensorSpec
from nestc.partition.plan import Alternative, Plan, PlannedPartition, PlannedRegion, Transfer


@pytest.fixture(scope="session")
def network() -> onnx.ModelProto:
    """x [1, 3, 8, 8] -> Conv 3x3 (4 channels, padded) and Relu -> MaxPool 2x2 -> Flatten -> Gemm to 5."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("MaxPool", ["r"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "g", "h"], ["y"], "gemm"),
    ]
    random = np.random.default_rng(1)
    weights = {"w": (4, 3, 3, 3), "b": (4,), "g": (64, 5), "h": (5,)}
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [
            numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), key)
            for key, shape in weights.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="session")
def on_cpu(network: onnx.ModelProto) -> nestc.Executable:
    """The network on the CPU, with one thread."""
    executable = nestc.compile(network, threads=1)
    assert isinstance(executable, nestc.Executable)
    return executable


class Played:
    """What a report needs of an executable, with times that are made up: 10 us on the CPU, 40 us on an NPU."""

    threads = 1
    fallback_ops: Mapping[str, int] = {}

    def __init__(self, bundle: Bundle, plan: Plan) -> None:
        self.bundle, self.plan = bundle, plan
        self.inputs = {spec.name: (spec.dtype, tuple(spec.shape or ())) for spec in bundle.inputs}
        self.requests = 1

    def run(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Nothing is computed."""
        self.requests = 1

    def map(self, items: Iterable[object], in_flight: int) -> Iterable[None]:
        """Nothing is computed, several times."""
        self.requests = len(list(items))
        return [None] * self.requests

    def timeline(self) -> list[dict[str, Any]]:
        """An NPU partition, a tensor on its way, and a CPU partition, for each request a bit later."""
        rows: list[dict[str, Any]] = []
        names = [part.name for part in self.bundle.partitions]
        for request in range(self.requests):
            at = 40.0 * request
            rows += [
                {"device": "npu", "region": names[0], "start_us": at, "end_us": at + 40, "kind": "modelled"},
                {"device": "npu->cpu", "region": "p", "start_us": at + 40, "end_us": at + 45, "kind": "estimated"},
                {"device": "cpu", "region": names[1], "start_us": at + 45, "end_us": at + 55, "kind": "measured"},
            ]
            rows[-2]["bytes"] = 256
        return [{**row, "request": number // 3} for number, row in enumerate(rows)]

    def throughput(self) -> dict[str, Any]:
        """As of requests 40 us apart."""
        return {"per_second": 25000.0, "kind": "modelled"}

    def energy(self) -> list[dict[str, Any]]:
        """Of the NPU and the link; the CPU's is not known."""
        return [
            {"device": "npu", "joules": 2e-6, "kind": "modelled"},
            {"device": "npu->cpu", "joules": 1e-6, "kind": "estimated"},
            {"device": "cpu", "joules": None, "kind": None},
        ]

    def profile(self, *arrays: np.ndarray, runs: int) -> list[dict[str, Any]]:
        """The kernels of the CPU's partition: Flatten has none."""
        names = [part.name for part in self.bundle.partitions]
        return [
            {"partition": names[0], "device": "npu", "us": 40.0, "kind": "modelled"},
            {"partition": names[1], "device": "cpu", "origin": ("Gemm:gemm",), "us": 6.0, "team_us": None},
            {"partition": names[1], "device": "cpu", "origin": ("Gemm:gemm",), "us": 3.0, "team_us": None},
        ]


def planned(regions: Sequence[str]) -> Plan:
    """The first two regions on the NPU, the rest on the CPU."""
    ops = (("Conv", "Relu"), ("MaxPool",), ("Flatten",), ("Gemm",))
    costs = {"cpu": Alternative(0.05, "measured"), "npu": Alternative(0.02, "modelled")}
    return Plan(
        model="small",
        objective="latency",
        devices=("npu", "cpu", "host"),
        regions=tuple(
            PlannedRegion(
                name,
                "npu" if number < 2 else "cpu",
                ops[number],
                refusals={} if number < 2 else {"npu": "no <such> layer"},
                predicted_ms=0.02 if number < 2 else 0.005,
                kind="modelled" if number < 2 else "measured",
                costs=costs if number < 2 else {"cpu": Alternative(0.005)},
                reason="cheapest there, with its borders" if number < 2 else "",
            )
            for number, name in enumerate(regions)
        ),
        partitions=(
            PlannedPartition("npu_0", "npu", tuple(regions[:2]), ("x",), ("p",), 0.0, 0.04),
            PlannedPartition("cpu_1", "cpu", tuple(regions[2:]), ("p",), ("y",), 0.045, 0.05),
        ),
        transfers=(Transfer("p", "npu", "cpu", 256, 5.0, "estimated"),),
        predicted_ms=0.05,
        lower_bound_ms=0.045,
        single_device_ms={"cpu": 0.11},
        method="by cost",
    )


@pytest.fixture(scope="session")
def played(on_cpu: nestc.Executable) -> Callable[..., Played]:
    """The network on two devices; keywords replace fields of the plan."""

    def make(**changes: Any) -> Played:
        (whole,) = on_cpu.bundle.partitions
        layers = [{"name": whole.regions[0], "cycles": 3000}, {"name": f"{whole.regions[1]}.rows", "cycles": 1000}]
        timing = {"kind": "modelled", "cycles": 4000, "seconds": 4e-5, "energy_joules": 2e-6, "layers": layers}
        metadata = {
            "timing": timing, "clock_hz": 1e8, "bus_bits": 64, "count": 1, "preset": "made_up",
            "config": {"LOG_BATCH": 0, "LOG_BLOCK": 4},
        }  # fmt: skip
        bundle = dataclasses.replace(
            on_cpu.bundle,
            partitions=(
                BundlePartition(
                    "npu_0", "npu", ("x",), (TensorSpec("p", "float32", (1, 4, 4, 4)),),
                    Artifact("vta", {}, {}, metadata), whole.regions[:2],
                ),
                BundlePartition("cpu_1", "cpu", ("p",), whole.outputs, whole.artifact, whole.regions[2:]),
            ),
            devices=(DeviceSpec("npu", "npu", 1e-6, 2e-6, 1e9, 0.0, "estimated"),),
        )  # fmt: skip
        return Played(bundle, dataclasses.replace(planned(whole.regions), **changes))

    return make
