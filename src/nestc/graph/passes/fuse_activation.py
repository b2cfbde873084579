"""Find activation functions that an exporter wrote as several elementwise operators, and call them by their name.

A candidate is recognised by what it computes, not by how it is written: the few operators between a value x and a
result y, with scalar constants only, are evaluated on sample points and compared with each known function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from nestc.graph.kinds import is_constant
from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import AttributeInput, Rewrite, scalar

Vector: TypeAlias = np.ndarray
_MAX_NODES = 12
_SAMPLES = np.concatenate([np.linspace(-15, 15, 2999), [-1e4, -300.0, -88.0, -40.0, 40.0, 88.0, 300.0, 1e4]])
_TOLERANCE = 3e-6  # constants such as 1.4142135 come rounded to float32, which moves results by up to 1e-6
_ERF: Callable[[Vector], Vector] = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Vector) -> Vector:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _softplus(x: Vector) -> Vector:
    return np.logaddexp(0.0, x)


def _power(x: Vector, exponent: Vector) -> Vector:
    return np.power(x, exponent)


_EVALUATE: dict[str, Callable[..., Vector]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": _power,
    "Neg": np.negative,
    "Reciprocal": lambda x: 1.0 / x,
    "Exp": np.exp,
    "Log": np.log,
    "Erf": _ERF,
    "Tanh": np.tanh,
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Relu": lambda x: np.maximum(x, 0.0),
    "Min": np.minimum,
    "Max": np.maximum,
    "Sqrt": np.sqrt,
    "Identity": lambda x: x,
}
_LAST = frozenset({"Mul", "Div", "Clip", "Min", "Max", "Reciprocal", "Add", "Relu", "Log"})


@dataclass(frozen=True)
class _Known:
    """A function of ONNX with fixed attributes."""

    op_type: str
    value: Vector
    attributes: dict[str, AttributeInput] = field(default_factory=dict)


def _known_functions() -> list[_Known]:
    x = _SAMPLES
    gelu_tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return [
        _Known("HardSwish", x * np.clip(x / 6 + 0.5, 0, 1)),
        _Known("HardSigmoid", np.clip(x / 6 + 0.5, 0, 1), {"alpha": 1 / 6, "beta": 0.5}),
        _Known("HardSigmoid", np.clip(x * 0.2 + 0.5, 0, 1), {"alpha": 0.2, "beta": 0.5}),
        _Known("Gelu", 0.5 * x * (1 + _ERF(x / math.sqrt(2)))),
        _Known("Gelu", gelu_tanh, {"approximate": "tanh"}),
        _Known("Swish", x * _sigmoid(x)),
        _Known("Swish", x * _sigmoid(1.702 * x), {"alpha": 1.702}),
        _Known("Mish", x * np.tanh(_softplus(x))),
        _Known("Sigmoid", _sigmoid(x)),
        _Known("Softplus", _softplus(x)),
    ]


class FuseActivation(Rewrite):
    """Gelu (both forms), HardSwish, HardSigmoid, Swish, Mish, Softplus, Sigmoid, Clip out of their parts."""

    what = "activation functions recognised"

    def __init__(self, notes: list[str] | None = None) -> None:
        super().__init__(notes)
        with np.errstate(all="ignore"):
            self.known = _known_functions()

    def rewrite(self, node: ir.Node) -> bool:
        result = node.outputs[0]
        floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
        if node.op_type not in _LAST or len(node.outputs) != 1 or result.dtype not in floats:
            return False
        for x, cone in reversed(_cuts(node)):
            value = _evaluate(cone, x, result)
            found = None if value is None else self.match(value)
            if found is not None and len(cone) > 1:
                return self.put(node, x, found)
            bounds = None if value is None else _clamp(value)
            if bounds is not None and (len(cone) > 1 or node.op_type in {"Min", "Max"}):
                return self.put_clip(node, x, *bounds)
        return False

    def match(self, value: Vector) -> _Known | None:
        for known in self.known:
            # Swish is young: ONNX Runtime knows it in set 24 and not in a later one that a model may have kept.
            if _close(value, known.value) and (known.op_type != "Swish" or self.graph.opset_imports.get("") == 24):
                return known
        return None

    def put(self, node: ir.Node, x: ir.Value, known: _Known) -> bool:
        made = self.insert(node, known.op_type, [x], known.attributes, like=node.outputs[0])
        self.replace(node.outputs[0], made)
        return True

    def put_clip(self, node: ir.Node, x: ir.Value, low: float, high: float) -> bool:
        result = node.outputs[0]
        if result.dtype is None:
            return False
        if low == 0.0 and high == math.inf:
            self.replace(result, self.insert(node, "Relu", [x], like=result))
            return True
        element = result.dtype.numpy()
        inputs: list[ir.Value | None] = [x]
        for bound, label in ((low, "min"), (high, "max")):
            finite = math.isfinite(bound)
            array = np.array(bound if finite else 0.0, element)
            inputs.append(self.constant(array, f"{result.name}.{label}", result.dtype) if finite else None)
        while inputs[-1] is None:
            inputs.pop()
        self.replace(result, self.insert(node, "Clip", inputs, like=result))
        return True


def _cuts(last: ir.Node) -> list[tuple[ir.Value, list[ir.Node]]]:
    """Every (x, nodes) such that the nodes, in order of execution, compute `last`'s result from x and scalars alone."""
    cone = [last]
    found: list[tuple[ir.Value, list[ir.Node]]] = []
    while len(cone) <= _MAX_NODES:
        inside = set(cone)
        if any(node.op_type not in _EVALUATE and node.op_type not in {"Clip", "HardSigmoid"} for node in cone):
            return found
        made = {value for node in cone for value in node.outputs}
        open_ = {value for node in cone for value in node.inputs if value is not None and value not in made}
        frontier = {value for value in open_ if not is_constant(value)}
        if any(scalar(value) is None for value in open_ - frontier):
            return found
        if len(frontier) == 1 and static_shape(next(iter(frontier))) == static_shape(last.outputs[0]):
            found.append((next(iter(frontier)), cone[::-1]))
        # The next node to take in is one whose every user is inside already, so that it need not be computed twice.
        ready = [
            source
            for value in frontier
            if (source := value.producer()) is not None
            and source.domain == ""
            and source.graph is last.graph
            and len(source.outputs) == 1
            and not value.is_graph_output()
            and all(user in inside for user, _ in value.uses())
        ]
        if not ready:
            return found
        cone.append(min(ready, key=lambda node: node.outputs[0].name or ""))
    return found


