"""Regions of quantized graphs as VTA layers: what each operator adds to a sum, and why some regions are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np

from nestc.graph.kinds import VIEWS
from nestc.graph.region import Op, Region
from nestc.runtime.vta.config import VtaConfig
from nestc.targets.vta.layer import FeatureMap, Init, Layer
from nestc.targets.vta.layers_linear import convolution, matrix_product
from nestc.targets.vta.layers_moves import concatenated, elsewhere, flattened, is_alias, moved
from nestc.targets.vta.layers_pool import average, is_spatial_mean, maximum
from nestc.targets.vta.layers_size import require_room
from nestc.targets.vta.layers_steps import packed
from nestc.targets.vta.layers_sum import Chain, Factor, Sum, lift, output_map, quantized, settled
from nestc.targets.vta.layers_values import (
    Constant,
    Reals,
    Refused,
    Source,
    Term,
    constant_of,
    feature_map,
    scale_of,
    spread,
)
from nestc.targets.vta.rows import by_rows, rank3

Value: TypeAlias = Source | Chain | Sum | Constant


@dataclass(frozen=True)
class Alias:
    """A value that is another one under a new shape: both lie alike in memory."""

    name: str
    source: str


def layers_of(region: Region, config: VtaConfig, rows: frozenset[str] = frozenset()) -> tuple[Layer | Alias, ...]:
    """The layers that compute a region, in order; values between them are new maps. Raises Refused with the reason.

    ``rows``: values of three axes that lie as rows of a matrix (see `rows.row_values`).
    """
    if rows.intersection(rank3(region)):
        region = by_rows(region) or region
    alias = alias_of(region)
    if alias is not None:
        return (alias,)
    return tuple(_layer(chain, region, i, config) for i, chain in enumerate(_walked(region, config)))


def refusal(region: Region, config: VtaConfig) -> str | None:
    """Why VTA does not take a region, in words; None if `layers_of` gives its layers."""
    if not needs_rows(region, config):
        return _refusal(region, config)
    lying = by_rows(region)
    return _refusal(region if lying is None else lying, config)


def needs_rows(region: Region, config: VtaConfig) -> bool:
    """Whether values of three axes have to lie as rows of a matrix for VTA to take the region."""
    if not rank3(region):
        return False
    if any(op.op_type == "MatMul" and not op.domain for op in region.ops):
        return True
    lying = by_rows(region)
    return lying is not None and _refusal(region, config) is not None and _refusal(lying, config) is None


def _refusal(region: Region, config: VtaConfig) -> str | None:
    try:
        if alias_of(region) is None:
            for chain in _walked(region, config):
                require_room(chain.steps, chain.maps, config)
    except Refused as reason:
        return str(reason)
    return None


def alias_of(region: Region) -> Alias | None:
    """The region as another name of its input, if it only gives that a shape which lies alike in memory."""
    if len(region.inputs) != 1 or len(region.outputs) != 1 or not is_alias(region):
        return None
    return Alias(region.outputs[0], region.inputs[0])


def _layer(chain: Chain, region: Region, index: int, config: VtaConfig) -> Layer:
    sources: dict[str, FeatureMap] = dict(chain.maps)
    sources.update({step.source.name: step.source for step in chain.steps if isinstance(step, Term)})
    channels = chain.shape[1]
    steps = tuple(packed(s, channels, config.block) if isinstance(s, Term) else s for s in chain.steps)
    name = region.name if index == 0 else f"{region.name}.{index}"
    return Layer(name, output_map(chain), sources, steps, region.origin)


def _walked(region: Region, config: VtaConfig) -> tuple[Chain, ...]:
    """What the region computes, a chain for each layer, in order. Raises Refused with the reason."""
    types = {name: region.types[name].dtype for name in (*region.inputs, *region.outputs)}
    if "int8" not in types.values():
        named = ", ".join(sorted(set(types.values())))
        raise Refused(f"its values are {named}, and VTA computes on int8: quantize with scheme int8-pow2")
    for name in region.outputs:
        if types[name] != "int8":
            raise Refused(f"its result {name!r} is {types[name]}, not quantized, and VTA stores int8")
    return _Walk(region, config).run()


class _Walk:
    """State of one reading: what each value is, and the chains that have become layers."""

    def __init__(self, region: Region, config: VtaConfig) -> None:
        self.region = region
        self.block = config.block
        self.values: dict[str, Value] = {}
        self.made: list[Chain] = []

    def run(self) -> tuple[Chain, ...]:
        for op in self.region.ops:
            handler = None if op.domain else _HANDLERS.get(op.op_type)
            if handler is None:
                raise Refused(_unknown(op))
            if op.op_type not in _ON_INTEGERS and self.region.types[op.outputs[0]].dtype != "float32":
                dtype = self.region.types[op.outputs[0]].dtype
                raise Refused(f"{op.op_type} (node {op.name!r}) is computed on {dtype}, not on quantized numbers")
            results = handler(self, op)
            for name, value in zip(op.outputs, results if isinstance(results, list) else [results], strict=False):
                self.values[name] = self.stored(name, value)
        return tuple(self.made)

    def stored(self, name: str, value: Value) -> Value:
        """A result, as integers if it is int8; one that is used outside the region becomes a map in memory."""
        if isinstance(value, Sum) and self.region.types[name].dtype == "int8":
            value = self.requantized(value, 0, name)
        if name in self.region.outputs:
            if isinstance(value, Constant):
                raise Refused(f"{name!r} is a constant")
            chain = value if isinstance(value, Chain) else self.requantized(lift(value), _exponent(value), name)
            return self.spilled(dataclasses.replace(chain, name=name))
        return value

    def value(self, name: str) -> Value:
        """What an operand is."""
        known = self.values.get(name)
        if known is not None:
            return known
        if name in self.region.constants:
            constant = constant_of(name, self.region)
            assert constant is not None
            return constant
        type_ = self.region.types[name]
        if type_.dtype != "int8":
            raise Refused(f"value {name!r} is {type_.dtype}, not quantized, and VTA computes on int8")
        return Source(feature_map(name, type_.shape), type_.shape)

    def shape(self, op: Op) -> tuple[int, ...]:
        """Shape of an operator's result."""
        return self.region.types[op.outputs[0]].shape

    def source(self, op: Op, index: int = 0) -> Source:
        """An operand as a map in memory."""
        value = self.value(op.inputs[index])
        if isinstance(value, Sum):
            chain = settled(value)
            if chain is None:
                raise Refused(f"operand {op.inputs[index]!r} of {op.op_type} is not quantized")
            value = chain
        if isinstance(value, Chain):
            value = self.spilled(value)
        if isinstance(value, Constant):
            raise Refused(f"{op.op_type} reads the constant {value.name!r} where VTA reads a computed map")
        return value

    def spilled(self, chain: Chain) -> Source:
        """Integers in the accumulators as a map in memory: a layer of its own ends here."""
        self.made.append(chain)
        return Source(feature_map(chain.name, chain.shape), chain.shape, chain.exponent)

    def grounded(self, value: Sum) -> Sum:
        """The sum without integers in the accumulators: those become a map in memory."""
        if value.head is None:
            return value
        assert not value.clipped and value.factor is None
        return lift(self.spilled(value.head)).plus(dataclasses.replace(value, head=None))

    def requantized(self, value: Sum, exponent: int, name: str) -> Chain:
        """A sum as integers in units of 2**exponent."""
        chain = quantized(value, exponent, name, self.block)
        if chain is not None:
            return chain
        assert value.head is not None
        low, high = value.low, value.high
        apart = self.grounded(dataclasses.replace(value, low=None, high=None))
        again = quantized(dataclasses.replace(apart, low=low, high=high), exponent, name, self.block)
        assert again is not None
        return again

    def open_sum(self, op: Op, index: int) -> Sum:
        """An operand to which something may still be added: without bounds and without a factor."""
        value = self.value(op.inputs[index])
        assert not isinstance(value, Constant)
        found = lift(value)
        if not found.clipped and found.factor is None:
            return found
        chain = settled(found)
        if chain is None:
            raise Refused(f"operand {op.inputs[index]!r} of {op.op_type} is not quantized")
        return lift(chain)

    # Quantization.

    def dequantize(self, op: Op) -> Value:
        scale = scale_of(op, self.region)
        value = self.value(op.inputs[0])
        if isinstance(value, Constant):
            rank = len(value.shape)
            zeros = spread(scale.zero_points, scale.axis, rank)
            whole = value.integers.astype(np.int64) - zeros if zeros.any() else value.integers
            return Constant(value.name, whole, spread(scale.exponents, scale.axis, rank), True)
        if isinstance(value, Sum):
            raise Refused(f"value {op.inputs[0]!r} is dequantized before it is quantized")
        return dataclasses.replace(value, exponent=_single(scale.exponents, scale.zero_points, op.inputs[0]))

    def quantize(self, op: Op) -> Value:
        dtype = self.region.types[op.outputs[0]].dtype
        if dtype != "int8":
            raise Refused(f"value {op.outputs[0]!r} is {dtype}, and VTA computes on int8: use scheme int8-pow2")
        scale = scale_of(op, self.region)
        exponent = _single(scale.exponents, scale.zero_points, op.outputs[0])
        value = self.value(op.inputs[0])
        if isinstance(value, Constant):
            raise Refused(f"the constant {value.name!r} is quantized when the model runs")
        return self.requantized(lift(value), exponent, op.outputs[0])

    # Products.

    def conv(self, op: Op) -> Value:
        term = convolution(op, self.source(op), self.weights(op))
        return self.with_bias(Sum(self.shape(op), None, (term,)), op.input(2))

    def gemm(self, op: Op) -> Value:
        if op.attributes.get("transA", 0):
            raise Refused("Gemm reads its left operand transposed, and VTA's channels are the columns of a matrix")
        if op.attributes.get("alpha", 1.0) != 1.0 or (op.input(2) and op.attributes.get("beta", 1.0) != 1.0):
            raise Refused("Gemm has an alpha or beta other than 1")
        term = matrix_product(self.source(op), self.weights(op), bool(op.attributes.get("transB", 0)))
        return self.with_bias(Sum(self.shape(op), None, (term,)), op.input(2))

    def matmul(self, op: Op) -> Value:
        weights = self.weights(op)
        x = self.source(op)
        if len(x.shape) != 2 or len(weights.shape) != 2:
            raise Refused(f"MatMul of shapes {list(x.shape)} and {list(weights.shape)}: VTA takes matrices of two axes")
        return Sum(self.shape(op), None, (matrix_product(x, weights, False),))

    def weights(self, op: Op) -> Constant:
        """The second operand, which has to be constant."""
        value = self.value(op.inputs[1])
        if not isinstance(value, Constant):
            raise Refused(f"weights {op.inputs[1]!r} of {op.op_type} are not constant")
        return value

    def with_bias(self, value: Sum, name: str) -> Sum:
        if not name:
            return value
        bias = self.value(name)
        if not isinstance(bias, Constant):
            raise Refused(f"bias {name!r} is not constant")
        rank = 2 if len(value.shape) == 2 else 1
        return value.plus_constant(bias.channels(rank, value.channels))

    # Elementwise.

    def add(self, op: Op) -> Value:
        return self.total(op, subtract=False)

    def subtract(self, op: Op) -> Value:
        return self.total(op, subtract=True)

    def total(self, op: Op, subtract: bool) -> Value:
        """a + b or a - b, where one may be a number a channel."""
        given = [self.value(name) for name in op.inputs]
        if all(isinstance(value, Constant) for value in given):
            raise Refused(f"{op.op_type} of two constants")
        shape = self.shape(op)
        for place, value in enumerate(given):
            if isinstance(value, Constant):
                numbers = value.channels(len(shape), shape[1])
                other = given[1 - place]
                assert not isinstance(other, Constant)
                kept = lift(other)
                self.same_shape(op, other)
                if kept.clipped:
                    kept = self.open_sum(op, 1 - place)
                if not subtract:
                    return kept.plus_constant(numbers)
                minus = Reals(np.full(shape[1], -1, object), 0)
                if place == 1:
                    return kept.plus_constant(numbers.times(minus))
                return self.grounded(kept).times(minus).plus_constant(numbers)
        sums = [self.open_sum(op, i) for i in range(2)]
        for value in sums:
            self.same_shape(op, value)
        if subtract:
            sums[1] = self.grounded(sums[1]).times(Reals(np.full(shape[1], -1, object), 0))
        if sums[0].head is not None and sums[1].head is not None:
            sums[1] = self.grounded(sums[1])
        return sums[0].plus(sums[1])

    def same_shape(self, op: Op, value: Value) -> None:
        if value.shape != self.shape(op):
            shapes = f"{list(value.shape)} to {list(self.shape(op))}"
            raise Refused(f"{op.op_type} repeats a computed value ({shapes}); VTA repeats only constants")

    def multiply(self, op: Op) -> Value:
        given = [self.value(name) for name in op.inputs]
        constants = [value for value in given if isinstance(value, Constant)]
        if len(constants) != 1:
            raise Refused("Mul of two computed values: VTA multiplies only by constants")
        place = 1 if given[1] is constants[0] else 0
        kept = self.open_sum(op, 1 - place)
        self.same_shape(op, kept)
        numbers = constants[0].channels(len(self.shape(op)), kept.channels)
        return self.grounded(kept).times(numbers)

    def relu(self, op: Op) -> Value:
        return self.bounded(op, Fraction(0), None)

    def clip(self, op: Op) -> Value:
        bounds: list[Fraction | None] = []
        for index in (1, 2):
            array = self.region.constant(op.input(index)) if op.input(index) else None
            if op.input(index) and (array is None or array.size != 1):
                raise Refused("Clip has a bound that is not one constant number")
            number = None if array is None else float(array.reshape(-1)[0])
            bounds.append(None if number is None or not np.isfinite(number) else Fraction(number))
        return self.bounded(op, *bounds)

    def extreme(self, op: Op) -> Value:
        """Max or Min of a value and a constant number."""
        given = [self.value(name) for name in op.inputs]
        places = [place for place, value in enumerate(given) if isinstance(value, Constant)]
        if len(given) != 2 or len(places) != 1:
            raise Refused(f"{op.op_type} of computed values: VTA's layers bound by constants")
        bound, kept = given[places[0]], given[1 - places[0]]
        assert isinstance(bound, Constant) and not isinstance(kept, Constant)
        self.same_shape(op, kept)
        if bound.integers.size != 1:
            raise Refused(f"{op.op_type} has a bound for each channel; VTA takes one for all")
        number = Fraction(int(bound.integers.reshape(()))) * Fraction(2) ** int(bound.exponents.reshape(()))
        return lift(kept).clip(*((number, None) if op.op_type == "Max" else (None, number)))

    def bounded(self, op: Op, low: Fraction | None, high: Fraction | None) -> Value:
        value = self.value(op.inputs[0])
        if isinstance(value, Constant):
            raise Refused(f"{op.op_type} of the constant {value.name!r}")
        return lift(value).clip(low, high)

    # Pooling and moves.

    def max_pool(self, op: Op) -> Value:
        x = self.source(op)
        start = Init(np.asarray(-128, np.int64))
        return Chain(op.outputs[0], self.shape(op), (start, maximum(op, x)), {x.map.name: x.map}, x.exponent)

    def average_pool(self, op: Op) -> Value:
        if op.op_type == "ReduceMean" and not is_spatial_mean(op, self.region):
            raise Refused("ReduceMean is not over the height and width of a map")
        x = self.source(op)
        shape = self.shape(op)
        if len(shape) == 2 and x.map.batch > 1:
            raise Refused("a mean without the averaged axes has the batch as rows, which lies differently on VTA")
        term, count = average(op, x, shape if len(shape) > 2 else (*shape, 1, 1))
        numbers = Reals(np.ones(x.map.channels, object), 0)
        power = (count & -count).bit_length() - 1
        if count == 1 << power:
            return Sum(shape, None, (dataclasses.replace(term, exponents=term.exponents - power),))
        return Sum(shape, None, (term,), None, Factor(numbers, count))

    def concat(self, op: Op) -> Value:
        return concatenated(op, [self.source(op, i) for i in range(len(op.inputs))], self.shape(op))

    def flatten(self, op: Op) -> Value:
        return flattened(op, self.source(op), self.shape(op))

    def move(self, op: Op) -> Value | list[Value]:
        found = moved(op, self.source(op), self.region)
        return list(found)


