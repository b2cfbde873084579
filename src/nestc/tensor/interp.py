"""The definition of Tensor IR: a short numpy interpreter, slow and plain, that every kernel is tested against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from nestc.errors import Error
from nestc.tensor.ir import (
    Binary,
    Bitcast,
    Block,
    Broadcast,
    Buffer,
    Call,
    Cast,
    Const,
    Dot,
    Expr,
    Fma,
    For,
    If,
    Kernel,
    Load,
    PairSum,
    Ramp,
    Reduce,
    Repeat,
    Select,
    Shuffle,
    Store,
    Unary,
    Var,
    Window,
)

Array = np.ndarray[Any, np.dtype[Any]]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of an ONNX element type name."""
    return np.dtype(getattr(ml_dtypes, name)) if name == "bfloat16" or name.startswith("float8") else np.dtype(name)


def _erf(x: Array) -> Array:
    from math import erf

    return np.vectorize(erf, otypes=[x.dtype])(x)


_UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.logical_not,
    "bitnot": np.bitwise_not,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "erf": _erf,
    "floor": np.floor,
    "ceil": np.ceil,
    "rint": np.rint,
    "trunc": np.trunc,
    "isnan": np.isnan,
}


def _div(a: Array, b: Array) -> Array:
    if a.dtype.kind not in "iu":
        return a / b
    quotient = np.floor_divide(a, b)
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _div,
    "rem": np.fmod,
    "floordiv": np.floor_divide,
    "mod": np.mod,
    "pow": np.power,
    "min": lambda a, b: np.where(a < b, a, b),
    "max": lambda a, b: np.where(a > b, a, b),
    "atan2": np.arctan2,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_REDUCE = {"add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum}


def evaluate(e: Expr, values: Mapping[str, Array]) -> Array:
    """A scalar expression without loads, for many values of its loop variables at once; the shape is theirs."""
    frame = _Frame({})
    frame.vars.update(values)
    return frame.value(e).reshape(-1)


class _Frame:
    """Values of the loop variables and storage of the buffers while a kernel runs."""

    def __init__(self, storage: dict[str, Array]) -> None:
        self.storage = storage
        self.vars: dict[str, int | Array] = {}

    def value(self, e: Expr) -> Array:
        """The value of `e` as an array of shape (lanes,)."""
        if isinstance(e, Const):
            return np.array([e.value]).astype(numpy_dtype(e.dtype))
        if isinstance(e, Var):
            return np.array([self.vars[e.name]], np.int64)
        if isinstance(e, Load):
            return self.load(e)
        if isinstance(e, Unary):
            return _UNARY[e.op](self.value(e.x))
        if isinstance(e, Binary):
            return _BINARY[e.op](self.value(e.a), self.value(e.b))
        if isinstance(e, Select):
            return np.where(self.value(e.cond), self.value(e.a), self.value(e.b))
        if isinstance(e, Cast):
            return self.value(e.x).astype(numpy_dtype(e.dtype))
        if isinstance(e, Bitcast):
            return self.value(e.x).view(numpy_dtype(e.dtype))
        if isinstance(e, Broadcast):
            return np.repeat(self.value(e.x), e.lanes)
        if isinstance(e, Ramp):
            return self.value(e.base) + np.arange(e.lanes) * e.stride
        if isinstance(e, Fma):
            wide = np.float64 if e.dtype == "float32" else numpy_dtype(e.dtype)
            a, b, c = (self.value(x).astype(wide) for x in (e.a, e.b, e.c))
            return (a * b + c).astype(numpy_dtype(e.dtype))
        if isinstance(e, Shuffle):
            return np.concatenate([self.value(e.a), self.value(e.b)])[list(e.picks)]
        if isinstance(e, Reduce):
            return _REDUCE[e.op].reduce(self.value(e.x), keepdims=True)
        if isinstance(e, Repeat):
            return np.tile(self.value(e.x), e.times)
        if isinstance(e, Dot):
            wide = np.float64 if e.dtype == "float32" else np.int64
            acc, a, b = (self.value(x).astype(wide) for x in (e.acc, e.a, e.b))
            return (acc + (a * b).reshape(-1, e.group).sum(1)).astype(numpy_dtype(e.dtype))
        if isinstance(e, PairSum):
            products = self.value(e.a).astype(np.int64) * self.value(e.b)
            return np.clip(products.reshape(-1, 2).sum(1), -(1 << 15), (1 << 15) - 1).astype(np.int16)
        raise TypeError(f"cannot interpret {type(e).__name__}")

    def places(self, buffer: Buffer, index: tuple[Expr, ...], lanes: int, live: Array) -> Array:
        """Flat positions of the lanes of an access; the live ones are checked against the shape."""
        position = np.zeros(lanes, np.int64)
        for d, (i, extent) in enumerate(zip(index, buffer.shape)):
            part = self.value(i)
            if part.size == 1 and d == len(buffer.shape) - 1 and all(j.lanes == 1 for j in index):
                part = part + np.arange(lanes)
            if np.any(live & ((part < 0) | (part >= extent))):
                raise Error(f"access outside {buffer.name}: index {d} is {part.tolist()}, extent {extent}")
            position = position * extent + part
        return position

    def live(self, mask: Expr | None, lanes: int) -> Array:
        """Which lanes an access touches."""
        return np.broadcast_to(np.array([True]) if mask is None else self.value(mask), (lanes,))

    def load(self, e: Load) -> Array:
        """A contiguous, gathered or masked load."""
        live = self.live(e.mask, e.lanes)
        places = self.places(e.buffer, e.index, e.lanes, live)
        flat = self.storage[e.buffer.name].reshape(-1)
        result = np.zeros(e.lanes, flat.dtype)
        result[live] = flat[places[live]]
        return result

    def run(self, block: Block) -> None:
        """Execute statements in order."""
        for s in block:
            if isinstance(s, For):
                for i in range(s.var.extent):
                    self.vars[s.var.name] = i
                    self.run(s.body)
            elif isinstance(s, Store):
                live = self.live(s.mask, s.value.lanes)
                places = self.places(s.buffer, s.index, s.value.lanes, live)
                self.storage[s.buffer.name].reshape(-1)[places[live]] = self.value(s.value)[live]
            elif isinstance(s, If):
                self.run(s.then if self.value(s.cond)[0] else s.orelse)
            elif isinstance(s, Call):
                self.call(s)

    def call(self, s: Call) -> None:
        """Run an intrinsic's body on views that start at the operands' windows."""
        if not s.intrinsic.body:
            return
        inner = _Frame({p.name: self.window(w, p) for p, w in zip(s.intrinsic.params, s.operands)})
        inner.run(s.intrinsic.body)

    def window(self, w: Window, param: Buffer) -> Array:
        """The elements from the window's place on, in the shape of the intrinsic's parameter."""
        start = int(self.places(w.buffer, w.index, 1, np.array([True]))[0])
        flat = self.storage[w.buffer.name].reshape(-1)
        if start + param.size > flat.size:
            raise Error(f"access outside {w.buffer.name}: {param.size} elements from {start} on, of {flat.size}")
        return flat[start : start + param.size].reshape(param.shape)


def run(kernel: Kernel, arrays: Mapping[str, Array]) -> None:
    """Run `kernel` on `arrays` (parameter name -> C-contiguous array of the parameter's shape), writing in place.

    Raises nestc.Error for an access outside a buffer. Local buffers start as NaN or an odd integer, so that reading
    before writing shows.
    """
    storage = dict(arrays)
    for param in kernel.params:
        array = storage[param.name]
        if array.shape != param.shape or array.dtype != numpy_dtype(param.dtype):
            raise Error(f"{kernel.name}: {param.name} is {array.dtype}{array.shape}, wants {param.dtype}{param.shape}")
    for local in kernel.locals:
        dtype = numpy_dtype(local.dtype)
        storage[local.name] = np.full(local.shape, 85 if dtype.kind in "iub" else np.nan, dtype)
    with np.errstate(all="ignore"):
        _Frame(storage).run(kernel.body)