def _evaluate(cone: list[ir.Node], x: ir.Value, result: ir.Value) -> Vector | None:
    """The result of the nodes for `x` = the sample points, in float64; None if an operator is not a known one."""
    values: dict[ir.Value, Vector] = {x: _SAMPLES}
    pending = list(cone)
    with np.errstate(all="ignore"):
        while pending:
            node = next((item for item in pending if all(_ready(value, values) for value in item.inputs)), None)
            if node is None:
                return None
            pending.remove(node)
            operands = [None if value is None else values.get(value, _constant(value)) for value in node.inputs]
            if node.op_type == "Clip":
                low = operands[1] if len(operands) > 1 and operands[1] is not None else -np.inf
                high = operands[2] if len(operands) > 2 and operands[2] is not None else np.inf
                outcome = np.clip(operands[0], low, high)  # pyright: ignore[reportArgumentType, reportCallIssue]
            elif node.op_type == "HardSigmoid":
                alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
                outcome = np.clip(operands[0] * alpha + beta, 0, 1)  # pyright: ignore[reportOptionalOperand]
            elif len(operands) > 2 or any(item is None for item in operands):
                return None
            else:
                outcome = _EVALUATE[node.op_type](*operands)
            values[node.outputs[0]] = np.broadcast_to(outcome, _SAMPLES.shape)
    return values.get(result)


def _ready(value: ir.Value | None, values: dict[ir.Value, Vector]) -> bool:
    return value is None or value in values or is_constant(value)


def _constant(value: ir.Value) -> Vector | None:
    number = scalar(value)
    return None if number is None else np.float64(number)  # pyright: ignore[reportReturnType]


def _close(value: Vector, wanted: Vector) -> bool:
    """Equal to float32's precision at every sample; where the parts overflow to NaN or infinity nothing is compared."""
    finite = np.isfinite(value)
    if finite[:-8].sum() < len(_SAMPLES) - 8:
        return False
    return bool(np.all(np.abs(value - wanted)[finite] <= _TOLERANCE * (1.0 + np.abs(wanted[finite]))))


def _clamp(value: Vector) -> tuple[float, float] | None:
    """The bounds if the function is x limited to bounds within the samples."""
    if not np.all(np.isfinite(value)):
        return None
    low = -math.inf if value[-8] == -1e4 else float(value[-8])
    high = math.inf if value[-1] == 1e4 else float(value[-1])
    bounded = low < high and (math.isfinite(low) or math.isfinite(high))
    return (low, high) if bounded and np.array_equal(value, np.clip(_SAMPLES, low, high)) else None