def _exponent(value: Source | Sum) -> int:
    return value.exponent if isinstance(value, Source) else 0


def _single(exponents: np.ndarray, zero_points: np.ndarray, name: str) -> int:
    """The one exponent of an activation."""
    if zero_points.any():
        raise Refused(f"value {name!r} has a zero point other than 0: quantize with scheme int8-pow2")
    if (exponents != exponents[0]).any():
        raise Refused(f"value {name!r} has a scale for each channel; VTA takes one for all")
    return int(exponents[0])


_CURVES = frozenset(
    """Celu Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu LogSoftmax Mish PRelu Selu Sigmoid Softmax Softplus
    Softsign Swish Tanh ThresholdedRelu""".split()
)


_ON_INTEGERS = frozenset("Clip Concat Flatten Max MaxPool Min Pad QuantizeLinear Relu Reshape Slice Split".split())
"""Operators that mean the same on integers as on the real numbers that those stand for."""


def _unknown(op: Op) -> str:
    if op.op_type in _CURVES and not op.domain:
        return f"activation {op.op_type} has no power-of-two integer form on VTA"
    if op.op_type in VIEWS and not op.domain:
        return elsewhere(op)
    name = op.op_type if not op.domain else f"{op.domain}::{op.op_type}"
    return f"operator {name} has no form of products, maxima and shifts on VTA"


_HANDLERS: Mapping[str, Callable[[_Walk, Op], Value | list[Value]]] = {
    "Add": _Walk.add,
    "AveragePool": _Walk.average_pool,
    "Clip": _Walk.clip,
    "Concat": _Walk.concat,
    "Conv": _Walk.conv,
    "DequantizeLinear": _Walk.dequantize,
    "Flatten": _Walk.flatten,
    "Gemm": _Walk.gemm,
    "GlobalAveragePool": _Walk.average_pool,
    "GlobalMaxPool": _Walk.max_pool,
    "MatMul": _Walk.matmul,
    "Max": _Walk.extreme,
    "MaxPool": _Walk.max_pool,
    "Min": _Walk.extreme,
    "Mul": _Walk.multiply,
    "Pad": _Walk.move,
    "QuantizeLinear": _Walk.quantize,
    "ReduceMean": _Walk.average_pool,
    "Relu": _Walk.relu,
    "Reshape": _Walk.flatten,
    "Slice": _Walk.move,
    "Split": _Walk.move,
    "Sub": _Walk.subtract,
}

OPERATORS = frozenset(_HANDLERS)
"""Operators that a layer may hold."""
