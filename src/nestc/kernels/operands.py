"""How a kernel under construction reads and writes the values of its region, whatever their layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy

import numpy as np

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import PLAIN, Launch, Layout, physical_shape
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, constant, within
from nestc.tensor.ir import Buffer, Const, Expr, Load, Stmt, Store
from nestc.tensor.rewrite import select

Index = tuple[Expr, ...]


class Operands:
    """Parameters of one kernel, declared in the order of their first use.

    A name is a value of the region, or one that the lowering made (`define`: temporaries and packed constants).
    Trailing and leading axes of extent 1 do not matter to callers: they index logically, always in ONNX's axes.
    """

    def __init__(self, builder: Builder, region: Region, layouts: Mapping[str, Layout]) -> None:
        self.builder = builder
        self.region = region
        self.layouts = layouts
        self.args: list[str] = []
        self._buffers: dict[str, Buffer] = {}
        self._types: dict[str, TensorType] = dict(region.types)
        self._places: dict[str, Callable[[Index], Index]] = {}
        self.constants: dict[str, np.ndarray] = {}

    def part(self, region: Region) -> Operands:
        """The same parameters, for the operators of a part of the region."""
        other = copy(self)
        other.region = region
        return other

    def hold(self, name: str, buffer: Buffer, place: Callable[[Index], Index]) -> None:
        """Keep a value, or what an item needs of it, in memory of the kernel: `place` maps a logical index to one of
        `buffer`, blocked like the value."""
        self._buffers[name] = buffer
        self._places[name] = place

    def define(self, name: str, type_: TensorType) -> None:
        """Announce a value that is not in the region: a temporary, or a packed constant."""
        self._types[name] = type_

    def type(self, name: str) -> TensorType:
        """Logical type of a value."""
        return self._types[name]

    def layout(self, name: str) -> Layout:
        """Layout of a value; constants and what the lowering defined lie plain."""
        return self.layouts.get(name, PLAIN)

    def buffer(self, name: str) -> Buffer:
        """The parameter for `name`, with its physical shape; constants of the region are passed as they are."""
        known = self._buffers.get(name)
        if known is not None:
            return known
        type_ = self._types[name]
        # Numbered, not named after the value: equal kernels of different layers must have equal texts.
        buffer = self.builder.param(f"p{len(self.args)}", type_.dtype, physical_shape(type_, self.layout(name)))
        self._buffers[name] = buffer
        self.args.append(name)
        if name in self.region.constants:
            array = self.region.constant(name)
            assert array is not None
            self.constants[name] = array
        return buffer

    def view(self, name: str, shape: Sequence[int]) -> Buffer:
        """Another parameter for `name`: the same elements in order under another shape, to be read in long runs."""
        buffer = self.builder.param(f"p{len(self.args)}", self._types[name].dtype, shape)
        self.args.append(name)
        return buffer

    def place(self, name: str, index: Index) -> Index:
        """Physical index of a logical one."""
        if name in self._places:
            return self._places[name](index)
        block = self.layout(name).block
        if block == 0:
            return index
        n, channel, *spatial = index
        return (n, ix.floordiv(channel, block), *spatial, ix.mod(channel, block))

    def load(self, name: str, index: Index, mask: Expr | None = None) -> Expr:
        """Read a value at a logical index (scalar; vectorise the statement afterwards)."""
        scalar = self._scalar(name)
        if scalar is not None:
            return scalar
        mask = None if isinstance(mask, Const) and mask.value else mask
        return Load(self.buffer(name), self.place(name, index), 1, mask)

    def broadcast(self, name: str, index: Index, mask: Expr | None = None) -> Expr:
        """Read a value that is broadcast (numpy rules) to the shape that `index` runs over."""
        shape = self._types[name].shape
        own = index[len(index) - len(shape) :] if shape else ()
        return self.load(name, tuple(ix.const(0) if n == 1 else i for n, i in zip(shape, own)), mask)

    def _scalar(self, name: str) -> Expr | None:
        """Constants of one element become literals."""
        type_ = self._types[name]
        if name not in self.region.constants or any(n != 1 for n in type_.shape):
            return None
        if type_.dtype not in ("float32", "float64", "bool") and not type_.dtype.lstrip("u").startswith("int"):
            return None
        array = self.region.constant(name)
        assert array is not None
        return constant(np.asarray(array).reshape(-1)[0].item(), type_.dtype)

    def stores(self, name: str, index: Index, value: Expr, mask: Expr | None = None) -> tuple[Stmt, ...]:
        """Write a value at a logical index that may run past the shape: nothing is written outside, except that the
        channel padding of a blocked layout receives zeros."""
        type_, block = self._types[name], self.layout(name).block
        buffer = self.buffer(name)
        for d, (i, extent) in enumerate(zip(index, type_.shape)):
            inside = within(i, extent)
            if isinstance(inside, Const) and inside.value:
                continue
            if block and d == 1:
                value = select(inside, value, constant(0, value.dtype))
                inside = within(i, physical_shape(type_, self.layout(name))[1] * block)
            mask = inside if mask is None else binary("and", mask, inside)
        if isinstance(mask, Const):
            if not mask.value:
                return ()
            mask = None
        return (Store(buffer, self.place(name, index), value, mask),)

    def launch(self, origin: Sequence[str] | None = None) -> Launch:
        """The finished kernel with its arguments."""
        return Launch(self.builder.finish(self.region.origin if origin is None else origin), tuple(self.args))
