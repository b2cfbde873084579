"""Derive scales, zero points and integer weights of all quantized tensors from a profile and the chosen schemes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from nestc.errors import QuantizationError
from nestc.graph.kinds import is_constant
from nestc.graph.model import Model
from nestc.graph.passes.rewrite import array, operand
from nestc.quant.choose import Assignment, data_inputs
from nestc.quant.parameters import Activation, Parameters, Weight
from nestc.quant.profile import Profile
from nestc.quant.scheme import RECURRENT, WEIGHTED, Format, Scheme
from nestc.quant.threshold import scale_zero_point, thresholds
from nestc.quant.weights import SMALLEST_SCALE, round_weights, weight_scales

Key = tuple[str, Format]

BIAS_LIMIT = 2**30
"""Largest bias, in units of its scale, that is left as it is; half of what fits, so that tools may still correct it."""

BIAS_BITS = 24
"""Precision of the bias of a channel whose weights are all zero, and whose scale is therefore free."""

CONCAT_SPREAD = 2.0
"""Operands of Concat share the scale of the result where that is at most so many times their own (a bit of theirs)."""


def derive(prepared: Model, profile: Profile, assignment: Assignment) -> Parameters:
    """The parameters of every tensor that the assignment quantizes.

    Both sides of operators that only move elements get the same; so do the operands and the result of Concat where no
    operand loses more than a bit by it. Raises QuantizationError if the profile lacks a tensor.
    """
    parameters = Parameters()
    nodes = [(node, assignment.of(node)) for node in prepared.ir.graph]
    wanted: dict[Key, str] = {}
    for node, decision in nodes:
        scheme = decision.scheme
        if decision.role in ("float", "tail") or scheme is None or scheme.activation is None:
            continue
        for name in _activations(node):
            wanted.setdefault((name, scheme.activation), scheme.method or profile.method)
        if node.name in assignment.stored and scheme.integer:
            result = assignment.result(node)
            name = result.name or ""
            # Outputs of the model stay float, and what was not observed has no range.
            if not result.is_graph_output() and name in profile.tensors:
                parameters.stored[name] = scheme.activation
                wanted.setdefault((name, scheme.activation), scheme.method or profile.method)
    ranges = {key: _range(key, profile, method) for key, method in wanted.items() if not key[1].is_float}
    groups = _Groups({key: key for key in ranges})
    for node, decision in nodes:
        if decision.scheme is not None and decision.scheme.activation is not None:
            _join(node, decision.role, decision.scheme.activation, groups, ranges)
    for key in wanted:
        if key[1].is_float:
            parameters.activations[key] = Activation(*key, np.float32(1), 0)
            continue
        members = groups.members(key)
        low, high = min(ranges[each][0] for each in members), max(ranges[each][1] for each in members)
        scale, zero_point = scale_zero_point(low, high, key[1])
        parameters.activations[key] = Activation(*key, np.float32(scale), int(zero_point))
    for node, decision in nodes:
        if decision.scheme is None or decision.role == "tail":
            continue
        for index in data_inputs(node):
            value = operand(node, index)
            if value is not None and is_constant(value):
                weight = _weight(node, index, value, decision.scheme)
                parameters.weights[weight.node, index] = weight
        _bias(node, decision.scheme, parameters)
    return parameters


def quantized_input(node: ir.Node, scheme: Scheme, parameters: Parameters) -> Activation | None:
    """The parameters of a product's one activation, None if it has none or two."""
    names = list(_activations(node))
    if len(names) != 1 or scheme.activation is None or scheme.activation.is_float:
        return None
    return parameters.activations.get((names[0], scheme.activation))


def contraction_axis(node: ir.Node, rank: int) -> int:
    """The axis of the right operand of MatMul or Gemm that is summed over."""
    if node.op_type == "Gemm":
        return 1 if node.attributes.get_int("transB", 0) else 0
    return max(rank - 2, 0)


