"""What a region is to AiM: a constant matrix times a few vectors, a bias, an activation, and what follows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from nestc.errors import UnsupportedOp
from nestc.graph.region import Op, Region
from nestc.kernels.conv_shape import ConvShape, conv_shape
from nestc.kernels.quantized import anchor_place
from nestc.runtime.aim.host import FLOATS, OPERATORS, HostOp

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

ANCHORS = frozenset({"Gemm", "MatMul", "Conv"})

MOST_VECTORS = 16
"""With more vectors the matrix would be read from the banks again and again, where a CPU or GPU reads it once."""

NUMBERS: Mapping[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

ACTIVATIONS = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Gelu": "gelu"}
"""Operators that the banks compute, by the names of `runtime.aim.activation`."""

_ATTRIBUTES = {"approximate", "alpha"}


class Refused(UnsupportedOp):
    """AiM does not take a region; the message says why."""


@dataclass(frozen=True, eq=False)
class Product:
    """``activation(weights @ vector + bias)`` for some vectors, and operators on the results, which the host computes.

    ``rows`` vectors of ``k`` numbers are taken from the flat value ``source``: all of it in order, or where ``take``
    (int64 (rows, k)) says, -1 being a zero. Results are (rows, m); the flat value ``result`` has element ``order[i]``
    of them at place i (None: in order). ``weights()`` is (m, k) in the format ``number``; ``bias`` float32 (m,).
    ``host`` follows, in order; ``constants`` are those that its operators read.
    """

    name: str
    anchor: Op
    source: str
    number: str
    rows: int
    m: int
    k: int
    take: Array | None
    order: Array | None
    weights: Callable[[], Array]
    bias: Array | None
    activation: str | None
    result: str
    result_shape: tuple[int, ...]
    host: tuple[HostOp, ...]
    constants: Mapping[str, Array]


def read(region: Region, rounded: str | None = None) -> Product:
    """The region as products of a matrix with vectors. Raises Refused with the reason; looks at no weights but those
    of convolutions, which have to be numbers of 16 bits. With ``rounded``, a format, float32 is rounded to that."""
    if region.anchor not in ANCHORS:
        raise Refused("AiM multiplies constant matrices with vectors, and this region has no such product")
    place = anchor_place(region)
    assert place is not None
    anchor = region.ops[place]
    where = f"{anchor.op_type} (node {anchor.name!r})"
    widened = _prologue(region, place, where)
    kind = _Convolution if anchor.op_type == "Conv" else _MatrixProduct
    return kind(region, place, where, widened, rounded).read()


def _prologue(region: Region, place: int, where: str) -> dict[str, str]:
    """Values before they were widened, by those that the anchor reads."""
    found: dict[str, str] = {}
    for op in region.ops[:place]:
        if op.op_type != "Cast" or region.types[op.inputs[0]].dtype not in NUMBERS:
            raise Refused(
                f"the operands of {where} are integers or go through {op.op_type}, and AiM multiplies floats of 16 "
                "bits; quantize the model with scheme bf16"
            )
        found[op.outputs[0]] = op.inputs[0]
    return found


def format_of(dtype: str, where: str, rounded: str | None) -> str:
    """The 16-bit format of an operand of this element type. Raises Refused if there is none."""
    if dtype == "float32" and rounded is not None:
        return rounded
    if dtype not in NUMBERS:
        raise Refused(
            f"{where} multiplies {dtype} and AiM multiplies bfloat16 or float16: quantize the model with scheme bf16"
            + (" (or have operands rounded with aim:round=true)" if dtype == "float32" else "")
        )
    return dtype


def host_operator(op: Op, region: Region, where: str) -> HostOp:
    """An elementwise operator of a region for the processor beside the memory. Raises Refused for types that it does
    not have; `where` it stands is for the message."""
    type_ = region.types[op.outputs[0]]
    shapeless = {"Reshape", "Squeeze", "Unsqueeze"}
    inputs = op.inputs[:1] if op.op_type in shapeless else op.inputs
    for dtype in (region.types[name].dtype for name in (*inputs, op.outputs[0]) if name):
        if dtype not in FLOATS:
            raise Refused(f"{op.op_type} (node {op.name!r}) {where} is on {dtype}")
    attributes: dict[str, float | str] = {}
    for key in _ATTRIBUTES & set(op.attributes):
        value = op.attributes[key]
        if isinstance(value, bytes):
            attributes[key] = value.decode()
        elif isinstance(value, int | float | str):
            attributes[key] = value
    return HostOp(op.op_type, inputs, op.outputs[0], type_.dtype, type_.shape, attributes)


class _Reader:
    """What products and convolutions have in common."""

    def __init__(self, region: Region, place: int, where: str, widened: Mapping[str, str], rounded: str | None) -> None:
        self.region, self.where, self.widened, self.rounded = region, where, widened, rounded
        self.anchor, self.tail = region.ops[place], region.ops[place + 1 :]
        self.result = self.anchor.outputs[0]
        self.shape = region.types[self.result].shape

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self.region.types[name].shape

    def constant(self, name: str) -> Array | None:
        """A constant operand of the anchor or of its tail, as float32 where it is a float."""
        array = self.region.constant(self.widened.get(name, name))
        return array if array is None or array.dtype.kind in "iub" else array.astype(np.float32)

    def number(self, name: str) -> str:
        """The format in which an operand comes. Raises Refused if it has not 16 bits."""
        return format_of(self.region.types[self.widened.get(name, name)].dtype, self.where, self.rounded)

    def require_few(self, rows: int) -> None:
        if rows > MOST_VECTORS:
            raise Refused(
                f"{self.where} multiplies its matrix with {rows} vectors; AiM reads the matrix again for each, so that "
                f"it takes no more than {MOST_VECTORS}"
            )

    def require_sizes(self, *sizes: int) -> None:
        if 0 in sizes:
            raise Refused(f"{self.where} has an axis of size 0")

    def bias_of(self, array: Array, order: Array | None, rows: int, m: int) -> Array | None:
        """`array` as one number for each output, if it is the same for all vectors; else None."""
        try:
            flat = np.broadcast_to(array, self.shape).reshape(-1)
        except ValueError:
            return None
        results = np.empty(rows * m, np.float32)
        results[slice(None) if order is None else order] = flat
        table = results.reshape(rows, m)
        return np.ascontiguousarray(table[0]) if bool((table == table[0]).all()) else None

    def finish(
        self,
        made: Product,
        scale: float = 1.0,
        addend: str = "",
        addend_scale: float = 1.0,
    ) -> Product:
        """`made` with bias and activation as far as the anchor and its tail have them, and the rest for the host.

        The anchor's result is ``scale * product + addend_scale * addend``.
        """
        todo = list(self.tail)
        bias: Array | None = None
        constants: dict[str, Array] = {}
        host: list[HostOp] = []
        raw = self.result
        rest_of_anchor = scale != 1
        if addend and not rest_of_anchor:
            array = self.constant(addend)
            found = None if array is None else self.bias_of(array, made.order, made.rows, made.m)
            if found is not None:
                bias = (found * np.float32(addend_scale)).astype(np.float32)
            else:
                rest_of_anchor = True
        if rest_of_anchor:
            raw = self._anchor_on_host(host, constants, scale, addend, addend_scale)
        shape = self.shape
        if not rest_of_anchor:
            # A bias may also be an Add of its own.
            if bias is None and todo and todo[0].op_type == "Add":
                other = self._other(todo[0], raw)
                array = None if other is None else self.constant(other)
                same = self.shape_of(todo[0].outputs[0]) == self.shape
                found = None if array is None or not same else self.bias_of(array, made.order, made.rows, made.m)
                if found is not None and self._only_use(raw):
                    bias, raw = found, todo.pop(0).outputs[0]
            activation: str | None = None
            if todo and todo[0].op_type in ACTIVATIONS and self._only_use(raw) and self._is_exact(todo[0]):
                activation = ACTIVATIONS[todo[0].op_type]
                raw = todo.pop(0).outputs[0]
            made = replace(made, activation=activation)
        for op in todo:
            host += self._widened_again(op, host)
            host.append(self._on_host(op, constants))
        return replace(made, bias=bias, result=raw, result_shape=shape, host=tuple(host), constants=constants)

    def _is_exact(self, op: Op) -> bool:
        """Whether the banks have this form of an activation: of GELU, that with erf."""
        return op.attributes.get("approximate", "none") in ("none", b"none", None)

    def _only_use(self, name: str) -> bool:
        """Whether a value between operators has one reader and does not leave the region."""
        uses = sum(each == name for op in self.region.ops for each in op.inputs)
        return uses == 1 and name not in self.region.outputs

    def _other(self, op: Op, name: str) -> str | None:
        """The other operand of an Add."""
        left, right = op.inputs[0], op.inputs[1]
        return right if left == name else left if right == name else None

    def _anchor_on_host(
        self, host: list[HostOp], constants: dict[str, Array], scale: float, addend: str, addend_scale: float
    ) -> str:
        """What a Gemm does besides multiplying, as operators of the host; the name of the bare product."""
        raw = current = f"{self.result}/product"
        for name, factor, label in ((raw, scale, "scaled"), (addend, addend_scale, "addend")):
            if not name or factor == 1:
                continue
            key = f"{self.result}/{label}/factor"
            constants[key] = np.array(factor, np.float32)
            output = f"{self.result}/{label}"
            shape = self.shape if name == raw else self.shape_of(name)
            if self.region.constants.get(name) is not None:
                array = self.constant(name)
                assert array is not None
                constants[name] = array
            host.append(HostOp("Mul", (name, key), output, "float32", shape, {}))
            if name == raw:
                current = output
            else:
                addend = output
        if addend:
            array = self.constant(addend)
            if array is not None:
                constants[addend] = array
            host.append(HostOp("Add", (current, addend), self.result, "float32", self.shape, {}))
        else:
            host.append(HostOp("Identity", (current,), self.result, "float32", self.shape, {}))
        return raw

    def _widened_again(self, op: Op, host: list[HostOp]) -> list[HostOp]:
        """Casts of what the anchor reads, where an operator of the tail reads it as well."""
        done = {each.output for each in host}
        names = [name for name in dict.fromkeys(op.inputs) if name in self.widened and name not in done]
        return [
            HostOp("Cast", (self.widened[name],), name, "float32", self.shape_of(name), {})
            for name in names
            if self.widened[name] not in self.region.constants
        ]

    def _on_host(self, op: Op, constants: dict[str, Array]) -> HostOp:
        """An operator of the tail. Raises Refused if the processor beside the memory is not to run it."""
        if op.op_type not in OPERATORS or op.domain or len(op.outputs) != 1:
            raise Refused(f"{op.op_type} (node {op.name!r}) follows {self.where}, and is not among what AiM computes")
        for name in op.inputs:
            if self.widened.get(name, name) in self.region.constants:
                array = self.constant(name)
                assert array is not None
                constants[name] = array
        return host_operator(op, self.region, f"after {self.where}")


class _MatrixProduct(_Reader):
    """MatMul and Gemm."""

    def read(self) -> Product:
        region, anchor = self.region, self.anchor
        left, right = anchor.inputs[0], anchor.inputs[1]
        fixed = [self.widened.get(name, name) in region.constants for name in (left, right)]
        if fixed == [False, False]:
            raise Refused(f"{self.where} multiplies two values that the model computes; AiM holds constant matrices")
        if fixed == [True, True]:
            raise Refused(f"{self.where} multiplies constants")
        if self.number(left) != self.number(right):
            raise Refused(f"{self.where} multiplies numbers of different formats")
        gemm = anchor.op_type == "Gemm"
        turned = [gemm and bool(anchor.attributes.get(name, 0)) for name in ("transA", "transB")]
        alpha, beta = (_factor(anchor, name) if gemm else 1.0 for name in ("alpha", "beta"))
        made = self._right(turned) if fixed[1] else self._left(turned)
        addend = anchor.input(2) if gemm and beta != 0 else ""
        return self.finish(made, alpha, addend, beta)

    def _right(self, turned: list[bool]) -> Product:
        """The matrix is the right operand: rows of the left one are the vectors."""
        x, w = self.anchor.inputs[0], self.anchor.inputs[1]
        shape, matrix = self.shape_of(x), self.shape_of(w)
        if prod(matrix[:-2]) != 1:
            raise Refused(f"{self.where} multiplies with several matrices")
        if len(matrix) < 2:
            raise Refused(f"{self.where} multiplies with one vector, not with a matrix")
        k, m = matrix[-2:]
        if turned[1]:
            k, m = m, k
        rows = prod(shape) // max(k, 1)
        self.require_sizes(m, k, rows)
        self.require_few(rows)
        take = np.arange(rows * k).reshape(k, rows).T if turned[0] and rows > 1 else None

        def weights() -> Array:
            array = self._matrix(w)
            return array if turned[1] else array.T

        return self._made(x, rows, m, k, take, None, weights)

    def _left(self, turned: list[bool]) -> Product:
        """The matrix is the left operand: columns of the right one are the vectors."""
        w, x = self.anchor.inputs[0], self.anchor.inputs[1]
        shape, matrix = self.shape_of(x), self.shape_of(w)
        if len(matrix) != 2:
            raise Refused(f"{self.where} multiplies with several matrices, or with a vector")
        m, k = matrix
        if turned[0]:
            k, m = m, k
        rows = prod(shape) // max(k, 1)
        self.require_sizes(m, k, rows)
        self.require_few(rows)
        if len(shape) == 1 or rows == 1 or turned[1]:
            take = None
        else:
            # (batch, k, columns) to (batch, columns, k).
            take = np.moveaxis(np.arange(prod(shape)).reshape(-1, k, shape[-1]), 1, 2).reshape(rows, k)
        order = None
        if rows > 1:
            columns = shape[0] if turned[1] else shape[-1]
            order = np.moveaxis(np.arange(rows * m).reshape(-1, columns, m), 1, 2).reshape(-1)

        def weights() -> Array:
            array = self._matrix(w)
            return array.T if turned[0] else array

        return self._made(x, rows, m, k, take, order, weights)

    def _matrix(self, name: str) -> Array:
        array = self.region.constant(self.widened.get(name, name))
        assert array is not None
        return array.reshape(array.shape[-2:]).astype(NUMBERS[self.number(name)])

    def _made(
        self, x: str, rows: int, m: int, k: int, take: Array | None, order: Array | None, weights: Callable[[], Array]
    ) -> Product:
        source = self.widened.get(x, x)
        return Product(
            self.region.name, self.anchor, source, self.number(x), rows, m, k, take, order,
            weights, None, None, self.result, self.shape, (), {},
        )  # fmt: skip


class _Convolution(_Reader):
    """Conv with so few output positions that it is a matrix times a few vectors."""

    def read(self) -> Product:
        x, w = self.anchor.inputs[0], self.anchor.inputs[1]
        image, kernel, out = self.shape_of(x), self.shape_of(w), self.shape
        array = self.constant(w)
        if array is None:
            raise Refused(f"{self.where} has weights that the model computes; AiM holds constant matrices")
        if self.anchor.attributes.get("group", 1) != 1:
            raise Refused(f"{self.where} has groups, for which a matrix would be mostly zeros")
        rows, k, m = out[0] * prod(out[2:]), prod(kernel[1:]), kernel[0]
        self.require_sizes(rows, k, m)
        number = self.number(x)
        self.require_few(rows)
        narrow = array.astype(NUMBERS[number])
        if self.rounded is None and not np.array_equal(narrow.astype(np.float32), array):
            raise Refused(
                f"the weights of {self.where} are no numbers of {number}; quantize the model with scheme bf16"
            )
        take = _patches(conv_shape(self.anchor, self.region))
        identity = take.size == prod(image) and bool((take.reshape(-1) == np.arange(take.size)).all())
        places = rows // out[0]
        order = None
        if places > 1:
            order = np.moveaxis(np.arange(rows * m).reshape(out[0], places, m), 1, 2).reshape(-1)
        source = self.widened.get(x, x)
        made = Product(
            self.region.name, self.anchor, source, number, rows, m, k,
            None if identity else take, order, lambda: narrow.reshape(m, k), None, None, self.result, self.shape,
            (), {},
        )  # fmt: skip
        return self._with_bias(made)

    def _with_bias(self, made: Product) -> Product:
        """A Conv's bias is one number a channel, which stands along axis 1 of the result."""
        name = self.anchor.input(2)
        if not name:
            return self.finish(made)
        array = self.constant(name)
        if array is None:
            raise Refused(f"the bias of {self.where} is no constant")
        finished = self.finish(made)
        if finished.bias is not None:
            return replace(finished, bias=(finished.bias + array).astype(np.float32))
        return replace(finished, bias=array.astype(np.float32))


def _patches(shape: ConvShape) -> Array:
    """Places in the flat image (or -1) that each output position multiplies: (positions, channels x taps)."""
    image = (shape.batch, shape.in_channels, *shape.size)
    found = np.arange(prod(image)).reshape(image)
    for axis, size in enumerate(shape.size):
        at = np.arange(shape.out[axis])[:, None] * shape.strides[axis] - shape.pads_begin[axis]
        at = at + np.arange(shape.kernel[axis]) * shape.dilations[axis]  # (positions, taps)
        place = 2 + 2 * axis  # each axis before became two
        found = np.take(found, np.clip(at, 0, size - 1), place)
        outside = ((at < 0) | (at >= size)).reshape(*at.shape, *(1,) * (found.ndim - place - 2))
        found = np.where(outside, -1, found)
    positions = tuple(range(2, found.ndim, 2))
    taps = tuple(range(3, found.ndim, 2))
    ordered = found.transpose(0, *positions, 1, *taps)
    return np.ascontiguousarray(ordered).reshape(shape.batch * prod(shape.out), -1)


def _factor(op: Op, name: str) -> float:
    value = op.attributes.get(name, 1.0)
    return float(value) if isinstance(value, int | float) else 1.0
