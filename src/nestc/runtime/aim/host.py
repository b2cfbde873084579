"""What the processor beside an AiM memory does with results: elementwise operators in float32, on numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from nestc.bundle.dtypes import numpy_dtype
from nestc.errors import TargetError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

FLOATS = ("float32", "float16", "bfloat16")
"""Types that values have here; sums and curves are computed in float32 and then rounded to the type of the result."""

# Gelu with approximate="tanh" (ONNX Gelu-20).
_GELU_SCALE, _GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


@dataclass(frozen=True)
class HostOp:
    """One ONNX operator: inputs and output by name, the output's type and shape, and numbers among its attributes."""

    op: str
    inputs: tuple[str, ...]
    output: str
    dtype: str
    shape: tuple[int, ...]
    attributes: Mapping[str, float | str]

    def to_json(self) -> dict[str, Any]:
        """JSON values, which `from_json` reads back."""
        return {
            "op": self.op,
            "inputs": list(self.inputs),
            "output": self.output,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "attributes": dict(self.attributes),
        }


def from_json(data: Mapping[str, Any]) -> HostOp:
    """The operator that `to_json` wrote. Raises TargetError for one that there is not, KeyError for a missing field."""
    if data["op"] not in {*OPERATORS, *RECURRENT} or data["dtype"] not in FLOATS:
        raise TargetError(f"the processor beside AiM has no operator {data['op']} that gives {data['dtype']}")
    attributes = dict(data["attributes"])
    shape = tuple(int(size) for size in data["shape"])
    return HostOp(data["op"], tuple(data["inputs"]), data["output"], data["dtype"], shape, attributes)


def evaluate(op: HostOp, operands: Sequence[Array | None]) -> Array:
    """The result of `op`, in its type and shape. ``operands`` are aligned with ``op.inputs``, None where absent."""
    given = [None if array is None else array.astype(np.float32) for array in operands]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        return _rule(op.op)(given, op.attributes).astype(numpy_dtype(op.dtype)).reshape(op.shape)


def _rule(op: str) -> _Rule:
    return OPERATORS[op] if op in OPERATORS else RECURRENT[op]


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), computed so that nothing overflows."""
    e = np.exp(-np.abs(x))
    return (np.where(x >= 0, np.float32(1), e) / (1 + e)).astype(np.float32)


def erf(x: Array) -> Array:
    """The error function, rounded from float64."""
    return np.array([math.erf(v) for v in x.reshape(-1).tolist()], np.float32).reshape(x.shape)


_Given: TypeAlias = Sequence["Array | None"]
_Rule: TypeAlias = Callable[[_Given, Mapping[str, "float | str"]], Array]


def _of(given: _Given, index: int = 0) -> Array:
    array = given[index]
    assert array is not None
    return array


def _unary(function: Callable[[Array], Array]) -> _Rule:
    return lambda given, attributes: function(_of(given))


def _binary(function: Callable[[Array, Array], Array]) -> _Rule:
    return lambda given, attributes: function(_of(given), _of(given, 1))


def _gelu(given: _Given, attributes: Mapping[str, float | str]) -> Array:
    x = _of(given)
    if attributes.get("approximate") == "tanh":
        inner = np.float32(_GELU_SCALE) * (x + np.float32(_GELU_CUBE) * x * x * x)
        return np.float32(0.5) * x * (1 + np.tanh(inner))
    return np.float32(0.5) * x * (1 + erf(x * np.float32(math.sqrt(0.5))))


def _clip(given: _Given, attributes: Mapping[str, float | str]) -> Array:
    result = _of(given)
    low = given[1] if len(given) > 1 else None
    high = given[2] if len(given) > 2 else None
    result = result if low is None else np.maximum(result, low)
    return result if high is None else np.minimum(result, high)


def _leaky(given: _Given, attributes: Mapping[str, float | str]) -> Array:
    x = _of(given)
    return np.where(x < 0, x * np.float32(attributes.get("alpha", 0.01)), x)


def _rows(given: _Given, attributes: Mapping[str, float | str], index: int = 0) -> Array:
    """Rows ``first`` to ``first + count`` of an operand."""
    first, count = int(attributes["first"]), int(attributes["count"])
    return _of(given, index)[first : first + count]


def _gates(given: _Given, attributes: Mapping[str, float | str], count: int) -> list[Array]:
    """Sums of a step's gates: from all steps' inputs, and from the state if there is one."""
    sums = _rows(given, attributes)
    return np.split(sums if given[1] is None else sums + given[1], count, axis=-1)


def _lstm_cell(given: _Given, attributes: Mapping[str, float | str]) -> Array:
    """The cell of ONNX's LSTM-22 from inputs of all steps, the state's product and the cell before."""
    enter, _, forget, fresh = _gates(given, attributes, 4)
    cell = sigmoid(enter) * np.tanh(fresh)
    return cell if given[2] is None else cell + sigmoid(forget) * given[2]


def _lstm_hidden(given: _Given, attributes: Mapping[str, float | str]) -> Array:
    """The hidden state of ONNX's LSTM-22; the third operand is the new cell."""
    return sigmoid(_gates(given, attributes, 4)[1]) * np.tanh(_of(given, 2))


def _gru_hidden(given: _Given, attributes: Mapping[str, float | str]) -> Array:
    """The hidden state of ONNX's GRU-22 with linear_before_reset; the third operand is the one before."""
    update, reset, fresh = np.split(_rows(given, attributes), 3, axis=-1)
    updates, resets, state = np.split(_of(given, 1), 3, axis=-1)
    z = sigmoid(update + updates)
    return (1 - z) * np.tanh(fresh + sigmoid(reset + resets) * state) + z * _of(given, 2)


OPERATORS: Mapping[str, _Rule] = {
    "Add": _binary(lambda a, b: a + b),
    "Sub": _binary(lambda a, b: a - b),
    "Mul": _binary(lambda a, b: a * b),
    "Div": _binary(lambda a, b: a / b),
    "Cast": _unary(lambda x: x),
    "Identity": _unary(lambda x: x),
    "Reshape": _unary(lambda x: x),
    "Flatten": _unary(lambda x: x),
    "Squeeze": _unary(lambda x: x),
    "Unsqueeze": _unary(lambda x: x),
    "Relu": _unary(lambda x: np.maximum(x, np.float32(0))),
    "Sigmoid": _unary(sigmoid),
    "Tanh": _unary(np.tanh),
    "Erf": _unary(erf),
    "Exp": _unary(np.exp),
    "Neg": _unary(np.negative),
    "Abs": _unary(np.abs),
    "Sqrt": _unary(np.sqrt),
    "LeakyRelu": _leaky,
    "Gelu": _gelu,
    "Clip": _clip,
}
"""By ONNX's names; views are the same numbers in another shape."""

RECURRENT: Mapping[str, _Rule] = {
    "LstmCell": _lstm_cell,
    "LstmHidden": _lstm_hidden,
    "GruHidden": _gru_hidden,
    "Part": _rows,
    "Stack": lambda given, attributes: np.stack([_of(given, i) for i in range(len(given))]),
}
"""Parts of recurrent nodes, which ONNX has no operators for."""
