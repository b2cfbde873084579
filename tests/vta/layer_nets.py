"""Small quantized graphs for the tests of layers, and their comparison with the independent reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from reference import regions_of, run_region

import nestc
from nestc.graph.region import Region
from nestc.graph.regions import form
from nestc.graph.regions import regions as read_regions
from nestc.runtime.vta.config import VtaConfig
from nestc.targets.vta.evaluate import evaluate, packed
from nestc.targets.vta.layer import Layer
from nestc.targets.vta.layers import Alias, layers_of, refusal

PYNQ = VtaConfig()


class Graph:
    """A graph under construction. Integer values carry the exponent of their scale; real ones come from `real`."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def name(self, kind: str) -> str:
        return f"{kind}{len(self.nodes)}_{len(self.weights)}"

    def constant(self, array: np.ndarray) -> str:
        name = self.name("k")
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def input(self, shape: tuple[int, ...], dtype: int = TensorProto.INT8) -> str:
        """An integer input."""
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        self.shapes[name] = shape
        return name

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Any operator."""
        names = [self.name(op.lower()) + (f".{i}" if i else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def real(self, name: str, exponent: int) -> str:
        """DequantizeLinear of an int8 value."""
        scale, zero = self.constant(np.float32(2.0**exponent)), self.constant(np.int8(0))
        return self.node("DequantizeLinear", name, scale, zero)

    def parameter(self, array: np.ndarray, exponents: Any, axis: int = 0) -> str:
        """A dequantized constant; exponents of the scale: one, or one along `axis`."""
        scales = (2.0 ** np.asarray(exponents)).astype(np.float32)
        return self.node("DequantizeLinear", self.constant(array), self.constant(scales), axis=axis)

    def weight(self, shape: tuple[int, ...], exponents: Any, axis: int = 0, largest: int = 127) -> str:
        """Random int8 weights."""
        return self.parameter(self.random.integers(-largest, largest + 1, shape).astype(np.int8), exponents, axis)

    def bias(self, exponents: Any, count: int, largest: int = 5000) -> str:
        """A random int32 bias."""
        return self.parameter(self.random.integers(-largest, largest + 1, count).astype(np.int32), exponents)

    def quantize(self, name: str, exponent: int) -> str:
        scale, zero = self.constant(np.float32(2.0**exponent)), self.constant(np.int8(0))
        return self.node("QuantizeLinear", name, scale, zero)

    def model(self, *outputs: str, dtype: int = TensorProto.INT8) -> nestc.Model:
        """The finished model."""
        made = [helper.make_tensor_value_info(name, dtype, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "small", self.inputs, made, self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
        onnx.checker.check_model(inferred)
        return nestc.load(inferred)


def regions(model: nestc.Model) -> list[Region]:
    """The regions of a model as it is written, without the passes that improve a graph (they take most of a test)."""
    return read_regions(form(model))


def check(model: nestc.Model, config: VtaConfig = PYNQ, seed: int = 0, optimised: bool = False) -> list[Layer]:
    """Every region is taken, and its layers give the bits of the reference, for random and for extreme inputs."""
    found = regions_of(model) if optimised else regions(model)
    layers = [(region, layers_of(region, config)) for region in found]
    for extreme in (False, True):
        values = inputs_of(model, seed, extreme)
        for region, made in layers:
            assert refusal(region, config) is None
            assert not region.inputs or made[-1]
            run_region(region, values)
            compare(region, made, values)
    return [layer for _, made in layers for layer in made if isinstance(layer, Layer)]


def inputs_of(model: nestc.Model, seed: int, extreme: bool = False) -> dict[str, np.ndarray]:
    """Random inputs of int8 models; extreme ones are -128 and 127 only."""
    random = np.random.default_rng(seed)
    values: dict[str, np.ndarray] = {}
    for name, (_, shape) in model.inputs.items():
        drawn = random.integers(-128, 128, shape)
        values[name] = (np.where(drawn < 0, -128, 127) if extreme else drawn).astype(np.int8)
    return values


def compare(region: Region, made: tuple[Layer | Alias, ...], values: dict[str, np.ndarray]) -> None:
    """The layers of a region against the values of the reference."""
    own: dict[str, np.ndarray] = {name: values[name] for name in region.inputs}
    for layer in made:
        if isinstance(layer, Alias):
            assert np.array_equal(values[layer.name].reshape(-1), values[layer.source].reshape(-1))
            continue
        assert set(layer.sources) <= set(own)
        assert layer.steps and type(layer.steps[0]).__name__ == "Init"
        shape = region.types[layer.output.name].shape
        own[layer.output.name] = packed(evaluate(layer, own), shape)
        np.testing.assert_array_equal(own[layer.output.name], values[layer.output.name], err_msg=layer.name)
    assert set(region.outputs) <= set(own) | {each.name for each in made if isinstance(each, Alias)}


def reasons(model: nestc.Model, config: VtaConfig = PYNQ) -> list[str]:
    """Why regions of a model are refused."""
    return [reason for region in regions(model) if (reason := refusal(region, config)) is not None]
