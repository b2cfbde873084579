"""A small builder that writes networks straight to ONNX with seeded random weights (or given ones), tracking shapes.

Weights are drawn from N(0, gain^2 / fan_in) (He et al. 2015, arXiv:1502.01852) with the gain of the activation that
follows, so that activations stay near unit variance: no denormals, no overflow, and decisions that are not ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Gain that keeps the second moment near one behind each activation (silu: for inputs somewhat above unit variance).
GAINS = {None: 1.0, "relu": math.sqrt(2.0), "relu6": math.sqrt(2.0), "silu": 1.41, "gelu": 1.54, "sigmoid": 1.0}

AttributeValue = int | float | str | Sequence[int] | Sequence[float]


@dataclass(frozen=True)
class Value:
    """A tensor of the network under construction: its name and static shape."""

    name: str
    shape: tuple[int, ...]


class NetBuilder:
    """Collects nodes and initializers in the order of the calls; `model()` gives a checked ONNX model."""

    def __init__(self, name: str, seed: int = 0, opset: int = 17) -> None:
        self.name = name
        self.opset = opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._serial = 0

    def fresh(self, stem: str) -> str:
        """A name that nothing else in this network has."""
        self._serial += 1
        return f"{stem}_{self._serial}"

    def input(
        self, name: str, shape: Sequence[int], dtype: int = TensorProto.FLOAT, dims: Sequence[str | int] | None = None
    ) -> Value:
        """Declare a graph input. The file says `dims` (which may hold symbols) if given, else `shape`."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(dims or shape)))
        return Value(name, tuple(shape))

    def output(self, value: Value, name: str, dims: Sequence[str | int] | None = None) -> None:
        """Declare `value` a graph output under `name`."""
        self.nodes.append(helper.make_node("Identity", [value.name], [name], name=f"output_{name}"))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims or value.shape)))

    def constant(self, array: np.ndarray, stem: str = "constant") -> Value:
        """Add an initializer."""
        name = self.fresh(stem)
        self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return Value(name, array.shape)

    def normal(self, shape: Sequence[int], std: float, stem: str = "weight") -> Value:
        """Add an initializer drawn from N(0, std^2), float32."""
        return self.constant(self.random.standard_normal(tuple(shape), dtype=np.float32) * np.float32(std), stem)

    def op(
        self, op_type: str, inputs: Sequence[Value | None], shape: Sequence[int], **attributes: AttributeValue
    ) -> Value:
        """Add a node of one output, whose shape the caller states."""
        name = self.fresh(op_type.lower())
        names = [v.name if v is not None else "" for v in inputs]
        node = helper.make_node(op_type, names, [name], name=f"node_{name}")
        node.attribute.extend(helper.make_attribute(key, attributes[key]) for key in sorted(attributes))
        self.nodes.append(node)
        return Value(name, tuple(shape))

    def activate(self, x: Value, kind: str | None) -> Value:
        """Apply an activation as PyTorch's exporter writes it."""
        if kind is None:
            return x
        if kind == "relu":
            return self.op("Relu", [x], x.shape)
        if kind == "relu6":
            return self.op("Clip", [x, self.scalar(0.0), self.scalar(6.0)], x.shape)
        if kind == "sigmoid":
            return self.op("Sigmoid", [x], x.shape)
        if kind == "silu":
            return self.op("Mul", [x, self.op("Sigmoid", [x], x.shape)], x.shape)
        if kind == "gelu":
            scaled = self.op("Div", [x, self.scalar(math.sqrt(2.0))], x.shape)
            erf = self.op("Erf", [scaled], x.shape)
            return self.op(
                "Mul",
                [self.op("Mul", [x, self.op("Add", [erf, self.scalar(1.0)], x.shape)], x.shape), self.scalar(0.5)],
                x.shape,
            )
        raise ValueError(f"unknown activation {kind!r}")

    def scalar(self, value: float) -> Value:
        """Add a float32 scalar initializer."""
        return self.constant(np.array(value, dtype=np.float32), "scalar")

    def integers(self, *values: int) -> Value:
        """Add a one-dimensional int64 initializer."""
        return self.constant(np.array(values, dtype=np.int64), "shape")

    def conv(
        self,
        x: Value,
        channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        pad: int | tuple[int, int] | None = None,
        groups: int = 1,
        activation: str | None = None,
        gain: float | None = None,
        weight: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        pads: tuple[int, int, int, int] | None = None,
        has_bias: bool = True,
    ) -> Value:
        """Convolution of an NCHW value (`pad` defaults to kernel // 2; `pads` is top, left, bottom, right)."""
        kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
        ph, pw = (kh // 2, kw // 2) if pad is None else (pad, pad) if isinstance(pad, int) else pad
        top, left, bottom, right = pads or (ph, pw, ph, pw)
        n, c, h, w = x.shape
        fan_in = c // groups * kh * kw
        if weight is None:
            std = (GAINS[activation] if gain is None else gain) / math.sqrt(fan_in)
            weight_value = self.normal((channels, c // groups, kh, kw), std)
            bias_value = self.normal((channels,), 0.05, "bias") if has_bias else None
        else:
            weight_value = self.constant(weight, "weight")
            bias_value = None if bias is None else self.constant(bias, "bias")
        shape = (n, channels, (h + top + bottom - kh) // stride + 1, (w + left + right - kw) // stride + 1)
        operands = [x, weight_value] if bias_value is None else [x, weight_value, bias_value]
        y = self.op(
            "Conv", operands, shape, kernel_shape=[kh, kw], strides=[stride, stride], group=groups,
            pads=[top, left, bottom, right], dilations=[1, 1],
        )  # fmt: skip
        return self.activate(y, activation)

    def batch_norm(
        self, x: Value, scale: np.ndarray, bias: np.ndarray, mean: np.ndarray, var: np.ndarray, epsilon: float
    ) -> Value:
        """BatchNormalization in inference form, left for the compiler to fold."""
        operands = [x, *(self.constant(a.astype(np.float32), "bn") for a in (scale, bias, mean, var))]
        return self.op("BatchNormalization", operands, x.shape, epsilon=epsilon)

    def pool(
        self, x: Value, kind: str, kernel: int, stride: int, pad: int = 0, ceil: bool = False, include_pad: bool = True
    ) -> Value:
        """MaxPool (`kind` "max") or AveragePool ("average") of an NCHW value."""
        n, c, h, w = x.shape
        shape = (n, c, *(_pooled(size, kernel, stride, pad, ceil) for size in (h, w)))
        attributes: dict[str, AttributeValue] = {
            "kernel_shape": [kernel, kernel], "strides": [stride, stride], "pads": [pad] * 4, "ceil_mode": int(ceil),
        }  # fmt: skip
        if kind == "max":
            return self.op("MaxPool", [x], shape, **attributes)
        return self.op("AveragePool", [x], shape, count_include_pad=int(include_pad), **attributes)

    def global_pool(self, x: Value) -> Value:
        """Mean over height and width, kept as 1x1."""
        return self.op("GlobalAveragePool", [x], (*x.shape[:2], 1, 1))

    def add(self, a: Value, b: Value) -> Value:
        """Sum of two values of one shape (or b a constant that broadcasts into a)."""
        return self.op("Add", [a, b], a.shape)

    def concat(self, values: Sequence[Value], axis: int = 1) -> Value:
        """Concatenation."""
        shape = list(values[0].shape)
        shape[axis] = sum(v.shape[axis] for v in values)
        return self.op("Concat", values, shape, axis=axis)

    def flatten(self, x: Value) -> Value:
        """All axes but the first become one."""
        return self.op("Flatten", [x], (x.shape[0], math.prod(x.shape[1:])), axis=1)

    def reshape(self, x: Value, target: Sequence[int], shape: Sequence[int]) -> Value:
        """Reshape to `target` (which may hold 0 and -1); `shape` is the outcome."""
        return self.op("Reshape", [x, self.integers(*target)], shape)

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        """Permute axes."""
        return self.op("Transpose", [x], [x.shape[p] for p in perm], perm=list(perm))

    def gemm(
        self,
        x: Value,
        features: int,
        activation: str | None = None,
        gain: float | None = None,
        weight: np.ndarray | None = None,
        bias: np.ndarray | None = None,
    ) -> Value:
        """Fully connected layer on a two-dimensional value, weights [features, inputs] as PyTorch keeps them."""
        std = (GAINS[activation] if gain is None else gain) / math.sqrt(x.shape[1])
        weight_value = self.normal((features, x.shape[1]), std) if weight is None else self.constant(weight, "weight")
        bias_value = self.normal((features,), 0.05, "bias") if bias is None else self.constant(bias, "bias")
        y = self.op("Gemm", [x, weight_value, bias_value], (x.shape[0], features), transB=1)
        return self.activate(y, activation)

    def linear(
        self,
        x: Value,
        features: int,
        activation: str | None = None,
        gain: float | None = None,
        weight: np.ndarray | None = None,
        bias: np.ndarray | None = None,
    ) -> Value:
        """Linear layer on the last axis: MatMul with [inputs, features] weights, then Add."""
        std = (GAINS[activation] if gain is None else gain) / math.sqrt(x.shape[-1])
        weight_value = self.normal((x.shape[-1], features), std) if weight is None else self.constant(weight, "weight")
        bias_value = self.normal((features,), 0.05, "bias") if bias is None else self.constant(bias, "bias")
        y = self.op("MatMul", [x, weight_value], (*x.shape[:-1], features))
        return self.activate(self.add(y, bias_value), activation)

    def layer_norm(
        self, x: Value, epsilon: float, scale: np.ndarray | None = None, bias: np.ndarray | None = None
    ) -> Value:
        """LayerNormalization over the last axis."""
        size = x.shape[-1]
        if scale is None:
            scale = 1.0 + 0.1 * self.random.standard_normal(size, dtype=np.float32)
        if bias is None:
            bias = 0.1 * self.random.standard_normal(size, dtype=np.float32)
        operands = [x, self.constant(scale, "ln_scale"), self.constant(bias, "ln_bias")]
        return self.op("LayerNormalization", operands, x.shape, axis=-1, epsilon=epsilon)

    def model(self) -> onnx.ModelProto:
        """The finished model, checked."""
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.initializers)
        model = helper.make_model(
            graph, producer_name="nestc-zoo", opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8
        )
        onnx.checker.check_model(model)
        return model


def _pooled(size: int, kernel: int, stride: int, pad: int, ceil: bool) -> int:
    """Output size of a pooling window along one axis, PyTorch's rule: no window may begin in the right padding."""
    span = size + 2 * pad - kernel
    count = (math.ceil(span / stride) if ceil else span // stride) + 1
    if ceil and (count - 1) * stride >= size + pad:
        count -= 1
    return count


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model under a temporary name first, so that a killed run leaves nothing half-written."""
    temporary = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(temporary))
    temporary.replace(path)
