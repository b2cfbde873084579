"""Small float networks that are quantized to bfloat16, and what a region means in float64, for the tests of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import nestc
from nestc.driver import build, with_fallbacks
from nestc.graph.region import Region
from nestc.targets import resolve

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Net:
    """A network under construction; values are names, constants come from a seeded generator."""

    def __init__(self, seed: int = 0, opset: int = 20) -> None:
        self.random = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, shape: Sequence[int], dtype: int = TensorProto.FLOAT) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"k{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def matrix(self, *shape: int, dtype: Any = np.float32) -> str:
        fan_in = max(shape[-2:], default=1)
        return self.constant(self.random.standard_normal(shape) / np.sqrt(fan_in), dtype)

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n_{name}", **attributes))
        return name

    def float_model(self, *outputs: str, dtype: int = TensorProto.FLOAT) -> nestc.Model:
        values = [helper.make_tensor_value_info(name, dtype, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, values, self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)
        return nestc.load(onnx.shape_inference.infer_shapes(proto))

    def model(self, *outputs: str) -> nestc.Model:
        """The network in scheme bf16."""
        return nestc.quantize(self.float_model(*outputs), None, scheme="bf16")


def regions(model: nestc.Model) -> list[Region]:
    """The regions that the compiler forms of a model."""
    done = build(model, with_fallbacks(resolve(["cpu"]), 1), stop_after="plan")
    return [claim.region for claim in done.claims]


def products(model: nestc.Model) -> list[Region]:
    """Those with an anchor."""
    return [region for region in regions(model) if region.anchor not in (None, "view")]


def on_cpu(model: nestc.Model, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the CPU target says: sums in float32."""
    return nestc.compile(model, targets=["cpu"], threads=1).run(dict(inputs))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over that of what is expected."""
    difference = np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))
    return float(difference / np.linalg.norm(expected.astype(np.float64)))