def channel_axis(node: ir.Node, index: int, rank: int) -> int | None:
    """The axis of a weight whose slices make one output channel each; None if a scale a slice has no such meaning."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        # With groups a slice along axis 1 holds weights of one channel of every group.
        return 1 if node.attributes.get_int("group", 1) == 1 else None
    if index != 1 or rank < 2:
        return None
    return rank - 1 if node.op_type == "MatMul" else 1 - contraction_axis(node, rank)


def _activations(node: ir.Node) -> Iterator[str]:
    """Names of the data inputs that are no constants."""
    for index in data_inputs(node):
        value = operand(node, index)
        if value is not None and value.name and not is_constant(value):
            yield value.name


def _range(key: Key, profile: Profile, method: str) -> tuple[float, float]:
    name, format = key
    if name not in profile.tensors:
        raise QuantizationError(f"tensor {name!r} is to be quantized and is not in the profile; calibrate again")
    return thresholds(profile.tensors[name], format, method)


@dataclass
class _Groups:
    """Tensors that share parameters: a forest of parents (union by linking)."""

    parents: dict[Key, Key] = field(default_factory=dict[Key, Key])

    def root(self, key: Key) -> Key:
        while self.parents[key] != key:
            key = self.parents[key]
        return key

    def join(self, one: Key, other: Key) -> None:
        if one in self.parents and other in self.parents:
            self.parents[self.root(other)] = self.root(one)

    def members(self, key: Key) -> list[Key]:
        root = self.root(key)
        return [each for each in self.parents if self.root(each) == root]


def _join(node: ir.Node, role: str, format: Format, groups: _Groups, ranges: dict[Key, tuple[float, float]]) -> None:
    """Let the tensors on both sides of a node share parameters if it can run on integers only so."""
    outputs = [(value.name or "", format) for value in node.outputs]
    if role == "moving":
        for output in outputs:
            groups.join((operand_name(node), format), output)
    if role != "active" or node.op_type != "Concat" or outputs[0] not in ranges:
        return
    inputs = [(name, format) for name in _activations(node)]
    width = ranges[outputs[0]][1] - ranges[outputs[0]][0]
    if all(width <= CONCAT_SPREAD * (ranges[key][1] - ranges[key][0]) for key in inputs):
        for key in inputs:
            groups.join(outputs[0], key)


def operand_name(node: ir.Node) -> str:
    """The name of the first input."""
    value = operand(node, 0)
    return "" if value is None else value.name or ""


def _weight(node: ir.Node, index: int, value: ir.Value, scheme: Scheme) -> Weight:
    """A constant operand rounded to the nearest, in the format of weights, or of activations if it stands for one."""
    values = array(value)
    assert values is not None
    values = values.astype(np.float32)
    name, tensor = node.name or "", value.name or ""
    if node.op_type not in WEIGHTED | RECURRENT:
        assert scheme.activation is not None
        low, high = min(float(values.min(initial=0.0)), 0.0), max(float(values.max(initial=0.0)), 0.0)
        step, zero = scale_zero_point(low, high, scheme.activation)
        rounded = np.clip(np.rint(values / np.float32(step)) + zero, scheme.activation.low, scheme.activation.high)
        return Weight(
            name, index, tensor, scheme.activation, 0, np.asarray(step, np.float32),
            rounded.astype(scheme.activation.dtype), int(zero),
        )  # fmt: skip
    format = scheme.weight
    if format.is_float:
        return Weight(name, index, tensor, format, 0, np.asarray(1, np.float32), values)
    axis = channel_axis(node, index, values.ndim)
    if format.block:
        axis = contraction_axis(node, values.ndim)
        # One block that is longer than the axis is as long as the axis.
        format = dataclasses.replace(format, block=min(format.block, values.shape[axis]))
    elif axis is None:
        format = dataclasses.replace(format, per_channel=False)
    scale = weight_scales(values, format, axis or 0, scheme.weight_method)
    weight = Weight(name, index, tensor, format, axis or 0, scale, values)
    weight.values = round_weights(values, weight.expanded(), format)
    return weight


def _bias(node: ir.Node, scheme: Scheme, parameters: Parameters) -> None:
    """Note the bias of a product that can be added to its int32 sums; enlarge scales of weights for which it cannot."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or not scheme.integer:
        return
    weight = parameters.weights[node.name or "", 1]
    given = array(operand(node, 2))
    channels = _channels(node, weight)
    bias = np.zeros(channels, np.float32) if given is None else _vector(given, channels)
    if bias is None or not _unscaled(node):
        return
    source = quantized_input(node, scheme, parameters)
    assert source is not None
    _enlarge(weight, bias, source.scale, operand(node, 1))
    if given is not None:
        parameters.biases[node.name or ""] = bias


def _enlarge(weight: Weight, bias: np.ndarray, input_scale: np.float32, value: ir.Value | None) -> None:
    """Enlarge the scales of channels whose bias would not fit int32, or whose weights are all zero."""
    if weight.format.block:
        return
    largest = np.abs(bias) if weight.scale.ndim else np.abs(bias).max(initial=0.0)
    step = np.float64(input_scale)
    needed = largest / (step * BIAS_LIMIT)
    free = _zero_channels(weight)
    if weight.scale.ndim or free.all():
        chosen = np.where(largest > 0, largest / (step * 2.0**BIAS_BITS), 1.0)
        scale = np.where(free if weight.scale.ndim else free.all(), chosen, np.maximum(weight.scale, needed))
    else:
        scale = np.maximum(weight.scale, needed)
    if weight.format.pow2:
        scale = np.exp2(np.ceil(np.log2(scale)))
    scale = np.maximum(scale.astype(np.float32), SMALLEST_SCALE)
    if np.array_equal(scale, weight.scale):
        return
    values = array(value)
    assert values is not None
    weight.scale = scale
    weight.values = round_weights(values.astype(np.float32), weight.expanded(), weight.format)


def _zero_channels(weight: Weight) -> np.ndarray:
    """Whether all weights of each channel (of the whole tensor, if it has one scale) are zero."""
    if not weight.scale.ndim:
        return np.asarray(not weight.values.any())
    rows = np.moveaxis(weight.values, weight.axis, 0).reshape(weight.values.shape[weight.axis], -1)
    return np.asarray(~rows.any(axis=1))


def _channels(node: ir.Node, weight: Weight) -> int:
    shape = weight.values.shape
    if node.op_type == "Conv":
        return shape[0]
    if node.op_type == "ConvTranspose":
        return shape[1] * node.attributes.get_int("group", 1)
    return shape[1 - contraction_axis(node, 2)]


def _vector(bias: np.ndarray, channels: int) -> np.ndarray | None:
    """The bias as (channels,), None if it also varies along another axis."""
    if bias.size not in (1, channels) or (bias.ndim == 2 and bias.shape[0] != 1):
        return None
    return np.broadcast_to(bias.astype(np.float32).reshape(-1), (channels,)).copy()


def _unscaled(node: ir.Node) -> bool:
    """Whether a Gemm adds its bias as it is to the plain product."""
    return node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0
